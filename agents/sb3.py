"""Stable-Baselines3 trains on a routing environment by the adapter, the policy classes and the agents here."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Discrete
from gymnasium.vector import AutoresetMode
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.distributions import MultiCategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.dqn.policies import DQNPolicy
from torch import Tensor, nn

from dynrl.agents.base import Agent, Ground, entropy_bonus, env_arguments
from dynrl.agents.metrics import ended_episodes, episode_scalars
from dynrl.agents.numbers import ADAM_EPSILON, check_one_choice, q_network, value_network
from dynrl.agents.numbers import DQN as DQN_NUMBERS
from dynrl.agents.numbers import PPO as PPO_NUMBERS
from dynrl.backbones import Backbone, load_backbone
from dynrl.checkpoints import MOST_STEPS, Checkpoint
from dynrl.envs import decision
from dynrl.envs.core import stepped_in_torch
from dynrl.policies import LearnedPolicy, PolicySpec
from dynrl.settings import Settings

# SB3's DQN differs from RLlib's in the steps of a batch, in how often each sampled step is learned from, and in how
# many rewards are added up before a value takes over.
DQN_BATCH, DQN_TIMES, DQN_STEPS = 128, 4, 3


class RoutingVecEnv(VecEnv):
    """This adapter makes a `RoutingVectorEnv` a `VecEnv`, for SB3's algorithms that take discrete choices.

    Args:
        env: the environment that `gymnasium.make_vec` makes, with same-step autoreset.

    Raises:
        ValueError: the environment is not dynrl's, is wrapped, or has another autoreset mode, which would lose
            transitions.
    """

    def __init__(self, env: gym.vector.VectorEnv) -> None:
        self.env = stepped_in_torch(env)
        self.render_mode = None
        self.ended: list[dict[str, Tensor]] | None = None  # if this is a list, each step appends its `ended_episodes`
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> np.ndarray:
        """Begin new episodes."""
        seed = self._seeds[0]
        self._reset_seeds()
        self._returns = torch.zeros(self.num_envs)
        self._lengths = torch.zeros(self.num_envs, dtype=torch.int64)
        return self.env.reset_tensors(seed).cpu().numpy()

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions for `step_wait`."""
        self._actions = torch.as_tensor(actions, dtype=torch.int64, device=self.env.device)

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Take one decision of every row."""
        obs, rewards, terminated, info = self.env.step_tensors(self._actions)
        self._returns += rewards.cpu()
        self._lengths += 1
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if "final_obs" in info:
            last, rows = info["final_obs"].cpu().numpy(), terminated.nonzero().flatten().tolist()
            if self.ended is not None:
                self.ended.append(ended_episodes(self.env, info, self._returns.to(self.env.device)))
            for row in rows:
                episode = {"r": float(self._returns[row]), "l": int(self._lengths[row]), "t": 0.0}
                infos[row] = {"terminal_observation": last[row], "TimeLimit.truncated": False, "episode": episode}
            self._returns[rows], self._lengths[rows] = 0, 0
        return obs.cpu().numpy(), rewards.cpu().numpy(), terminated.cpu().numpy(), infos

    def close(self) -> None:
        """Do nothing, since nothing is held open."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return an attribute of the environment once for each row."""
        return [getattr(self.env, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Raise a ValueError, because all rows share one environment."""
        raise ValueError("rows of a routing environment share its attributes; make another one")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Raise a ValueError, because all rows share one environment."""
        raise ValueError("rows of a routing environment have no methods of their own")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """Return False for each row."""
        return [False] * len(list(self._get_indices(indices)))


class _Reader(nn.Module):
    """This reader gives the actor the whole observation, and the critic the observation without its mask."""

    def __init__(self, net: LearnedPolicy) -> None:
        super().__init__()
        self.net = net
        self.latent_dim_pi, self.latent_dim_vf = net.sight.width, net.sight.price + 1

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        return observation, self.net.trunk(observation)

    def forward_actor(self, observation: Tensor) -> Tensor:
        return observation

    def forward_critic(self, observation: Tensor) -> Tensor:
        return self.net.trunk(observation)


class RouterActorCritic(ActorCriticPolicy):
    """SB3's actor is the policy, and its critic is the same value network as in RLlib's PPO.

    Args:
        spec: the specification that builds the policy.
    """

    def __init__(self, *args: Any, spec: PolicySpec, **kwargs: Any) -> None:
        self.spec = spec
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Any) -> None:
        net = self.spec.build()
        if not isinstance(self.action_space, Discrete):  # each decision has as many columns as the largest one needs
            self.action_dist = MultiCategoricalDistribution([net.sight.choices] * net.sight.decisions)
        self.mlp_extractor: Any = _Reader(net)
        self.action_net: Any = net
        self.value_net: Any = value_network(net)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=lr_schedule(1), eps=ADAM_EPSILON)


class _Returns(BasePolicy):
    """This wrapper reads the policy's scores as the returns expected of each choice."""

    def __init__(self, net: LearnedPolicy, *spaces: Any) -> None:
        super().__init__(*spaces)
        self.net = net

    def forward(self, observation: Any) -> Tensor:
        return self.net.scores(observation)

    def _predict(self, observation: Any, deterministic: bool = True) -> Tensor:
        return self(observation).argmax(1)


class RouterQ(DQNPolicy):
    """SB3's Q-network is the policy.

    Args:
        spec: the specification that builds the policy.
    """

    def __init__(self, *args: Any, spec: PolicySpec, **kwargs: Any) -> None:
        self.spec = spec
        super().__init__(*args, **kwargs)

    def make_q_net(self) -> Any:
        """Return an untrained Q-network."""
        return _Returns(q_network(self.spec), self.observation_space, self.action_space)


class SB3Agent(Agent):
    """This agent runs an algorithm of SB3 on the decision's environment; a subclass writes `build` and `net`."""

    def build(self, env: RoutingVecEnv, ground: Ground) -> Any:
        """Return the algorithm, set up on `env`."""
        raise NotImplementedError

    def schedule(self) -> None:
        """Set the numbers that change with `steps`."""

    def start(self) -> None:
        """Build the environment and the algorithm."""
        self.backbone, _ = load_backbone(self.backbone_file)
        self.ground = self.ground_on(self.backbone)
        self._env, self.steps = self._make_env(), 0
        self._algorithm = self.build(self._env, self.ground)
        policy = self._algorithm.policy
        self._kept = Checkpoint(self.checkpoints / "sb3.safetensors", {"policy": policy, "optimizer": policy.optimizer})
        self.steps = self._kept.restore(MOST_STEPS)
        self._algorithm.num_timesteps = self.steps // self.ground.decisions
        self._seed()

    def _seed(self) -> None:
        """Seed the environment so that each seed meets other inputs, and a restart does not meet the first ones again.

        SB3 also seeds the environment, by its own seed alone, when an algorithm is built; this call comes after that.
        """
        self._env.seed(self.settings.problem.seed * 1_000_003 + 31 * self.steps)

    def _make_env(self) -> RoutingVecEnv:
        settings = self.settings
        env = RoutingVecEnv(
            gym.make_vec(
                decision(settings.problem.decision).env_id, settings.learning.num_envs,
                vectorization_mode="vector_entry_point", autoreset_mode=AutoresetMode.SAME_STEP,
                **env_arguments(settings, self.backbone_file, self.times),
            )
        )  # fmt: skip
        env.ended = []
        return env

    def iterate(self) -> dict[str, float]:
        """Sample one rollout and learn from it."""
        self.schedule()
        samples = self.ground.rollout * self.settings.learning.num_envs
        self._algorithm.learn(samples, reset_num_timesteps=False, log_interval=None)
        self.steps = self._algorithm.num_timesteps * self.ground.decisions
        ended, self._env.ended = self._env.ended, []
        assert ended
        over = {name: torch.cat([part[name] for part in ended]) for name in ended[0]}
        scalars = episode_scalars(over, self._env.env.backbone.points)
        logged = self._algorithm.logger.name_to_value
        for tag, key in (
            ("loss/policy", "train/policy_gradient_loss"), ("loss/value", "train/value_loss"), ("loss/q", "train/loss"),
            ("loss/value_explained", "train/explained_variance"),
        ):  # fmt: skip
            if key in logged:
                scalars[tag] = float(logged[key])
        if "train/entropy_loss" in logged:
            scalars["entropy"] = -float(logged["train/entropy_loss"])
        return scalars

    def router(self) -> LearnedPolicy:
        """Return a copy of the policy inside the algorithm."""
        return copy.deepcopy(self.net()).eval()

    def net(self) -> LearnedPolicy:
        """Return the policy inside the algorithm."""
        raise NotImplementedError

    def save(self) -> None:
        """Write one file of tensors and numbers, because loading SB3's own files may run code."""
        self._kept.save(self.steps)

    def reload(self) -> None:
        """Make a new environment, which loads the changed file."""
        self._env = self._make_env()
        self._seed()
        self._algorithm.set_env(self._env)


class SB3PPO(SB3Agent):
    """This agent is SB3's PPO with the same numbers as RLlib's."""

    cannot = {name: reason for name, reason in SB3Agent.cannot.items() if name != "entropy"}

    def build(self, env: RoutingVecEnv, ground: Ground) -> PPO:
        """Return PPO with a learning rate that falls to a tenth."""
        learning, numbers = self.settings.learning, PPO_NUMBERS
        rate = learning.learning_rate or numbers.learning_rate
        batch = ground.rollout * env.num_envs
        self._entropy = entropy_bonus(learning, numbers.entropy, self.backbone)
        return PPO(
            RouterActorCritic, env, policy_kwargs={"spec": ground.spec}, learning_rate=lambda _: rate * self.left,
            n_steps=ground.rollout, batch_size=max(2, batch // numbers.minibatches), n_epochs=numbers.epochs,
            gamma=numbers.gamma, gae_lambda=numbers.lambda_, clip_range=numbers.clip, ent_coef=self._entropy,
            vf_coef=numbers.value_weight, max_grad_norm=numbers.gradient_norm, seed=self.settings.problem.seed,
            device="cpu",
        )  # fmt: skip

    def schedule(self) -> None:
        """Let the entropy bonus fall to a tenth, like the learning rate."""
        self._algorithm.ent_coef = self._entropy * self.left

    def net(self) -> LearnedPolicy:
        """Return the actor."""
        net: LearnedPolicy = self._algorithm.policy.action_net
        return net


class SB3DQN(SB3Agent):
    """This agent is SB3's DQN with the same numbers as RLlib's. Resumed training begins with an empty buffer."""

    cannot = {**SB3Agent.cannot, "finetune": "Q-learning would replay episodes from the backbone before fine-tuning"}

    @classmethod
    def refuse(cls, settings: Settings, backbone: Backbone) -> None:
        """Also refuse policies that answer with several choices, and backbones whose choices may be closed."""
        super().refuse(settings, backbone)
        check_one_choice(settings.learning, backbone)
        if backbone.may_close:  # SB3 explores closed choices too, and would learn from the scores that mask them
            raise ValueError("sb3-dqn is for backbones whose choices are all open everywhere; choose another agent")

    def build(self, env: RoutingVecEnv, ground: Ground) -> DQN:
        """Return DQN that samples one walk of each row at a time."""
        numbers = DQN_NUMBERS
        rate = self.settings.learning.learning_rate or numbers.learning_rate
        model = DQN(
            RouterQ, env, policy_kwargs={"spec": ground.spec}, learning_rate=lambda _: rate * self.left,
            buffer_size=numbers.buffer, learning_starts=min(numbers.warm_up, self.total // 10), batch_size=DQN_BATCH,
            gamma=numbers.gamma, n_steps=DQN_STEPS, train_freq=(ground.looks, "step"),
            gradient_steps=max(1, round(DQN_TIMES * ground.looks * env.num_envs / DQN_BATCH)),
            target_update_interval=numbers.target_every, max_grad_norm=numbers.gradient_norm,
            seed=self.settings.problem.seed, device="cpu",
        )  # fmt: skip
        model.exploration_schedule = lambda _: numbers.rate(model.num_timesteps, self.total)
        return model

    def net(self) -> LearnedPolicy:
        """Return the policy that is the Q-network."""
        net: LearnedPolicy = self._algorithm.policy.q_net.net
        return net
