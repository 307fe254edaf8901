"""Thresholds on a number that a network gives by itself: how sure an exit is, say. A rule that policies must beat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynrl.policies.base import StepPolicy


class ThresholdPolicy(StepPolicy):
    """One choice where a score passes its point's threshold, and another where it does not.

    Args:
        features, points, choices: the observation's layout.
        column: of the observation, where the score stands.
        rising: whether a higher score means surer.
        thresholds: [points]; a row is sure at this score or a higher one (a lower one, if not `rising`).
        sure: [points], the choice of rows that are sure: to stop, say.
        unsure: [points], the choice of all others.

    Source: BranchyNet (Teerapittayanon et al. 2016, ICPR; entropy) and MSDNet (Huang et al. 2018, ICLR; top-1).
    """

    thresholds: Tensor
    sure: Tensor
    unsure: Tensor

    def __init__(
        self,
        features: int,
        points: int,
        choices: int,
        column: int,
        rising: bool,
        thresholds: Tensor,
        sure: Sequence[int],
        unsure: Sequence[int],
    ) -> None:
        super().__init__(features, points, choices)
        if not 0 <= column < features:
            raise ValueError(f"expected a score in one of the {features} features, got column {column}")
        if tuple(thresholds.shape) != (points,):
            raise ValueError(f"expected a threshold for each of {points} points, got shape {tuple(thresholds.shape)}")
        self.column, self.rising = column, rising
        self.register_buffer("thresholds", thresholds)
        self.register_buffer("sure", torch.as_tensor(sure, dtype=torch.int64))
        self.register_buffer("unsure", torch.as_tensor(unsure, dtype=torch.int64))

    def act(self, observation: Tensor) -> Tensor:
        """[n] int64, the choice of each row."""
        point = observation[:, self.features : self.features + self.points].argmax(1)
        score, threshold = observation[:, self.column], self.thresholds[point]
        sure = score >= threshold if self.rising else score <= threshold
        return torch.where(sure, self.sure[point], self.unsure[point])


def fit_thresholds(scores: Tensor, costs: Tensor, budget: float, rising: bool = True) -> Tensor:
    """Find thresholds that meet a budget on the data they are fitted on, where rows that are sure leave.

    The budgeted batch classification of MSDNet (Huang et al. 2018, section 5): exit k of K is to be taken by a share
    q_k = z (1 - q)^(k-1) q of the inputs, q the one number for which the mean cost is the budget; the surest inputs
    that are still there leave. For budgets above those of equal shares, q is below 0 (and q_k positive all the same).

    Args:
        scores: [n, K-1], of each input at each exit but the last.
        costs: [K], what an input costs that leaves at each exit; rising.
        budget: mean cost, in the same units.
        rising: whether a higher score means surer.

    Returns:
        [K-1]: an input leaves at the first exit where its score is at least this (at most, if not `rising`).

    Raises:
        ValueError: the budget is not between the first exit's cost and the last one's.
    """
    costs = costs.double()
    if not costs[0] <= budget <= costs[-1]:
        raise ValueError(f"the budget {budget} is out of reach; exits cost {float(costs[0])} to {float(costs[-1])}")
    low, high = -50.0, 50.0  # of log(1 - q)
    for _ in range(60):
        middle = (low + high) / 2
        share = torch.softmax(middle * torch.arange(len(costs), dtype=torch.float64), 0)
        low, high = (middle, high) if float(share @ costs) < budget else (low, middle)
    sure = scores if rising else -scores
    left = torch.ones(len(scores), dtype=torch.bool)
    thresholds, gone = [], 0
    # Rounding the sums, not the shares, lets no error pile up.
    for k, wanted in enumerate((share.cumsum(0)[:-1] * len(scores)).round().int().tolist()):
        here, count = sure[left, k].sort(descending=True).values, wanted - gone
        thresholds.append(here[count - 1] if count > 0 else here.new_tensor(torch.inf))
        left &= sure[:, k] < thresholds[-1]
        gone = len(left) - int(left.sum())
    found = torch.stack(thresholds)
    return found if rising else -found
