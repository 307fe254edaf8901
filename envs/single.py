"""Single environments have one row; `dynrl.envs.single:DECISION` is the entry point of each in Gymnasium."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import load_env_creator
from gymnasium.vector import AutoresetMode

from dynrl.backbones import Backbone
from dynrl.envs import DECISIONS
from dynrl.envs.core import RoutingVectorEnv
from dynrl.envs.render import MODES


class RoutingEnv(gym.Env):
    """In this environment, one input walks a backbone; it is `RoutingVectorEnv` with one row and the same arguments.

    Args:
        settings: the arguments of `RoutingVectorEnv`, except `num_envs` and `autoreset_mode`.
    """

    metadata: dict[str, Any] = {"render_modes": list(MODES), "render_fps": 4}

    decision: ClassVar[str]

    def __init__(self, **settings: Any) -> None:
        for refused in ("num_envs", "autoreset_mode"):
            if refused in settings:
                raise ValueError(f"{refused} is for the batched environment; use gymnasium.make_vec")
        batched: Any = load_env_creator(DECISIONS[self.decision].vector_entry_point)
        self._batch: RoutingVectorEnv = batched(1, **settings, autoreset_mode=AutoresetMode.DISABLED)
        self.observation_space = copy.deepcopy(self._batch.single_observation_space)
        self.action_space = copy.deepcopy(self._batch.single_action_space)
        self.render_mode = self._batch.render_mode
        self._over = True

    @property
    def backbone(self) -> Backbone:
        """The frozen backbone."""
        return self._batch.backbone

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; there are no options."""
        if options:
            raise ValueError(f"unknown reset options {sorted(options)}; this environment has none")
        super().reset(seed=seed)
        view, info = self._batch.reset(seed=seed)
        self._over = False
        return view[0], {"action_mask": info["action_mask"][0]}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take one answer of the policy."""
        if self._over:
            raise ValueError("the episode has ended; call reset first")
        view, reward, terminated, _, info = self._batch.step(np.asarray([action]))
        self._over = bool(terminated[0])
        own = {name: value[0] for name, value in info.items() if not name.startswith("_")}
        return view[0], float(reward[0]), self._over, False, own

    def render(self) -> Any:
        """Return what `render_mode` asks for: a text or a picture of the walk so far; None without a mode."""
        frames = self._batch.render()
        return None if frames is None else frames[0]


def __getattr__(decision: str) -> type[RoutingEnv]:
    """Return the single environment of a decision, which is made when it is first needed."""
    if decision not in DECISIONS:
        raise AttributeError(f"no decision {decision!r}; there are {sorted(DECISIONS)}")
    # Under the name that this module knows it by, by which other processes find it, too.
    made = type(decision, (RoutingEnv,), {"decision": decision, "__module__": __name__, "__qualname__": decision})
    globals()[decision] = made
    return made
