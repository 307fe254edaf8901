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
    from dynrl.scripts.cells import check, train_cells, tunes
    from dynrl.scripts.common import use_threads
    from dynrl.training import folder_name, held

    if not args.decisions or not args.agents or not args.seeds:
        raise ValueError("expected at least one decision, one agent and one seed")
    posed = [(name, check_dataset(args.data or decision(name).data)) for name in args.decisions]
    matrix = [(args.out / f"{name}-{folder_name(data)}", name, data) for name, data in posed]
    check(args, matrix)
    use_threads(args.threads)
    for folder, name, data in matrix:
        folder.mkdir(parents=True, exist_ok=True)
        with held(folder):
            if not train_cells(folder, name, data, args):
                raise KeyboardInterrupt
            compare_runs(folder, tunes(name, data, args))


def compare_runs(folder: Path, tuned: bool = False) -> dict[str, Any]:
    """Compare all finished runs in `folder`, and plain networks that trained as long as backbones that are `tuned`.

    The comparison is written, printed and returned; what is left out is named.
    """
    from dynrl.evaluation import compare, comparison_text
    from dynrl.runs import RunFolder
    from dynrl.scripts.cells import TUNED

    folders = [RunFolder(path) for path in sorted(folder.iterdir())]
    runs, plain = [f for f in folders if f.policy_file.is_file()], [f for f in folders if f.path.match("plain-*")]
    alike = [f for f in plain if f.path.name.endswith(TUNED) == tuned]
    finished, smaller = [run for run in runs if run.finished], [f for f in alike if f.plain_file.is_file()]
    early, other = "it was stopped early", f"it did not train as long as {'tuned' if tuned else 'these'} backbones"
    for left in (f for f in [*runs, *plain] if f not in [*finished, *smaller]):
        print(f"left out, because {early if left in [*runs, *alike] else other}: {left}", file=sys.stderr)
    result = compare(finished, out=folder, smaller=[f.path for f in smaller], show=True)
    print(f"\n{comparison_text(result)}")
    return result


if __name__ == "__main__":
    from dynrl.scripts.cli import run

    run("compare")
