"""Decisions sampled a second, by several paths: rows of `dynrl bench env`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from dynrl.backbones import END, SkipResNet, State
from dynrl.data import Augmentation, Dataset, Split
from dynrl.observation import Layout, View, observation
from dynrl.policies import Router
from dynrl.scripts.bench_model import NETWORKS as MODELS

NETWORKS: dict[str, dict[str, Any]] = {
    "resnet20 28x28": {"input_shape": (1, 28, 28), "layers": (3, 3, 3), "widths": (16, 32, 64)},
    "resnet50 224x224": MODELS["resnet50 224x224"].settings,
}
IMAGES = 256
# path: what it takes beside torch. Single environments are measured in these numbers, whatever is asked for.
PATHS = {
    "walk": None, "bare": None, "env": "gymnasium", "rllib": "ray", "rllib-upfront": "ray", "rllib-stock": "ray",
    "naive": "ray",
}  # fmt: skip
SINGLE = (1, 16)

Sampler = Callable[[int], int]


class _ForcedHalf(SkipResNet):
    def _run(self, state: State, action: torch.Tensor) -> list[State]:
        return super()._run(state, (state.rows + state.point) % 2)


def bench_env(
    rounds: int = 5, networks: tuple[str, ...] = (), counts: tuple[int, ...] = (), device: str = "cpu",
    dtype: str = "float32",
) -> list[dict[str, Any]]:  # fmt: skip
    """Decisions sampled a second on ResNets, half of whose blocks are forced to run, on one thread.

    Forced: what runs does not depend on the policy, so that every path does the same work. Paths: `walk` is the
    backbone alone on a route known beforehand; `bare` adds observation, router and draw, in torch; `env` the same
    through the environment; `rllib` is `SlabRunner`, `rllib-upfront` the same where all of a walk is decided at once;
    `rllib-stock` is RLlib's own runner on the same batched environment; `naive` is RLlib's own runner on single
    environments side by side. The last two read the same router through RLlib's connectors. What `bare`, `env` and
    `rllib` each take longer than the path before is what they add. Paths whose packages are missing are left out, and
    named.

    Args:
        rounds: times each is measured, in turn; medians count.
        networks: of `NETWORKS`; default the first.
        counts: of sub-environments; default 64 and 256.
        device, dtype: of the backbone.
    """
    unknown = set(networks) - set(NETWORKS)
    if unknown:
        raise ValueError(f"unknown networks {sorted(unknown)}; expected some of {list(NETWORKS)}")
    torch.set_num_threads(1)
    missing = {package for package in PATHS.values() if package and find_spec(package) is None}
    paths = [path for path, package in PATHS.items() if package not in missing]
    if missing:
        left_out = [path for path in PATHS if path not in paths]
        print(f"left out, as {', '.join(sorted(missing))} is missing: {', '.join(left_out)}", flush=True)
    return [
        row | {"device": device, "dtype": dtype}
        for network in networks or list(NETWORKS)[:1]
        for row in _bench(network, paths, counts or (64, 256), rounds, device, dtype)
    ]


def _bench(
    network: str, paths: list[str], counts: tuple[int, ...], rounds: int, device: str, dtype: str
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    backbone = _ForcedHalf(**NETWORKS[network]).eval()
    frozen = backbone.for_inference().to(device, getattr(torch, dtype))
    classes: int = backbone.config["classes"]
    split = Split(torch.randn(IMAGES, *backbone.input_shape), torch.randint(0, classes, (IMAGES,)))
    images = split.inputs.to(device, getattr(torch, dtype))
    noise = Dataset("noise", classes, split, split, split, Augmentation())
    router: dict[str, Any] = {**Layout.of(backbone).to_dict(), "price_range": [0.01, 1.0], "start": 1}
    upfront = {**View.of(backbone).to_dict(), "price_range": [0.01, 1.0]}
    env_config: dict[str, Any] = {
        "backbone": backbone, "data": noise, "price_range": [0.01, 1.0], "accuracy_term": "correct", "device": device,
        "dtype": dtype,
    }  # fmt: skip
    env_id, depth = "dynrl/Skip-v0", backbone.max_steps

    def drawn(logits: torch.Tensor) -> torch.Tensor:
        return (logits - torch.empty_like(logits).exponential_().log_()).argmax(1)

    def some(count: int) -> torch.Tensor:
        return images[torch.randint(0, IMAGES, (count,), device=device)]

    def walk(count: int) -> Sampler:
        route = frozen.dense_actions(count, images.device)  # in vain, see `_ForcedHalf`

        def known(state: State) -> torch.Tensor:
            return state.along(route)

        @torch.no_grad()
        def sample(steps: int) -> int:
            for _ in range(steps // depth):
                frozen.run(some(count), known)  # `run_route` would look at the route's values
            return steps // depth * depth * count

        return sample

    def bare(count: int) -> Sampler:
        net = Router(**router).to(device)

        @torch.no_grad()
        def sample(steps: int) -> int:
            state = frozen.begin(some(count))
            for _ in range(steps):
                (state,) = frozen.advance(state, drawn(net(observation(frozen, state, 0.1))))
                if state.point == END:
                    frozen.output(state)
                    state = frozen.begin(some(count))
            return steps * count

        return sample

    def env(count: int) -> Sampler:
        from dynrl.envs.skip import SkipVectorEnv

        envs = SkipVectorEnv(count, **env_config, autoreset_mode="SameStep")
        net = Router(**router).to(device)
        view = [envs.reset_tensors(0)]

        @torch.no_grad()
        def sample(steps: int) -> int:
            for _ in range(steps):
                view[0] = envs.step_tensors(drawn(net(view[0])))[0]
            return steps * count

        return sample

    def ours(count: int, kind: str, arguments: dict[str, Any]) -> Sampler:
        from dynrl.agents.base import PolicySpec
        from dynrl.agents.ppo import ppo_config
        from dynrl.agents.slab import SlabRunner

        each = depth if kind == "upfront" else 1
        spec = PolicySpec(kind, arguments)
        config = ppo_config(env_id, env_config | {"upfront": kind == "upfront"}, spec, num_envs=count)
        runner = SlabRunner(config=config, worker_index=0, num_workers=0)
        return lambda steps: each * sum(map(len, runner.sample(num_timesteps=steps * count // each)))

    def stock(count: int, mode: str) -> Sampler:
        from ray.rllib.algorithms.ppo import PPOConfig
        from ray.rllib.core.rl_module.rl_module import RLModuleSpec
        from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

        from dynrl.agents.base import PolicySpec
        from dynrl.agents.rllib import RouterModule

        spec = RLModuleSpec(module_class=RouterModule, model_config={"spec": PolicySpec("sequential", router)})
        config = (
            PPOConfig()
            .environment(env_id, env_config=env_config)
            .env_runners(num_env_runners=0, num_envs_per_env_runner=count, gym_env_vectorize_mode=mode)
            .rl_module(rl_module_spec=spec)
            .debugging(seed=0)
        )
        runner = SingleAgentEnvRunner(config=config, worker_index=0, num_workers=0)
        return lambda steps: sum(map(len, runner.sample(num_timesteps=steps * count)))

    make: dict[str, Callable[[int], Sampler]] = {
        "walk": walk, "bare": bare, "env": env,
        "rllib": lambda count: ours(count, "sequential", router),
        "rllib-upfront": lambda count: ours(count, "upfront", upfront),
        "rllib-stock": lambda count: stock(count, "vector_entry_point"),
        "naive": lambda count: stock(count, "sync"),
    }  # fmt: skip
    samplers = {(path, n): make[path](n) for path in paths for n in (SINGLE if path == "naive" else counts)}
    speeds: dict[tuple[str, int], list[float]] = {key: [] for key in samplers}
    wait = torch.cuda.synchronize if images.is_cuda else lambda: None
    for i in range(rounds + 1):
        for (path, count), sample in samplers.items():
            steps = depth * (max(1, 512 // count // depth) if count > 1 else 30)
            wait()
            start = time.perf_counter()
            done = sample(steps)
            wait()
            if i:  # the first round warms up
                speeds[path, count].append(done / (time.perf_counter() - start))
        print(f"{network}: round {i} of {rounds}", flush=True)
    rows = [
        {"network": network, "path": path, "num_envs": count, "steps_per_s": statistics.median(values)}
        for (path, count), values in speeds.items()
    ]
    for row in rows:
        print(f"{network} {row['path']:13} {row['num_envs']:4} sub-envs {row['steps_per_s']:9.0f} steps/s", flush=True)
    return rows
