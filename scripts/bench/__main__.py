"""Measure, and write dated results: hardware, versions, commit, command, rows."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


@dataclass
class Args:
    """Settings of `dynrl bench`."""

    suite: Annotated[Literal["env", "ops", "model", "known", "agents"], tyro.conf.Positional]
    """What to measure. env: decisions sampled a second, by several paths. ops: each op against its ideal. model: whole
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
    """Ops, networks, decisions or agents to measure; default all (of env, the first network)."""
    batches: tuple[int, ...] = ()
    """Batch sizes of ops and model, default all; of env, numbers of sub-environments."""
    runs: tuple[Path, ...] = ()
    """Run folders whose learned policy model measures, too, at half the MACs; of agents one, whose backbone is taken
    (default: one is pretrained)."""
    device: str = "cpu"
    """Where ops, model and env's backbone run."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of their numbers."""
    threads: int = 2
    """Threads; env uses one."""


# The options that each suite heeds.
HEEDED = {
    "env": ("rounds", "only", "batches", "device", "dtype"),
    "ops": ("seconds", "only", "batches", "device", "dtype", "threads"),
    "model": ("rounds", "only", "batches", "runs", "device", "dtype", "threads"),
    "known": ("rounds", "only", "threads"),
    "agents": ("rounds", "only", "runs", "threads"),
}


def main(args: Args) -> None:
    """Run the suite, print its rows and write them."""
    from dynrl.files import write_json
    from dynrl.machine import hardware
    from dynrl.scripts.common import commit, use_threads

    if args.rounds is not None and args.rounds < 1:
        raise ValueError(f"expected --rounds of at least 1, got {args.rounds}")
    heeded = HEEDED[args.suite]
    for field in fields(args):
        if field.name not in (*heeded, "suite", "out") and getattr(args, field.name) != field.default:
            options = ", ".join(f"--{name}" for name in heeded)
            raise ValueError(f"bench {args.suite} does not heed --{field.name}; its options are {options}")
    out = args.out or Path("results") / f"bench-{args.suite}-{date.today():%Y%m%d}.json"
    out.parent.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is known before the work
    summaries: list[dict[str, Any]] = []
    if args.suite == "env":
        from dynrl.scripts.bench_env import bench_env

        rows = bench_env(args.rounds or 5, args.only, args.batches, args.device, args.dtype)
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


if __name__ == "__main__":
    from dynrl.scripts.cli import run

    run("bench")
