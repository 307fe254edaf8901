"""`exit_scores` tells how sure a classifier is of its answer."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def exit_scores(logits: Tensor) -> Tensor:
    """Return three scores of each row's class probabilities, each from 0 to 1.

    The op is plain torch on every device, is differentiable, and is its own definition. It takes 0 MACs.

    Args:
        logits: [n, K], K > 1.

    Returns:
        [n, 3] float32: the highest probability; its lead over the second one; the entropy divided by log K.

    Source: the criteria of BranchyNet (Teerapittayanon et al. 2016; entropy) and MSDNet (Huang et al. 2018; top-1).
    """
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"expected logits of shape [n, classes] with at least two classes, got {tuple(logits.shape)}")
    likely = torch.softmax(logits.float(), 1)
    first, second = likely.topk(2, 1).values.unbind(1)
    entropy = torch.special.entr(likely).sum(1) / math.log(logits.shape[1])
    return torch.stack([first, first - second, entropy], 1)
