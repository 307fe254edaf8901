"""Trees of modules beyond what every backbone is tested for: mixtures of leaves, what paths cost, how routers learn."""

from __future__ import annotations

import pytest
import torch

from dynrl.backbones import NeuralTree, SkipResNet
from dynrl.cost import count_macs
from dynrl.deploy import RoutedModel
from dynrl.evaluation.rules import rules_of
from dynrl.policies import StaticPolicy, ThresholdPolicy
from tests.cases import answered_by, make_policy, trained

SHAPE = dict(input_shape=(2, 12, 12), classes=5, layers=(1, 2, 1), widths=(4, 6, 8))
OWN, BOTH, OTHER = range(3)
ROWS = 40


def make(**settings) -> NeuralTree:
    torch.manual_seed(0)
    tree = trained(NeuralTree(**SHAPE, **settings))
    for router in tree.routers:
        torch.nn.init.normal_(router.weight, std=2.0)
    return tree


def inputs_of(rows: int = ROWS) -> torch.Tensor:
    return torch.randn(rows, 2, 12, 12, generator=torch.Generator().manual_seed(1))


def mixture(tree, x, route, which=0):
    """What one row gets of a tree, by recursion over its depth of 2: modules are numbered left side first."""

    def answer(module, point, size, x):
        x = tree.stages[module](x)
        if size == 1:
            return tree.heads[str(module)](x.mean((2, 3)))
        router = 3 * which + point
        right = torch.sigmoid(4 * (tree.routers[router](x.mean((2, 3))) + tree.lean[router])).item()
        halves = (module + 1, point + 1), (module + 1 + (size // 2), point + 1 + (size // 4))
        both = [lambda at=at: answer(*at, size // 2, x) for at in halves]
        if route[point] == BOTH:
            return (1 - right) * both[0]() + right * both[1]()
        return both[(right > 0.5) == (route[point] == OWN)]()

    return answer(7 * which, 0, 7, tree.stem(x.unsqueeze(0)))[0]


@pytest.mark.parametrize("fast", [False, True])
@torch.no_grad()
def test_a_row_gets_its_leaf_or_the_mixture_of_those_that_it_takes(fast):
    tree, inputs = make(), inputs_of()
    tree.lean.uniform_(-0.5, 0.5)
    run = tree.for_inference().for_inference() if fast else tree
    routes = [torch.full((ROWS, 3), choice) for choice in range(3)] + [torch.randint(0, 3, (ROWS, 3))]
    for route in routes:
        expected = torch.stack([mixture(tree, x, r) for x, r in zip(inputs, route.tolist(), strict=True)])
        torch.testing.assert_close(run(inputs, route), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fast", [False, True])
@torch.no_grad()
def test_a_forest_answers_by_the_mean_of_the_trees_that_a_row_goes_through(fast):
    forest, inputs = make(forest=3), inputs_of()
    run = forest.for_inference() if fast else forest
    route = torch.randint(0, 3, (ROWS, 11))
    route[:, (3, 7)] = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).repeat(ROWS // 4, 1)
    walk, expected = run.run_route(inputs, route), []
    for x, row in zip(inputs, route.tolist(), strict=True):
        votes = [mixture(forest, x, row[4 * tree : 4 * tree + 3], tree) for tree in range(3)]
        trees = 1 if row[3] == 0 else 2 if row[7] == 0 else 3
        expected.append(sum(votes[:trees]) / trees)
    torch.testing.assert_close(walk.outputs, torch.stack(expected), atol=1e-4, rtol=1e-4)
    assert (walk.route[0::4, 4:] == -1).all() and (walk.route[1::4, 4:] == -1).all()


@torch.no_grad()
def test_each_further_tree_costs_a_plain_network_but_its_stem_and_a_vote_may_be_the_last():
    forest, tree = make(forest=3), make()
    stem = count_macs(tree.stem, tree.input_shape)[0]
    path, soft, inputs = tree.start_macs - stem, tree.dense_macs - stem, inputs_of()
    spent = [
        (name, forest.run_route(inputs, StaticPolicy(route).route(inputs)).macs.unique().tolist())
        for name, route in forest.constant_routes()
    ]
    assert spent == [
        *(("own routers", [stem + trees * path]) for trees in (3, 2, 1)),
        *(("soft trees", [stem + trees * soft]) for trees in (2, 1)),
    ]
    assert forest.dense_macs == stem + 3 * soft


def test_a_forest_is_trained_by_the_vote_behind_each_tree():
    forest, inputs = make(forest=3), inputs_of()
    for rate in (None, torch.ones(ROWS)):
        (answers,) = forest.training_outputs(inputs, rate, torch.Generator().manual_seed(0))
        *_, two, one = (forest(inputs, StaticPolicy(r).route(inputs)) for _, r in forest.constant_routes())
        for got, expected in zip(answers, (one, two, forest(inputs)), strict=True):
            torch.testing.assert_close(got.output, expected)
            assert torch.equal(got.rows, torch.arange(ROWS))


@torch.no_grad()
def test_a_rule_takes_paths_of_trees_until_their_vote_is_sure():
    forest = make(forest=3)
    for norm in (module for module in forest.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.running_mean.zero_()  # or many leaves would say the same of all rows
    split = answered_by(forest).validation
    assert list(rules_of(make())) == ["threshold router"]
    policy_for = rules_of(forest)["threshold vote"](forest, split)
    one, two, three = (forest.start_macs + trees * int(forest.costs[3, 1]) for trees in range(3))
    assert policy_for(one / forest.dense_macs - 0.01) is None
    dearest = policy_for(three / forest.dense_macs + 0.01)
    assert (forest.run(split.inputs, dearest.chooser(forest, 0.0)).macs == three).all()
    policy = policy_for(two / forest.dense_macs)
    walk = forest.run(split.inputs, policy.chooser(forest, 0.0))
    stopped = walk.route[:, (3, 7)]
    assert set(walk.route[:, (0, 1, 2, 4, 5, 6, 8, 9, 10)].flatten().tolist()) == {-1, OWN}
    assert len(stopped.unique(dim=0)) == 3, "rows stop behind each tree"
    vote = forest(split.inputs, StaticPolicy(forest.constant_routes()[2][1]).route(split.inputs))
    assert torch.equal(stopped[:, 0] == 0, vote.softmax(1).amax(1) >= policy.thresholds[3])
    assert walk.macs.float().mean() == pytest.approx(two, rel=0.01)


@pytest.mark.parametrize("forest", [1, 2])
def test_a_limit_counts_the_looks_that_wait_on_the_right(forest):
    tree = make(forest=forest)
    policy = make_policy(tree, hidden=200, start=[BOTH])
    torch.nn.init.normal_(policy.head.weight, std=0.3)
    model, inputs = RoutedModel(tree, policy), inputs_of(8)
    free = model(inputs)
    spent = model.last_route.macs + model.last_route.router_macs
    for share in torch.linspace(tree.start_macs + 3 * model._look_macs, float(spent.max()), 60) / tree.dense_macs:
        model.set_limit(float(share))
        bound, within = model(inputs), spent <= float(share) * tree.dense_macs
        assert (model.last_route.macs + model.last_route.router_macs <= float(share) * tree.dense_macs).all()
        torch.testing.assert_close(bound[within], free[within])


@torch.no_grad()
def test_a_path_costs_a_plain_network_and_its_routers_and_both_children_one_more_way():
    tree, plain = make(), SkipResNet(**SHAPE)
    assert tree.start_macs == plain.dense_macs + 4 + 6
    one, two = (tree.run_route(inputs_of(), torch.tensor([r] * ROWS)).macs for r in ([0, 0, 0], [0, BOTH, BOTH]))
    assert (one == tree.start_macs).all() and (two - one == tree.costs[2, BOTH]).all()
    assert tree.dense_macs == tree.start_macs + int(tree.costs[:, BOTH].sum())


@torch.no_grad()
def test_a_rule_follows_routers_that_are_sure_and_mixes_where_they_are_not():
    tree, inputs = make(), inputs_of()
    half = tree.observe(tree.begin(inputs))[:, 0].median().item()
    policies = {share: ThresholdPolicy(tree, "router", torch.full((3,), share)) for share in (0.5, half, 1.1)}
    walks = {share: tree.run(inputs, policy.chooser(tree, 0.0)) for share, policy in policies.items()}
    ((name, route),) = tree.constant_routes()
    greedy = tree.run_route(inputs, StaticPolicy(route).route(inputs))
    assert name == "own routers" and torch.equal(walks[0.5].outputs, greedy.outputs)
    assert torch.equal(walks[1.1].outputs, tree(inputs))
    assert set(walks[half].route[:, 0].tolist()) == {OWN, BOTH}


def test_routers_draw_their_child_and_learn_which_is_better():
    """The answers wanted are those of the other children: routers come to prefer these."""
    tree, inputs = make(), inputs_of(400)
    with torch.no_grad():
        for router in tree.routers:
            router.weight.mul_(0.2)
        targets = tree(inputs, torch.full((400, 3), OTHER))
    tree.requires_grad_(False).routers.requires_grad_(True)
    optimizer = torch.optim.Adam(tree.routers.parameters(), 0.5)
    for step in range(20):
        (answers,) = tree.training_outputs(inputs, torch.zeros(400), torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (answers[0].output - targets).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        own, other = ((tree(inputs, torch.full((400, 3), c)) - targets).square().mean() for c in (OWN, OTHER))
    assert own < 0.5 * other


@pytest.mark.parametrize("rate", [None, 0.5])
def test_a_router_leans_towards_the_child_that_fewer_rows_come_to_while_it_is_trained(rate):
    tree, inputs = make(), inputs_of()
    rates = None if rate is None else torch.full((ROWS,), rate)
    with torch.no_grad():
        tree.lean.copy_(torch.tensor([30.0, 0.0, -30.0]))  # all rows to the right, then to the left
    for _ in tree.training_outputs(inputs, rates, torch.Generator().manual_seed(0)):
        pass
    assert tree.lean.tolist() == [30.0, 0.0, -30.0], "nothing is trained in eval mode"
    for _ in tree.train().training_outputs(inputs, rates, torch.Generator().manual_seed(0)):
        pass
    assert tree.lean[0] == pytest.approx(29.9) and tree.lean[2] == pytest.approx(-29.9)


def test_without_a_rate_the_soft_tree_is_trained():
    tree, inputs = make(), inputs_of()
    ((answer,),) = tree.training_outputs(inputs, None)
    torch.testing.assert_close(answer.output, tree(inputs))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"layers": (1,), "widths": (4,)}, "2 to 8 levels"), ({"widths": (4, 6)}, "a width for each"),
        ({"forest": 0}, "forest of at least 1"), ({"forest": 2, "classes": 1}, "classes of at least 2"),
        ({"layers": (1, 0, 1)}, "each number in layers"), ({"input_shape": (12, 12)}, "expected images"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        NeuralTree(**{**SHAPE, **settings})
