"""Show where compute pays: an exit network that traces curves, its learned policy, and what stands beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

DECISION, DATA, BUDGET = "exit", "trace-small", 0.5
HALF = ("layers=[1,2]", "exits=[0]")  # a plain network of about half of the MACs


@dataclass
class Args:
    """Settings of `dynrl demo`."""

    out: Path | None = None
    """Folder to make; default: runs/demo-TIME. The same command goes on in it."""
    threads: int | None = None
    """CPU threads; default: all available cores."""


def main(args: Args) -> None:
    """Train a small plain network, then a backbone with its policy; print five rows, and where the picture is."""
    from dynrl import evaluate, train
    from dynrl.scripts.common import use_threads
    from dynrl.training import folder_for, pretrain, resume

    use_threads(args.threads)
    out = folder_for(args.out, "demo")
    if out.exists() and not (out / "smaller").is_dir():
        raise ValueError(f"{out} exists, and holds no demo to go on with; choose another --out")
    try:
        print("1 of 2: a plain network of half of the MACs, trained alone", flush=True)
        smaller = pretrain(DECISION, DATA, out=out / "smaller", plain=True, network=HALF, show=True)
        print("2 of 2: a network with exits, and a policy that decides where each image stops", flush=True)
        begun = (out / "run").is_dir()
        run = resume(out / "run", show=True) if begun else train(DECISION, DATA, out=out / "run", show=True)
        if not run.finished:
            raise KeyboardInterrupt
        report = evaluate(run, out=out, smaller=[smaller], budgets=(BUDGET,), show=True)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"to go on, give the same command with --out {quote(str(out))}") from None
    print(f"\n{DECISION} on {DATA}, test split; times of a batch of {report['dense']['batch_size']}")
    for name, row in rows(report):
        print(
            f"{name:36} {100 * row['accuracy']:6.2f} %  {row['macs_fraction']:5.2f} of the MACs"
            f" {row['latency_ms']:8.2f} ms {row['speedup']:6.2f} times as fast"
        )
    print(f"\nwhat was spent on short and on long curves: {out}/report.png")
    print(f"plug it: model = dynrl.load({str(run.path)!r}); model.set_budget({BUDGET}); outputs = model(inputs)")


def rows(report: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the five that tell it: dense, learned, the best rule of thumb, the plain network, random."""
    points = report["points"]

    def best(prefix: str) -> dict[str, Any]:
        mine = [row for row in points if row["policy"].startswith(prefix) and row["budget"] == BUDGET]
        return max(mine, key=lambda row: row["accuracy"])

    yield "dense", report["dense"] | {"macs_fraction": 1.0, "speedup": 1.0}
    yield f"learned, {BUDGET} of the MACs", best("learned")
    rule = best("threshold")
    yield f"best rule of thumb ({rule['policy']})", rule
    yield "plain network of half of the MACs", best("smaller")
    yield "random routes", best("random")


def table(report: dict[str, Any]) -> list[str]:
    """Write the five rows as a Markdown table."""
    from dynrl.tasks import TASKS

    task = TASKS[report["metric"]]
    lines = [f"| | {task.heading} | MACs | ms | speed-up |", "|---|---|---|---|---|"]
    for name, row in rows(report):
        cells = (
            task.show(row[task.metric]),
            f"{row['macs_fraction']:.2f}",
            f"{row['latency_ms']:.1f}",
            f"{row['speedup']:.2f}",
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    from dynrl.scripts.cli import run

    run("demo")
