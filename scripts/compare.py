"""Train a matrix of policies (decisions x agents x seeds), and tell which is better, by how much, and how surely.

Every cell is a run folder, OUT/DECISION-DATA/AGENT-SEED (ppo-at-PRICE-SEED), on one backbone. A cell that was begun is
gone on with, a finished one stays as it is, and run folders that you put beside them are compared, too. For each
decision the result is `comparison.json`, `comparison.png` and a table: areas under the accuracy-compute fronts of the
test split, operating points chosen on validation data, and paired differences of PPO's policies (without them, of all)
to each other contender, with 95 % intervals over inputs and seeds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro


@dataclass
class Args:
    """Settings of `dynrl compare`."""

    decisions: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Decisions to learn; see `dynrl list`."""
    out: Path
    """Folder of all runs; the same command goes on with it."""
    data: str | None = None
    """Data set, as in `dynrl train`; default: each decision's."""
    agents: tuple[str, ...] = ("ppo", "gate")
    """What learns, as in `dynrl train`."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Policy seeds; the backbone's is the first of them."""
    finetune: bool = False
    """Train backbones and policies in turn, as in `dynrl train`."""
    prices: tuple[float, ...] = ()
    """Prices to train PPO at, one alone each: policies that one policy for all prices must stand beside."""
    plain: tuple[str, ...] = ()
    """Smaller networks to train alone by the same recipe, each by what differs from the backbone's settings: two are
    'layers=[2,2,2]' 'layers=[1,4] widths=[16,16]'. The best that a budget allows are one front."""
    threads: int | None = None
    """CPU threads; default: all available cores."""


def main(args: Args) -> None:
    """Train what is missing, then compare."""
    from dynrl.data import check_dataset
    from dynrl.envs import decision
    from dynrl.scripts.cells import check, train_cells
    from dynrl.scripts.common import use_threads
    from dynrl.training import folder_name

    if not args.decisions or not args.agents or not args.seeds:
        raise ValueError("expected at least one decision, one agent and one seed")
    matrix = [(name, check_dataset(args.data or decision(name).data)) for name in args.decisions]
    check(args, matrix)
    use_threads(args.threads)
    for name, data in matrix:
        folder = args.out / f"{name}-{folder_name(data)}"
        if not train_cells(folder, name, data, args):
            return
        compare_runs(folder)


def compare_runs(folder: Path) -> dict[str, Any]:
    """Compare all finished runs and plain networks in `folder`; write, print and return the comparison."""
    from dynrl.evaluation import compare, comparison_text
    from dynrl.runs import RunFolder

    runs = [run for path in sorted(folder.iterdir()) if (run := RunFolder(path)).policy_file.is_file()]
    for run in runs:
        if not run.finished:
            print(f"left out, since it was stopped early: {run}", file=sys.stderr)
    finished, smaller = [run for run in runs if run.finished], sorted(folder.glob("plain-*"))
    result = compare(finished, out=folder, smaller=smaller, show=True)
    print(f"\n{comparison_text(result)}")
    return result


if __name__ == "__main__":
    from dynrl.scripts.cli import run

    run("compare")
