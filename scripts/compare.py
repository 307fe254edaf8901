"""Train a matrix of policies (decisions x agents x seeds), and report which is better and how certain that is.

Every cell is a run folder, OUT/DECISION-DATA/AGENT-SEED (ppo-at-PRICE-SEED), on one backbone. Unfinished cells
continue, finished cells stay, and other run folders that you put beside them are compared, too. For each decision, the
result is `comparison.json`, `comparison.png` and a table. They hold the areas under the accuracy-compute fronts on the
test split, operating points that were chosen on validation data, and paired differences between PPO's policies and
every other contender, with 95 % intervals over inputs and seeds. Without PPO, they hold the differences between all
learned policies and every other contender.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro


@dataclass
class Args:
    """These are the settings of `dynrl compare`."""

    decisions: Annotated[tuple[str, ...], tyro.conf.Positional]
    """The decisions to learn; `dynrl list` shows all of them."""
    out: Path
    """The folder of all runs; the same command continues in it."""
    data: str | None = None
    """The data set, as in `dynrl train`; by default, each decision's own."""
    agents: tuple[str, ...] = ("ppo", "gate")
    """The agents that learn, as in `dynrl train`."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """The seeds of policies; the first one is also the backbone's."""
    steps: int | None = None
    """The number of decisions that each policy learns from, as in `dynrl train`; by default, the data set's."""
    backbone: Path | None = None
    """A folder from `dynrl pretrain` or a run, whose backbone all policies learn on; by default, one is pretrained
    first. Only for one decision."""
    finetune: bool = False
    """Train backbones and policies in turn, as in `dynrl train`."""
    prices: tuple[float, ...] = ()
    """Prices at which PPO is also trained, each in runs of its own, to compare with one policy for all prices."""
    plain: tuple[str, ...] = ()
    """Smaller networks to train alone by the same recipe, each by what differs from the backbone's settings: two are
    'layers=[2,2,2]' 'layers=[1,4] widths=[16,16]'. The best that a budget allows are one front."""
    threads: int | None = None
    """The number of CPU threads; by default, all available cores."""


def main(args: Args) -> None:
    """Train the missing runs, then compare all of them."""
    from dynrl.data import check_dataset
    from dynrl.envs import decision
    from dynrl.scripts.cells import check, train_cells
    from dynrl.scripts.common import use_threads
    from dynrl.training import folder_name, held

    if not args.decisions or not args.agents or not args.seeds:
        raise ValueError("expected at least one decision, one agent and one seed")
    matrix = [(name, check_dataset(args.data or decision(name).data)) for name in args.decisions]
    check(args, matrix)
    use_threads(args.threads)
    for name, data in matrix:
        folder = args.out / f"{name}-{folder_name(data)}"
        folder.mkdir(parents=True, exist_ok=True)
        with held(folder):
            if not train_cells(folder, name, data, args):
                raise KeyboardInterrupt("to go on, give the same command")
            compare_runs(folder)


def compare_runs(folder: Path) -> dict[str, Any]:
    """Compare all finished runs and plain networks in `folder`; write, print and return the comparison."""
    from dynrl.evaluation import compare, comparison_text
    from dynrl.runs import RunFolder

    runs = [run for path in sorted(folder.iterdir()) if (run := RunFolder(path)).policy_file.is_file()]
    for run in runs:
        if not run.finished:
            print(f"left out, because it was stopped early: {run}", file=sys.stderr)
    finished, smaller = [run for run in runs if run.finished], sorted(folder.glob("plain-*"))
    result = compare(finished, out=folder, smaller=smaller, show=True)
    print(f"\n{comparison_text(result)}")
    return result


if __name__ == "__main__":
    from dynrl.scripts.cli import run

    run("compare")
