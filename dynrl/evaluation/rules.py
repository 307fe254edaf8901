"""Rules that a decision is known for, fitted on validation data: they stand beside the learned policies in reports."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from dynrl.backbones import Backbone, State
from dynrl.data import Split
from dynrl.observation import Layout, observation
from dynrl.policies import SCORES, StepPolicy, ThresholdPolicy
from dynrl.policies.threshold import fit_thresholds

# From a backbone and validation data to what gives the policy for a budget (a share of the dense MACs), or None where
# that is out of reach.
Fit = Callable[[Backbone, Split], Callable[[float], StepPolicy | None]]


@torch.inference_mode()
def fit_exits(backbone: Backbone, split: Split, score: str) -> Callable[[float], ThresholdPolicy | None]:
    """Thresholds on one of `SCORES`, one an exit, that meet a budget on `split` (see `fit_thresholds`)."""
    column, rising = SCORES[score]
    seen: list[list[torch.Tensor]] = [[] for _ in backbone.points]

    def go_on(state: State) -> torch.Tensor:
        seen[state.point].append(observation(backbone, state, 0.0)[:, column])
        return torch.full_like(state.rows, backbone.full_route[state.point])

    for inputs in split.inputs.split(256):
        backbone.run(inputs, go_on)
    scores = torch.stack([torch.cat(parts) for parts in seen], 1)
    costs = backbone.start_macs + torch.nn.functional.pad(backbone.costs[:, 1].cumsum(0), (1, 0))

    def policy(budget: float) -> ThresholdPolicy | None:
        if not costs[0] <= budget * backbone.dense_macs <= costs[-1]:
            return None
        thresholds = fit_thresholds(scores, costs, budget * backbone.dense_macs, rising)
        return ThresholdPolicy(**Layout.of(backbone).to_dict(), score=score, thresholds=thresholds)

    return policy


HEURISTICS: dict[str, dict[str, Fit]] = {
    "exit": {f"threshold {score}": partial(fit_exits, score=score) for score in SCORES},
}
