"""Early classifiers tell the class from features before the end of a network, as exits or for routers to see."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrl.backbones.base import Backbone
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


class SeenEnd(Backbone):
    """This base class lets routers see how sure the network's last layer `fc` would be of the map as it is.

    They see it at each point behind which no block changes the shape, and every row pays for it. A network of one
    output is never sure. Where nothing is seen, zeros stand for it.
    """

    fc: nn.Linear
    _end_macs: list[int]  # what is paid for it at each point

    def _see_end(self, fixed_macs: list[int]) -> list[int]:
        """Return the MACs before the first block and behind each, `fixed_macs`, with those of what is seen."""
        told = self.fc.weight.numel() if self.fc.out_features > 1 else 0
        rests = [sum(fixed_macs[k:]) for k in range(1, len(fixed_macs))]
        self._end_macs = [told if rest == told else 0 for rest in rests]
        return [fixed + end for fixed, end in zip(fixed_macs, [*self._end_macs, 0], strict=True)]

    def _with_end(self, point: int, means: Tensor) -> Tensor:
        """Return how sure the last layer is of `means` [n, C], and then these: [n, SCORES + C] float32."""
        if not self._end_macs[point]:
            return F.pad(means, (SCORES, 0))
        # While a backbone is fine-tuned, its maps may be bfloat16 where a policy looks at them without autocast.
        return torch.cat([exit_scores(self.fc(means.to(self.fc.weight.dtype))), means], 1)

    @property
    def whole_macs(self) -> int:
        """The MACs of `whole` for one row: the last layer runs once."""
        return super().whole_macs - sum(self._end_macs)
