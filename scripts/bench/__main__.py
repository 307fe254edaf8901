"""Measure, and write dated results: hardware, versions, commit, command, rows."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


@dataclass
class Args:
    """Settings of `dynrl bench`."""

    suite: Annotated[Literal["env", "ops", "model", "known", "agents", "tasks"], tyro.conf.Positional]
    """What to measure. env: decisions sampled a second, by several paths. ops: each op against its ideal. model: whole
    plugged networks against dense ones. known: how soon the default agent finds routes that are known to be best.
    agents: how soon it learns skip on fashion-mnist, beside SB3 and stock RLlib. tasks: whether half of the compute
    costs accuracy, however a plain network saves it."""
    out: Path | None = None
    """File to write; default results/bench-SUITE-DATE.json."""
    rounds: int | None = None
    """How often each side is measured, the median counts: default 5 for env, 15 for model. ops goes by `seconds`. For
    known, agents and tasks, the number of seeds; default 3."""
    seconds: float = 1.5
    """Time for each shape and batch size of ops."""
    only: tuple[str, ...] = ()
    """Ops, networks, decisions, agents or data sets to measure; default: all (env: the first network; tasks: the data
    set trace-small)."""
    batches: tuple[int, ...] = ()
    """Batch sizes for ops and model, numbers of sub-environments for env; default: all."""
    runs: tuple[Path, ...] = ()
    """Run folders whose learned policy model measures, too, at half the MACs; for agents one, whose backbone is taken
    (default: one is pretrained); for tasks the folder of its networks (default: runs/bench-tasks)."""
    device: str = "cpu"
    """Where ops, model and env's backbone run."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of their numbers."""
    threads: int = 2
    """CPU threads; env uses one."""


HEEDED = {  # the options of each suite
    "env": ("rounds", "only", "batches", "device", "dtype"),
    "ops": ("seconds", "only", "batches", "device", "dtype", "threads"),
    "model": ("rounds", "only", "batches", "runs", "device", "dtype", "threads"),
    "known": ("rounds", "only", "threads"),
    "agents": ("rounds", "only", "runs", "threads"),
    "tasks": ("rounds", "only", "runs", "threads"),
}


def main(args: Args) -> None:
    """Run the suite, print its rows and write them."""
    from dynrl.files import write_json
    from dynrl.machine import commit, hardware
    from dynrl.scripts.bench.tables import SUMMED
    from dynrl.scripts.common import use_threads

    if args.rounds is not None and args.rounds < 1:
        raise ValueError(f"expected --rounds of at least 1, got {args.rounds}")
    heeded = HEEDED[args.suite]
    for field in fields(args):
        if field.name not in (*heeded, "suite", "out") and getattr(args, field.name) != field.default:
            options = ", --".join(heeded)
            raise ValueError(f"bench {args.suite} does not heed --{field.name}; its options are --{options}")
    out = args.out or Path("results") / f"bench-{args.suite}-{date.today():%Y%m%d}.json"
    out.parent.mkdir(parents=True, exist_ok=True)  # before the work
    if "threads" in heeded:
        use_threads(args.threads)
    rows, summaries = measured(args)
    for found in summaries:
        print(SUMMED[args.suite](found))
    result = {
        "suite": args.suite, "date": f"{date.today()}", "command": " ".join(sys.argv), "commit": commit(),
        "hardware": hardware(), "rows": rows, "summary": summaries,
    }  # fmt: skip
    write_json(out, result)
    print(f"written to {out}")


def measured(args: Args) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run the suite: its rows, and what it sums them up to."""
    suite: Any = importlib.import_module(f"dynrl.scripts.bench.{args.suite}")
    calls: dict[str, Callable[[], Any]] = {
        "env": lambda: suite.bench_env(args.rounds or 5, args.only, args.batches, args.device, args.dtype),
        "known": lambda: suite.bench_known(args.only, args.rounds or 3),
        "agents": lambda: suite.bench_agents(args.only, args.rounds or 3, args.runs),
        "tasks": lambda: suite.bench_tasks(args.only, args.rounds or 3, args.runs),
        "model": lambda: suite.bench_model(
            args.device, args.dtype, args.rounds or 15, args.only, args.batches, args.runs
        ),
        "ops": lambda: suite.bench_ops(args.device, args.dtype, args.seconds, args.only, args.batches or suite.BATCHES),
    }
    rows = calls[args.suite]()
    return rows, suite.summary(rows) if hasattr(suite, "summary") else []


if __name__ == "__main__":
    from dynrl.scripts.cli import run

    run("bench")
