"""Early classifiers tell the class from features before the end of a network: as exits, or for routers to see."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrl.ops.exit_scores import exit_scores
from dynrl.ops.pooled import summary

CELLS = 4  # early classifiers see means over this many cells each way; of smaller maps, they see all pixels
# The columns of `exit_scores`, and whether higher means surer, as `Backbone.scores` has it.
EXIT_SCORES = {"top-1": (0, True), "margin": (1, True), "entropy": (2, False)}
SCORES = len(EXIT_SCORES)


def early_inputs(x: Tensor, channels_last: bool = False) -> Tensor:
    """Return what an early classifier sees, [n, k]: of images `CELLS` means each way, of other features `summary`."""
    if x.dim() != 4:
        return summary(x, channels_last).to(x.dtype)
    x = x.permute(0, 3, 1, 2) if channels_last else x
    cells = F.adaptive_avg_pool2d(x, (min(CELLS, x.shape[2]), min(CELLS, x.shape[3])))
    return cells.permute(0, 2, 3, 1).flatten(1)  # in this order, nothing is copied in channels_last


def early_classifier(size: tuple[int, ...], classes: int) -> nn.Linear:
    """Make a classifier of maps of `size` (channels, height, width): one linear layer on their `early_inputs`.

    Source: Shallow-Deep Networks (Kaya et al. 2019, ICML).
    """
    channels, height, width = size
    return nn.Linear(channels * min(CELLS, height) * min(CELLS, width), classes)


def seen_early(x: Tensor, classifier: nn.Linear) -> Tensor:
    """Return how sure an early classifier is of maps `x` [n, C, H, W], then the mean of each channel's cells.

    Returns:
        [n, SCORES + C] float32.
    """
    cells = early_inputs(x)
    means = cells.unflatten(1, (-1, x.shape[1])).mean(1).float()
    # While a backbone is fine-tuned, its maps may be bfloat16 where a policy looks at them without autocast.
    return torch.cat([exit_scores(classifier(cells.to(classifier.weight.dtype))), means], 1)
