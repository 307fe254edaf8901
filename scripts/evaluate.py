"""Report accuracy (or squared error), MACs and time of run folders, as `report.json`, `report.png` and a table.

Several runs (policy seeds, agents, fine-tuned or not) of one pretrained backbone make one report. It has a row for each
kind of run, with the mean and the spread over its seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dynrl.schema import Dtype


@dataclass
class Args:
    """These are the settings of `dynrl evaluate`."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders of one pretrained backbone and data set."""
    smaller: tuple[Path, ...] = ()
    """Folders of `dynrl pretrain` with smaller networks (`--network ... --plain`): a row for each, and at each budget
    the best that it allows. Networks of one shape are seeds of one another."""
    out: Path | None = None
    """The folder for report.json and report.png; by default, the run folder, if there is only one."""
    data: str | None = None
    """Where the runs' data are now, if they have moved; by default, they are found by the name in the run."""
    budgets: tuple[float, ...] = ()
    """The shares of the dense MACs at which policies are asked, rising; by default, those of the family."""
    batch_size: int = 256
    """The number of inputs in the batch that is timed."""
    protocol: Literal["budgeted"] | None = None
    """A paper's protocol that is measured, too: budgeted, MSDNet's curve of 39 budgets and the answer of each exit."""
    device: str = "cpu"
    """The device on which networks run: cpu or cuda."""
    dtype: Dtype = "float32"
    """The number type of networks and inputs; policies stay in float32."""
    threads: int | None = None
    """The number of CPU threads; by default, all available cores."""


def main(args: Args) -> None:
    """Check everything, then write the report."""
    from dynrl.runs import RunFolder
    from dynrl.scripts.common import use_threads

    use_threads(args.threads)
    if not args.runs:
        raise ValueError("expected at least one run folder")
    for run in args.runs:
        _ = RunFolder(run).config
    if args.out is None and len(args.runs) > 1:
        raise ValueError("several runs make one report: name its folder with --out")
    out = args.out or args.runs[0]
    report_runs(
        args.runs, out, batch_size=args.batch_size, smaller=args.smaller, device=args.device, dtype=args.dtype,
        data=args.data, protocol=args.protocol, budgets=args.budgets,
    )  # fmt: skip


def report_runs(
    runs: Sequence[Path],
    out: Path,
    batch_size: int = 256,
    smaller: Sequence[Path] = (),
    device: str = "cpu",
    dtype: str = "float32",
    data: str | None = None,
    protocol: Literal["budgeted"] | None = None,
    budgets: Sequence[float] = (),
) -> dict[str, Any]:
    """Evaluate runs and show progress; write, print and return the report (see `dynrl.evaluation.evaluate`)."""
    from dynrl.evaluation import evaluate, report_text
    from dynrl.evaluation.figures import show_in_tensorboard

    report = evaluate(
        runs, out=out, smaller=smaller, data=data, batch_size=batch_size, device=device, dtype=dtype,
        protocol=protocol, budgets=budgets or None, show=True,
    )  # fmt: skip
    print(f"\n{report_text(report)}")
    if out in runs and (out / "report.png").is_file():
        show_in_tensorboard(out / "report.png", out)
    return report


if __name__ == "__main__":
    from dynrl.scripts.cli import run

    run("evaluate")
