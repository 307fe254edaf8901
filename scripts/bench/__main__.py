"""Measure one suite, and write dated results with hardware, versions, commit and command."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


@dataclass
class Args:
    """These are the settings of `dynrl bench`."""

    suite: Annotated[Literal["env", "ops", "model", "known", "agents"], tyro.conf.Positional]
    """The suite to measure.
    env: decisions sampled a second, by several paths.
    ops: each op against its ideal.
    model: whole routed networks against dense ones.
    known: how soon the default agent finds routes that are known to be the best.
    agents: how soon the default agent, SB3's and stock RLlib's learn skip on fashion-mnist."""
    out: Path | None = None
    """The file to write; by default, results/bench-SUITE-DATE.json."""
    rounds: int | None = None
    """How often each side is measured; the median counts. Default: 5 for env, 15 for model; ops goes by --seconds.
    For known and agents, the number of policy seeds; default: 3."""
    seconds: float = 1.5
    """The seconds of timing for each shape and batch size of ops."""
    only: tuple[str, ...] = ()
    """The ops, networks, decisions or agents to measure; by default, all of them (env: the first network)."""
    batches: tuple[int, ...] = ()
    """The batch sizes for ops and model, or the numbers of sub-environments for env; by default, all of them."""
    runs: tuple[Path, ...] = ()
    """For model: run folders whose policies are measured, too, at half of the MACs.
    For agents: one run folder, whose backbone is taken; by default, one is pretrained."""
    device: str = "cpu"
    """The device on which ops, networks and the backbone of env run."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """The number type of ops, networks and the backbone of env."""
    threads: int = 2
    """The number of CPU threads; env uses one."""


HEEDED = {  # the options of each suite
    "env": ("rounds", "only", "batches", "device", "dtype"),
    "ops": ("seconds", "only", "batches", "device", "dtype", "threads"),
    "model": ("rounds", "only", "batches", "runs", "device", "dtype", "threads"),
    "known": ("rounds", "only", "threads"),
    "agents": ("rounds", "only", "runs", "threads"),
}


def main(args: Args) -> None:
    """Run the suite, print its rows and write them."""
    from dynrl.files import write_json
    from dynrl.machine import commit, hardware
    from dynrl.scripts.bench.tables import summed
    from dynrl.scripts.common import use_threads

    if args.rounds is not None and args.rounds < 1:
        raise ValueError(f"expected --rounds of at least 1, got {args.rounds}")
    heeded = HEEDED[args.suite]
    for field in fields(args):
        if field.name not in (*heeded, "suite", "out") and getattr(args, field.name) != field.default:
            options = ", --".join(heeded)
            raise ValueError(f"bench {args.suite} does not heed --{field.name}; its options are --{options}")
    out = args.out or Path("results") / f"bench-{args.suite}-{date.today():%Y%m%d}.json"
    out.parent.mkdir(parents=True, exist_ok=True)  # before the work, so that a bad path is refused at once
    if "threads" in heeded:
        use_threads(args.threads)
    rows, summaries = measured(args)
    print(*map(summed, summaries), sep="\n", end="\n" if summaries else "")
    result = {
        "suite": args.suite, "date": f"{date.today()}", "command": " ".join(sys.argv), "commit": commit(),
        "hardware": hardware(), "rows": rows, "summary": summaries,
    }  # fmt: skip
    write_json(out, result)
    print(f"written to {out}")


def measured(args: Args) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run the suite and return its rows and its summaries."""
    suite: Any = importlib.import_module(f"dynrl.scripts.bench.{args.suite}")
    if args.suite == "env":
        return suite.bench_env(args.rounds or 5, args.only, args.batches, args.device, args.dtype), []
    if args.suite == "known":
        return suite.bench_known(args.only, args.rounds or 3), []
    if args.suite == "agents":
        return suite.bench_agents(args.only, args.rounds or 3, args.runs), []
    if args.suite == "model":
        return suite.bench_model(args.device, args.dtype, args.rounds or 15, args.only, args.batches, args.runs), []
    rows = suite.bench_ops(args.device, args.dtype, args.seconds, args.only, args.batches or suite.BATCHES)
    return rows, suite.summary(rows)


if __name__ == "__main__":
    from dynrl.scripts.cli import run

    run("bench")
