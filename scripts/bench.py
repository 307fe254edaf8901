"""Measure, and write dated results: hardware, versions, commit, command, rows."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


@dataclass
class Args:
    """Settings of `dynrl bench`."""

    suite: Annotated[Literal["env", "ops", "model", "known", "agents"], tyro.conf.Positional]
    """What to measure. env: decisions sampled a second, by four paths. ops: each op against its ideal. model: whole
    plugged networks against dense ones. known: how soon the default agent finds routes that are known to be best.
    agents: how soon it learns skip on fashion-mnist, beside SB3 and stock RLlib, and where its time goes."""
    out: Path | None = None
    """File to write; default results/bench-SUITE-DATE.json."""
    rounds: int | None = None
    """Times each side is measured, its median counts; default 5 for env, 15 for model. ops decides by `seconds`. Of
    known and agents, policy seeds; default 3."""
    seconds: float = 1.5
    """Time for each shape and batch size of ops."""
    only: tuple[str, ...] = ()
    """Ops, networks, decisions or agents to measure; default all."""
    batches: tuple[int, ...] = ()
    """Batch sizes of ops and model; default all."""
    runs: tuple[Path, ...] = ()
    """Run folders whose learned policy model measures, too, at half the MACs; of agents one, whose backbone is taken
    (default: one is pretrained)."""
    device: str = "cpu"
    """Where ops and model run."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of ops' and model's numbers."""
    threads: int = 2
    """Threads; env uses one."""


def main(args: Args) -> None:
    """Run the suite, print its rows and write them."""
    from dynrl.files import write_json
    from dynrl.machine import hardware
    from dynrl.scripts.common import commit, use_threads

    if args.rounds is not None and args.rounds < 1:
        raise ValueError(f"expected --rounds of at least 1, got {args.rounds}")
    out = args.out or Path("results") / f"bench-{args.suite}-{date.today():%Y%m%d}.json"
    out.parent.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is known before the work
    summaries: list[dict[str, Any]] = []
    if args.suite == "env":
        rows = bench_env(args.rounds or 5)
    elif args.suite == "known":
        from dynrl.envs import DECISIONS
        from dynrl.scripts.bench_known import bench_known

        use_threads(args.threads)
        rows = bench_known(args.only or DECISIONS, args.rounds or 3)
    elif args.suite == "agents":
        from dynrl.scripts.bench_agents import CONTENDERS, bench_agents

        use_threads(args.threads)
        if unknown := set(args.only) - set(CONTENDERS):
            raise ValueError(f"unknown agents {sorted(unknown)}; expected some of {list(CONTENDERS)}")
        rows = bench_agents(args.only or CONTENDERS, args.rounds or 3, args.runs)
    else:
        use_threads(args.threads)
        if args.suite == "ops":
            from dynrl.scripts.bench_ops import BATCHES, bench_ops, summary

            rows = bench_ops(args.device, args.dtype, args.seconds, args.only, args.batches or BATCHES)
            summaries = summary(rows)
            for found in summaries:
                print(
                    f"{found['op']:14} {found['rows']} rows of 0.5 ms and more: geometric mean "
                    f"{found['geometric_mean']:.3f}, worst {found['worst']:.3f}; slower than dense: "
                    f"{found['slower_than_dense']} of {found['with_dense']}, {found['clearly']} clearly"
                )
        else:
            from dynrl.scripts.bench_model import bench_model

            rows = bench_model(args.device, args.dtype, args.rounds or 15, args.only, args.batches, args.runs)
    result = {
        "suite": args.suite, "date": f"{date.today()}", "command": " ".join(sys.argv), "commit": commit(),
        "hardware": hardware(), "rows": rows, "summary": summaries,
    }  # fmt: skip
    write_json(out, result)
    print(f"written to {out}")


def bench_env(rounds: int) -> list[dict[str, Any]]:
    """Decisions sampled a second on a ResNet of 9 residual blocks (16/32/64 channels, 28x28), half of them forced.

    One thread. Forced: what runs does not depend on the policy, so that every path does the same work. Paths:
    `bare` is the walk in a loop with observation, router and draw, in torch, without environment or RLlib; `rllib` is
    `SlabRunner`, `rllib-upfront` the same where all of a walk is decided at once; `rllib-stock` is RLlib's own runner
    on the same batched environment; `naive` is RLlib's own runner on single environments side by side. The last two
    read the same router through RLlib's connectors.
    """
    import torch

    torch.set_num_threads(1)
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.core.rl_module.rl_module import RLModuleSpec
    from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

    from dynrl.agents.ppo import ppo_config
    from dynrl.agents.rllib import RouterModule, SlabRunner
    from dynrl.backbones import END, GatedResNet, State
    from dynrl.data import Augmentation, Dataset, Split
    from dynrl.observation import Layout, View, observation
    from dynrl.policies import Router

    class ForcedHalf(GatedResNet):
        def _run(self, state: State, action: torch.Tensor) -> list[State]:
            return super()._run(state, (state.rows + state.point) % 2)

    torch.manual_seed(0)
    backbone = ForcedHalf((1, 28, 28), layers=(3, 3, 3), widths=(16, 32, 64)).eval()
    split = Split(torch.randn(512, 1, 28, 28), torch.randint(0, 10, (512,)))
    noise = Dataset("noise", 10, split, split, split, Augmentation())
    router: dict[str, Any] = {**Layout.of(backbone).to_dict(), "price_range": [0.01, 1.0], "start": 1}
    upfront = {**View.of(backbone).to_dict(), "price_range": [0.01, 1.0]}
    env_config = {"backbone": backbone, "data": noise, "price_range": [0.01, 1.0], "accuracy_term": "correct"}
    env_id, model = "dynrl/Skip-v0", {"router": ["sequential", router]}

    def bare(count: int) -> Callable[[int], int]:
        frozen, net = backbone.for_inference(), Router(**router)

        @torch.no_grad()
        def sample(steps: int) -> int:
            state = frozen.begin(split.inputs[torch.randint(0, 512, (count,))])
            for _ in range(steps):
                logits = net(observation(frozen, state, 0.1))
                action = (logits - torch.empty_like(logits).exponential_().log_()).argmax(1)
                (state,) = frozen.advance(state, action)
                if state.point == END:
                    frozen.output(state)
                    state = frozen.begin(split.inputs[torch.randint(0, 512, (count,))])
            return steps * count

        return sample

    def ours(count: int, kind: str, arguments: dict[str, Any]) -> Callable[[int], int]:
        settings = env_config | {"upfront": kind == "upfront"}
        each = backbone.max_steps if kind == "upfront" else 1
        config = ppo_config(env_id, settings, (kind, arguments), num_envs=count)
        runner = SlabRunner(config=config, worker_index=0, num_workers=0)
        return lambda steps: each * sum(map(len, runner.sample(num_timesteps=steps * count // each)))

    def stock(count: int, mode: str) -> Callable[[int], int]:
        config = (
            PPOConfig()
            .environment(env_id, env_config=env_config)
            .env_runners(num_env_runners=0, num_envs_per_env_runner=count, gym_env_vectorize_mode=mode)
            .rl_module(rl_module_spec=RLModuleSpec(module_class=RouterModule, model_config=model))
            .debugging(seed=0)
        )
        runner = SingleAgentEnvRunner(config=config, worker_index=0, num_workers=0)
        return lambda steps: sum(map(len, runner.sample(num_timesteps=steps * count)))

    paths: dict[tuple[str, int], Callable[[int], int]] = {}
    for count in (64, 256):
        paths["bare", count] = bare(count)
        paths["rllib", count] = ours(count, "sequential", router)
        paths["rllib-upfront", count] = ours(count, "upfront", upfront)
        paths["rllib-stock", count] = stock(count, "vector_entry_point")
    for count in (1, 16):
        paths["naive", count] = stock(count, "sync")
    speeds: dict[tuple[str, int], list[float]] = {key: [] for key in paths}
    for i in range(rounds + 1):
        for (path, count), sample in paths.items():
            steps = (
                backbone.max_steps * max(1, 512 // count // backbone.max_steps)
                if count > 1
                else 30 * backbone.max_steps
            )
            start = time.perf_counter()
            done = sample(steps)
            if i:  # the first round warms up
                speeds[path, count].append(done / (time.perf_counter() - start))
        print(f"round {i} of {rounds}", flush=True)
    rows = [
        {"path": path, "num_envs": count, "steps_per_s": statistics.median(values)}
        for (path, count), values in speeds.items()
    ]
    for row in rows:
        print(f"{row['path']:12} {row['num_envs']:4} sub-envs {row['steps_per_s']:9.0f} steps/s")
    return rows


if __name__ == "__main__":
    from dynrl.scripts.cli import run

    run("bench")
