"""Rules of thumb: thresholds on what a network says of itself, which reports show beside learned policies."""

from __future__ import annotations

import pytest
import torch

import dynrl
from dynrl.backbones import ExitResNet
from dynrl.data import Split
from dynrl.envs import DECISIONS
from dynrl.evaluation import RULES, rules_of, score
from dynrl.evaluation.thresholds import ExitThresholds
from dynrl.ops.exit_scores import exit_scores
from dynrl.policies import StaticPolicy, ThresholdPolicy
from tests.cases import EXAMPLES, make_backbone
from tests.toys import Branching, Exiting, Looping

COSTS = torch.tensor([3.0, 4.0, 7.0, 20.0], dtype=torch.float64)


def leaves(scores, thresholds):
    """[n], the exit at which each input leaves: one input, one exit at a time."""
    found = []
    for row in scores.t().tolist():
        sure = [s >= t for s, t in zip(row, thresholds.tolist(), strict=True)]
        found.append(sure.index(True) if any(sure) else len(row))
    return torch.tensor(found)


def shares(scores, budget):
    """MSDNet's thresholds, for which answers are all the same."""
    return ExitThresholds(scores, torch.zeros(4, scores.shape[1]), COSTS).by_shares(budget)


@pytest.mark.parametrize("budget", [3.0, 3.5, 5.0, 8.5, 12.0, 19.0, 20.0])
def test_shares_meet_the_budget(budget):
    scores = torch.rand(3, 500)
    at = leaves(scores, shares(scores, budget))
    assert float(COSTS[at].mean()) == pytest.approx(budget, rel=0.02)
    assert len(at.unique()) == 4 or budget in (3.0, 20.0, 19.0, 3.5)


def test_shares_fall_or_rise_by_one_factor_from_exit_to_exit():
    """q_k = z (1 - q)^(k-1) q: what MSDNet's protocol fixes beside the budget."""
    scores = torch.rand(3, 20_000)
    for budget in (5.0, 13.0):
        share = torch.bincount(leaves(scores, shares(scores, budget)), minlength=4) / scores.shape[1]
        factors = share[1:] / share[:-1]
        torch.testing.assert_close(factors, factors[:1].expand(3), rtol=0.02, atol=0)
        assert (factors[0] > 1) == (budget > float(COSTS.mean()))


def test_the_surest_leave_first_and_a_dearer_budget_lets_none_leave_earlier():
    scores = torch.rand(3, 400)
    before = None
    for budget in (4.0, 6.0, 9.0, 15.0):
        thresholds = shares(scores, budget)
        at = leaves(scores, thresholds)
        assert scores[0, at == 0].min() > scores[0, at > 0].max()
        if before is not None:
            assert thresholds[0] > before
        before = thresholds[0]


def test_ties_leave_together_and_the_rest_of_the_fit_goes_on():
    scores = torch.ones(3, 100)
    assert (leaves(scores, shares(scores, 8.0)) == 0).all()
    assert shares(scores, 2.9) is None
    assert ExitThresholds(scores, torch.zeros(4, 100), COSTS).within(2.9) is None


def test_nobody_leaves_where_an_exit_knows_nothing():
    """The first exit is chance and the second is right where it is sure: shares would send rows to the first."""
    generator = torch.Generator().manual_seed(0)
    sure = torch.rand(2, 2000, generator=generator)
    wrong = torch.zeros(3, 2000)
    wrong[0] = torch.rand(2000, generator=generator) < 0.5
    wrong[1] = sure[1] < 0.5
    fitted = ExitThresholds(sure, wrong, torch.tensor([0.4, 0.6, 1.0], dtype=torch.float64))

    def error(thresholds):
        at = leaves(sure, thresholds)
        return float(wrong.gather(0, at[None]).mean())

    assert error(fitted.within(0.82)) == 0.0
    assert error(fitted.by_shares(0.82)) > 0.05


def test_no_setting_of_thresholds_on_a_grid_is_better_within_the_budget():
    """Beside all pairs of quantiles, tried one by one, on exits whose scores are on scales of their own."""
    generator = torch.Generator().manual_seed(1)
    right = torch.rand(3, 300, generator=generator)
    sure, wrong = right[:2] * torch.tensor([[1.0], [0.3]]), (right < torch.tensor([[0.7], [0.4], [0.1]])).float()
    sure += 0.1 * torch.rand(2, 300, generator=generator)
    costs = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    fitted = ExitThresholds(sure, wrong, costs)
    grid = [[*row.quantile(torch.linspace(0, 1, 40)).tolist(), torch.inf] for row in sure]
    tried = []
    for pair in torch.cartesian_prod(*map(torch.tensor, grid)):
        at = leaves(sure, pair)
        tried.append((float(costs[at].mean()), float(wrong.gather(0, at[None]).mean())))
    for budget in (0.3, 0.5, 0.7, 0.9):
        at = leaves(sure, fitted.within(budget))
        best = min(error for cost, error in tried if cost <= budget)
        assert float(costs[at].mean()) <= budget + 1e-9
        assert float(wrong.gather(0, at[None]).mean()) <= best + 0.015


@pytest.mark.parametrize("name", ExitResNet.scores)
@torch.no_grad()
def test_a_policy_reads_its_column_and_its_exit(name):
    backbone = make_backbone("exit")
    column, rising = backbone.scores[name]
    thresholds = torch.tensor([0.15, 0.9, 0.12]) if rising else torch.tensor([0.995, 0.5, 0.999])
    choose = ThresholdPolicy(backbone, name, thresholds).chooser(backbone, 0.3)
    state = backbone.begin(torch.randn(40, *backbone.input_shape))
    for threshold in thresholds:
        scores = exit_scores(backbone.output(state))[:, column]
        stop = scores >= threshold if rising else scores <= threshold
        assert torch.equal(choose(state), (~stop).long())
        (state,) = backbone.advance(state, torch.ones(40, dtype=torch.int64))


def test_bad_thresholds_are_refused():
    backbone = make_backbone("exit")
    with pytest.raises(ValueError, match="a threshold for each of 3 columns"):
        ThresholdPolicy(backbone, "margin", torch.zeros(4))
    with pytest.raises(ValueError, match="unknown score 'nosuch'"):
        ThresholdPolicy(backbone, "nosuch", torch.zeros(3))


def random_split(backbone, size=180):
    return Split(torch.randn(size, *backbone.input_shape), torch.arange(size) % 2)


# Other rules have tests of their own: a cascade spends at most its budget.
RULED = [(d, name) for d in DECISIONS if (b := EXAMPLES[d]).rule == "threshold" for name in rules_of(b)]


def test_exits_are_known_for_thresholds_on_three_scores():
    assert [("exit", f"threshold {score}") for score in ("top-1", "margin", "entropy")] == [
        ruled for ruled in RULED if ruled[0] == "exit"
    ]


@pytest.mark.parametrize(("decision", "name"), RULED)
def test_rules_keep_budgets_on_their_data_or_pass(decision, name):
    backbone = make_backbone(decision).for_inference()
    split = random_split(backbone)
    policy_for = rules_of(backbone)[name](backbone, split)
    met = 0
    for budget in (0.01, 0.3, 0.5, 0.7, 0.9, 1.0):
        policy = policy_for(budget)
        if policy is not None:
            model = dynrl.plug(backbone, policy)
            assert score(model, split).macs_fraction <= 1.02 * budget
            met += 1
    assert policy_for(0.01) is None
    assert met >= 3


class ByFirst:
    """The first column of what the toy shows of itself as its score: the higher, the surer."""

    scores, rule = {"first": (0, True)}, "threshold"


class RuledExiting(ByFirst, Exiting):
    """Its choice 1 stops, and costs nothing: the cheapest."""


class RuledLooping(ByFirst, Looping):
    """It is met again and again, so no share of the inputs leaves at each point: one threshold for all visits."""


class RuledBranching(ByFirst, Branching):
    """Nobody leaves early: the walk goes on whatever is chosen."""


@pytest.mark.parametrize("family", [RuledExiting, RuledLooping, RuledBranching])
def test_any_familys_own_score_is_a_rule(family):
    """Thresholds keep budgets whether rows leave, come again or go on; the surest are those that take less.

    Where nobody can leave, the budget is spent. Where rows can, less is spent if more would not be more right.
    """
    backbone = family().eval()
    split = random_split(backbone, 400)
    (fit,) = rules_of(backbone).values()
    policy_for, spent = fit(backbone, split), []
    routes = backbone.dense_actions(len(split))
    for budget in (0.6, 0.7, 0.8, 0.9):
        policy = policy_for(budget)
        if policy is not None:
            spent.append(score(dynrl.plug(backbone, policy), split).macs_fraction)
            assert (budget - 0.1) * (family is not RuledExiting) <= spent[-1] <= budget + 0.02
    assert len(spent) >= 2 and spent == sorted(spent)
    if family is RuledExiting:
        return
    dearest = score(dynrl.plug(backbone, policy_for(1.2)), split).macs_fraction
    assert dearest == pytest.approx(
        float(backbone.run_route(split.inputs, routes).macs.double().mean()) / backbone.dense_macs
    )


def test_a_rule_of_ones_own_is_one_row(monkeypatch):
    backbone = Exiting().eval()
    assert rules_of(backbone) == {}
    monkeypatch.setattr(Exiting, "rule", "mine")
    with pytest.raises(
        ValueError,
        match=r"asks for the rule 'mine'; expected one of \['cascade', 'layouts', 'looks', 'table', 'threshold', 'trees'\]",
    ):
        rules_of(backbone)
    monkeypatch.setitem(RULES, "mine", lambda backbone: {"mine": lambda network, split: lambda budget: None})
    assert list(rules_of(backbone)) == ["mine"]


@torch.no_grad()
def test_a_plugged_threshold_charges_no_router():
    backbone = make_backbone("exit")
    model = dynrl.plug(backbone, ThresholdPolicy(backbone, "top-1", torch.full((3,), 2.0)))
    inputs = torch.randn(5, *backbone.input_shape)
    torch.testing.assert_close(model(inputs), backbone(inputs), atol=1e-4, rtol=1e-4)
    assert model.last_route.router_macs.sum() == 0
    assert (model.last_route.macs == backbone.dense_macs).all()
    with pytest.raises(ValueError, match="thresholds for 3 columns"):
        dynrl.plug(ExitResNet((1, 8, 8), layers=(2,), widths=(4,), exits=(0,)), model.policy)
    with pytest.raises(ValueError, match="knows no price"):
        model.set_price(0.1)
    plug_static = dynrl.plug(backbone, StaticPolicy((0, 0, 0)))
    plug_static(inputs)
    assert (plug_static.last_route.macs == backbone.start_macs).all()
