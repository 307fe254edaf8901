"""`decide` is a router of one or two linear layers at one point and price, from features to choices."""

from __future__ import annotations

import torch
from torch import Tensor

from dynrl.ops.backend import Path, path


def decide_ref(
    features: Tensor, last: Tensor, spent: Tensor, *, weight: Tensor, bias: Tensor, last_weight: Tensor,
    spent_weight: Tensor, head: Tensor | None, head_bias: Tensor | None, dense_macs: int,
) -> Tensor:  # fmt: skip
    """Compute the definition of `decide`.

    Args:
        features: [n, f] float32.
        last: [n] int64, 1 + the last choice, 0 before the first.
        spent: [n] int64, the MACs spent so far.
        weight: [f, h] float32; without a head, h is the number of choices.
        bias: [h], including whatever is the same for every row.
        last_weight: [1 + choices, h].
        spent_weight: [h], for the share `spent` / `dense_macs`.
        head: [h, choices], the layer after ReLU; None for a router of one layer.
        head_bias: [choices], or None.

    Returns:
        each row's likeliest choice, [n] int64.
    """
    scores = features @ weight + bias + last_weight[last] + (spent.float() / dense_macs).unsqueeze(1) * spent_weight
    if head is not None:
        assert head_bias is not None
        scores = scores.relu() @ head + head_bias
    return scores.argmax(1)


def is_fused(x: Tensor) -> bool:
    """Tell whether `decide` is one kernel for tensors like `x`; if not, it may pay to skip some of its steps."""
    return path(x, vendor=True) is Path.TRITON


def decide(
    features: Tensor, last: Tensor, spent: Tensor, *, weight: Tensor, bias: Tensor, last_weight: Tensor,
    spent_weight: Tensor, head: Tensor | None, head_bias: Tensor | None, dense_macs: int,
) -> Tensor:  # fmt: skip
    """Do `decide_ref` in one kernel if kernels are asked for. The MACs are f h + h choices for each row."""
    if not is_fused(features):
        return decide_ref(
            features, last, spent, weight=weight, bias=bias, last_weight=last_weight, spent_weight=spent_weight,
            head=head, head_bias=head_bias, dense_macs=dense_macs,
        )  # fmt: skip
    from dynrl.ops.kernels.decide import decide as kernel

    action = torch.empty(len(features), dtype=torch.int64, device=features.device)
    return kernel(
        features.contiguous(), weight, bias, last_weight, spent_weight, head, head_bias, last, spent, dense_macs,
        action,
    )  # fmt: skip
