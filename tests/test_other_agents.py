"""Agents beside PPO: RLlib's APPO and DQN, Stable-Baselines3's PPO and DQN; episodes and adapter step by step."""

from __future__ import annotations

import sys
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3 as sb3
import torch
from gymnasium.vector import AutoresetMode
from ray.rllib.core.columns import Columns
from stable_baselines3.common.vec_env import VecFrameStack, VecMonitor, VecNormalize

import dynrl
from dynrl.agents.base import AGENTS, Agent, agent_class, open_agent
from dynrl.agents.rllib import start_ray
from dynrl.agents.sb3 import RoutingVecEnv
from dynrl.agents.slab import EpisodesRunner, SlabRunner
from dynrl.backbones import load_backbone
from dynrl.data import load_dataset
from dynrl.deploy import RoutedModel
from dynrl.evaluation import calibrate, score, score_routes
from dynrl.policies import SIGHTS, ForeignPolicy, UpfrontRouter
from dynrl.scripts.cli import main
from dynrl.settings import Learning, Place, Problem, Settings
from tests.cases import make_backbone
from tests.test_agents import exit_config

OTHERS = ["appo", "dqn", "sb3-ppo", "sb3-dqn"]


def test_episodes_are_the_walks_of_the_slabs():
    """Exits end walks when they like: what a slab cuts is whole in the next one's, and nothing is lost."""
    slabs = SlabRunner(config=exit_config(), worker_index=0, num_workers=0)
    torch.manual_seed(3)
    met = [slabs.sample(num_timesteps=56)[0] for _ in range(3)]
    episodes = EpisodesRunner(config=exit_config(), worker_index=0, num_workers=0)
    torch.manual_seed(3)
    found = [episodes.sample(num_timesteps=56) for _ in range(3)]
    obs, actions, rewards, ended, logp = (
        torch.cat([getattr(slab, name) for slab in met])
        for name in ("obs", "actions", "rewards", "terminateds", "logp")
    )
    expected = []  # (in which sample, row, first step, step behind the last)
    for row in range(8):
        start = 0
        for end in (ended[:, row].nonzero().flatten() + 1).tolist():
            expected.append(((end - 1) // 7, row, start, end))
            start = end
    assert {start // 7 == (end - 1) // 7 for _, _, start, end in expected} == {True, False}  # some were cut
    assert [len(of) for of in found] == [sum(at == i for at, *_ in expected) for i in range(3)]
    for episode, (_, row, start, end) in zip([e for of in found for e in of], sorted(expected), strict=True):
        span = slice(start, end)
        assert episode.is_terminated and not episode.is_truncated and len(episode) == end - start
        assert np.array_equal(episode.get_actions(), actions[span, row])
        assert np.array_equal(episode.get_rewards(), rewards[span, row])
        assert np.array_equal(episode.get_observations(slice(0, len(episode))), obs[span, row])
        assert np.array_equal(episode.get_extra_model_outputs(Columns.ACTION_LOGP), logp[span, row])
    episodes.sample(num_timesteps=56, force_reset=True)  # what was cut is not gone on with
    assert all(len(walk[0]) < 7 for walk in episodes._begun.values())


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("agent", OTHERS)
def test_a_high_price_is_obeyed_and_training_goes_on_where_it_stopped(agent, small_backbone, tmp_path):
    learning = Learning(agent, steps=8_000, num_envs=32, price_range=(20.0, 20.0), reward="log_likelihood")
    settings = Settings(Problem("skip", "digits"), learning)
    scalars = {}
    with open_agent(settings, small_backbone, tmp_path, 8_000) as trained:
        trained.write = lambda given: scalars.update(given)
        trained.learn(6_000)
        before, weights = trained.steps, trained.router().state_dict()
    assert {"reward", "accuracy", "macs_fraction", "price", "routes/distinct", "rate/layer1.1"} <= set(scalars)
    assert any(tag.startswith("loss/") for tag in scalars)
    with open_agent(settings, small_backbone, tmp_path, 8_000) as trained:
        assert trained.steps == before
        for name, value in trained.router().state_dict().items():
            # APPO's learner may have learned a little more before `router` asked.
            torch.testing.assert_close(value, weights[name], rtol=0, atol=0.02 if agent == "appo" else 0)
        trained.learn(8_000)
        assert trained.steps > before
        router = trained.router()
    backbone, _ = load_backbone(small_backbone)
    model = RoutedModel(backbone, router)
    test = load_dataset("digits").test
    nothing = score_routes(model.backbone, torch.zeros(len(test), backbone.max_steps, dtype=torch.int64), test)
    assert score(model, test).macs_fraction == pytest.approx(float(nothing.macs.mean()), abs=0.05)


@pytest.mark.usefixtures("ray_local")
def test_q_learning_is_repeated_by_its_seed(small_backbone, tmp_path):
    learned = []
    for name, seed in (("first", 0), ("second", 0), ("other", 1)):
        learning = Learning("dqn", steps=600, num_envs=8, price_range=(0.002, 2.0))
        settings = Settings(Problem("skip", "digits", seed=seed), learning)
        with open_agent(settings, small_backbone, tmp_path / name, 600) as trained:
            start = trained.router().state_dict()
            trained.learn(600)
            learned.append(trained.router().state_dict())
        assert any(not torch.equal(value, start[key]) for key, value in learned[-1].items())
        np.random.rand(3), torch.rand(3)  # what a program draws changes nothing
    for key, value in learned[0].items():
        torch.testing.assert_close(learned[1][key], value, rtol=0, atol=0)
    assert any(not torch.equal(learned[2][key], value) for key, value in learned[0].items())


@pytest.mark.usefixtures("no_ray")
def test_where_ray_cannot_start_only_agents_are_told_to_do_without(small_backbone, tmp_path, monkeypatch):
    def slow(*given, **more):
        raise RuntimeError("too slow\nby far")

    monkeypatch.setattr("ray.init", slow)
    with pytest.raises(ValueError) as by_a_sweep:
        start_ray(2)
    told = "ray could not start on this machine (too slow); try again when it is less busy"
    assert str(by_a_sweep.value) == told
    settings = Settings(Problem("skip", "digits"), Learning(price_range=(0.002, 2.0)))
    with pytest.raises(ValueError) as by_an_agent, open_agent(settings, small_backbone, tmp_path, 8):
        pass
    assert str(by_an_agent.value) == f"{told}, or take an agent that needs no ray, such as --agent sb3-ppo"


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("agent", ["appo", "sb3-ppo"])
def test_whole_routes_at_once(agent, small_backbone, tmp_path):
    settings = Settings(
        Problem("skip", "digits"), Learning(agent, "upfront", steps=3_000, num_envs=16, price_range=(0.002, 2.0))
    )
    with open_agent(settings, small_backbone, tmp_path, 3_000) as trained:
        trained.learn(3_000)
        assert trained.steps >= 3_000 and isinstance(trained.router(), UpfrontRouter)


@pytest.mark.parametrize("agent", ["ppo", "sb3-ppo"])
@pytest.mark.usefixtures("ray_local")
def test_each_seed_meets_inputs_of_its_own_and_a_reload_others_again(agent, small_backbone, tmp_path):
    met = []
    for seed in (0, 1):
        settings = Settings(
            Problem("skip", "digits", seed=seed), Learning(agent, steps=500, num_envs=8, price_range=(0.002, 2.0))
        )
        with open_agent(settings, small_backbone, tmp_path / str(seed), 500) as trained:
            envs = (lambda t: t._env.env) if agent == "sb3-ppo" else (lambda t: t._algorithm.env_runner.env.unwrapped)
            trained.learn(1)
            met.append(set(envs(trained)._seeds.tolist()))
            trained.reload()
            trained.learn(trained.steps + 1)
            met.append(set(envs(trained)._seeds.tolist()))
    assert all(len(one) == 8 for one in met)
    assert not any(one & other for i, one in enumerate(met) for other in met[:i])


def make(decision="Skip", **arguments):
    arguments = {"autoreset_mode": AutoresetMode.SAME_STEP, "data": "digits", **arguments}
    return gym.make_vec(f"dynrl/{decision}-v0", 6, vectorization_mode="vector_entry_point", **arguments)


def test_the_adapter_is_the_environment():
    given, plain = RoutingVecEnv(make("Exit")), make("Exit")
    given.ended = []
    given.seed(5)
    rng = np.random.default_rng(0)
    obs, (expected, _) = given.reset(), plain.reset(seed=5)
    assert np.array_equal(obs, expected)
    returns, lengths, ended = np.zeros(6), np.zeros(6, int), 0
    for _ in range(12):
        actions = rng.integers(plain.single_action_space.n, size=6)
        obs, rewards, dones, infos = given.step(actions)
        expected, paid, over, _, told = plain.step(actions)
        assert np.array_equal(obs, expected) and np.array_equal(rewards, paid) and np.array_equal(dones, over)
        returns, lengths = returns + paid, lengths + 1
        for row in range(6):
            if over[row]:
                assert np.array_equal(infos[row]["terminal_observation"], told["final_obs"][row])
                assert infos[row]["episode"]["r"] == pytest.approx(returns[row], abs=1e-6)
                assert infos[row]["episode"]["l"] == lengths[row]
                returns[row], lengths[row], ended = 0, 0, ended + 1
            else:
                assert infos[row] == {}
    assert ended == sum(len(part["return"]) for part in given.ended) > 6


@pytest.mark.parametrize("sight", SIGHTS)
def test_the_adapter_serves_policies_of_sb3s_own(sight):
    env = RoutingVecEnv(make(sight=sight))
    model = sb3.PPO("MlpPolicy", env, n_steps=8, batch_size=16, n_epochs=1, device="cpu").learn(96)
    assert model.num_timesteps == 96 and len(model.ep_info_buffer) > 0


@pytest.mark.parametrize(("kind", "sight"), [("PPO", "step"), ("PPO", "route"), ("DQN", "step")])
def test_a_policy_that_sb3_trained_plugs_and_chooses_the_same(kind, sight):
    """Choices are SB3's own `predict`, asked along the walk in the environment, input by input."""
    backbone = make_backbone("skip")
    env = make(backbone=backbone, sight=sight, price=0.1)
    wanted = {"n_steps": 8, "batch_size": 16, "n_epochs": 1} if kind == "PPO" else {"learning_starts": 8}
    algorithm = getattr(sb3, kind)("MlpPolicy", RoutingVecEnv(env), seed=0, device="cpu", **wanted).learn(96)
    obs, known = env.reset(seed=1)[0], {}
    inputs = env._walk.inputs.clone()
    layers = ForeignPolicy.of(algorithm).layers
    *_, last = (layer for layer in layers.modules() if isinstance(layer, torch.nn.Linear))
    with torch.no_grad():  # it has learned next to nothing: let inputs differ in their first choices
        last.bias -= layers(torch.as_tensor(obs)).mean(0)
    model = dynrl.plug(backbone, algorithm)
    assert (model.price, model.price_range) == (0.1, (0.1, 0.1)), "it met no other price"
    while len(known) < env.num_envs:
        obs, _, over, _, info = env.step(algorithm.predict(obs, deterministic=True)[0])
        known |= {row: info["final_info"]["route"][row] for row in np.flatnonzero(over) if row not in known}
    model(inputs)
    assert np.array_equal(model.last_route.actions, np.stack([known[row] for row in range(env.num_envs)]))
    assert len(np.unique(model.last_route.actions, axis=0)) > 1
    hidden = 64 * (64 + env.sight.width) + 64 * sum(env.sight.counts)
    looks = env.sight.looks(backbone.max_steps)
    assert (model.last_route.router_macs == looks * hidden).all()
    split = load_dataset("digits").validation.head(64)
    assert len(calibrate(model, split, points=3)) == 1
    env = VecNormalize(RoutingVecEnv(make(backbone=backbone, sight=sight, price_range=(0.1, 1.0))), norm_obs=False)
    model = dynrl.plug(backbone, getattr(sb3, kind)("MlpPolicy", env, device="cpu"))
    assert model.price_range == (0.1, 1.0) and len(calibrate(model, split, points=3)) >= 3


def test_what_does_not_plug_is_refused():
    backbone = make_backbone("skip")
    with pytest.raises(ValueError, match="expected a policy file, a policy of dynrl, or an algorithm of Stable-Base"):
        dynrl.plug(backbone, 3)
    algorithm = sb3.PPO("MlpPolicy", "CartPole-v1", device="cpu")
    with pytest.raises(
        ValueError, match=r"trained on dynrl\.agents\.sb3\.RoutingVecEnv, got one that saw .* shape \(4,\)"
    ):
        dynrl.plug(backbone, algorithm)
    for env, words in (
        (VecNormalize(RoutingVecEnv(make())), "VecNormalize"),
        (VecMonitor(VecNormalize(VecNormalize(RoutingVecEnv(make())), norm_obs=False)), "VecNormalize"),
        (VecFrameStack(RoutingVecEnv(make()), 2), r"of shape \(\d+,\), expected \(\d+,\).*VecFrameStack"),
    ):
        algorithm = sb3.PPO("MlpPolicy", env, device="cpu")
        with pytest.raises(ValueError, match=words):
            dynrl.plug(backbone, algorithm)
    algorithm.env = None
    with pytest.raises(ValueError, match="set_env"):
        dynrl.plug(backbone, algorithm)


def test_the_adapter_refuses_what_would_lose_transitions():
    with pytest.raises(ValueError, match="SameStep"):
        RoutingVecEnv(make(autoreset_mode=AutoresetMode.NEXT_STEP))
    with pytest.raises(ValueError, match="SameStep"):
        RoutingVecEnv(gym.make_vec("CartPole-v1", 2))
    with pytest.raises(ValueError, match="share"):
        RoutingVecEnv(make()).set_attr("x", 1)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--agent", "dqn", "--policy", "upfront"], "one choice a step"),
        (["--agent", "sb3-dqn", "--policy", "upfront"], "one choice a step"),
        (["--agent", "sb3-ppo", "--num-learners", "1"], "such as those of RLlib"),
        (["--agent", "sb3-ppo", "--num-env-runners", "1"], "such as those of RLlib"),
        (["--agent", "appo", "--baseline", "group"], "for agents such as ppo"), (["--baseline", "nosuch"], "value, group, greedy"),
        (["--baseline", "greedy"], "compares whole routes"), (["--agent", "dqn", "--entropy", "0.01"], "ppo, appo and sb3-ppo"),
        (["--agent", "gate", "--device", "cpu:0"], "on the CPU"), (["--agent", "gate", "--dtype", "bfloat16"], "in float32"),
        (["--policy", "nosuch"], "expected one of sequential, upfront"),
        (["--agent", "gate", "--cost", "time"], "counts MACs"), (["--agent", "nosuch"], "nosuch"),
        (["--agent", "dqn", "--finetune"], "from the backbone before fine-tuning"), (["--num-learners", "3"], "3 learners"),
    ],
)  # fmt: skip
def test_what_an_agent_cannot_do_is_refused(words, reason, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", "skip", "--data", "digits", "--out", str(tmp_path / "x"), *words])
    told = capsys.readouterr()
    assert reason in told.err + told.out and not list(tmp_path.iterdir())


def test_choices_that_close_are_no_ground_for_sb3s_dqn():
    settings = Settings(Problem("exit", "digits"), Learning("sb3-dqn"))
    agent_class("sb3-dqn").refuse(settings, make_backbone("exit"))
    with pytest.raises(ValueError, match="all open"):
        agent_class("sb3-dqn").refuse(settings, make_backbone("branching"))


def test_remote_runners_see_one_gpu_each():
    backbone = make_backbone("skip")
    for agent in ("ppo", "appo", "dqn"):
        settings = Settings(Problem("skip", "digits"), Learning(agent), Place("cuda:1"))
        agent_class(agent).refuse(settings, backbone)
        with pytest.raises(ValueError, match="--device cuda, not cuda:1"):
            agent_class(agent).refuse(
                Settings(settings.problem, Learning(agent), Place("cuda:1", num_env_runners=2)), backbone
            )


@pytest.mark.parametrize("agent", AGENTS)
def test_what_an_agent_cannot_do_are_settings_that_there_are(agent):
    known = {*vars(Learning()), *vars(Place())}
    assert set(agent_class(agent).cannot) <= known


def test_wrapped_environments_are_refused_by_name():
    """The adapter and the runner step in torch, which a wrapper does not see."""
    import gymnasium as gym
    from gymnasium.wrappers import vector

    from dynrl.agents.sb3 import RoutingVecEnv
    from dynrl.envs.core import stepped_in_torch

    env = gym.make_vec("dynrl/Skip-v0", num_envs=2, autoreset_mode="SameStep")
    assert stepped_in_torch(env) is env
    for wrapped in (
        vector.TransformReward(env, lambda reward: reward + 7),
        vector.ClipReward(env, 0, 1),
        vector.TransformReward(vector.RecordEpisodeStatistics(env), lambda reward: reward),
    ):
        for taken in (RoutingVecEnv, stepped_in_torch):
            with pytest.raises(ValueError, match=f"no wrapper around it, got {type(wrapped).__name__}"):
                taken(wrapped)


def test_an_agent_learns_on_inputs_as_the_backbone_sees_them_and_on_none_that_it_knows(tmp_path):
    digits, backbone = load_dataset("digits"), make_backbone("skip")
    backbone.trained_on = replace(digits.provenance, mean=0.7, deviation=0.1)
    agent = Agent(Settings(Problem("skip", "digits"), Learning()), tmp_path / "any", tmp_path, 1)
    split = agent.split_on(backbone)
    torch.testing.assert_close(split.inputs, (digits.raw(digits.unseen.inputs) - 0.7) / 0.1)
    assert torch.equal(split.targets, digits.unseen.targets)


def test_an_agent_says_what_it_takes(monkeypatch):
    """`pip install dynrl` leaves out what agents need."""
    monkeypatch.delitem(sys.modules, "dynrl.agents.sb3", raising=False)
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(ValueError, match=r"'sb3-dqn' takes stable_baselines3, which is not installed: pip install"):
        agent_class("sb3-dqn")
