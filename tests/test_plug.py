"""Policies, their files, and the routed model: what was trained is what is deployed."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
import threading
import zipfile
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

import dynrl
from dynrl.backbones import SkipModule, SkipResNet, load_backbone
from dynrl.cost import count_macs
from dynrl.data import Split, load_dataset
from dynrl.deploy import SHIPPED, RoutedModel, shipped
from dynrl.evaluation import (
    ORACLE_PRICE,
    Usage,
    calibrate,
    collapse,
    measured_routes,
    oracle_routes,
    random_rate,
    score,
    score_routes,
    static_routes,
    static_tries,
)  # fmt: skip
from dynrl.files import read_json
from dynrl.policies import PolicySpec, RandomPolicy, Router, StaticPolicy, StepSight, load_policy, save_policy
from dynrl.policies.router import Folded, Fused
from dynrl.runs import RunFolder
from dynrl.tasks import CLASSIFICATION, Segmentation
from tests.cases import BACKBONES, REGISTERED, make_backbone, make_policy, numbers_split, vector_env
from tests.toys import Branching, Exiting, Looping, Roundabout

PRICES = (0.01, 1.0)


def make_router(backbone, hidden=64) -> Router:
    """An untrained router whose choices depend on features and price."""
    torch.manual_seed(0)
    router = make_policy(backbone, PRICES, hidden)
    with torch.no_grad():
        router.head.bias.zero_()
        router.head.weight.normal_()
        if router.hidden is not None:
            router.head.weight[1] -= 20 * router.hidden.weight[:, router.sight.price]  # a higher price runs less
    return router.eval()


def write_run(folder, backbone, router, **changes):
    folder.mkdir()
    backbone.save(folder / "backbone.safetensors")
    model = RoutedModel(backbone, router)
    curve = calibrate(model, load_dataset("digits").validation.head(64))
    metadata = {"decision": backbone.decision, "data": "digits", "backbone": backbone.fingerprint(), "curve": curve}
    save_policy(folder / "policy.safetensors", router, metadata | changes)
    return folder


@pytest.fixture
def run(tmp_path, small_backbone):
    backbone, _ = load_backbone(small_backbone)
    return write_run(tmp_path / "run", backbone, make_router(backbone))


@pytest.mark.parametrize("price", [0.01, 0.08, 1.0])
@pytest.mark.parametrize("name", REGISTERED)
def test_plugged_model_and_environment_agree(name, price):
    env = vector_env(name)(16, price=price, price_range=PRICES, autoreset_mode="Disabled", split="test")
    router, obs = make_router(env.backbone), env.reset_tensors(seed=0)
    with torch.no_grad():
        # Centred, so that no choice is everyone's; not on the spot, where rows that all look alike would be ties.
        router.head.bias -= router._scores(obs).mean(0)
        router.head.bias[1] += 0.01
    model = dynrl.plug(make_backbone(name), router)
    model.set_price(price)
    inputs = env._split.inputs[env._drawn]
    ended, actions = torch.zeros(16, dtype=torch.bool), []
    while not ended.all():
        with torch.no_grad():
            actions.append(router.act(obs))
        env._ended = None  # rows that have ended are left as they are, where a user would have to reset them
        obs, _, terminated, info = env.step_tensors(actions[-1])
        ended |= terminated
    outputs = model(inputs)
    torch.testing.assert_close(outputs, env._walk.outputs, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.last_route.actions, info["route"])
    assert torch.equal(model.last_route.macs, env._walk.macs)
    assert len(model.last_route.actions.unique()) > 1 or price != 0.08


def check_rows_one_by_one(model, inputs):
    together, route = model(inputs), model.last_route
    for i in range(len(inputs)):
        torch.testing.assert_close(model(inputs[i : i + 1])[0], together[i], atol=1e-5, rtol=1e-5)
        for field in ("actions", "macs", "router_macs"):
            assert torch.equal(getattr(model.last_route, field)[0], getattr(route, field)[i]), field
    return route


def test_a_routed_batch_is_its_rows_one_by_one(run):
    check_rows_one_by_one(dynrl.load(run), load_dataset("digits").test.inputs[:20])


@pytest.mark.parametrize("hidden", [0, 64])
@pytest.mark.parametrize(
    ("toy", "settings"), [(Exiting, ()), (Looping, ()), (Looping, (64,)), (Branching, ()), (Roundabout, ())]
)
def test_rows_may_end_part_and_meet_in_a_routed_batch(toy, settings, hidden):
    backbone = toy(*settings)
    router = make_router(backbone, hidden)
    with torch.no_grad():  # look at the features most: rows decide differently, and a loop's anew at each visit
        (router.head if router.hidden is None else router.hidden).weight[:, :4] *= 8
    model = RoutedModel(backbone.eval(), router)
    route = check_rows_one_by_one(model, torch.randn(40, 4))
    decided = route.actions >= 0
    for visits in decided.split([point.visits for point in backbone.points], 1):
        assert torch.equal(visits, visits.cumprod(1).bool()), "a row that left a loop decides there no more"
    assert len(decided.sum(1).unique()) > 1, "all rows were equally long"
    per_decision = count_macs(router, (router.sight.width,))[0]
    assert torch.equal(route.router_macs, decided.sum(1) * per_decision)
    walked = backbone.run_route(torch.randn(40, 4), route.actions.clamp_min(0))
    assert torch.equal(walked.macs, route.macs)


def test_a_policy_file_brings_a_linear_router_back(tmp_path):
    backbone = Exiting().eval()
    router = make_router(backbone, hidden=0)
    save_policy(tmp_path / "policy.safetensors", router, {})
    own = type("Mine", (Router,), {})(router.sight, router.price_range)
    with pytest.raises(ValueError, match=r"no row of POLICIES holds Mine, .* POLICIES\['NAME'\] = Mine, in a plugin"):
        save_policy(tmp_path / "own.safetensors", own, {})
    assert not (tmp_path / "own.safetensors").exists()
    again, _ = load_policy(tmp_path / "policy.safetensors")
    assert count_macs(again, (again.sight.width,))[0] == (again.sight.price + 1) * 2
    seen = torch.rand(20, router.sight.width) + 0.01
    assert torch.equal(again(seen), router(seen))


def test_the_users_inputs_and_backbone_are_left_alone(run, small_backbone):
    backbone, _ = load_backbone(small_backbone)
    inputs = torch.randn(8, *backbone.input_shape)
    kept, before = inputs.clone(), backbone.fingerprint()
    router = make_router(backbone).train()
    dynrl.plug(backbone, router)(inputs)
    assert router.training
    assert all(p.requires_grad for p in router.parameters())
    dynrl.plug(backbone, run / "policy.safetensors")(inputs)
    assert torch.equal(inputs, kept)
    assert backbone.fingerprint() == before
    assert all(p.requires_grad for p in backbone.parameters())


def test_router_macs_are_counted(run):
    model = dynrl.load(run)
    model(torch.randn(4, *model.input_shape))
    width = model.policy.sight.price + 1
    assert count_macs(model.policy, (model.policy.sight.width,))[0] == width * 64 + 64 * 2
    assert model.last_route.router_macs.tolist() == [model.backbone.max_steps * (width * 64 + 128)] * 4
    fraction = model.last_route.macs_fraction - model.last_route.router_fraction
    torch.testing.assert_close(fraction, model.last_route.macs / model.backbone.dense_macs)


def test_budgets_are_met_or_refused(run):
    model = dynrl.load(run)
    validation = load_dataset("digits").validation.head(64)
    low, high = min(m for _, m in model.curve), max(m for _, m in model.curve)
    assert high - low > 0.1
    for share in (0.25, 0.5, 0.75):
        budget = low + share * (high - low)
        model.set_budget(budget)
        assert abs(score(model, validation).macs_fraction - budget) < 0.03
    for budget in (low - 0.01, high + 0.01):
        with pytest.raises(ValueError, match=f"reaches {low:.3f} to {high:.3f}"):
            model.set_budget(budget)
    with pytest.raises(ValueError, match="outside the policy's range"):
        model.set_price(2.0)


def test_a_budget_that_the_policy_jumps_over_takes_the_cheaper_side(run):
    model = dynrl.load(run)
    model.curve = [(0.01, 0.95), (0.1, 0.9), (0.10005, 0.3), (1.0, 0.2)]
    with pytest.warns(UserWarning, match=r"no price leads to 0.5 .*jumps from 0.900 to 0.300"):
        model.set_budget(0.5)
    assert model.price == 0.10005
    model.set_budget(0.25)
    assert 0.10005 < model.price < 1.0


@pytest.mark.parametrize("hidden", [0, 16])
def test_constants_follow_weights_that_are_loaded_copied_and_pickled(small_backbone, hidden):
    backbone, inputs = load_backbone(small_backbone)[0], load_dataset("digits").test.inputs[:50]
    first, second = make_router(backbone, hidden), make_router(backbone, hidden)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(-1)
    models = [RoutedModel(backbone, router) for router in (first, second)]
    routes = []
    for model in models:
        model.set_price(0.05)
        model(inputs)
        routes.append(model.last_route.actions)
    assert not torch.equal(*routes)
    twin, brought = copy.deepcopy(models[0]), pickle.loads(pickle.dumps(models[0]))
    third = copy.deepcopy(twin)
    models[0].load_state_dict(models[1].state_dict())
    third.policy.load_state_dict(models[1].policy.state_dict())
    for model, expected in ((models[0], routes[1]), (third, routes[1]), (twin, routes[0]), (brought, routes[0])):
        model(inputs)
        assert torch.equal(model.last_route.actions, expected)


@pytest.mark.parametrize("hidden", [0, 16])
@pytest.mark.parametrize("name", REGISTERED)
def test_a_plugged_model_has_its_own_dtype_under_autocast(name, hidden):
    backbone = make_backbone(name)
    model, inputs = RoutedModel(backbone, make_router(backbone, hidden)), backbone.random_inputs(9)
    expected = model(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(inputs), expected)


def test_an_uncalibrated_policy_says_so(small_backbone):
    backbone, _ = load_backbone(small_backbone)
    with pytest.raises(ValueError, match="no calibrated budgets"):
        dynrl.plug(backbone, make_router(backbone)).set_budget(0.5)
    model = dynrl.load("skip-digits")
    for setter in (model.set_budget, model.set_price, model.set_limit):
        for wrong in ("0.5", [0.5], torch.zeros(2), None):
            if wrong is not None or setter != model.set_limit:
                with pytest.raises(ValueError, match="as a number, got"):
                    setter(wrong)
        setter(torch.tensor(0.6))
    with pytest.raises(ValueError, match="knows no price"):
        dynrl.plug(backbone, StaticPolicy(backbone.full_route)).set_price(0.1)


def test_bad_inputs_are_refused(run):
    model = dynrl.load(run)
    good = torch.randn(3, *model.input_shape)
    nan = good.clone()
    nan[1, 0, 2, 3] = torch.nan
    for bad, message in (
        (good[:0], "empty batch"), (nan, "NaN"), (good[:, :, 1:], "expected inputs of shape"),
        (good.double(), r"convert them with \.to"),
        (good[0], "expected inputs of shape"), (good.numpy(), "expected inputs of shape"), (good / 0, "infinity"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            model(bad)
    model(good)


def test_bad_policies_are_refused(run, tmp_path, small_backbone):
    backbone, _ = load_backbone(small_backbone)
    file = run / "policy.safetensors"
    whole = file.read_bytes()
    for name, content in (("cut", whole[:-10]), ("altered", whole[:-3] + b"abc"), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            dynrl.plug(backbone, tmp_path / name)
    with pytest.raises(ValueError, match="expected a policy file"):
        dynrl.plug(backbone, small_backbone)
    other = SkipResNet(backbone.input_shape, layers=(2, 2), widths=(8, 16), stem_stride=2)
    with pytest.raises(ValueError, match="another backbone"):
        dynrl.plug(other, file)
    foreign = write_run(tmp_path / "foreign", backbone, make_router(backbone), decision="exit")
    with pytest.raises(ValueError, match="decides 'exit'"):
        dynrl.plug(backbone, foreign / "policy.safetensors")
    with pytest.raises(ValueError, match="is no run folder"):
        dynrl.load(tmp_path / "nosuch")
    with pytest.raises(ValueError, match="the policy is for StepSight"):
        dynrl.plug(make_backbone("skip"), make_router(backbone))


def test_nan_in_weights_is_refused(run, small_backbone):
    backbone, _ = load_backbone(small_backbone)
    with torch.no_grad():
        backbone.fc.bias[0] = torch.nan
    with pytest.raises(ValueError, match="'fc.bias' holds NaN"):
        dynrl.plug(backbone, run / "policy.safetensors")


def test_policy_files_carry_json_and_come_back(run):
    router, metadata = load_policy(run / "policy.safetensors")
    json.dumps(metadata)
    again = dynrl.load(run).policy
    assert router.config["price_range"] == list(PRICES)
    assert all(
        torch.equal(a, b) for a, b in zip(router.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_where_compute_goes():
    """Routes known by their inputs: class 0 skips the second of three blocks, class 1 all but the first."""
    backbone = SkipResNet((1, 8, 8), classes=2, layers=(3,), widths=(4,)).eval()
    routes = torch.tensor([[1, 0, 1], [1, 0, 0]])
    inputs = torch.rand(12, 1, 8, 8)
    inputs[:, 0, 0, 0] = classes = torch.arange(12) % 3 // 2

    class ByClass(StaticPolicy):
        def route(self, seen):
            return routes[seen[:, 0, 0, 0].long()]

    usage = Usage.of(RoutedModel(backbone, ByClass([1, 1, 1])), Split(inputs, classes), shown=3)
    assert usage.distinct_routes == 2 and usage.commonest == pytest.approx(8 / 12)
    assert usage.by_column == routes.float().tolist()  # though what is fixed behind a skipped block costs the same
    assert [group["inputs"] for group in usage.groups] == [8, 4]
    assert set(usage.cheapest) < set((classes == 1).nonzero().flatten().tolist())
    assert set(usage.dearest) < set((classes == 0).nonzero().flatten().tolist())
    assert usage.groups[1]["choice_rates"] == dict(zip(usage.columns, [1.0, 0.0, 0.0], strict=True))


def test_a_policy_of_one_price_is_told_nothing_of_it(small_backbone):
    backbone = load_backbone(small_backbone)[0]
    router = make_policy(backbone, (0.3, 0.3))
    assert router.trunk(torch.full((1, router.sight.width), 0.3))[0, router.sight.price] == pytest.approx(0, abs=1e-6)
    model = dynrl.plug(backbone, router)
    assert model.price == 0.3 and len(calibrate(model, load_dataset("digits").validation)) == 1
    with pytest.raises(ValueError, match="no calibrated budgets"):
        model.set_budget(0.5)


def test_router_needs_a_price_range():
    for bad in ((0.0, 1.0), (1.0, 0.5), (0.1, float("inf"))):
        with pytest.raises(ValueError, match="0 < low <= high"):
            Router(StepSight(2, 1, 2), bad)


def test_router_never_takes_a_closed_choice_and_its_logits_stay_finite():
    router = Router(StepSight(3, 2, 4), PRICES)
    with torch.no_grad():
        router.head.weight.fill_(1e4)
    obs = torch.rand(50, router.sight.width) + 0.01
    obs[:, -4:] = torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert set(router.act(obs).flatten().tolist()) <= {1, 3}
    logits = router(obs)
    assert (logits[:, [1, 3]].abs() <= 5).all()
    assert torch.equal(logits.argmax(1) % 2, torch.ones(50, dtype=torch.int64))


@torch.no_grad()
def test_observation_holds_what_its_layout_says():
    backbone = make_backbone("skip")
    layout = StepSight.of(backbone)
    state = backbone.begin(torch.randn(3, *backbone.input_shape))
    price = torch.tensor([0.1, 0.2, 0.3])
    first = layout.see(backbone, state, price)
    assert first.shape == (3, layout.width)
    assert first[:, layout.last : layout.spent].tolist() == [[1, 0, 0]] * 3
    features = backbone.observe(state)
    torch.testing.assert_close(first[:, : features.shape[1]], features)
    assert first[:, features.shape[1] : layout.features].abs().sum() == 0
    (state,) = backbone.advance(state, torch.tensor([1, 0, 1]))
    second = layout.see(backbone, state, price)
    assert second[:, layout.last : layout.spent].tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 1]]
    assert second[:, layout.features : layout.last].argmax(1).tolist() == [1, 1, 1]
    torch.testing.assert_close(second[:, layout.spent], state.walk.macs / backbone.dense_macs)
    torch.testing.assert_close(second[:, layout.price], price)
    assert (layout.mask(second) == 1).all()


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_random_policy_draws_by_cost(rate):
    """Two choices, four unevenly priced ones, two that cost the same, and two at a step that has no third."""
    costs = torch.tensor([[9, 5, -1, -1], [1, 3, 9, 5], [7, 7, -1, -1]])
    shares = [[1.0, 0.0], [0.0, 0.25, 1.0, 0.5], [0.5, 0.5]]
    drawn = RandomPolicy(costs, rate, seed=1).route(torch.zeros(20_000, 1))
    for step, share in enumerate(shares):
        odds = [rate**s * (1 - rate) ** (1 - s) if step < 2 else 1.0 for s in share]
        expected = [p / sum(odds) for p in odds] + [0.0] * (4 - len(odds))
        found = [float((drawn[:, step] == choice).float().mean()) for choice in range(4)]
        assert found == pytest.approx(expected, abs=0.015)
        assert [p == 0 for p in found] == [p == 0 for p in expected]


def test_static_routes_of_long_walks_are_first_last_and_even():
    backbone = Looping(40).eval()
    targets = torch.randint(0, 2, (6,))
    found = static_routes(backbone, Split(torch.randn(6, 4), targets))
    assert len(found) <= static_tries(backbone) < 3 * 17
    assert found[0][0] == backbone.full_route
    assert [macs for _, macs, _ in found] == sorted((macs for _, macs, _ in found), reverse=True)
    kept = {route for route, _, _ in found}
    full = torch.tensor(backbone.full_route)
    for count in (10, 20):
        first, last, even = torch.zeros(3, 40, dtype=torch.int64)
        first[:count], last[40 - count :], even[40 // count - 1 :: 40 // count] = 1, 1, 1
        assert {tuple((mask * full).tolist()) for mask in (first, last, even)} <= kept


def test_random_and_static_policies():
    backbone = make_backbone("skip")
    inputs = torch.randn(500, *backbone.input_shape)
    with pytest.raises(ValueError, match="rate"):
        RandomPolicy(backbone.thrift, 1.5)
    model = dynrl.plug(backbone, StaticPolicy((1, 0) * (backbone.columns // 2)))
    model(inputs[:4])
    assert model.last_route.actions.tolist() == [[1, 0] * (backbone.columns // 2)] * 4
    assert model.last_route.router_macs.sum() == 0


def test_random_rate_meets_the_cost(small_backbone):
    backbone, _ = load_backbone(small_backbone)
    inputs = load_dataset("digits").validation.inputs
    for wanted in (0.5, 0.8):
        rate = random_rate(backbone, inputs, wanted)
        routes = RandomPolicy(backbone.thrift, rate, seed=9).route(inputs)
        assert float(backbone.run_route(inputs, routes).macs.double().mean()) / backbone.dense_macs == pytest.approx(
            wanted, abs=0.03
        )


def test_random_rate_of_many_choices_reaches_from_the_cheapest_to_the_dearest():
    backbone = make_backbone("channel")
    inputs = torch.zeros(200, *backbone.input_shape)
    floor = float(backbone.start_macs + backbone.costs[:, 0].sum()) / backbone.dense_macs
    for wanted in (floor + 0.005, (floor + 1) / 2, 0.995):
        policy = RandomPolicy(backbone.thrift, random_rate(backbone, inputs, wanted), seed=9)
        macs = backbone.run_route(inputs, policy.route(inputs)).macs
        assert float(macs.double().mean()) / backbone.dense_macs == pytest.approx(wanted, abs=0.01)
    assert random_rate(backbone, inputs, floor - 0.005) is None
    assert random_rate(backbone, inputs, 1.005) == 1


def test_static_search_and_oracle(small_backbone):
    backbone, _ = load_backbone(small_backbone)
    split = load_dataset("digits").validation
    found = static_routes(backbone, split)
    assert len(found) == backbone.columns + 1
    fractions = [macs for _, macs, _ in found]
    assert fractions == sorted(fractions, reverse=True)
    assert found[0][1] == pytest.approx(1)
    routes = oracle_routes(backbone, split, [route for route, _, _ in found])
    right, _, macs, _ = score_routes(backbone, routes, split)
    for _, cost, accuracy in found:
        assert float(right.mean()) >= accuracy - 1e-6
        assert float(macs.mean()) <= cost + 0.2
    ever = torch.zeros(len(split))
    for route, _, _ in found:
        ever = ever.maximum(score_routes(backbone, StaticPolicy(route).route(split.inputs), split).metric)
    assert torch.equal(right, ever)


@pytest.mark.parametrize("name", BACKBONES)
def test_routes_that_are_measured_are_plugged_ones(name):
    backbone = make_backbone(name)
    inputs, targets = backbone.random_inputs(12), torch.arange(12) % 2
    places = backbone(inputs.clone()).shape[2:]
    task = Segmentation() if places else CLASSIFICATION
    split = Split(inputs, targets.view(12, *[1] * len(places)).expand(12, *places), task)
    uniform = [(c,) * backbone.columns for c in range(backbone.num_choices)]
    found = measured_routes(backbone, split, uniform)
    assert sorted(route for route, _, _ in found) == uniform
    assert [macs for _, macs, _ in found] == sorted((macs for _, macs, _ in found), reverse=True)
    for route, macs, accuracy in found:
        plugged = score(dynrl.plug(backbone, StaticPolicy(route)), split)
        assert (plugged.macs_fraction, plugged.metric) == (pytest.approx(macs), pytest.approx(accuracy))


def test_oracle_of_a_regression():
    """No route tried is cheaper and no worse, none is better by more than the oracle's price."""
    split = numbers_split(40)
    backbone = SkipResNet(split.inputs.shape[1:], classes=1, layers=(4,), widths=(4,)).eval()
    found = static_routes(backbone, split)
    assert len(found) == backbone.columns + 1
    mse, _, macs, _ = score_routes(backbone, oracle_routes(backbone, split, [route for route, _, _ in found]), split)
    chosen = split.task.error(mse)
    for route, _, metric in found:
        each, _, cost, _ = score_routes(backbone, StaticPolicy(route).route(split.inputs), split)
        assert float(each.mean()) == pytest.approx(metric)
        error = split.task.error(each)
        assert not ((error <= chosen) & (cost < macs)).any()
        assert (chosen <= error + ORACLE_PRICE).all()
    assert len(macs.unique()) > 1


def test_score_is_the_plugged_models_accuracy(run):
    model, split = dynrl.load(run), load_dataset("digits").test
    whole = score(model, split, batch_size=77)
    assert whole.metric == pytest.approx(float((model(split.inputs).argmax(1) == split.targets).float().mean()))
    assert whole.macs_fraction == pytest.approx(float(model.last_route.macs_fraction.mean()), abs=1e-4)


WITHOUT_TRAINING_STACK = """
import sys
class Away:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in "ray stable_baselines3 tensorboard sklearn pandas matplotlib scipy tqdm tyro".split():
            raise ImportError(name)
sys.meta_path.insert(0, Away())
import torch, dynrl
model = dynrl.load(sys.argv[1])
out = model(torch.randn(5, *model.input_shape))
assert out.shape == (5, 10) and torch.isfinite(out).all()
"""


def test_deployment_needs_no_training_stack(run, tmp_path):
    """A run folder, moved, loads and runs with ray, SB3, tensorboard, scikit-learn, pandas and others away."""
    moved = shutil.copytree(run, tmp_path / "moved")
    subprocess.run([sys.executable, "-c", WITHOUT_TRAINING_STACK, str(moved)], check=True, cwd=tmp_path)


@pytest.fixture(scope="module")
def wheel_tree(tmp_path_factory):
    """What the built wheel installs, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "runs", "results", "build", "*.egg-info", ".*_cache", "__pycache__"
    )
    shutil.copytree(Path(__file__).parents[1], source, ignore=ignore)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "tree")
    return folder / "tree"


def test_the_wheel_holds_all_and_runs_without_the_training_stack(wheel_tree, run):
    tops = {p.name for p in wheel_tree.iterdir() if not p.name.endswith(".dist-info")}
    assert tops == {"dynrl"}, "envs, agents and the like must never become top-level import names"
    root = Path(__file__).parents[1]
    for folder in ("envs", "policies", "agents", "scripts"):
        sources = {p.relative_to(root) for p in (root / folder).rglob("*.py")}
        assert sources == {p.relative_to(wheel_tree / "dynrl") for p in (wheel_tree / "dynrl" / folder).rglob("*.py")}
    code = (
        f"import dynrl; assert dynrl.__file__.startswith({str(wheel_tree)!r}), dynrl.__file__\n"
        + WITHOUT_TRAINING_STACK
    )
    subprocess.run([sys.executable, "-c", code, str(run)], check=True, cwd=run, env={"PYTHONPATH": str(wheel_tree)})


@pytest.mark.parametrize(
    ("name", "kind", "hidden"),
    [(name, Folded, hidden) for name in BACKBONES for hidden in (0, 64)] + [("skip", Fused, 64)],
)
@torch.no_grad()
def test_choices_without_an_observation_are_the_routers(name, kind, hidden):
    torch.manual_seed(0)
    backbone, met = make_backbone(name), []
    inputs = backbone.random_inputs(20)
    for price in (0.01, 0.1, 1.0) * max(3, backbone.num_choices):
        router, sight = make_policy(backbone, PRICES, hidden), StepSight.of(backbone)
        for layer in router.children():
            nn.init.normal_(layer.weight)
        nn.init.zeros_(router.head.bias)
        choice = router.chooser(backbone, price)
        if kind is Fused:  # which is for where a kernel runs it
            first = router.hidden
            choice = Fused(
                backbone,
                router,
                first.weight[:, : sight.price],
                first.bias + router.told(price) * first.weight[:, sight.price],
            )

        def choose(state, price=price, router=router, choice=choice, sight=sight):
            met.append(choice(state))
            assert torch.equal(met[-1], router.act(sight.see(backbone, state, price))[:, 0])
            return met[-1]

        backbone.run(inputs, choose)
    assert len(torch.cat(met).unique()) == backbone.num_choices


@pytest.mark.parametrize("hidden", [0, 64])
@torch.no_grad()
def test_features_in_units_of_their_own_are_as_smaller_weights(hidden, tmp_path):
    backbone = make_backbone("skip")
    features = backbone.feature_width
    units = [2.0 ** (i % 5) for i in range(features)]
    router = PolicySpec.of("sequential", backbone, PRICES, hidden, units).build()
    for layer in router.children():
        nn.init.normal_(layer.weight)
    nn.init.zeros_(router.head.bias)
    without, twin = make_policy(backbone, PRICES, hidden), make_policy(backbone, PRICES, hidden)
    for other in (without, twin):
        other.load_state_dict(router.state_dict())
    (twin.head if twin.hidden is None else twin.hidden).weight[:, :features] /= torch.tensor(units)
    seen = torch.rand(50, router.sight.width)
    seen[:, router.sight.price + 1 :] = 1  # all choices are open
    assert torch.equal(router.scores(seen), twin.scores(seen))
    assert not torch.equal(router.scores(seen), without.scores(seen))
    save_policy(tmp_path / "policy.safetensors", router, {})
    again, _ = load_policy(tmp_path / "policy.safetensors")
    assert again.config["units"] == units
    inputs, chosen = backbone.random_inputs(40), []
    for policy in (router, again, twin):
        chosen.append(torch.cat([backbone.run(inputs, policy.chooser(backbone, price)).route for price in PRICES]))
        sights = [policy.sight.follow(backbone, policy.act, price) for price in PRICES]
        assert torch.equal(chosen[-1], torch.cat([backbone.run(inputs, choose).route for choose in sights]))
    assert torch.equal(chosen[0], chosen[1]) and torch.equal(chosen[0], chosen[2])
    assert len(chosen[0].unique(dim=0)) > 1 or not hidden
    for bad in (units[1:], [0.0, *units[1:]], [-1.0, *units[1:]]):
        with pytest.raises(ValueError, match=f"a unit above 0 for each of {features} features"):
            PolicySpec.of("sequential", backbone, PRICES, hidden, bad).build()
    assert "units" not in PolicySpec.of("upfront", backbone, PRICES, hidden, units).config


def test_collapsed_policies_are_told_of():
    backbone, split = make_backbone("skip"), load_dataset("digits").validation.head(64)

    def found(router):
        model = RoutedModel(backbone, router)
        calibrate(model, split)
        return collapse(model, split)

    router = make_router(backbone, hidden=0)
    with torch.no_grad():
        router.head.weight[1, router.sight.price] -= 9
    assert found(router) is None
    with torch.no_grad():
        router.head.weight[:, : router.sight.price] = 0
    assert "every input takes the same route" in found(router)
    with torch.no_grad():
        router.head.bias[1] = 99
    assert "the price changes nothing" in found(router)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", REGISTERED)
def test_a_plugged_model_runs_in_other_dtypes(name, dtype):
    """The policy stays in float32; batches of any size go through one model."""
    backbone = make_backbone(name)
    model = RoutedModel(backbone, make_router(backbone)).to(dtype)
    weights = {p.dtype for p in model.policy.parameters()}
    assert weights == {torch.float32}
    inputs = backbone.random_inputs(1024 if name == "skip" else 65)
    given = inputs.to(dtype) if inputs.is_floating_point() else inputs
    routes = model(given), model.last_route.actions
    for rows in (1, 2, 33):
        torch.testing.assert_close(model(given[:rows]), routes[0][:rows], atol=0.1, rtol=0.1)
    expected = backbone(inputs, routes[1].clamp_min(0)).detach().double()
    error = (routes[0].double() - expected).norm()
    assert float(error / routes[0].double().norm()) < (0.05 if dtype is torch.bfloat16 else 0.005)
    with pytest.raises(ValueError, match="expected inputs of"):
        model(inputs if inputs.is_floating_point() else inputs.to(dtype))


@pytest.mark.parametrize("name", shipped())
def test_the_models_that_come_with_dynrl_are_as_their_reports_say(name, monkeypatch):
    monkeypatch.chdir("/")
    folder = SHIPPED / name
    assert {f.name for f in folder.iterdir()} == {
        "backbone.safetensors", "policy.safetensors", "config.json", "report.json",
    }  # fmt: skip
    assert sum(f.stat().st_size for f in folder.iterdir()) < 1e6
    model, report = dynrl.load(name), read_json(folder / "report.json")
    points = [p for p in report["points"] if p["policy"].startswith("learned")]
    point = next((p for p in points if p["budget"] == 0.5), points[-1])
    # A policy that reaches none of the budgets of reports is in there at its lowest price.
    model.set_price(model.price_range[0]) if point["budget"] is None else model.set_budget(point["budget"])
    got = score(model, load_dataset(report["data"]).test)
    assert got.metric == pytest.approx(point["accuracy"], abs=0.006)  # two images: rounding differs between machines
    assert got.macs_fraction == pytest.approx(point["macs_fraction"], abs=0.01)
    assert got.metric > min(0.97, report["dense"]["accuracy"])  # not all tasks are learned as well as digits
    # A family that is not asked for half of the MACs is judged above where it spends most, and here nearest to half.
    near = min(points, key=lambda p: abs(p["macs_fraction"] - 0.5))
    (chance,) = (p for p in report["points"] if p["policy"] == "random" and p["budget"] == near["budget"])
    assert near["accuracy"] > min(0.97, chance["accuracy"])


def test_one_model_for_each_decision_comes_with_dynrl():
    assert {RunFolder(SHIPPED / name).decision for name in shipped()} == set(REGISTERED)
    assert dynrl.load("skip-digits/").curve == dynrl.load(Path("skip-digits")).curve
    for bad in ("nosuch", "/skip-digits"):
        with pytest.raises(ValueError, match="nor one of the models that come with dynrl"):
            dynrl.load(bad)


@torch.inference_mode()
def test_what_is_plugged_stays_as_it_is_in_training():
    """Inside a larger model whose `train()` is called: batch norm would change for good."""
    block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Dropout(0.5))
    backbone = SkipModule(nn.Sequential(block, nn.Flatten(), nn.Linear(192, 4)).eval(), (3, 8, 8), ["0"])
    model, inputs = RoutedModel(backbone, StaticPolicy((1,))), torch.randn(9, 3, 8, 8)
    expected = model(inputs).clone()
    nn.Sequential(model).train()
    torch.testing.assert_close(model(inputs), expected)
    torch.testing.assert_close(model.eval()(inputs), expected)


def test_compiled_models_run_as_they_are_and_say_so():
    """Their steps depend on values: compiled, they took many recompilations, or an error of the compiler."""
    model, inputs = dynrl.load("exit-digits"), load_dataset("digits").test.inputs[:50]
    torch._dynamo.reset()
    compiled = torch.compile(model)
    for price in model.price_range:
        model.set_price(price)
        expected = model(inputs)
        with pytest.warns(UserWarning, match=r"runs as it is under torch\.compile.*model\.capture.*model\.export"):
            assert torch.equal(compiled(inputs), expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"runs as it is under torch\.compile.*model\.capture"):
        torch.compile(model, fullgraph=True)(inputs)


@pytest.mark.parametrize("name", shipped())
def test_outputs_are_normal_tensors_without_a_graph(name):
    model = dynrl.load(name)
    inputs = model.backbone.random_inputs(8)
    inputs.requires_grad_(inputs.is_floating_point())
    outputs = model(inputs)
    expected, walk = outputs.clone(), model.walk(inputs)
    assert not outputs.requires_grad
    outputs[:, 3] = -torch.inf
    walk.outputs.mul_(2)
    route = model.last_route
    for tensor in (route.actions, route.macs, route.router_macs, walk.route, walk.macs):
        tensor.add_(1)
    assert torch.equal(model(inputs), expected), "nothing of the model was written to"
    classes = expected.shape[1]
    head = nn.Linear(classes, 3)
    head(model(inputs)).square().sum().backward()
    student = nn.Linear(classes, classes)
    nn.functional.kl_div(student(expected).log_softmax(1), model(inputs).softmax(1), reduction="batchmean").backward()
    assert head.weight.grad.abs().sum() > 0 and student.weight.grad.isfinite().all()
    with torch.inference_mode():
        assert torch.equal(model(inputs), expected)


@pytest.mark.parametrize("name", ["skip-digits", "exit-digits", "hidden-update-sequential-digits"])
def test_threads_share_a_model(name, switching):
    """Each call has one price and one limit, which it takes at its begin, and each thread its own last route."""
    model = dynrl.load(name)
    batches = {size: torch.randn(size, *model.input_shape) for size in (5, 16)}
    known, settings = {size: [] for size in batches}, list(product(model.price_range, (None, 0.6)))
    for price, limit in settings:
        model.set_price(price)
        model.set_limit(limit)
        for size, inputs in batches.items():
            walk = model.walk(inputs)
            known[size].append((walk.route, walk.outputs))
    assert len({str(route.tolist()) for route, _ in known[16]}) >= 3
    done, wrong = threading.Event(), []

    def flip():
        while not done.is_set():
            for price, limit in settings:
                model.set_price(price)
                model.set_limit(limit)

    def call(size):
        for _ in range(40):
            walk = model.walk(batches[size])
            outputs, route = model(batches[size]), model.last_route.actions
            for ran, said in ((walk.route, walk.outputs), (route, outputs)):
                if not any(torch.equal(ran, r) and torch.allclose(said, o, atol=1e-5) for r, o in known[size]):
                    wrong.append((size, ran))

    threads = [threading.Thread(target=call, args=(size,)) for size in batches]
    flipping = threading.Thread(target=flip)
    for thread in (flipping, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    flipping.join()
    assert not wrong
    seen = []
    thread = threading.Thread(target=lambda: seen.append(model.last_route))
    thread.start()
    thread.join()
    assert seen == [None], "another thread has called nothing yet"


@pytest.fixture
def switching():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def default_type():
    """A function that sets the program's default type, until the test ends."""
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", shipped())
def test_the_programs_default_type_changes_nothing(name, kind, default_type):
    inputs = dynrl.load(name).backbone.random_inputs(9)
    model = dynrl.load(name)
    budget = sum(cost for _, cost in model.curve) / len(model.curve)
    model.set_budget(budget)
    expected, route = model(inputs), model.last_route
    default_type(kind)
    model = dynrl.load(name)
    model.set_budget(budget)
    assert torch.equal(model(inputs), expected) and torch.equal(model.last_route.actions, route.actions)
    assert torch.equal(model.last_route.macs_fraction, route.macs_fraction)


@pytest.mark.parametrize("name", shipped())
def test_a_converted_backbone_fits_or_its_type_is_named(name):
    run = SHIPPED / name
    backbone, _ = load_backbone(run / "backbone.safetensors")
    expected = dynrl.plug(backbone, run / "policy.safetensors")
    inputs = backbone.random_inputs(9)
    wide = dynrl.plug(copy.deepcopy(backbone).double(), run / "policy.safetensors")
    given = inputs.double() if inputs.is_floating_point() else inputs
    torch.testing.assert_close(wide(given).float(), expected(inputs), atol=1e-4, rtol=1e-4)
    for narrow in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match=f"backbone of torch.float32, this one is of {narrow}: plug"):
            dynrl.plug(copy.deepcopy(backbone).to(narrow), run / "policy.safetensors")
