"""A threshold rule stops, or does less, where the network itself is sure enough. Learned routes must beat it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dynrl.policies.base import Policy
from dynrl.schema import check_one_of


class ThresholdPolicy(Policy):
    """This policy takes the cheapest choice where the network's own score is sure enough, else the dense network's.

    Args:
        backbone: the backbone that the policy is for.
        score: a name in the backbone's `scores`.
        thresholds: [columns], what the score must reach in each column, or fall to if a lower score means surer.
        unsure: [columns] int64, the choices where the score is not sure enough; None for the dense network's.

    Raises:
        ValueError: the backbone has no such score, or another number of columns.

    The sources are BranchyNet (Teerapittayanon et al. 2016, ICPR; entropy) and MSDNet (Huang et al. 2018, ICLR; highest
    probability).
    """

    thresholds: Tensor
    sure: Tensor
    unsure: Tensor

    def __init__(self, backbone: Any, score: str, thresholds: Tensor, unsure: Tensor | None = None) -> None:
        super().__init__()
        check_one_of("score", score, backbone.scores)
        if tuple(thresholds.shape) != (backbone.columns,):
            raise ValueError(
                f"expected a threshold for each of {backbone.columns} columns, got shape {tuple(thresholds.shape)}"
            )
        self.column, self.rising = backbone.scores[score]
        thrift = backbone.thrift
        self.register_buffer("thresholds", thresholds)
        self.register_buffer("sure", thrift.masked_fill(thrift < 0, torch.inf).argmin(1))
        full = torch.tensor(backbone.full_route).clamp_min(0)
        self.register_buffer("unsure", full if unsure is None else unsure)

    def check(self, backbone: Any) -> None:
        """Refuse, with a ValueError, a backbone whose number of columns is not that of the thresholds."""
        if backbone.columns != len(self.thresholds):
            raise ValueError(
                f"the policy has thresholds for {len(self.thresholds)} columns, not {backbone.columns}; fit them again"
            )

    def chooser(self, backbone: Any, price: float) -> Callable[[Any], Tensor]:
        """Return a `Policy.chooser` that reads the score from `backbone.observe`."""

        def at(state: Any) -> Tensor:
            column, score = state.column, backbone.observe(state)[:, self.column]
            threshold = self.thresholds[column]
            sure = score >= threshold if self.rising else score <= threshold
            return torch.where(sure, self.sure[column], self.unsure[column])

        return at
