"""The agents of RLlib: advantages, runners, known answers, TensorBoard, remote workers."""

from __future__ import annotations

import math
import shutil
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from dynrl.agents.base import Agent, feature_units, open_agent, train_policy
from dynrl.agents.baselines import BASELINES, gae, group_advantages
from dynrl.agents.metrics import TrainingLog, ended_episodes, episode_scalars
from dynrl.agents.ppo import SlabGAE, ppo_config
from dynrl.agents.rllib import RouterModule, router_of
from dynrl.agents.slab import Slab, SlabRunner
from dynrl.backbones import Point, SkipResNet, load_backbone
from dynrl.data import Augmentation, Dataset, Split, load_dataset
from dynrl.deploy import RoutedModel
from dynrl.evaluation import score
from dynrl.policies import PolicySpec, StaticPolicy
from dynrl.settings import Learning, Place, Problem, Settings
from tests.cases import make_backbone, numbers_split

PRICES = [0.01, 1.0]
GROUP = BASELINES["group"].group


def config_for(backbone, path, **changes):
    spec = PolicySpec.of("sequential", backbone, PRICES, hidden=64)
    env = {"backbone": str(path), "price_range": PRICES, "reward": "log_likelihood"}
    return ppo_config("dynrl/Skip-v0", env, spec, **{"num_envs": 8, "rollout": 12, **changes})


def connector(lambda_=1.0, baseline="value"):
    return SlabGAE(gamma=1.0, lambda_=lambda_, baseline=BASELINES[baseline])


@pytest.fixture
def runner(small_backbone):
    backbone, _ = load_backbone(small_backbone)
    return SlabRunner(config=config_for(backbone, small_backbone), worker_index=0, num_workers=0)


def test_advantages_in_five_lines_of_numpy():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(13, 4)), rng.normal(size=(14, 4))
    ended = rng.random((13, 4)) < 0.3
    got = gae(*(torch.from_numpy(a) for a in (rewards, values, ended)), 0.97, 0.9)
    for n in range(4):
        for t in range(13):
            expected, weight = 0.0, 1.0
            for k in range(t, 13):
                following = 0.0 if ended[k, n] else values[k + 1, n]
                expected += weight * (rewards[k, n] + 0.97 * following - values[k, n])
                weight *= 0.97 * 0.9
                if ended[k, n]:
                    break
            assert float(got[t, n]) == pytest.approx(expected, abs=1e-5)


def test_advantages_in_groups_by_a_plain_loop():
    """Sub-environments whose episodes end when they like; two groups of four."""
    rng, (steps, count, group) = np.random.default_rng(1), (15, 8, 4)
    rewards, ended = rng.normal(size=(steps, count)), rng.random((steps, count)) < 0.35
    number = np.concatenate([np.zeros((1, count), int), np.cumsum(ended, 0)[:-1]]) + 5
    got, kept = group_advantages(*map(torch.from_numpy, (rewards, ended, number)), group)
    learned_from = 0
    for n in range(count):
        for t in range(steps):
            mine = number[t, n]
            peers = [number[:, m] == mine for m in range(n // group * group, n // group * group + group)]
            over = [
                bool((ended[:, m] & peer).any())
                for m, peer in zip(range(n // group * group, n // group * group + group), peers, strict=True)
            ]
            whole = all(over)
            assert bool(kept[t, n]) == (whole and n % group > 0)
            if whole:
                earned = [rewards[peer, n // group * group + i].sum() for i, peer in enumerate(peers)]
                assert float(got[t, n]) == pytest.approx(earned[n % group] - np.mean(earned))
                learned_from += int(kept[t, n])
    assert 10 < learned_from < steps * count


def test_a_group_meets_one_input_and_its_first_takes_the_likeliest_route(small_backbone):
    backbone, _ = load_backbone(small_backbone)
    config = config_for(backbone, small_backbone, num_envs=2 * GROUP, rollout=6, baseline="group")
    runner = SlabRunner(config=config, worker_index=0, num_workers=0)
    steps = backbone.max_steps
    slab, second = runner.sample(num_timesteps=2 * GROUP * (2 * steps + 1))[0], runner.sample(num_timesteps=1)[0]
    for first in (0, steps):  # of an episode: all are as long
        starts = slab.obs[first].view(2, GROUP, -1)
        assert torch.equal(starts, starts[:, :1].expand_as(starts))
        assert not torch.equal(starts[0, 0], starts[1, 0])
    likeliest = slab.logits.argmax(-1)
    assert torch.equal(slab.actions[:, ::GROUP], likeliest[:, ::GROUP])
    assert not torch.equal(slab.actions, likeliest)
    assert torch.equal(slab.episodes[:, 0], torch.tensor([0] * steps + [1] * steps + [2]))
    assert (second.episodes == 0).all(), "what the first slab cut begins anew"
    module = RouterModule(
        observation_space=runner.env.single_observation_space, action_space=runner.env.single_action_space,
        model_config=runner.config.rl_module_spec.model_config, inference_only=False,
    )  # fmt: skip
    batch = connector(baseline="group")(rl_module={"default_policy": module}, batch={}, episodes=[slab])
    assert {len(column) for column in batch["default_policy"].values()} == {2 * steps * 2 * (GROUP - 1)}
    with pytest.raises(ValueError, match=f"expected {GROUP} x n environments .--num-envs., got 12"):
        config_for(backbone, small_backbone, num_envs=12, baseline="group")


def test_the_likeliest_action_is_the_deployed_ones_beyond_the_cap(small_backbone):
    """There all logits are equal by rounding."""
    backbone, _ = load_backbone(small_backbone)
    config = config_for(backbone, small_backbone, num_envs=GROUP, rollout=3, baseline="group")
    runner = SlabRunner(config=config, worker_index=0, num_workers=0)
    net = runner.module.net
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.copy_(torch.tensor([300.0, 400.0]))
    (slab,) = runner.sample(num_timesteps=3 * GROUP)
    assert torch.equal(slab.logits, torch.full_like(slab.logits, 5.0))
    assert (slab.actions[:, 0] == 1).all() and (net.act(slab.obs[0]) == 1).all()
    assert (slab.actions == 0).any(), "others are drawn from equal logits"


def test_large_features_are_measured_once_and_divided_by_a_power_of_two(monkeypatch, tmp_path):
    backbone, split = make_backbone("skip"), load_dataset("digits").validation
    assert feature_units(backbone, split) is None
    observe, scales = SkipResNet.observe, torch.ones(backbone.feature_width)
    scales[3] = 1000.0
    monkeypatch.setattr(
        SkipResNet, "observe", lambda self, state: (seen := observe(self, state)) * scales[: seen.shape[1]]
    )
    units = feature_units(backbone, split)
    assert units[3] > 64 and math.log2(units[3]).is_integer() and units[:3] + units[4:] == [1.0] * (len(units) - 1)
    seen = list[torch.Tensor]()
    choose = StaticPolicy(backbone.full_route).chooser(backbone, 1.0)
    backbone.run(
        split.inputs[:256], lambda state: (seen.append(backbone.observe(state)[:, 3].detach()), choose(state))[1]
    )
    assert 0.1 < float(torch.cat(seen).square().mean().sqrt()) / units[3] < 10

    file = tmp_path / "backbone.safetensors"
    backbone.save(file)
    agents = [
        open_agent(
            Settings(Problem("skip", "digits"), Learning(agent, price_range=PRICES)), file, tmp_path / "run", 100
        )
        for agent in ("gate", "sb3-ppo")
    ]
    assert agents[0].ground_on(backbone).spec.build().units.tolist() == units
    scales[3] = 1.0
    assert agents[1].ground_on(backbone).spec.build().units.tolist() == units, "a run that goes on keeps its own"
    suggesting = make_backbone("look")
    monkeypatch.setattr(
        type(suggesting), "observe", lambda self, state: torch.full((state.count, self.feature_width), 99.0)
    )
    found = feature_units(suggesting, load_dataset("digit-scenes").validation.head(8))
    assert found == [128.0] * (suggesting.feature_width - suggesting.suggested) + [1.0] * suggesting.suggested


def exit_config(**changes):
    backbone = make_backbone("exit")
    config = config_for(backbone, "unused", **changes)
    config.environment("dynrl:dynrl/Exit-v0")
    config.env_config |= {"backbone": backbone, "data": load_dataset("digits")}
    return config


def test_groups_whose_routes_differ_in_length_stay_together():
    """The likeliest route is longer or shorter than drawn ones: rows that went on would drift apart without end."""
    runner = SlabRunner(
        config=exit_config(num_envs=4 * GROUP, rollout=12, baseline="group"), worker_index=0, num_workers=0
    )
    for _ in range(12):
        slab = runner.sample(num_timesteps=4 * GROUP * 12)[0]
        assert slab.terminateds[:3].any() and not slab.terminateds[-1].all()  # they do differ
        _, kept = group_advantages(slab.rewards, slab.terminateds, slab.episodes, GROUP)
        assert kept.float().mean() > 0.4


@pytest.mark.parametrize("asked", [{"num_episodes": 40}, {"num_timesteps": 2 * GROUP * 9}])
@pytest.mark.parametrize("baseline", ["value", "group"])
def test_which_walks_are_logged_does_not_depend_on_their_length(baseline, asked):
    """By a plain loop over the slab, row by row."""
    config = exit_config(num_envs=2 * GROUP, rollout=9, baseline=baseline)
    runner = SlabRunner(config=config, worker_index=0, num_workers=0)
    looks, rows = runner.env.backbone.max_steps, range(2 * GROUP)
    if baseline == "group":
        rows = [row for row in rows if row % GROUP]  # the first takes the likeliest route
        most = 9 // looks
    else:
        most = 9
    if "num_episodes" in asked:
        most = -(-40 // len(rows))
    nn.init.zeros_(runner.module.net.head.bias)  # no choice is favoured: short walks and long ones
    torch.manual_seed(0)
    slab, logged, left = runner.sample(**asked)[0], [], []
    for row in rows:
        ends = (slab.terminateds[:, row].nonzero().flatten() + 1).tolist()
        walks = [(end - start, float(slab.rewards[start:end, row].sum())) for start, end in pairwise([0, *ends])]
        assert len(walks) >= most or (baseline == "value" and "num_timesteps" in asked)
        logged += walks[:most]
        left += walks[most:]
    assert len({length for length, _ in logged}) > 1
    assert bool(left) == (baseline == "group" or "num_episodes" in asked)
    length, earned = np.mean(logged, 0)
    assert runner.metrics.peek("episode_len_mean") == pytest.approx(length)
    assert runner.metrics.peek(("route", "reward")) == pytest.approx(earned, abs=1e-5)


def test_workers_of_all_seeds_meet_inputs_of_their_own(small_backbone):
    backbone, _ = load_backbone(small_backbone)
    met = []
    for seed, worker in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        config = config_for(backbone, small_backbone, seed=seed, num_env_runners=worker)
        runner = SlabRunner(config=config, worker_index=worker, num_workers=worker)
        runner.sample(num_timesteps=8)
        met.append(set(runner.env.unwrapped._seeds.tolist()))
    assert all(len(one) == 8 for one in met)
    assert not any(one & other for i, one in enumerate(met) for other in met[:i])


@pytest.mark.usefixtures("ray_local")
def test_the_entropy_bonus_goes_on_after_a_restart(small_backbone):
    backbone, _ = load_backbone(small_backbone)
    algorithm = config_for(backbone, small_backbone, total_steps=1000, entropy=0.01).build_algo()
    learner = algorithm.learner_group._learner
    learner.before_gradient_based_update(timesteps={"num_env_steps_sampled_lifetime": 900})
    found = learner.entropy_coeff_schedulers_per_module["default_policy"].get_current_value()
    algorithm.stop()
    assert float(found) == pytest.approx(0.01 - 0.9 * 0.009)


def test_the_slab_is_what_the_environment_did(runner):
    first, second = runner.sample(num_timesteps=40)[0], runner.sample(num_timesteps=40)[0]
    assert len(first) == len(second) == 40
    assert torch.equal(first.last_obs, second.obs[0])
    env, layout = runner.env.unwrapped, runner.env.unwrapped.sight
    obs = torch.cat([first.obs, second.obs])
    ended, actions = torch.cat([first.terminateds, second.terminateds]), torch.cat([first.actions, second.actions])
    rewards = torch.cat([first.rewards, second.rewards])
    replay = env.reset_tensors([int(s) for s in env._seeds])
    for t in range(10):
        torch.testing.assert_close(replay, obs[t])
        replay, paid, over, _ = env.step_tensors(actions[t])
        torch.testing.assert_close(paid, rewards[t])
        assert torch.equal(over, ended[t])
    # Points count up to the end of an episode, then start again: no step lost, none invented.
    points = obs[..., layout.features : layout.last].argmax(-1)
    steps = env.backbone.max_steps
    assert torch.equal(points, (torch.arange(10) % steps).unsqueeze(1).expand(-1, 8))
    assert torch.equal(ended, (torch.arange(10) % steps == steps - 1).unsqueeze(1).expand(-1, 8))


def test_a_regression_is_logged_by_its_own_metric():
    backbone, split = SkipResNet((1, 8, 8), classes=1, layers=(1,), widths=(4,)).eval(), numbers_split(9)
    config = config_for(backbone, "unused")
    config.env_config |= {"backbone": backbone, "data": Dataset("numbers", 1, split, split, split, Augmentation())}
    runner = SlabRunner(config=config, worker_index=0, num_workers=0)
    (slab,) = runner.sample(num_timesteps=80)
    assert torch.isfinite(slab.rewards).all()
    shown = runner.get_metrics()["route"]
    assert set(shown) == {"mse", "macs_fraction", "price", "reward", "routes/distinct", "rate/layer1.0"}


def test_what_each_class_spends_is_logged():
    over = {
        "accuracy": torch.tensor([1.0, 0.0, 1.0, 1.0]), "macs_fraction": torch.tensor([0.2, 0.6, 0.4, 0.9]),
        "route": torch.tensor([[0], [1], [0], [1]]), "return": torch.zeros(4), "target": torch.tensor([3, 0, 3, 70]),
    }  # fmt: skip
    shown = episode_scalars(over, [Point("layer1.0", 2)])
    by_class = {tag: value for tag, value in shown.items() if tag.startswith("macs_by_class")}
    assert by_class == {"macs_by_class/3": pytest.approx(0.3), "macs_by_class/0": pytest.approx(0.6)}  # 70: too many


def test_classes_in_the_log_are_those_of_the_inputs_that_ended(runner):
    env = runner.env.unwrapped
    env.reset_tensors(0)
    met = []
    for _ in range(2 * env.backbone.max_steps):
        drawn = env._drawn.clone()
        *_, info = env.step_tensors(torch.ones(env.num_envs, dtype=torch.int64))
        if "route" in info:
            met.append((ended_episodes(env, info, torch.zeros(env.num_envs))["target"], env._split.targets[drawn]))
    assert len(met) == 2
    assert all(torch.equal(logged, expected) for logged, expected in met)


def test_exploration_draws_from_the_policys_distribution(runner):
    with torch.no_grad():
        runner.module.net.head.weight.zero_()
        runner.module.net.head.bias.copy_(torch.tensor([0.0, 1.0]))
    slab = runner.sample(num_timesteps=8000)[0]
    share = torch.sigmoid(5 * torch.tanh(torch.tensor(0.2)))  # the router caps its logits at 5
    assert float(slab.actions.float().mean()) == pytest.approx(float(share), abs=0.02)
    expected = torch.log(torch.where(slab.actions == 1, share, 1 - share))
    torch.testing.assert_close(slab.logp, expected, atol=1e-4, rtol=1e-4)
    greedy = runner.sample(num_episodes=8, explore=False)[0]
    assert (greedy.actions == 1).all()
    assert int(greedy.terminateds.sum()) >= 8
    assert len(runner.sample(num_timesteps=24, random_actions=True)[0].actions.unique()) == 2


def test_the_connector_hands_every_step_to_the_learner_once(runner):
    slab = runner.sample(num_timesteps=96)[0]
    module = RouterModule(
        observation_space=runner.env.single_observation_space, action_space=runner.env.single_action_space,
        model_config=runner.config.rl_module_spec.model_config, inference_only=False,
    )  # fmt: skip
    batch = connector(0.95)(rl_module={"default_policy": module}, batch={}, episodes=[slab, slab])
    columns = batch["default_policy"]
    assert {len(c) for c in columns.values()} == {192}
    assert float(columns["advantages"].mean()) == pytest.approx(0, abs=1e-5)
    assert float(columns["advantages"].std()) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(columns["obs"].sum(0), 2 * slab.obs.flatten(0, 1).sum(0), rtol=1e-3, atol=1e-3)
    # With lambda and gamma 1 a value target is the sum of the episode's remaining rewards.
    exact = connector()(rl_module={"default_policy": module}, batch={}, episodes=[slab])
    steps = runner.env.unwrapped.backbone.max_steps
    assert len(slab.rewards) % steps == 0, "the slab should end with an episode"
    rest = slab.rewards.view(-1, steps, 8).flip(1).cumsum(1).flip(1).flatten()
    got = exact["default_policy"]["value_targets"].sort().values
    torch.testing.assert_close(got, rest.sort().values, atol=1e-4, rtol=1e-4)


def test_next_step_environments_are_refused(small_backbone):
    backbone, _ = load_backbone(small_backbone)
    config = config_for(backbone, small_backbone)
    config.env_config["autoreset_mode"] = "NextStep"
    with pytest.raises(ValueError, match="SameStep"):
        SlabRunner(config=config, worker_index=0, num_workers=0)


@pytest.mark.parametrize(("count", "baseline"), [(9, "value"), (8, "group")])
def test_learners_that_cannot_share_are_refused(count, baseline, small_backbone):
    backbone, _ = load_backbone(small_backbone)
    with pytest.raises(ValueError, match=f"got {count}"):
        config_for(backbone, small_backbone, num_learners=2, num_envs=count, baseline=baseline)


def test_learners_share_the_environments(small_backbone):
    backbone, _ = load_backbone(small_backbone)
    config = config_for(backbone, small_backbone, num_envs=32, num_learners=2, baseline="group")
    slabs = SlabRunner(config=config, worker_index=0, num_workers=0).sample()
    assert [len(slab) for slab in slabs] == [12 * 16, 12 * 16]
    whole = config_for(backbone, small_backbone, num_envs=32, baseline="group")
    (slab,) = SlabRunner(config=whole, worker_index=0, num_workers=0).sample()
    assert vars(slab).keys() == vars(slabs[0]).keys()
    for name in ("obs", "rewards", "episodes", "last_obs"):
        shape = getattr(slab, name).shape
        assert torch.cat([getattr(s, name) for s in slabs], 0 if name == "last_obs" else 1).shape == shape
    # Drawn by the same seeds up to the first choice.
    assert torch.equal(torch.cat([s.obs[0] for s in slabs]), slab.obs[0])


def test_slabs_stay_whole_in_rllibs_hands():
    import tree

    slab = Slab({"rewards": torch.zeros(2, 3)}, torch.zeros(3))
    assert tree.flatten([slab]) == [slab]
    assert len(slab) == 6


def train(algorithm, iterations):
    for _ in range(iterations):
        result = algorithm.train()
    return result


@pytest.mark.usefixtures("ray_local")
def test_a_high_price_skips_all_and_no_price_keeps_what_accuracy_needs(small_backbone):
    """Invariant 5: the same policy, told the two ends of its price range."""
    backbone, _ = load_backbone(small_backbone)
    config = config_for(backbone, small_backbone, num_envs=64, rollout=24, learning_rate=5e-3, total_steps=40_000)
    config.env_config["price_range"] = config.rl_module_spec.model_config["spec"].config["price_range"] = [1e-4, 30.0]
    config.env_config["reward"] = "distillation"
    algorithm = config.build_algo()
    train(algorithm, 26)
    model, test = RoutedModel(backbone, router_of(algorithm)), load_dataset("digits").test
    algorithm.stop()
    model.set_price(30.0)
    cheapest = score(model, test)
    model.set_price(1e-4)
    best = score(model, test)
    nothing = torch.zeros(1, backbone.max_steps, dtype=torch.int64)
    floor = int(backbone.run_route(test.inputs[:1], nothing).macs[0]) / backbone.dense_macs
    assert cheapest.macs_fraction - cheapest.router_fraction == pytest.approx(floor, abs=0.02)
    assert best.macs_fraction > 0.9
    assert best.metric > cheapest.metric + 0.05


class TwoKinds(SkipResNet):
    """A network whose gated block is needed by inputs with a bright first pixel and ruins the others' answer."""

    def __init__(self) -> None:
        super().__init__((1, 4, 4), classes=2, layers=(1,), widths=(4,))
        self.config = {}

    def _head(self, x: torch.Tensor) -> torch.Tensor:
        ran, kind = x[:, 0, 0, 0] > 50, x[:, 1, 0, 0] > 0.5
        return 4.0 * nn.functional.one_hot((ran != kind).long(), 2).float()  # class 0 where the route fits the kind


def two_kinds() -> tuple[TwoKinds, Dataset]:
    torch.manual_seed(0)
    backbone = TwoKinds().eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.zero_()
        for norm in (m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.fill_(1)
        backbone.conv1.weight[1, 0, 1, 1] = 1  # channel 1 shows the input
        backbone._blocks[0].bn2.bias[0] = 100  # a row that ran is marked in channel 0
    bright = (torch.arange(64) % 2).float().view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    split = Split(bright, torch.zeros(64, dtype=torch.int64))
    return backbone, Dataset("kinds", 2, split, split, split, Augmentation())


def assert_two_routes(config, backbone, data, iterations):
    """Trained by `config`, the policy runs the block for the inputs that need it and for no others."""
    config.env_config |= {"backbone": backbone, "data": data}
    algorithm = config.build_algo()
    train(algorithm, iterations)
    model = RoutedModel(backbone, router_of(algorithm))
    algorithm.stop()
    model.set_price(0.05)
    model(data.test.inputs)
    assert torch.equal(model.last_route.actions[:, 0], torch.arange(64) % 2)


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("baseline", ["value", "group"])
def test_two_kinds_of_inputs_get_two_routes(baseline):
    backbone, data = two_kinds()
    settings = {"learning_rate": 1e-2, "total_steps": 20_000, "baseline": baseline}
    config = config_for(backbone, "unused", num_envs=64, rollout=8, **settings)
    assert_two_routes(config, backbone, data, iterations=25)


@pytest.mark.usefixtures("ray_local")
def test_stock_rllib_trains_on_the_registered_id():
    from ray.rllib.algorithms.ppo import PPOConfig

    config = (
        PPOConfig()
        .environment("dynrl:dynrl/Skip-v0", env_config={"reward": "correct"})
        .env_runners(num_env_runners=0, num_envs_per_env_runner=8, gym_env_vectorize_mode="vector_entry_point")
        .training(train_batch_size_per_learner=96, minibatch_size=48, num_epochs=1)
    )
    algorithm = config.build_algo()
    result = algorithm.train()
    algorithm.stop()
    assert result["env_runners"]["num_env_steps_sampled_lifetime"] >= 96
    assert result["env_runners"]["episode_len_mean"] == make_backbone("skip").max_steps


@pytest.mark.usefixtures("ray_local")
def test_one_rare_and_bad_draw_does_not_flip_a_settled_policy(small_backbone):
    """After a long time of next to no gradient Adam's memory is empty; see `ADAM_EPSILON`."""
    backbone, _ = load_backbone(small_backbone)
    algorithm = config_for(backbone, small_backbone).build_algo()
    learner = algorithm.learner_group._learner
    ((_, optimizer),) = learner.get_optimizers_for_module("default_policy")
    parameters = list(optimizer.param_groups[0]["params"])
    before = [p.detach().clone() for p in parameters]
    for size in (*[1e-9] * 2000, 1e-6):
        for p in parameters:
            p.grad = torch.full_like(p, size)
        optimizer.step()
    moved = max(float((p - b).abs().max()) for p, b in zip(parameters, before, strict=True))
    rate = optimizer.param_groups[0]["lr"]
    algorithm.stop()
    # Torch's default would move each weight by some 200 and 3 times the learning rate.
    assert 0 < moved < rate


@pytest.mark.usefixtures("ray_local")
def test_remote_runners_find_the_environment(small_backbone):
    backbone, _ = load_backbone(small_backbone)
    algorithm = config_for(backbone, small_backbone, num_env_runners=1).build_algo()
    before = router_of(algorithm)
    result = algorithm.train()
    router = router_of(algorithm)
    algorithm.stop()
    assert not torch.equal(before.head.weight, router.head.weight)
    assert result["env_runners"]["num_env_steps_sampled_lifetime"] == 96
    assert 0 < result["env_runners"]["route"]["macs_fraction"] <= 1
    assert all(torch.isfinite(p).all() for p in router.parameters())


@pytest.mark.usefixtures("ray_local")
def test_tensorboard_shows_what_is_promised(small_backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(Agent, "checkpoint_every", 1)
    backbone, _ = load_backbone(small_backbone)
    settings = Settings(Problem("skip", "digits"), Learning(steps=400, num_envs=8, price_range=(0.002, 2.0)))
    router, finished = train_policy(settings, small_backbone, tmp_path)
    assert finished
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    rates = {f"rate/{point.name}" for point in backbone.points}
    assert tags >= {
        "reward", "accuracy", "macs_fraction", "price", "routes/distinct", "throughput/steps_per_s", "entropy",
        "loss/policy", "loss/value", *rates,
    }  # fmt: skip
    reward = events.Scalars("reward")
    per_iteration = 8 * 8 * backbone.max_steps
    assert [e.step for e in reward] == [per_iteration * (i + 1) for i in range(len(reward))]
    assert all(0 <= e.value <= 1 for tag in rates for e in events.Scalars(tag))
    assert not router.training
    assert len(list((tmp_path / "checkpoints").glob("checkpoint_*"))) == min(2, len(reward))


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("remote", [0, 1])
def test_ppo_goes_on_with_the_new_version_of_its_backbone(remote, small_backbone, tmp_path):
    file = tmp_path / "backbone.safetensors"
    shutil.copyfile(small_backbone, file)
    settings = Settings(
        Problem("skip", "digits"),
        Learning(steps=2000, num_envs=8, price_range=(0.002, 2.0)),
        Place(num_env_runners=remote),
    )
    with open_agent(settings, file, tmp_path, 2000) as agent:
        agent.learn(1)
        before = agent.steps
        backbone, _ = load_backbone(file)
        with torch.no_grad():
            backbone.fc.bias += 1
        backbone.save(file)
        agent.reload()
        runners = agent._algorithm.env_runner_group
        seen = runners.foreach_env_runner(
            lambda runner: runner.env.unwrapped.backbone.fingerprint(), local_env_runner=not remote
        )
        assert seen == [backbone.for_inference().fingerprint()]
        agent.learn(before + 1)
        assert agent.steps == 2 * before


def test_a_resumed_log_hides_what_was_written_after_the_checkpoint(tmp_path):
    for begins_after, steps in ((0, (10, 20, 30)), (20, (30, 40))):
        with TrainingLog(tmp_path, begins_after) as log:
            for step in steps:
                log.write(step, {"reward": float(begins_after)})
        time.sleep(1.1)  # event files are told apart, and ordered, by the second
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(10, 0), (20, 0), (30, 20), (40, 20)]


def test_a_resumed_runner_meets_other_inputs(small_backbone):
    backbone, _ = load_backbone(small_backbone)
    first, second = (
        SlabRunner(config=config_for(backbone, small_backbone), worker_index=0, num_workers=0) for _ in range(2)
    )
    second.set_state({"num_env_steps_sampled_lifetime": 960})
    assert not torch.equal(first.sample(num_timesteps=8)[0].obs, second.sample(num_timesteps=8)[0].obs)


def test_what_is_not_finite_is_not_written(tmp_path):
    with TrainingLog(tmp_path) as log:
        log.write(5, {"reward": 1.0, "accuracy": float("nan")})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["reward"]
