"""Stable-Baselines3 on a routing environment: the adapter, the router as its policies, its PPO and DQN as agents."""

from __future__ import annotations

import copy
from pathlib import Path
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
from dynrl.envs import decision
from dynrl.envs.core import RoutingVectorEnv
from dynrl.files import whole, write_aside
from dynrl.policies import LearnedPolicy, PolicySpec
from dynrl.settings import Settings

# Where SB3's DQN differs from RLlib's: steps a batch, how often each step that is sampled is learned from, and rewards
# that are added up before a value is asked for.
DQN_BATCH, DQN_TIMES, DQN_STEPS = 128, 4, 3


class RoutingVecEnv(VecEnv):
    """A `RoutingVectorEnv` with same-step autoreset as Stable-Baselines3's `VecEnv`, for any of its
    algorithms that take discrete choices.

    Args:
        env: as `gymnasium.make_vec` makes it.

    Raises:
        ValueError: another environment, or another autoreset mode, which would lose transitions.
    """

    def __init__(self, env: gym.vector.VectorEnv) -> None:
        inner = env.unwrapped
        mode = inner.metadata.get("autoreset_mode")
        if not isinstance(inner, RoutingVectorEnv) or mode is not AutoresetMode.SAME_STEP:
            raise ValueError(f"expected a dynrl environment with autoreset_mode='SameStep', got {env}, {mode}")
        self.env = inner
        self.render_mode = None
        self.ended: list[dict[str, Tensor]] | None = None  # a list there gets what `ended_episodes` says of each step
        super().__init__(inner.num_envs, inner.single_observation_space, inner.single_action_space)

    def reset(self) -> np.ndarray:
        """Begin new episodes."""
        seed = self._seeds[0]
        self._reset_seeds()
        self._returns = torch.zeros(self.num_envs)
        self._lengths = torch.zeros(self.num_envs, dtype=torch.int64)
        return self.env.reset_tensors(seed).cpu().numpy()

    def step_async(self, actions: np.ndarray) -> None:
        """Take note of the actions."""
        self._actions = torch.as_tensor(actions, dtype=torch.int64, device=self.env.device)

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """One decision of every row."""
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
        """Nothing is held."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """An attribute of the environment, once a row."""
        return [getattr(self.env, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Refused: rows share one environment."""
        raise ValueError("rows of a routing environment share its attributes; make another one")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Refused: rows share one environment."""
        raise ValueError("rows of a routing environment have no methods of their own")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """Never."""
        return [False] * len(list(self._get_indices(indices)))


class _Reader(nn.Module):
    """What SB3's actor and critic read: the whole observation, and it without its mask."""

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
    """SB3's actor is the policy, its critic the value network that RLlib's PPO has.

    Args:
        spec: what builds the policy.
    """

    def __init__(self, *args: Any, spec: PolicySpec, **kwargs: Any) -> None:
        self.spec = spec
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Any) -> None:
        net = self.spec.build()
        if not isinstance(self.action_space, Discrete):  # each decision has columns for the one of most choices
            self.action_dist = MultiCategoricalDistribution([net.sight.choices] * net.sight.decisions)
        self.mlp_extractor: Any = _Reader(net)
        self.action_net: Any = net
        self.value_net: Any = value_network(net)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=lr_schedule(1), eps=ADAM_EPSILON)


class _Returns(BasePolicy):
    """The policy's scores, as what each choice is expected to return."""

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
        spec: what builds the policy.
    """

    def __init__(self, *args: Any, spec: PolicySpec, **kwargs: Any) -> None:
        self.spec = spec
        super().__init__(*args, **kwargs)

    def make_q_net(self) -> Any:
        """An untrained Q-network."""
        return _Returns(q_network(self.spec), self.observation_space, self.action_space)


class SB3Agent(Agent):
    """An algorithm of Stable-Baselines3's on the decision's environment; its classes fill in `build`."""

    def build(self, env: RoutingVecEnv, ground: Ground) -> Any:
        """The algorithm, on `env`."""
        raise NotImplementedError

    def schedule(self) -> None:
        """Set what changes with `steps`."""

    def start(self) -> None:
        """Build the environment and the algorithm."""
        self.backbone, _ = load_backbone(self.backbone_file)
        self.ground = Ground.of(self.settings.learning, self.backbone)
        self._env, self.steps = self._make_env(), 0
        self._algorithm = self.build(self._env, self.ground)
        if self._file.exists():
            with whole(self._file):
                saved = torch.load(self._file, weights_only=True)
                self._algorithm.policy.load_state_dict(saved["policy"])
                self._algorithm.policy.optimizer.load_state_dict(saved["optimizer"])
                self.steps = saved["steps"]
            self._algorithm.num_timesteps = self.steps // self.ground.decisions
        self._seed()

    def _seed(self) -> None:
        """Let each seed meet other inputs, and a restart not the first ones again.

        SB3 seeds the environment, too, by its own seed alone, when an algorithm is built: before this.
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
        """One rollout and what is learned from it."""
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
        """A copy of the policy inside the algorithm."""
        return copy.deepcopy(self.net()).eval()

    def net(self) -> LearnedPolicy:
        """The policy inside the algorithm."""
        raise NotImplementedError

    def save(self) -> None:
        """Write one file of tensors and numbers; SB3's own would run code when it is loaded."""
        policy = self._algorithm.policy
        state = {"policy": policy.state_dict(), "optimizer": policy.optimizer.state_dict(), "steps": self.steps}
        with write_aside(self._file) as aside:
            torch.save(state, aside)

    @property
    def _file(self) -> Path:
        return self.checkpoints / "sb3.pt"

    def reload(self) -> None:
        """Make a new environment: it loads the file again, since that has changed."""
        self._env = self._make_env()
        self._seed()
        self._algorithm.set_env(self._env)


class SB3PPO(SB3Agent):
    """SB3's PPO with the numbers of RLlib's."""

    cannot = {name: reason for name, reason in SB3Agent.cannot.items() if name != "entropy"}

    def build(self, env: RoutingVecEnv, ground: Ground) -> PPO:
        """PPO with a learning rate that falls to a tenth."""
        learning, numbers = self.settings.learning, PPO_NUMBERS
        rate = learning.learning_rate or numbers.learning_rate
        batch = ground.rollout * env.num_envs
        self._entropy = entropy_bonus(numbers.entropy if learning.entropy is None else learning.entropy, self.backbone)
        return PPO(
            RouterActorCritic, env, policy_kwargs={"spec": ground.spec}, learning_rate=lambda _: rate * self.left,
            n_steps=ground.rollout, batch_size=max(2, batch // numbers.minibatches), n_epochs=numbers.epochs,
            gamma=numbers.gamma, gae_lambda=numbers.lambda_, clip_range=numbers.clip, ent_coef=self._entropy,
            vf_coef=numbers.value_weight, max_grad_norm=numbers.gradient_norm, seed=self.settings.problem.seed,
            device="cpu",
        )  # fmt: skip

    def schedule(self) -> None:
        """Let the entropy bonus fall to a tenth, too."""
        self._algorithm.ent_coef = self._entropy * self.left

    def net(self) -> LearnedPolicy:
        """The actor."""
        net: LearnedPolicy = self._algorithm.policy.action_net
        return net


class SB3DQN(SB3Agent):
    """SB3's DQN with the numbers of RLlib's. Training that is resumed begins with an empty buffer."""

    cannot = {**SB3Agent.cannot, "finetune": "Q-learning replays what it met on the backbone as it was"}

    @classmethod
    def refuse(cls, settings: Settings, backbone: Backbone) -> None:
        """Also refuse policies that answer with several choices, and backbones whose choices may be closed."""
        super().refuse(settings, backbone)
        check_one_choice(settings.learning, backbone)
        if backbone.may_close:  # SB3 explores among all, and would learn what a closed one is said to return
            raise ValueError("sb3-dqn is for backbones whose choices are all open everywhere; choose another agent")

    def build(self, env: RoutingVecEnv, ground: Ground) -> DQN:
        """DQN that samples one walk of each row at a time."""
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
        """The Q-network."""
        net: LearnedPolicy = self._algorithm.policy.q_net.net
        return net
