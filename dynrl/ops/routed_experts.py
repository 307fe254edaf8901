"""`routed_experts`: a residual layer of two-layer experts of unequal width, each row at the one it chose."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from dynrl.ops.backend import on_host
from dynrl.ops.route import route, route_ref
from dynrl.ops.routed_linear import routed_linear, routed_linear_ref
from dynrl.ops.rows import compute_groups

# So many bytes of hidden units are made at a time on the CPU: they stay in the cache between the two products.
HIDDEN = 1 << 19


class Expert:
    """x + w2 relu(w1 x + b1), written over x. For inference only.

    Args:
        w1: [width, C].
        b1: [width].
        w2: [C, width].
    """

    def __init__(self, w1: Tensor, b1: Tensor, w2: Tensor) -> None:
        self.first, self.bias, self.second = w1.t(), b1, w2.t()
        self.weight_bytes = 2 * w1.numel() * w1.element_size()

    def __call__(self, x: Tensor) -> Tensor:
        """[n, ..., C] to the same tensor."""
        positions, row_bytes = x.reshape(-1, x.shape[-1]), len(self.second) * x.element_size()
        for part in (positions,) if x.is_cuda else positions.split(max(1, HIDDEN // row_bytes)):
            hidden = torch.addmm(self.bias, part, self.first).relu_()
            torch.addmm(part, hidden, self.second, out=part)
        return x if positions.data_ptr() == x.data_ptr() else x.copy_(positions.view(x.shape))


def routed_experts_macs(positions: int, channels: int, width: int) -> int:
    """MACs of so many positions of so many channels at an expert of `width` hidden units."""
    return 2 * positions * channels * width


def routed_experts_ref(
    x: Tensor, choice: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, splits: tuple[int, ...]
) -> Tensor:
    """The definition: x + w2_e relu(w1_e x + b1_e), e being the row's choice; every expert on every row.

    Args:
        x: [n, ..., C]; the positions of a row share its choice.
        choice: [n] integers in 0 ... experts-1.
        w1: [sum(splits), C], the experts' first matrices, one below the other.
        b1: [sum(splits)].
        w2: [C, sum(splits)], their second matrices, side by side.
        splits: hidden units of each expert; one of 0 hands its rows through.

    Returns:
        [n, ..., C].

    Source: experts as the feed-forward layer (Shazeer et al. 2017, ICLR, section 2), of unequal width (Wang et al.
    2025, "HMoE", EMNLP); the null expert is the copy expert of MoE++ (Jin et al. 2025, ICLR).
    """
    positions, routing = x.reshape(-1, x.shape[-1]), route_ref(choice, len(splits)).repeated(math.prod(x.shape[1:-1]))
    hidden = routed_linear_ref(positions, w1, routing, b1, splits=splits, relu=True, sorted_out=True)
    return x + routed_linear_ref(hidden, w2, routing, splits=splits, sorted_in=True).view(x.shape)


def routed_experts(x: Tensor, choice: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, splits: tuple[int, ...]) -> Tensor:
    """`routed_experts_ref`, each row at its own expert only. Differentiable.

    Where no gradient is recorded, `x` itself is overwritten and returned. MACs: `routed_experts_macs` for each
    expert's positions.
    """
    routing = route(choice, len(splits))
    if not on_host(x):
        positions, routing = x.reshape(-1, x.shape[-1]), routing.repeated(math.prod(x.shape[1:-1]))
        hidden = routed_linear(positions, w1, routing, b1, splits=splits, relu=True, sorted_out=True)
        y = routed_linear(hidden, w2, routing, splits=splits, sorted_in=True).view(x.shape)
        return x + y if torch.is_grad_enabled() else x.add_(y)
    experts = list(zip(w1.split(splits), b1.split(splits), w2.split(splits, 1), strict=True))
    if torch.is_grad_enabled():
        # Expert by expert, where two grouped products would pad all hidden units to the widest: 2 to 3 times as fast.
        parts = [
            part + F.linear(F.linear(part, first, bias).relu(), second) if len(first) and len(part) else part
            for part, (first, bias, second) in zip(x[routing.order].split(routing.sizes), experts, strict=True)
        ]
        rows = torch.cat(parts)
        return torch.empty_like(rows).index_copy(0, routing.order, rows)
    for (first, bias, second), (start, end) in zip(experts, pairwise(routing.ends), strict=True):
        if len(first) and end > start:
            expert = Expert(first, bias, second)
            if end - start == len(x):
                expert(x)
            else:
                compute_groups(x, routing.order[start:end], [(expert, 0, end - start)])
    return x
