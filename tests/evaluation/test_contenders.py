"""Contenders on networks that branch, loop and end early: each is asked in one way what it reaches."""

from __future__ import annotations

import pytest
import torch

from dynrl.backbones import SkipResNet
from dynrl.data import Augmentation, Dataset, Split
from dynrl.deploy import SHIPPED, RoutedModel
from dynrl.evaluation import BUDGETS, RULES, Dense, Ground, Learned, Plain, Ruled, Smaller, compare, measure, rivals
from dynrl.policies import StaticPolicy
from dynrl.runs import RunFolder, RunKind
from dynrl.tasks import Classification, Regression
from tests.cases import TOYS, make_backbone, make_policy


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


@pytest.mark.parametrize(("name", "budget"), [("exit", 0.4), ("branching", 0.55)])
def test_each_seed_of_random_routes_costs_what_is_asked(name, budget):
    """On 256 draws alone, the rate of few exits would be wrong by several percent, and alike for all seeds."""
    backbone = make_backbone(name)
    inputs = backbone.random_inputs(600, torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = backbone(inputs)
    split = Split(inputs, outputs, Regression.of(outputs))
    ground = Ground(backbone, Dataset("draws", outputs.shape[1], split, split, split, Augmentation()))
    random, *_ = rivals(ground)
    found = random.reach(budget)
    assert [float(seed.macs.double().mean()) for seed in found] == pytest.approx([budget] * 3, rel=0.006)
    assert not torch.equal(found[0].route, found[1].route)
    assert all((seed.macs == 1).all() for seed in random.reach(1.1)), "a budget above the dearest walk is not spent"
    assert random.reach(0.01) is None


def test_the_same_choice_everywhere_is_shown_where_there_are_more_than_two():
    named = [contender.name for contender in rivals(ground_of("branching"))]
    assert named == ["random", "static", *["uniform"] * 3, "oracle"]
    assert [contender.name for contender in rivals(ground_of("looping"))] == ["random", "static", "oracle"]


def test_rules_are_fitted_on_each_tuned_network_too():
    """Tuning makes a network better, so a rule on the one before would be too weak a rival."""
    networks = [make_backbone("exit") for _ in range(3)]
    classes, images = networks[0].fc.out_features, networks[0].random_inputs(40, torch.Generator().manual_seed(0))
    split = Split(images, torch.arange(40) % classes, Classification())
    for seed, network in enumerate(networks):
        torch.manual_seed(seed)
        for weight in network.fc.parameters():
            torch.nn.init.normal_(weight)
    ground = Ground(networks[0], Dataset("images", classes, split, split, split, Augmentation()))
    models = [RoutedModel(of, make_policy(of), [(0.01, 1.0), (1.0, 0.2)]) for of in networks[1:]]
    tuned = Learned(RunKind(tuned=True), [*models, models[0]], ground)  # two policies share a network
    plain = Learned(RunKind(), models, ground)
    ruled = {of.name: of for of in rivals(ground, learned=[plain, tuned]) if isinstance(of, Ruled)}
    names = [f"threshold {name}" for name in networks[0].scores]
    assert list(ruled) == [*names, *(f"{name} on learned tuned" for name in names)]
    mine = ruled["threshold top-1 on learned tuned"]
    mine.prepare(lambda: None)
    for network, reached in zip(networks[1:], mine.reach(1.0), strict=True):
        ends = (reached.route == 1).all(1)
        with torch.no_grad():
            said = network(split.inputs).argmax(1) == split.targets
        assert torch.equal(reached.metric[ends].bool(), said[ends])


@pytest.mark.parametrize("name", ["static", "random", "dense", "oracle", "learned"])
def test_a_rule_of_another_rows_name_is_refused(name, monkeypatch):
    """Its figures would stand as those of the other, such as a learned policy's."""
    run = RunFolder(SHIPPED / "exit-digits")
    monkeypatch.setitem(RULES, run.pretrained.rule, lambda backbone: {name: lambda network, split: lambda budget: None})
    ground = Ground(run.pretrained, run.dataset(None))
    said = f"a rule of thumb is named '{name}', as another row of the report is"
    with pytest.raises(ValueError, match=said):
        measure(ground, [Learned(run.kind, [run.model], ground)], batch_size=8)
    if name == "learned":
        with pytest.raises(ValueError, match=said):
            compare([run])


@pytest.mark.parametrize(
    ("fit", "said"),
    [
        (lambda network, split: StaticPolicy((0, 0)), "return a function from a budget to a policy .*got a StaticPolicy"),
        (lambda network, split: None, "return a function from a budget to a policy .*got a NoneType"),
        (lambda network, split: lambda budget: [0, 0], "'odd' to return a policy for the budget 0.5, .*got a list"),
        (lambda network, split: lambda budget: torch.zeros(2), "return a policy .*got a Tensor; StaticPolicy makes one"),
        (lambda network, split: lambda budget: StaticPolicy((0, 7)), "of StaticPolicy choices from 0 to 1, got 0 to 7"),
    ],
)  # fmt: skip
def test_what_a_rule_returns_is_checked(fit, said, monkeypatch):
    monkeypatch.setattr(TOYS["exiting"], "rule", "odd")
    monkeypatch.setitem(RULES, "odd", lambda backbone: {"odd": fit})
    odd = next(of for of in rivals(ground_of("exiting")) if of.name == "odd")
    with pytest.raises(ValueError, match=said):
        odd.prepare(lambda: None)
        odd.reach(0.5)


@pytest.mark.parametrize("route", [torch.ones(3) * 0.5, torch.ones(9, 3).long(), torch.tensor([0, -2, 1])])
def test_a_static_route_is_one_of_choices(route):
    with pytest.raises(ValueError, match=r"expected a route \[columns\] of choices as whole numbers, got torch"):
        StaticPolicy(route)


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
    uniform = [name for name, _ in ground.network.constant_routes()]
    assert [p["policy"] for p in points if p["budget"] is None] == [*uniform, "oracle"]
    assert all(p["kind"] is None for p in points)


def test_policies_are_measured_on_copies():
    run = RunFolder(SHIPPED / "exit-digits")
    run.model.set_budget(0.8)
    price, ground = run.model.price, Ground(run.pretrained, run.dataset(None), "cpu", torch.bfloat16)
    (reached,) = Learned(run.kind, [run.model], ground).reach(0.3)
    assert float(reached.macs.mean()) < 0.5
    assert run.model.price == price and run.model(torch.rand(2, *run.model.input_shape)).dtype == torch.float32


def says(layers, answer):
    """A network of as many blocks that answers the same whatever it is shown."""
    network = SkipResNet((1, 8, 8), classes=3, layers=(layers,), widths=(8,)).eval()
    with torch.no_grad():
        network.fc.weight.zero_()
        network.fc.bias.copy_(torch.nn.functional.one_hot(torch.tensor(answer), 3))
    return network


def test_what_is_best_is_decided_by_all_of_validation():
    """The first 1,024 rows are mostly of class 0, all together of class 1; of something rare, they show too little."""
    targets = (torch.arange(3000) % 10 < torch.where(torch.arange(3000) < 1024, 4, 8)).long()
    split = Split(torch.randn(3000, 1, 8, 8), targets)
    ground = Ground(says(4, 0), Dataset("toy", 3, split.tail(100), split, split.tail(100), Augmentation()))
    static = next(of for of in rivals(ground) if of.name == "static")
    static.prepare(lambda: None)
    right = float((targets == 0).float().mean())
    assert [of.metric for of in static.found] == pytest.approx([right] * len(static.found))
    zero, one = (Plain([says(1, answer)], ground) for answer in (0, 1))
    front = Smaller([zero, one], ground)
    front.prepare(lambda: None)
    (best,) = front.reach(0.9)
    assert best.network is one.networks[0]


def test_plain_networks_are_one_front_and_a_row_each():
    """Three blocks are right for half of the inputs, two for a fifth, one for three tenths."""
    targets = torch.tensor([0] * 5 + [1] * 2 + [2] * 3).repeat(8)
    split = Split(torch.randn(80, 1, 8, 8), targets)
    ground = Ground(says(5, 0), Dataset("toy", 3, split, split, split, Augmentation()))
    smaller = [says(layers, answer) for layers, answer in ((1, 2), (3, 0), (2, 1), (3, 0), (1, 2), (2, 1))]
    whole, macs = ground.network.dense_macs, {len(of.points): of.dense_macs for of in smaller}
    front, *rows = [of for of in rivals(ground, smaller) if isinstance(of, Smaller | Plain)]
    assert [of.name for of in rows] == [f"plain {macs[layers] / 1e6:.3g} MMACs" for layers in (3, 2, 1)]
    assert [of.rows(BUDGETS) for of in rows] == [[None]] * 3
    found = [row.reach(None) for row in rows]
    assert [[float(of.metric.mean()) for of in seeds] for seeds in found] == [
        [pytest.approx(accuracy)] * 2 for accuracy in (0.5, 0.2, 0.3)
    ]
    assert [float(seeds[0].macs.mean()) for seeds in found] == pytest.approx([macs[n] / whole for n in (3, 2, 1)])
    front.prepare(lambda: None)
    for budget in (0.05, macs[1] / whole, macs[2] / whole, macs[3] / whole, 0.9):
        reached = front.reach(budget)
        if budget < macs[1] / whole:
            assert reached is None
            continue
        best = 1 if budget < macs[3] / whole else 3
        assert [float(of.macs.mean()) for of in reached] == pytest.approx([macs[best] / whole] * 2)
    with pytest.raises(ValueError, match="as many seeds of each smaller network, got 1 of .* MMACs, 2 of"):
        rivals(ground, smaller[2:])
    twins = [SkipResNet((1, 8, 8), 3, layers=(1,), widths=(8,), stem_stride=2).eval(), says(1, 2)]
    twins[0].dense_macs = twins[1].dense_macs
    assert [of.name for of in rivals(ground, twins) if isinstance(of, Plain)] == [rows[2].name, f"{rows[2].name} (2)"]
    points = measure(ground, [], smaller=smaller, batch_size=8)["points"]
    shown = [(p["policy"], p["runs"]) for p in points if p["budget"] is None]
    assert shown == [*((of.name, 2) for of in rows), ("oracle", 1)]
    assert {p["budget"] for p in points if p["policy"] == "smaller"} == {b for b in BUDGETS if b >= macs[1] / whole}
