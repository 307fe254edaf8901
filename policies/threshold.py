"""Early exit by thresholds: stop where the exit is sure enough. What learned exits must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from dynrl.policies.base import StepPolicy

# The first columns of an exit's features (`dynrl.ops.exit_scores`), and whether more of it means surer.
SCORES = {"top-1": (0, True), "margin": (1, True), "entropy": (2, False)}


class ThresholdPolicy(StepPolicy):
    """Choice 0 (stop) at an exit whose score is at least the exit's threshold (entropy: at most), else 1 (go on).

    Args:
        features, points, choices: the observation's layout.
        score: one of `SCORES`.
        thresholds: [points].

    Source: BranchyNet (Teerapittayanon et al. 2016, ICPR; entropy) and MSDNet (Huang et al. 2018, ICLR; top-1).
    """

    thresholds: Tensor

    def __init__(self, features: int, points: int, choices: int, score: str, thresholds: Tensor) -> None:
        super().__init__(features, points, choices)
        if score not in SCORES:
            raise ValueError(f"unknown score {score!r}; expected one of {sorted(SCORES)}")
        if tuple(thresholds.shape) != (points,):
            raise ValueError(f"expected a threshold for each of {points} exits, got shape {tuple(thresholds.shape)}")
        self.score = score
        self.register_buffer("thresholds", thresholds)

    def act(self, observation: Tensor) -> Tensor:
        """0 where the exit is sure enough, else 1."""
        column, rising = SCORES[self.score]
        exits = observation[:, self.features : self.features + self.points].argmax(1)
        score, threshold = observation[:, column], self.thresholds[exits]
        return (score < threshold if rising else score > threshold).long()


def fit_thresholds(scores: Tensor, costs: Tensor, budget: float, rising: bool = True) -> Tensor:
    """Thresholds that meet a budget on the data they are fitted on.

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
