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


def fit_thresholds(scores: Tensor, costs: Tensor, budget: float, rising: bool = True) -> Tensor:
    """Find thresholds that meet a budget on the data that they are fitted on.

    This is the budgeted batch classification of MSDNet (Huang et al. 2018, section 5). Exit k of K is taken by the
    share q_k = z (1 - q)^(k-1) q of the inputs, where q is the number for which the mean cost is the budget. At each
    exit, the surest of the remaining inputs leave. If the budget is above that of equal shares, q is below 0, but q_k
    stays positive.

    Args:
        scores: [n, K-1], the score of each input at each exit but the last.
        costs: [K], the cost of leaving at each exit, rising.
        budget: the mean cost, in the same units as `costs`.
        rising: whether a higher score means surer.

    Returns:
        thresholds [K-1]: an input leaves at the first exit where its score is at least the threshold, or at most if not
        `rising`.

    Raises:
        ValueError: the budget is not between the first exit's cost and the last exit's.
    """
    costs = costs.double()
    if not costs[0] <= budget <= costs[-1]:
        raise ValueError(f"the budget {budget} is out of reach; exits cost {float(costs[0])} to {float(costs[-1])}")
    low, high = -50.0, 50.0  # the bounds of log(1 - q)
    for _ in range(60):
        middle = (low + high) / 2
        share = torch.softmax(middle * torch.arange(len(costs), dtype=torch.float64), 0)
        low, high = (middle, high) if float(share @ costs) < budget else (low, middle)
    sure = scores if rising else -scores
    left = torch.ones(len(scores), dtype=torch.bool)
    thresholds, gone = [], 0
    # The sums are rounded, not the shares, so that errors do not add up.
    for k, wanted in enumerate((share.cumsum(0)[:-1] * len(scores)).round().int().tolist()):
        here, count = sure[left, k].sort(descending=True).values, wanted - gone
        thresholds.append(here[count - 1] if count > 0 else here.new_tensor(torch.inf))
        left &= sure[:, k] < thresholds[-1]
        gone = len(left) - int(left.sum())
    found = torch.stack(thresholds)
    return found if rising else -found
