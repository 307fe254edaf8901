"""Rules between whole models: what they say of validation data is what their policies do there."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import nn

import dynrl
from dynrl.backbones import Models
from dynrl.data import Split
from dynrl.evaluation import rules_of, score
from dynrl.evaluation.cascades import Heard, _follow, _greedy, _seen, _tried, cascade
from dynrl.policies import LinearPolicy, StepSight

ROWS = 400
BUDGETS = (0.05, 0.2, 0.4, 0.7, 1.0)


class Reads(nn.Module):
    """The input holds the class in its first half, and in its second how much noise a model of its width adds."""

    def __init__(self, noise: float, width: int) -> None:
        super().__init__()
        self.noise, self.first, self.last = noise, nn.Linear(8, width), nn.Linear(width, 4)

    def forward(self, x):
        spent = self.last(self.first(x)) * 0
        return 3 * x[:, :4] + self.noise * x[:, 4:] + spent


def problem():
    """Three models; each is wrong on rows of more noise than it bears, and less sure there."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(4, (ROWS,), generator=generator)
    noise = torch.randn(ROWS, 4, generator=generator) * torch.rand(ROWS, 1, generator=generator)
    inputs = torch.cat([nn.functional.one_hot(targets, 4).float(), noise], 1)
    backbone = Models([Reads(5.0, 2), Reads(2.0, 12), Reads(0.1, 64)], (8,)).eval()
    return backbone, Split(inputs, targets)


def plugged(backbone, policy, split):
    return score(dynrl.plug(backbone, policy), split)


@pytest.mark.parametrize("name", rules_of(problem()[0]))
def test_a_rule_keeps_its_budget_and_gets_better_with_it(name):
    backbone, split = problem()
    policy_for = rules_of(backbone)[name](backbone, split)
    alone = [1 - float(wrong.mean()) for wrong in Heard.of(backbone, split).error]
    assert policy_for(0.001) is None
    met = []
    for budget in BUDGETS:
        if (policy := policy_for(budget)) is not None:
            found = plugged(backbone, policy, split)
            assert found.macs_fraction - found.router_fraction <= budget + 1e-6
            met.append(found.metric)
    assert met == sorted(met) and met[-1] >= alone[2] - 0.02
    assert met[-2] > alone[1] + 0.01, "by asking the dearest model on some rows only"


@pytest.mark.parametrize("score_name", Models.scores)
def test_tried_cascades_cost_and_err_as_the_walks_do(score_name):
    backbone, split = problem()
    heard = Heard.of(backbone, split)
    for chain in ((0, 1, 2), (0, 2), (1,)):
        tried = _tried(heard, heard.sure(backbone, score_name), chain)
        for found in tried[:: max(1, len(tried) // 7)]:
            got = plugged(backbone, cascade(backbone, score_name, found.what), split)
            assert got.macs_fraction == pytest.approx(found.cost, abs=1e-5)
            assert 1 - got.metric == pytest.approx(found.error, abs=1e-5)


def told(costs, rows, hard):
    """Models that are less sure of hard rows and err on some of these, the dearer the fewer, and the last on none."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(3, len(costs), rows, generator=generator)
    hard = torch.rand(rows, generator=generator) < hard
    scores = torch.where(hard, 0.1 + 0.4 * draws[0], 0.4 + 0.6 * draws[1])
    error = (hard & (draws[2] > torch.linspace(0.3, 1, len(costs)).unsqueeze(1))).float()
    return Heard(scores.unsqueeze(2), error, torch.tensor(costs, dtype=torch.float64))


def least(tried, budget):
    return min(found.error for found in tried if found.cost <= budget)


@pytest.mark.parametrize("costs", [(0.003, 1.0), (0.003, 0.5, 0.7, 1.0)])
def test_a_small_budget_buys_a_dear_model_for_the_few_rows_that_it_pays(costs):
    """Nearly as good as any threshold between the first and the last model, by sums along the sorted rows."""
    heard, rows = told(costs, 5000, hard=0.02), 5000
    sure, count = heard.scores[..., 0], len(costs)
    chains = [chain for length in range(1, count + 1) for chain in combinations(range(count), length)]
    tried = [found for chain in chains for found in _tried(heard, sure, chain)]
    mended = heard.error[0, sure[0].argsort()].cumsum(0) / rows
    cost, error = costs[0] + torch.arange(1, rows + 1) / rows, heard.error[0].mean() - mended
    for budget in (0.008, 0.012, 0.016, 0.02, 0.05, 0.1):
        assert least(tried, budget) <= float(error[cost <= 0.9 * budget].min()) + 1e-6


def test_refined_thresholds_are_as_good_as_any():
    """Three models, and all pairs of thresholds."""
    heard = told((0.003, 0.02, 1.0), 150, hard=0.3)
    sure = heard.scores[..., 0]
    pairs = torch.cartesian_prod(*(torch.cat([scores, torch.tensor([9.0])]) for scores in sure[:2]))
    first, second = (sure[k] >= pairs[:, k : k + 1] for k in (0, 1))
    error = torch.where(first, heard.error[0], torch.where(second, heard.error[1], heard.error[2])).mean(1)
    cost = 0.003 + 0.02 * (~first).double().mean(1) + (~(first | second)).double().mean(1)
    tried = _tried(heard, sure, (0, 1, 2))
    for budget in (0.0151, 0.0301, 0.0501, 0.101, 0.201, 0.401):
        assert least(tried, budget) == pytest.approx(float(error[cost <= budget].min()), abs=1e-6)


def test_a_score_that_is_no_number_is_never_sure():
    backbone, split = problem()
    heard = Heard.of(backbone, split)
    scores = heard.scores.clone()
    scores[0, :100] = torch.nan
    heard = replace(heard, scores=scores)
    tried = _tried(heard, heard.sure(backbone, "top-1"), (0, 2))
    assert max(found.cost for found in tried) > 0.5
    assert min(found.cost for found in tried) >= float(heard.costs[0] + heard.costs[2] / 4) - 1e-6


def test_greedy_stages_keep_the_last_models_accuracy():
    backbone, split = problem()
    heard = Heard.of(backbone, split)
    sure = heard.sure(backbone, "top-1")
    for strict in (0.9, 1.0):
        found, left = _greedy(heard, sure, strict), torch.ones(ROWS, dtype=torch.bool)
        for k, least in found.what:
            answered = left & (sure[k] >= least)
            right = 1 - heard.error[:, answered].mean(1)
            assert float(right[k]) >= strict * float(right[2]) - 1e-6
            left &= ~answered
        assert not left.any()


def test_a_linear_rule_is_foreseen_as_it_walks():
    backbone, split = problem()
    heard, sight = Heard.of(backbone, split), StepSight.of(backbone)
    seen = dict(_seen(backbone, split, 3))
    assert len(seen) == 4  # at first, after either model, after the one and then the other
    torch.manual_seed(1)
    weight, bias = torch.randn(sight.points, sight.choices, sight.features), torch.randn(sight.points, sight.choices)
    cost, error = _follow(heard, seen, weight, bias, backbone)
    model = dynrl.plug(backbone, LinearPolicy(sight, weight, bias))
    found = score(model, split)
    assert found.distinct_routes > 4
    assert found.macs_fraction - found.router_fraction == pytest.approx(cost, abs=1e-5)
    assert 1 - found.metric == pytest.approx(error, abs=1e-5)
    assert model.last_route.router_macs.min() == sight.features * sight.points * sight.choices
