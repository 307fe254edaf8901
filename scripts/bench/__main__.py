"""Measure one suite, and write dated results with hardware, versions, commit and command."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dynrl.schema import Dtype


@dataclass
class Args:
    """These are the settings of `dynrl bench`."""

    suite: Annotated[Literal["env", "ops", "model", "known", "agents", "tasks"], tyro.conf.Positional]
    """The suite to measure.
    env: decisions sampled a second, by several paths.
    ops: each op against its ideal.
    model: whole routed networks against dense ones.
    known: how soon the default agent finds routes that are known to be the best.
    agents: how soon the default agent, SB3's and stock RLlib's learn skip on fashion-mnist.
    tasks: whether half of the compute costs accuracy, however a plain network saves it."""
    out: Path | None = None
    """The file to write; by default, results/bench-SUITE-DATE.json."""
    rounds: int | None = None
    """How often each side is measured; the median counts. Default: 5 for env, 15 for model; ops goes by --seconds.
    For known, agents and tasks, the number of seeds; default: 3."""
    seconds: float = 1.5
    """The seconds of timing for each shape and batch size of ops."""
    only: tuple[str, ...] = ()
    """The ops, networks, decisions, agents or data sets to measure; by default, all of them.
    By default, env measures the first network, and tasks the data set trace-small."""
    batches: tuple[int, ...] = ()
    """The batch sizes for ops and model, or the numbers of sub-environments for env; by default, all of them."""
    runs: tuple[Path, ...] = ()
    """For model: run folders whose policies are measured, too, at half of the MACs.
    For agents: one run folder, whose backbone is taken; by default, one is pretrained.
    For tasks: the folder of its networks; by default, runs/bench-tasks."""
    device: str = "cpu"
    """The device on which ops, networks and the backbone of env run."""
    dtype: Dtype = "float32"
    """The number type of ops, networks and the backbone of env."""
    threads: int = 2
    """The number of CPU threads; env uses one."""


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
    from dynrl.files import check_folder, write_json
    from dynrl.machine import check_device, commit, hardware
    from dynrl.schema import MOST_ROWS, check_count
    from dynrl.scripts.bench.tables import SUMMED
    from dynrl.scripts.common import use_threads

    if args.rounds is not None:
        check_count("--rounds", args.rounds, 1, 1_000_000)
    heeded = HEEDED[args.suite]
    for field in fields(args):
        if field.name not in (*heeded, "suite", "out") and getattr(args, field.name) != field.default:
            options = ", --".join(heeded)
            raise ValueError(f"bench {args.suite} does not heed --{field.name}; its options are --{options}")
    out = args.out or Path("results") / f"bench-{args.suite}-{date.today():%Y%m%d}.json"
    if not 0 < args.seconds <= 3600:
        raise ValueError(f"expected --seconds above 0 and at most 3600, got {args.seconds}")
    for batch in args.batches:
        check_count("each of --batches", batch, 1, MOST_ROWS)
    check_device(args.device)
    check_folder(out.parent)
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
    """Run the suite and return its rows and its summaries."""
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
