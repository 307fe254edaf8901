"""`routed_experts` is a residual layer of two-layer experts of unequal width; each row runs the one it chose."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrl.ops.backend import Path, path
from dynrl.ops.costs import COSTS
from dynrl.ops.move import compute_groups
from dynrl.ops.partition import Partition, partition, partition_ref
from dynrl.ops.routed_linear import column_major, routed_linear, routed_linear_ref


class Expert:
    """An expert alone, for inference only: x + w2 relu(w1 x + b1), which overwrites x.

    Args:
        w1: [width, C].
        b1: [width].
        w2: [C, width].
    """

    def __init__(self, w1: Tensor, b1: Tensor, w2: Tensor) -> None:
        self.first, self.bias, self.second = w1.t(), b1, w2.t()
        self.weight_bytes = 2 * w1.numel() * w1.element_size()

    def __call__(self, x: Tensor) -> Tensor:
        """Run the expert on [n, ..., C], overwrite it and return it."""
        positions, row_bytes = x.reshape(-1, x.shape[-1]), len(self.second) * x.element_size()
        for part in (positions,) if x.is_cuda else positions.split(max(1, COSTS.hidden // row_bytes)):
            hidden = torch.addmm(self.bias, part, self.first).relu_()
            torch.addmm(part, hidden, self.second, out=part)
        return x if positions.data_ptr() == x.data_ptr() else x.copy_(positions.view(x.shape))


def routed_experts_macs(positions: int, channels: int, width: int) -> int:
    """Return the MACs of `positions` positions of `channels` channels at an expert of `width` hidden units."""
    return 2 * positions * channels * width


def routed_experts_ref(
    x: Tensor, choice: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, splits: tuple[int, ...]
) -> Tensor:
    """Compute the definition: x + w2_e relu(w1_e x + b1_e) for each row's choice e; all experts compute all rows.

    Args:
        x: [n, ..., C]; the positions of a row share its choice.
        choice: [n] integers in 0 ... experts-1.
        w1: [sum(splits), C], the experts' first matrices, one below the other.
        b1: [sum(splits)].
        w2: [C, sum(splits)], their second matrices, side by side.
        splits: the hidden units of each expert; an expert of 0 passes its rows through.

    Returns:
        [n, ..., C].

    Source: experts as the feed-forward layer (Shazeer et al. 2017, ICLR, section 2), of unequal width (Wang et al.
    2025, "HMoE", EMNLP); the null expert is the copy expert of MoE++ (Jin et al. 2025, ICLR).
    """
    parts = partition_ref(choice, len(splits)).repeated(math.prod(x.shape[1:-1]))
    hidden = routed_linear_ref(x.reshape(-1, x.shape[-1]), w1, parts, b1, splits=splits, relu=True, sorted_out=True)
    return x + routed_linear_ref(hidden, w2, parts, splits=splits, sorted_in=True).view(x.shape)


def routed_experts(x: Tensor, choice: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, splits: tuple[int, ...]) -> Tensor:
    """Do `routed_experts_ref`, with each row at its own expert only. Differentiable.

    If no gradient is recorded, `x` itself is overwritten and returned. The MACs are `routed_experts_macs` for each
    expert's positions.
    """
    parts = partition(choice, len(splits))
    if path(x) is Path.HOST:
        return _on_host(x, parts, w1, b1, w2, splits)
    parts = parts.repeated(math.prod(x.shape[1:-1]))
    hidden = routed_linear(x.reshape(-1, x.shape[-1]), w1, parts, b1, splits=splits, relu=True, sorted_out=True)
    y = routed_linear(hidden, w2, parts, splits=splits, sorted_in=True).view(x.shape)
    return x + y if torch.is_grad_enabled() else x.add_(y)


def _on_host(x: Tensor, parts: Partition, w1: Tensor, b1: Tensor, w2: Tensor, splits: tuple[int, ...]) -> Tensor:
    experts = list(zip(w1.split(splits), b1.split(splits), w2.split(splits, 1), strict=True))
    if torch.is_grad_enabled():
        # Experts run one after the other: two grouped products would pad all hidden units to the widest.
        done = [
            part + F.linear(F.linear(part, first, bias).relu(), second) if len(first) and len(part) else part
            for part, (first, bias, second) in zip(x[parts.order].split(parts.sizes), experts, strict=True)
        ]
        rows = torch.cat(done)
        return torch.empty_like(rows).index_copy(0, parts.order, rows)
    for (first, bias, second), (start, end) in zip(experts, pairwise(parts.ends), strict=True):
        if len(first) and end > start:
            expert = Expert(first, bias, second)
            if end - start == len(x):
                expert(x)
            else:
                compute_groups(x, parts.order[start:end], [(expert, 0, end - start)])
    return x


class ExpertLayer(nn.Module):
    """`routed_experts` with its weights: a residual layer of experts, for training and inference.

    Args:
        channels: C, the size of the last dimension of the layer's input.
        widths: the hidden units of each expert; an expert of 0 passes its rows through.
    """

    _frozen = False

    def __init__(self, channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.widths = widths
        hidden = torch.tensor(widths)
        self.w1 = nn.Parameter(torch.randn(sum(widths), channels) * (2 / channels) ** 0.5)
        self.b1 = nn.Parameter(torch.zeros(sum(widths)))
        # The weights are small at first, so that outputs depend little on routes until experts have learned to agree.
        self.w2 = nn.Parameter(0.2 * torch.randn(channels, sum(widths)) / hidden.repeat_interleave(hidden).sqrt())

    def freeze(self) -> None:
        """Lay the weights out in the order that is fastest for few rows."""
        self._frozen = True
        self.w1.data, self.w2.data = column_major(self.w1.data), column_major(self.w2.data)

    def _apply(self, fn: Any, recurse: bool = True) -> ExpertLayer:
        super()._apply(fn, recurse)
        if self._frozen:
            self.freeze()
        return self

    def experts(self) -> list[Expert]:
        """Return each expert alone."""
        parts = (self.w1.split(self.widths), self.b1.split(self.widths), self.w2.split(self.widths, 1))
        return [Expert(*of) for of in zip(*parts, strict=True)]

    def forward(self, x: Tensor, choice: Tensor) -> Tensor:
        """Run [n, ..., C] through the chosen experts [n]. Without gradients, `x` is overwritten."""
        return routed_experts(x, choice, self.w1, self.b1, self.w2, self.widths)

    def weighted(self, x: Tensor, gates: Tensor) -> Tensor:
        """Run [n, ..., C] through all experts, weighted by `gates` [n, experts]; differentiable."""
        share = gates.repeat_interleave(torch.tensor(self.widths, device=x.device), 1)
        share = share.view(len(x), *[1] * (x.dim() - 2), -1)
        return x + F.linear(F.linear(x, self.w1, self.b1).relu() * share, self.w2)
