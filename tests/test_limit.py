"""A limit on what one input may spend: none spends more, and none that would have spent less is routed otherwise."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from dynrl.backbones import END, Backbone, ExitResNet, Point
from dynrl.backbones.base import OUT_OF_REACH
from dynrl.deploy import RoutedModel
from dynrl.policies import RandomPolicy, StaticPolicy, ThresholdPolicy
from tests.cases import BACKBONES, EXAMPLES, OWN, TOYS, make_backbone, make_policy
from tests.test_traced import as_exported
from tests.toys import Roundabout

ROWS = 12


def learned(backbone, kind):
    """An untrained policy that favours dear choices, and decides differently from row to row."""
    policy = make_policy(backbone, hidden=8, kind=kind)
    nn.init.normal_(policy.head.weight)
    policy.head.bias.data.view(-1, policy.sight.choices).copy_(dearness(backbone, policy))
    return policy


def dearness(backbone, policy):
    """[decisions, choices] or [1, choices]: a bias by what choices cost in the long run."""
    thrift = backbone.thrift / backbone.thrift.amax(1, keepdim=True)
    return 4 * (thrift if policy.sight.decisions > 1 else thrift.mean(0, keepdim=True))


KINDS = {
    "sequential": lambda backbone: learned(backbone, "sequential"),
    "upfront": lambda backbone: learned(backbone, "upfront"),
    "random": lambda backbone: RandomPolicy(backbone.thrift, 0.7),
    "static": lambda backbone: StaticPolicy(backbone.full_route),
    "threshold": lambda backbone: ThresholdPolicy(
        backbone, next(iter(backbone.scores)), torch.full((backbone.columns,), 0.6)
    ),
}


def fits(name, kind):
    backbone = EXAMPLES[name]
    return {"upfront": len(backbone.input_shape) == 3, "threshold": bool(backbone.scores)}.get(kind, True)


CASES = [(name, kind) for name in BACKBONES for kind in KINDS if fits(name, kind)]


def routed(name, kind):
    backbone = make_backbone(name)
    return RoutedModel(backbone, KINDS[kind](backbone))


def spent(model):
    return model.last_route.macs + model.last_route.router_macs


def least_of(model):
    """The least share that an input can spend, which the refusal of less tells."""
    with pytest.raises(ValueError, match="expected a limit of at least") as refused:
        model.set_limit(0.0)
    return float(str(refused.value).split("at least ")[1].split()[0])


def walked(model, inputs):
    """What a call gives, with the same draws each time."""
    if isinstance(model.policy, RandomPolicy):
        model.policy.generator.manual_seed(0)
    return model(inputs), model.last_route.actions, spent(model)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_no_row_spends_more_and_what_would_have_spent_less_stays(name, kind):
    model = routed(name, kind)
    dense, inputs, changed = model.backbone.dense_macs, model.backbone.random_inputs(ROWS), 0
    free, route, paid = walked(model, inputs)
    least = least_of(model)
    for share in torch.rand(4).tolist():
        limit = least + share * max(0.0, float(paid.max()) / dense - least)
        model.set_limit(limit)
        bound, bound_route, bound_paid = walked(model, inputs)
        within = paid <= limit * dense
        assert (bound_paid <= limit * dense).all() and (model.last_route.macs_fraction <= limit).all()
        assert torch.equal(bound_route[within], route[within])
        torch.testing.assert_close(bound[within], free[within], atol=1e-5, rtol=1e-5)
        changed += int((~within).sum())
    assert changed, "no limit closed anything"
    model.set_limit(None)
    assert torch.equal(walked(model, inputs)[1], route) and model.limit is None


@pytest.mark.parametrize("name", BACKBONES)
def test_the_least_limit_is_kept_and_less_is_refused(name):
    model = routed(name, "sequential")
    cheapest = model.backbone.start_macs + int(model.backbone.least_macs(model._look_macs)[0].min())
    share = cheapest / model.backbone.dense_macs
    model.set_limit(share)
    model(model.backbone.random_inputs(ROWS))
    assert (spent(model) <= cheapest).all()
    assert share <= least_of(model) < share + 2e-4
    for bad in (share * (1 - 1e-9), -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected a limit of at least"):
            model.set_limit(bad)
    assert model.limit == share


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_the_cheapest_walk_pays_the_least(name):
    backbone, look = make_backbone(name), 7
    least = backbone.least_macs(look)

    def choose(state):
        return least[state.column].argmin(-1).expand(state.count)

    walk = backbone.run(backbone.random_inputs(ROWS), choose)
    decisions = (walk.route >= 0).sum(1)
    assert torch.equal(walk.macs + look * decisions, (backbone.start_macs + least[0].min()).expand(ROWS))


@pytest.mark.parametrize("name", [*TOYS, *(name for name in OWN if "LSTM" not in name), "exit"])
@torch.no_grad()
def test_the_cheapest_rest_is_that_of_all_routes(name):
    backbone = make_backbone(name)
    found = torch.full((backbone.columns, backbone.num_choices), OUT_OF_REACH)
    for route in product(range(backbone.num_choices), repeat=backbone.columns):
        before = {}

        def choose(state, route=route, before=before):
            before[state.column if isinstance(state.column, int) else int(state.column)] = int(state.walk.macs)
            return state.along(torch.tensor([route]))

        walk = backbone.run(torch.randn(1, *backbone.input_shape), choose)
        for column, paid in before.items():
            at = column, int(walk.route[0, column])
            found[at] = min(int(found[at]), int(walk.macs) - paid)
    least = backbone.least_macs()
    closed = (found == OUT_OF_REACH) & (backbone.column_costs >= 0)
    assert torch.equal(least[~closed], found[~closed])
    assert torch.equal(backbone.least_macs(7)[:, 0] - least[:, 0] >= 7, torch.ones(backbone.columns, dtype=torch.bool))


class Turns(Backbone):
    """Two points that take turns: the columns of one visit each do not follow each other."""

    family, decision = "toy_turns", "toy"

    def __init__(self) -> None:
        super().__init__()
        self.config, self.input_shape = {}, (4,)
        self._pose(
            [Point("a", 2, 2), Point("b", 2, 2)], costs=[[1, 5], [2, 7]], start_macs=3, full_route=(1,) * 4,
            feature_width=1,
        )  # fmt: skip

    def leads_to(self, column, choice):
        return {0: 2, 2: 1, 1: 3, 3: END}[column]


def test_points_may_take_turns():
    assert Turns().least_macs().tolist() == [[6, 10], [3, 7], [5, 10], [2, 7]]


def test_charges_beyond_the_table_must_be_said():
    class Silent(Roundabout):
        def surcharge(self, column, choice):
            return 0

    model = RoutedModel(Silent().eval(), StaticPolicy((1,) * 5))
    with pytest.raises(ValueError, match="Silent charges MACs beyond its table and does not say how many"):
        model.set_limit(0.9)


@torch.no_grad()
def test_a_limit_is_exported(tmp_path):
    backbone = ExitResNet((1, 8, 8), layers=(3,), widths=(4,), exits=(0, 1)).eval()
    model, inputs = RoutedModel(backbone, learned(backbone, "sequential")), torch.randn(40, 1, 8, 8)
    free = model(inputs)
    model.set_limit(0.9 * float(model.last_route.macs_fraction.max()))
    bound = model(inputs)
    assert not torch.allclose(free, bound, atol=1e-3)
    torch.testing.assert_close(as_exported(model, tmp_path / "model.pt2")(inputs), bound, atol=1e-5, rtol=1e-5)
