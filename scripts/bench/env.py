"""`dynrl bench env` measures decisions sampled a second, by several paths."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from dynrl.backbones import END, ExitResNet, SkipResNet, State
from dynrl.data import Augmentation, Dataset, Split
from dynrl.policies import PolicySpec
from dynrl.scripts.bench import Keep, forget
from dynrl.scripts.bench.model import NETWORKS as MODELS

NETWORKS: dict[str, dict[str, Any]] = {
    "resnet20 28x28": {"input_shape": (1, 28, 28), "layers": (3, 3, 3), "widths": (16, 32, 64)},
    "resnet50 224x224": MODELS["resnet50 224x224"].settings,
    "resnet20 28x28, exits": {
        "input_shape": (1, 28, 28), "layers": (3, 3, 3), "widths": (16, 32, 64), "exits": (1, 3, 5, 7),
    },
}  # fmt: skip
IMAGES = 256
# The paths, each with the package that it needs besides torch.
PATHS = {
    "walk": None, "bare": None, "env": "gymnasium", "env-eager": "gymnasium", "rllib": "ray", "rllib-upfront": "ray",
    "rllib-stock": "ray", "naive": "ray",
}  # fmt: skip
BY_EXITS = ("env", "env-eager")  # the paths whose rows may exit
SINGLE = (1, 16)  # the numbers of single environments that `naive` always measures
ENV = "dynrl/Skip-v0"

Sampler = Callable[[int], int]


class _ForcedHalf(SkipResNet):
    """Every other block runs, whatever the actions say."""

    def take(self, state: State, action: torch.Tensor) -> torch.Tensor:
        return super().take(state, (state.rows + state.point) % 2)


def bench_env(
    rounds: int = 5, networks: tuple[str, ...] = (), counts: tuple[int, ...] = (), device: str = "cpu",
    dtype: str = "float32", keep: Keep = forget,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure decisions sampled a second on ResNets, half of whose blocks are forced to run, on one thread.

    They are forced so that what runs does not depend on the policy, and every path does the same work. `walk` is the
    backbone alone on a route known beforehand. `bare` adds observation, router and draw, in torch. `env` goes through
    the environment; `env-eager`, on CUDA, does without its graphs. `rllib` is `SlabRunner`, and `rllib-upfront` is
    `SlabRunner` deciding a whole walk at once. `rllib-stock` is RLlib's runner on the same batched environment. `naive`
    is RLlib's own runner on single environments. The last two read the same router through RLlib's connectors. The time
    that `bare`, `env` and `rllib` each take longer than the path before is what they add. Paths whose packages are
    missing are left out and named.

    Of a ResNet with exits, only the environment is measured. Each row stops at the last exit before the network's own,
    and as many rows stand at each exit.

    Args:
        rounds: how often each path is measured, in turn; medians count.
        networks: names in `NETWORKS`; by default, the first one.
        counts: the numbers of sub-environments; by default, 64 and 256.
        device, dtype: where the backbone runs, and its type.
        keep: called with each row as soon as its network is measured.
    """
    unknown = set(networks) - set(NETWORKS)
    if unknown:
        raise ValueError(f"unknown networks {sorted(unknown)}; expected some of {list(NETWORKS)}")
    torch.set_num_threads(1)
    missing = {package for package in PATHS.values() if package and find_spec(package) is None}
    steps = set(PATHS) - ({"env-eager"} if device == "cpu" else set())  # only on CUDA are steps recorded
    paths = [path for path, package in PATHS.items() if path in steps and package not in missing]
    if missing:
        left_out = [path for path in PATHS if PATHS[path] in missing]
        print(f"left out, as {', '.join(sorted(missing))} is missing: {', '.join(left_out)}", flush=True)
    rows = []
    for network in networks or list(NETWORKS)[:1]:
        for row in _bench(network, paths, counts or (64, 256), rounds, device, dtype):
            rows.append(row | {"device": device, "dtype": dtype})
            keep(rows[-1])
    return rows


class _Paths:
    """Each path is a method that makes a sampler for a number of sub-environments.

    Args:
        backbone: the backbone, on the CPU in float32; its inference copy is moved.
        device, dtype: where the inference copy runs, and its type.
    """

    def __init__(self, backbone: SkipResNet | ExitResNet, device: str, dtype: str) -> None:
        classes: int = backbone.config["classes"]
        split = Split(torch.randn(IMAGES, *backbone.input_shape), torch.randint(0, classes, (IMAGES,)))
        noise = Dataset("noise", classes, split, split, split, Augmentation())
        self.frozen = backbone.for_inference().to(device, getattr(torch, dtype))
        self.images = split.inputs.to(device, getattr(torch, dtype))
        self.depth, self.device = backbone.max_steps, device
        self.specs = {kind: PolicySpec.of(kind, backbone, (0.01, 1.0), hidden=64) for kind in ("sequential", "upfront")}
        self.env_config: dict[str, Any] = {
            "backbone": backbone, "data": noise, "price_range": [0.01, 1.0], "reward": "correct",
            "device": device, "dtype": dtype,
        }  # fmt: skip

    def sampler(self, path: str, count: int) -> Sampler:
        """Make the sampler of the path `path`."""
        return {
            "walk": self.walk, "bare": self.bare, "env": self.env, "env-eager": lambda n: self.env(n, graphs=False),
            "rllib": lambda n: self.ours(n, "sequential"), "rllib-upfront": lambda n: self.ours(n, "upfront"),
            "rllib-stock": lambda n: self.stock(n, "vector_entry_point"),
            "naive": lambda n: self.stock(n, "sync"),
        }[path](count)  # fmt: skip

    def _drawn(self, logits: torch.Tensor) -> torch.Tensor:
        return (logits - torch.empty_like(logits).exponential_().log_()).argmax(1)

    def _some(self, count: int) -> torch.Tensor:
        return self.images[torch.randint(0, IMAGES, (count,), device=self.device)]

    def walk(self, count: int) -> Sampler:
        """Walk the backbone alone, on a route known beforehand."""
        frozen, depth = self.frozen, self.depth
        route = frozen.dense_actions(count, self.images.device)  # `_ForcedHalf` overrides it

        def known(state: State) -> torch.Tensor:
            return state.along(route)

        @torch.no_grad()
        def sample(steps: int) -> int:
            for _ in range(steps // depth):
                frozen.run(self._some(count), known)  # `run_route` would look at the route's values
            return steps // depth * depth * count

        return sample

    def bare(self, count: int) -> Sampler:
        """Walk the backbone with observation, router and draw, in torch."""
        frozen, net = self.frozen, self.specs["sequential"].build().to(self.device)

        @torch.no_grad()
        def sample(steps: int) -> int:
            state = frozen.begin(self._some(count))
            for _ in range(steps):
                (state,) = frozen.advance(state, self._drawn(net(net.sight.see(frozen, state, 0.1))))
                if state.point == END:
                    frozen.output(state)
                    state = frozen.begin(self._some(count))
            return steps * count

        return sample

    def env(self, count: int, graphs: bool = True) -> Sampler:
        """Go through the environment."""
        from dynrl.envs.exit import ExitVectorEnv
        from dynrl.envs.skip import SkipVectorEnv

        kind = ExitVectorEnv if self.frozen.speaks else SkipVectorEnv
        envs = kind(count, **self.env_config, autoreset_mode="SameStep")
        envs.graphs = graphs
        net = self.specs["sequential"].build().to(self.device)
        view, slots, done = envs.reset_tensors(0), torch.arange(count, device=self.device), 0

        @torch.no_grad()
        def sample(steps: int) -> int:
            nonlocal view, done
            for _ in range(steps):
                actions = self._drawn(net(view))
                if self.frozen.speaks:
                    actions = ((slots + done) % self.depth != 0).long()
                view, done = envs.step_tensors(actions)[0], done + 1
            return steps * count

        return sample

    def ours(self, count: int, kind: str) -> Sampler:
        """Sample by `SlabRunner`, deciding step by step or a whole walk at once."""
        from dynrl.agents.ppo import ppo_config
        from dynrl.agents.slab import SlabRunner

        spec = self.specs[kind]
        sight = spec.build().sight
        config = ppo_config(ENV, self.env_config | {"sight": sight.name}, spec, num_envs=count)
        each = min(sight.span, self.depth)  # how many decisions an environment step counts as
        runner = SlabRunner(config=config, worker_index=0, num_workers=0)
        return lambda steps: each * sum(map(len, runner.sample(num_timesteps=steps * count // each)))

    def stock(self, count: int, mode: str) -> Sampler:
        """Sample by RLlib's own runner and connectors."""
        from ray.rllib.algorithms.ppo import PPOConfig
        from ray.rllib.core.rl_module.rl_module import RLModuleSpec
        from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

        from dynrl.agents.rllib import RouterModule

        spec = RLModuleSpec(module_class=RouterModule, model_config={"spec": self.specs["sequential"]})
        config = (
            PPOConfig()
            .environment(ENV, env_config=self.env_config)
            .env_runners(num_env_runners=0, num_envs_per_env_runner=count, gym_env_vectorize_mode=mode)
            .rl_module(rl_module_spec=spec)
            .debugging(seed=0)
        )
        runner = SingleAgentEnvRunner(config=config, worker_index=0, num_workers=0)
        return lambda steps: sum(map(len, runner.sample(num_timesteps=steps * count)))


def _bench(
    network: str, names: list[str], counts: tuple[int, ...], rounds: int, device: str, dtype: str
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    settings = NETWORKS[network]
    exits = "exits" in settings
    paths = _Paths((ExitResNet if exits else _ForcedHalf)(**settings).eval(), device, dtype)
    names = [name for name in names if name in BY_EXITS or not exits]
    samplers = {(name, n): paths.sampler(name, n) for name in names for n in (SINGLE if name == "naive" else counts)}
    speeds: dict[tuple[str, int], list[float]] = {key: [] for key in samplers}
    wait = torch.cuda.synchronize if paths.images.is_cuda else lambda: None
    for i in range(rounds + 1):
        for (name, count), sample in samplers.items():
            steps = paths.depth * (max(1, 512 // count // paths.depth) if count > 1 else 30)
            wait()
            start = time.perf_counter()
            done = sample(steps)
            wait()
            if i:  # the first round warms up
                speeds[name, count].append(done / (time.perf_counter() - start))
        print(f"{network}: round {i} of {rounds}", flush=True)
    rows = [
        {"network": network, "path": name, "num_envs": count, "steps_per_s": statistics.median(values)}
        for (name, count), values in speeds.items()
    ]
    for row in rows:
        print(f"{network} {row['path']:13} {row['num_envs']:4} sub-envs {row['steps_per_s']:9.0f} steps/s", flush=True)
    return rows
