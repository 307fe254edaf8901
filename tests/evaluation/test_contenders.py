"""Contenders on networks that branch, loop and end early: each is asked in one way what it reaches."""

from __future__ import annotations

import pytest
import torch

from dynrl.data import Augmentation, Dataset, Split
from dynrl.evaluation import BUDGETS, Dense, Ground, Static, measure, rivals
from tests.cases import TOYS


def ground_of(name):
    split = Split(torch.randn(80, 4), torch.arange(80) % 2)
    return Ground(TOYS[name]().eval(), Dataset("toy", 2, split, split, split, Augmentation()))


@pytest.mark.parametrize("name", TOYS)
def test_every_rival_says_what_each_input_gets_within_the_budget(name):
    ground, ticks = ground_of(name), []
    for contender in rivals(ground):
        ticks.clear()
        contender.prepare(lambda: ticks.append(1))
        assert len(ticks) <= contender.preparing
        for budget in contender.rows(BUDGETS):
            for reached in contender.reach(budget) or ():
                assert reached.metric.shape == reached.macs.shape == reached.router.shape == (80,)
                assert reached.route.shape == (80, ground.network.columns)
                if contender.name == "static":
                    assert float(reached.macs.mean()) <= budget + 1e-6
                if contender.name == "random":
                    assert float(reached.macs.mean()) == pytest.approx(budget, abs=0.15)
                assert reached.start(ground.test.inputs[:9])() is not None


def test_the_same_choice_everywhere_is_shown_where_there_are_more_than_two():
    named = [contender.name for contender in rivals(ground_of("branching"))]
    assert named == ["random", "static", *["uniform"] * 3, "oracle"]
    assert [contender.name for contender in rivals(ground_of("looping"))] == ["random", "static", "oracle"]


def test_the_dense_network_is_chosen_on_validation_data():
    ground = ground_of("exiting")
    answers = torch.cat([ground.network(ground.test.inputs)]).argmax(1)
    split = Split(ground.test.inputs, answers)  # what the pretrained network says is right
    ground = Ground(ground.network, Dataset("toy", 2, split, split, split, Augmentation()))
    dense = Dense(ground, plain=TOYS["exiting"]().eval())
    dense.prepare(lambda: None)
    assert dense.best == "pretrained" and list(dense.networks) == ["pretrained", "plain"]
    (reached,) = dense.reach(None)
    assert float(reached.metric.mean()) == 1.0 and float(reached.macs.mean()) == 1.0


@pytest.mark.parametrize("name", ["looping", "branching"])
def test_a_report_of_rivals_alone(name, monkeypatch):
    """No policy, no run: what a network can do without one. The toys have no `ideal`; time is not what is tested."""
    ground = ground_of(name)
    monkeypatch.setattr(TOYS[name], "ideal", lambda self, inputs, route: lambda: None)
    points = measure(ground, [], batch_size=8)["points"]
    uniform = ["uniform"] * Static(ground).kinds
    assert [p["policy"] for p in points if p["budget"] is None] == [*uniform, "oracle"]
    assert all(p["kind"] is None for p in points)
