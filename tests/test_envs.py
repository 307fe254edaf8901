"""Environments: Gymnasium's contract, invariant 4 (batched = single), seeds, reward terms. Cases from the registry."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from dynrl.backbones import Backbone
from dynrl.data import Augmentation, Dataset, Split
from dynrl.envs import DECISIONS, Decision
from dynrl.envs.core import RoutingVectorEnv, draw
from dynrl.envs.rewards import REWARDS, Reward, log_likelihood
from dynrl.envs.single import RoutingEnv
from dynrl.tasks import Regression
from tests.cases import REGISTERED, make_backbone, vector_env
from tests.toys import Branching, Exiting, Looping, Roundabout


def toy_dataset(name="exiting", size=23) -> Dataset:
    torch.manual_seed(3)
    split = Split(torch.randn(size, 4), torch.randint(0, 2, (size,)))
    if name == "regressing":
        numbers = torch.randn(size, 2)
        split = Split(split.inputs, numbers, Regression.of(numbers))
    return Dataset("toy", 2, split, split, split, Augmentation())


class ToyVectorEnv(RoutingVectorEnv):
    decision = "toy"


class ToyEnv(RoutingEnv):
    decision = "toy"


@pytest.fixture(autouse=True)
def _toys_are_registered(monkeypatch):
    monkeypatch.setitem(DECISIONS, "toy", Decision("toy", "dynrl/Toy-v0", "tests.test_envs:ToyVectorEnv", "", ""))


def make_vec(name, num_envs, **settings):
    if name in TOYS:
        return ToyVectorEnv(num_envs, backbone=TOYS[name], data=toy_dataset(name), **settings)
    return vector_env(name)(num_envs, **settings)


def make_single(name, **settings):
    if name in TOYS:
        return ToyEnv(backbone=TOYS[name], data=toy_dataset(name), **settings)
    return gym.make(DECISIONS[name].env_id, **settings).unwrapped


torch.manual_seed(5)
TOYS: dict[str, Backbone] = {
    "exiting": Exiting().eval(), "looping": Looping().eval(), "regressing": Looping().eval(),
    "branching": Branching().eval(), "roundabout": Roundabout().eval(),
}  # fmt: skip
CASES = [*REGISTERED, *TOYS]


@pytest.mark.parametrize("name", REGISTERED)
def test_gymnasiums_checker(name):
    env = gym.make(DECISIONS[name].env_id)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*Box observation space (minimum|maximum) value is -?infinity.*")
        check_env(env.unwrapped)


def test_an_environment_is_pickled():
    env = gym.make("dynrl/Exit-v0").unwrapped
    again = pickle.loads(pickle.dumps(env))
    assert type(again) is type(env) and np.array_equal(again.reset(seed=3)[0], env.reset(seed=3)[0])


@pytest.mark.parametrize("name", CASES)
def test_a_walk_is_rendered_until_its_end(name):
    """By hand: a line for each decision that was taken, one for the next, one for the cost; frames of one size."""
    told, drawn = (make_single(name, render_mode=mode, price=0.1) for mode in ("ansi", "rgb_array"))
    for env in (told, drawn):
        with pytest.raises(ValueError, match="reset the environment"):
            env.render()
        env.reset(seed=3)
    rng, ended, taken, sizes = np.random.default_rng(0), False, [], set()
    while not ended:
        lines = told.render().splitlines()
        assert sum("? of 0 to" in line for line in lines) == 1 and len(lines) == len(taken) + 2
        before = drawn.render()
        action = int(rng.integers(told.action_space.n))
        _, _, ended, _, info = told.step(action)
        drawn.step(action)
        taken.append(action)
        sizes |= {before.shape, drawn.render().shape}
        assert (before != drawn.render()).any()
    (height, width, colours) = sizes.pop()
    assert not sizes and colours == 3 and height >= 192 and width >= 320
    *lines, last = told.render().splitlines()
    ran = [choice for choice in info["route"].tolist() if choice >= 0]
    assert [int(line.split(" of 0 to")[0].split()[-1]) for line in lines] == ran
    metric = told._batch.task.metric
    assert last == f"spent {info['macs_fraction']:.3f} of the dense MACs at price 0.1; ended: {metric} {info[metric]:g}"


def test_the_input_is_shown_beside_the_route():
    env = gym.make_vec("dynrl/Skip-v0", num_envs=2, render_mode="rgb_array", price=1.0)
    env.reset(seed=0)
    frames, image = env.render(), env._split.inputs[env._drawn[1]]
    shown = frames[1][8:200:8, 8:200:8, 0].astype(int)  # 24x24 pixels, each 8x8 times
    raw = image[0] * env._data.deviation + env._data.mean
    assert len(frames) == 2 and np.abs(shown - 255 * raw.numpy()).max() <= 1
    assert gym.make_vec("dynrl/Skip-v0", num_envs=1).render() is None
    with pytest.raises(ValueError, match=r"unknown render_mode 'human'; expected one of ansi, rgb_array, or None"):
        make_vec("skip", 2, render_mode="human")


@pytest.mark.parametrize("name", REGISTERED)
def test_made_by_gymnasium(name):
    env = gym.make_vec(DECISIONS[name].env_id, num_envs=5)
    assert env.metadata["autoreset_mode"] is env.autoreset_mode is AutoresetMode.NEXT_STEP
    obs, _ = env.reset(seed=1)
    assert env.observation_space.contains(obs)
    env.action_space.seed(0)
    for _ in range(25):
        obs, reward, _, truncated, info = env.step(env.action_space.sample())
        assert env.observation_space.contains(obs)
        assert obs.dtype == np.float32
        assert np.isfinite(reward).all()
        assert not truncated.any()
        assert info["action_mask"].shape == (5, env.single_action_space.n)


def test_found_by_a_fresh_process_by_module_and_id():
    """All by one process, since a start takes seconds; whichever comes first imports dynrl, which registers all."""
    ids = [f"dynrl:{DECISIONS[name].env_id}" for name in REGISTERED]
    code = f"import gymnasium\nfor env in {ids}: gymnasium.make_vec(env, num_envs=2).reset(seed=0)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
@pytest.mark.parametrize("name", CASES)
def test_batched_environment_is_as_many_single_ones(name, mode):
    """Invariant 4: staggered endings, forced actions, at least three episodes each."""
    count, seed = 5, 11
    batch = make_vec(name, count, autoreset_mode=mode)
    singles = [make_single(name) for _ in range(count)]
    rng = np.random.default_rng(0)
    obs, _ = batch.reset(seed=seed)
    alone = [env.reset(seed=seed + i)[0] for i, env in enumerate(singles)]
    np.testing.assert_allclose(obs, np.stack(alone), atol=1e-5)
    episodes, ended, staggered = np.zeros(count, int), np.zeros(count, bool), False
    while episodes.min() < 3:
        actions = rng.integers(0, batch.single_action_space.n, count)
        obs, reward, terminated, _, info = batch.step(actions)
        staggered |= 0 < terminated.sum() < count
        for i, env in enumerate(singles):
            if mode is AutoresetMode.NEXT_STEP and ended[i]:
                expected, _ = env.reset()
                assert reward[i] == 0
                assert not terminated[i]
                ended[i] = False
            else:
                expected, paid, over, _, own = env.step(int(actions[i]))
                assert paid == pytest.approx(reward[i], abs=1e-5)
                assert over == terminated[i]
                for term in ("accuracy_term", "cost_term"):
                    assert own[term] == pytest.approx(info[term][i], abs=1e-5)
                if over:
                    episodes[i] += 1
                    ended[i] = True
                    assert own["macs_fraction"] == pytest.approx(info["macs_fraction"][i])
                    assert own[batch.task.metric] == pytest.approx(info[batch.task.metric][i])
                    assert own["route"].tolist() == info["route"][i].tolist()
                    if mode is AutoresetMode.SAME_STEP:
                        np.testing.assert_allclose(info["final_obs"][i], expected, atol=1e-5)
                        assert info["final_info"]["route"][i].tolist() == own["route"].tolist()
                        expected, _ = env.reset()
                        ended[i] = False
            np.testing.assert_allclose(obs[i], expected, atol=1e-5)
    assert staggered or name not in TOYS, "the toys should end at different times"


@pytest.mark.parametrize("name", CASES)
def test_returns_are_accuracy_minus_price_times_macs(name):
    env = make_vec(name, 4, autoreset_mode="SameStep", reward="log_likelihood")
    rng = np.random.default_rng(1)
    obs, _ = env.reset(seed=2)
    price = obs[:, env.sight.price].copy()
    total, spent, prices_seen = np.zeros(4), np.zeros(4), set()
    for _ in range(4 * env.backbone.max_steps):
        obs, reward, terminated, _, info = env.step(rng.integers(0, env.single_action_space.n, 4))
        total += reward
        np.testing.assert_allclose(info["accuracy_term"] + info["cost_term"], reward, atol=1e-6)
        assert ((info["accuracy_term"] == 0) | terminated).all()
        for i in range(4):
            after = info["final_obs"][i][env.sight.spent] if terminated[i] else obs[i, env.sight.spent]
            assert info["cost_term"][i] == pytest.approx(-price[i] * (after - spent[i]), abs=1e-5)
            spent[i] = after
            if terminated[i]:
                assert info["macs_fraction"][i] == pytest.approx(after)
                assert total[i] == pytest.approx(info["accuracy_term"][i] - price[i] * after, abs=1e-5)
                total[i], spent[i], price[i] = 0, 0, obs[i, env.sight.price]
                prices_seen.add(float(price[i]))
    assert len(prices_seen) > 8
    assert min(prices_seen) >= env.price_range[0] and max(prices_seen) <= env.price_range[1]


def test_a_five_line_loop_recomputes_the_returns():
    env = make_vec("skip", 3, autoreset_mode="SameStep", reward="correct", price=0.25)
    env.reset(seed=0)
    backbone, paid = env.backbone, np.zeros(3)
    actions = np.random.default_rng(0).integers(0, 2, (backbone.max_steps, 3))
    for step in actions:
        _, reward, _, _, info = env.step(step)
        paid += reward
    seeds, zeros = np.arange(3), np.zeros(3, np.int64)
    for i, image in enumerate(draw(seeds, zeros, 0) % np.uint64(1257)):
        walk = backbone.run_route(env._split.inputs[int(image)][None], torch.from_numpy(actions[:, i])[None])
        right = float(walk.outputs.argmax() == env._split.targets[int(image)])
        assert paid[i] == pytest.approx(right - 0.25 * float(walk.macs[0]) / backbone.dense_macs, abs=1e-5)


def any_times(backbone) -> dict:
    """A latency table of no machine."""
    rows = [[float(1 + 3 * point + choice**2) for choice in range(p.n)] for point, p in enumerate(backbone.points)]
    return {"start": 5.0, "choices": rows}


@pytest.mark.parametrize("name", CASES)
def test_times_may_be_charged_instead_of_macs(name):
    given = any_times(TOYS.get(name) or make_backbone(name))
    env = make_vec(name, 4, autoreset_mode="SameStep", price=0.5, times=given)
    rng, backbone = np.random.default_rng(1), env.backbone
    env.reset(seed=2)
    points = backbone.column_point.tolist()

    def of_tables(route):
        """Milliseconds and MACs of a route by the two tables."""
        ran = [(point, choice) for point, choice in zip(points, route, strict=True) if choice >= 0]
        ms = given["start"] + sum(given["choices"][point][choice] for point, choice in ran)
        return ms, backbone.start_macs + sum(int(backbone.costs[point, choice]) for point, choice in ran)

    dense, counted = of_tables(backbone.full_route)
    rate = dense / counted  # of what a family charges beyond its table
    dense += rate * (backbone.dense_macs - counted)
    paid, episodes = np.zeros(4), 0
    while episodes < 12:
        _, _, terminated, _, info = env.step(rng.integers(0, env.single_action_space.n, 4))
        paid += info["cost_term"]
        for i in np.flatnonzero(terminated):
            ms, macs = of_tables(info["route"][i].tolist())
            spent = ms + rate * (info["macs_fraction"][i] * backbone.dense_macs - macs)
            assert paid[i] == pytest.approx(-0.5 * spent / dense, rel=1e-4)
            paid[i], episodes = 0, episodes + 1


@pytest.mark.parametrize("name", REGISTERED)
def test_a_backbone_in_bf16_is_paid_in_float32(name):
    """Nearly the same rewards for the same actions, and the file's backbone, shared in a process, stays as it is."""
    wide, narrow = (make_vec(name, 8, autoreset_mode="SameStep", price=0.1, dtype=d) for d in ("float32", "bfloat16"))
    first, second = (env.reset(seed=1)[0] for env in (wide, narrow))
    np.testing.assert_allclose(first, second, atol=0.1, rtol=0.1)
    assert next(narrow.backbone.parameters()).dtype is torch.bfloat16
    assert next(wide.backbone.parameters()).dtype is torch.float32
    wide.action_space.seed(0)
    for _ in range(wide.backbone.max_steps + 1):
        actions = wide.action_space.sample()
        _, wanted, over, _, _ = wide.step(actions)
        obs, paid, ended, _, _ = narrow.step(actions)
        assert obs.dtype == paid.dtype == np.float32
        assert np.array_equal(over, ended)
        np.testing.assert_allclose(paid, wanted, atol=0.15, rtol=0.1)


def test_an_unknown_dtype_or_device_is_refused():
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        make_vec("skip", 2, dtype="int8")
    with pytest.raises(ValueError, match="no device 'xyz' here"):
        make_vec("skip", 2, device="xyz")


def test_times_that_do_not_fit_are_refused():
    given = any_times(make_backbone("skip"))
    for bad in (
        {}, {"start": 1.0}, {**given, "more": 1}, {**given, "choices": given["choices"][1:]}, {**given, "start": 0.0},
        {**given, "choices": [[1.0, float("nan")]] * len(given["choices"])}, {**given, "start": float("inf")}, [1, 2],
        {**given, "start": None}, {**given, "choices": 5}, {**given, "choices": [["a", "b"]] * len(given["choices"])},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="expected times"):
            make_vec("skip", 2, times=bad)


def test_seeds_of_any_size_are_taken():
    env = make_vec("skip", 2)
    first = {seed: env.reset(seed=seed)[0] for seed in (0, 2**63, 2**63 - 1, 2**64, 2**100 + 5)}
    assert np.array_equal(first[2**64], first[0]) and not np.array_equal(first[2**63], first[0])
    assert np.array_equal(env.reset(seed=[2**100 + 5, np.int64(-1)])[0][0], first[2**100 + 5][0])
    assert env._seeds.tolist() == [5, -1]
    for bad in ([5.5, 1], ["1", 2], [True, 0]):
        with pytest.raises(ValueError, match="seeds as whole numbers, got"):
            env.reset(seed=bad)


def test_rows_without_a_seed_go_on():
    """As in Gymnasium's own vector environments; before the first reset, they draw a seed."""
    env, other = (make_vec("skip", 4, group=2) for _ in range(2))
    first, again = env.reset(seed=[1, 1, None, None])[0], other.reset(seed=[1, 1, None, None])[0]
    np.testing.assert_allclose(first[:2], again[:2], atol=1e-6)
    np.testing.assert_allclose(first[2], first[3], atol=1e-6)
    assert np.abs(first[2:] - again[2:]).max() > 1e-3
    seeds, drawn = env._seeds.tolist(), env._drawn.clone()
    second = env.reset(seed=[None, 1, None, None])[0]
    np.testing.assert_allclose(second[1], first[1], atol=1e-6)
    assert env._seeds.tolist() == seeds
    assert env._episodes.tolist() == [2, 1, 2, 2] and not torch.equal(env._drawn, drawn)
    with pytest.raises(ValueError, match=r"expected a seed for each of 4 environments, got \(2,\)"):
        env.reset(seed=[None, 1])


def test_seeds_reproduce_and_differ():
    def trace(seed):
        env = make_vec("skip", 3)
        obs, _ = env.reset(seed=seed)
        return np.stack([obs, *(env.step(np.array([0, 1, 1]))[0] for _ in range(15))])

    assert np.array_equal(trace(4), trace(4))
    assert not np.array_equal(trace(4), trace(5))
    assert np.array_equal(trace(4)[0, 1], trace(5)[0, 0])  # sub-environment i draws by seed + i
    env = make_vec("skip", 3)
    first = env.reset(seed=4)[0]
    assert np.array_equal(env.reset(seed=[4, 5, 6])[0], first)
    assert not np.array_equal(env.reset()[0], first)  # goes on with the next episodes


def test_draws_are_even_and_unrelated():
    seeds, episodes = np.meshgrid(np.arange(200), np.arange(200))
    share = draw(seeds.ravel(), episodes.ravel(), 1) / 2.0**64
    counts = np.histogram(share, 20, (0, 1))[0]
    assert abs(counts - 2000).max() < 200
    assert abs(np.corrcoef(share[:-1], share[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(share, draw(seeds.ravel(), episodes.ravel(), 0) / 2.0**64)[0, 1]) < 0.02


def test_observations_are_fresh_every_step():
    env = make_vec("skip", 4)
    kept = [env.reset(seed=0)[0]]
    before = kept[0].copy()
    for _ in range(5):
        kept.append(env.step(np.ones(4, int))[0])
    assert np.array_equal(kept[0], before)
    assert len({o.ctypes.data for o in kept}) == len(kept)


def test_reset_mask_restarts_only_those():
    env = make_vec("exiting", 4, autoreset_mode=AutoresetMode.DISABLED)
    env.reset(seed=0)
    obs, _, terminated, _, _ = env.step(np.array([1, 0, 1, 0]))
    assert terminated.tolist() == [True, False, True, False]
    after, _ = env.reset(options={"reset_mask": terminated})
    np.testing.assert_allclose(after[[1, 3]], obs[[1, 3]])
    assert (after[[0, 2], env.sight.features] == 1).all()  # at the first point again
    env.reset(seed=7, options={"reset_mask": terminated})
    assert env._seeds.tolist() == [7, 1, 9, 3]
    for bad in (terminated[:2], np.ones(4, int)):
        with pytest.raises(ValueError, match="reset_mask is for"):
            env.reset(options={"reset_mask": bad})
    with pytest.raises(ValueError, match="reset_mask is for"):
        make_vec("exiting", 4).reset(options={"reset_mask": terminated})


@pytest.mark.parametrize("name", ["exit", "exiting", "looping"])
def test_gain_pays_each_output_what_it_adds_and_sums_up_to_the_last(name):
    gain, whole = (
        make_vec(name, 4, autoreset_mode="SameStep", reward=r, price=0.01) for r in ("gain", "log_likelihood")
    )
    for env in (gain, whole):
        env.reset(seed=0)
    rng, total, episodes, between = np.random.default_rng(0), np.zeros(4), 0, 0
    while episodes < 12:
        actions = rng.integers(0, gain.single_action_space.n, 4)
        _, _, ended, _, info = gain.step(actions)
        _, _, _, _, expected = whole.step(actions)
        total += info["accuracy_term"]
        between += int((info["accuracy_term"][~ended] != 0).sum())
        for i in np.flatnonzero(ended):
            assert total[i] == pytest.approx(expected["accuracy_term"][i], abs=1e-4)
            total[i], episodes = 0, episodes + 1
    assert (between > 0) == gain.backbone.speaks


class Squared(Reward):
    """Compute is charged by its square, and by how good the answer is."""

    def terms(self, task, output, target, dense, price, share):
        """Return both terms."""
        earned = self.accuracy(task, output, target, dense)
        return 2 * earned - price, -3 - price * share**2 * earned.exp()


OWN_COST = {
    "squared": Squared("squared", "at the end", log_likelihood),
    "squared gain": Squared("squared gain", "from output to output", log_likelihood, per_step=True),
}


@pytest.mark.parametrize("sight", ["step", "route"])
@pytest.mark.parametrize("name", ["exit", "skip"])
@pytest.mark.parametrize("reward", [*REWARDS, *OWN_COST])
def test_the_return_of_an_episode_is_what_the_terms_of_its_reward_say(reward, name, sight, monkeypatch):
    monkeypatch.setattr("dynrl.envs.rewards.REWARDS", REWARDS | OWN_COST)
    row = (REWARDS | OWN_COST)[reward]
    if row.whole_route and sight == "step":
        with pytest.raises(ValueError, match="decides upfront"):
            make_vec(name, 4, reward=reward)
        return
    env = make_vec(name, 4, autoreset_mode="SameStep", reward=reward, sight=sight, price_range=(0.5, 2.0))
    env.reset(seed=0)
    rng, met = np.random.default_rng(0), 0
    earned, paid, shape = np.zeros(4), np.zeros(4), env.action_space.shape
    drawn, prices = env._drawn.clone(), env._prices.clone()
    while met < 12:
        actions = rng.integers(0, env.sight.counts if sight == "route" else env.sight.choices, shape)
        foreseen = env.foresee(torch.from_numpy(actions)) if sight == "route" else None
        _, got, ended, _, info = env.step(actions)
        np.testing.assert_allclose(got, info["accuracy_term"] + info["cost_term"], atol=1e-6)
        earned, paid = earned + info["accuracy_term"], paid + info["cost_term"]
        for i in np.flatnonzero(ended):
            chosen, price, took = drawn[[i]], prices[[i]], torch.from_numpy(info["route"][[i]])
            walk = env.backbone.run_route(env._split.inputs[chosen], took.clamp_min(0))
            assert torch.equal(walk.route, took)
            target, dense = env._split.targets[chosen], partial(env._dense, chosen)
            share = walk.macs / env.backbone.dense_macs
            terms = row.terms(env.task, walk.outputs, target, dense, price, share)
            assert [earned[i], paid[i]] == pytest.approx([float(term) for term in terms], abs=1e-4)
            if foreseen is not None:
                assert got[i] == pytest.approx(float(foreseen[i]), abs=1e-5)
            earned[i], paid[i], met = 0, 0, met + 1
        drawn, prices = env._drawn.clone(), env._prices.clone()


def test_the_page_of_an_environment_says_what_the_registries_know():
    page = vector_env("exit").__doc__
    for said in (
        "| `distillation` |",
        "- `ExitResNet`:",
        "- `ExitModule`:",
        'gymnasium.make("dynrl/Exit-v0"',
        "| columns |",
    ):
        assert said in page


@pytest.mark.parametrize("name", REGISTERED)
def test_the_example_of_a_page_runs(name, capsys):
    code = vector_env(name).__doc__.partition("```python\n")[2].partition("```")[0]
    exec(code, {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("term", ["distillation", "log_likelihood"])
def test_a_regression_pays_what_squared_errors_cost(term):
    env = make_vec("regressing", 6, autoreset_mode="SameStep", reward=term, price=0.01)
    data, rng = toy_dataset("regressing"), np.random.default_rng(0)
    env.reset(seed=0)
    seen = 0
    while seen < 20:
        drawn = env._drawn.clone()
        *_, ended, _, info = env.step(rng.integers(0, 2, 6))
        for i in np.flatnonzero(ended):
            inputs, target = data.train.inputs[drawn[i]][None], data.train.targets[drawn[i]]
            route = torch.from_numpy(info["route"][i])[None].clamp_min(0)
            output, dense = env.backbone(inputs, route)[0], env.backbone(inputs)[0]
            error = float(((output - target) ** 2).mean())
            away = float(((output - dense) ** 2).mean()) if term == "distillation" else 0.0
            assert info["mse"][i] == pytest.approx(error, abs=1e-5)
            variance = float(data.train.targets.var(0).mean())
            assert info["accuracy_term"][i] == pytest.approx(-(error + away) / variance, abs=1e-5)
            seen += 1


def test_right_or_wrong_is_no_reward_for_numbers():
    with pytest.raises(ValueError, match="'correct' is for classes, this task's metric is mse"):
        make_vec("regressing", 2, reward="correct")


def test_one_backbone_file_is_loaded_once(small_backbone):
    a, b = (vector_env("skip")(2, backbone=small_backbone) for _ in range(2))
    assert a.backbone is b.backbone


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_envs": 0}, "num_envs of at least 1"),
        ({"num_envs": 2.0}, "num_envs as a whole number, got 2.0"),
        ({"num_envs": True}, "num_envs as a whole number, got True"),
        ({"price": "0.1"}, "a price as a number, got '0.1'"),
        ({"price": True}, "a price as a number, got True"),
        ({"price_range": (0.1, "2")}, "price range"),
        ({"price_range": "ab"}, "price range"),
        ({"num_envs": 6, "group": 4}, "a group that divides the 6"),
        ({"data": "nosuch"}, "unknown data set"),
        ({"data": 3}, "expected .*got int"),
        ({"data": np.zeros(3)}, "expected .*got ndarray"),
        ({"split": "nosuch"}, "unknown split"),
        ({"reward": "nosuch"}, "unknown accuracy term|unknown reward"),
        ({"price": 3.0}, "outside its range"),
        ({"price_range": (0.5, 0.1)}, "price range"),
        ({"price_range": (0.0, 0.1)}, "price range"),
        ({"autoreset_mode": "nosuch"}, r"unknown autoreset_mode 'nosuch'; expected one of NextStep, "),
        ({"backbone": "nosuch.safetensors"}, "no such file"),
        ({"backbone": torch.nn.Linear(2, 2)}, "expected a backbone, its file, or None for a small one, got a Linear"),
        ({"backbone": TOYS["exiting"]}, "poses 'skip', not 'toy'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        vector_env("skip")(**settings)


@pytest.mark.usefixtures("registries")
def test_pairs_of_tensors_are_data():
    env = vector_env("skip")(2, data=(torch.rand(100, 1, 16, 16), torch.arange(100) % 4))
    env.reset(seed=0)
    assert env._data.classes == 4 and env.backbone.input_shape == (1, 16, 16)


def test_more_than_is_stated_does_not_lie_over_the_price(monkeypatch):
    monkeypatch.setattr(type(TOYS["exiting"]), "observe", lambda self, state: state.features.repeat(1, 3))
    with pytest.raises(ValueError, match="observe to show at most 4 numbers of a row, its feature_width, got 12"):
        make_vec("exiting", 2).reset(seed=0)


def test_a_backbone_for_other_inputs_is_refused():
    with pytest.raises(ValueError, match="expects inputs of shape"):
        vector_env("skip")(2, backbone=vector_env("skip").default_backbone((1, 8, 8)))


def test_unknown_settings_are_refused():
    with pytest.raises(TypeError, match="nosuch"):
        vector_env("skip")(2, nosuch=1)
    with pytest.raises(ValueError, match="make_vec"):
        make_single("skip", num_envs=3)


def test_bad_actions_and_calls_are_refused():
    env = make_vec("skip", 3)
    with pytest.raises(ValueError, match="reset the environment"):
        env.step(np.zeros(3, int))
    env.reset(seed=0)
    for bad in (np.zeros(2, int), np.zeros(3), np.array([0, 1, 2]), np.array([0, -1, 0])):
        with pytest.raises(ValueError, match="expected integer actions of shape|expected actions of 0 to 1, got"):
            env.step(bad)
    with pytest.raises(ValueError, match="reset options"):
        env.reset(options={"nosuch": 1})
    with pytest.raises(ValueError, match="a seed for each"):
        env.reset(seed=[1, 2])
    single = make_single("skip")
    with pytest.raises(ValueError, match="call reset"):
        single.step(0)
    assert isinstance(single.backbone, type(make_backbone("skip")))


def test_ended_rows_are_not_stepped_on():
    """Without autoreset, as in the single environment: their rewards would be 0 without a word."""
    env = make_vec("exiting", 4, autoreset_mode=AutoresetMode.DISABLED)
    env.reset(seed=0)
    stop, go = np.ones(4, np.int64), np.zeros(4, np.int64)
    env.step(np.array([1, 0, 1, 0]))
    with pytest.raises(ValueError, match=r"the episodes of rows \[0, 2\] have ended; reset these rows first"):
        env.step(go)
    env.reset(options={"reset_mask": np.array([True, False, False, False])})
    with pytest.raises(ValueError, match=r"rows \[2\] have ended"):
        env.step_tensors(torch.from_numpy(go))
    env.reset(options={"reset_mask": np.array([False, False, True, False])})
    _, reward, ended, _, _ = env.step(stop)
    assert ended.all() and (reward != 0).all()
    env.reset()
    env.step(go)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", REGISTERED)
def test_the_programs_default_type_changes_no_episode(name, kind):
    def walk():
        env = vector_env(name)(3, price_range=(0.01, 1.0))
        seen, _ = env.reset(seed=0)
        steps = [env.step(np.ones(3, np.int64)) for _ in range(4)]
        return [seen, *(array for step in steps for array in step[:3])]

    expected = walk()
    torch.set_default_dtype(kind)
    try:
        found = walk()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(
        mine.dtype == theirs.dtype and np.array_equal(mine, theirs)
        for mine, theirs in zip(found, expected, strict=True)
    )
