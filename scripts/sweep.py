"""Search for good training settings with Ray Tune: try every combination, stop poor ones early, name the best.

Each combination is a run folder, OUT/NAME=VALUE,..., on one backbone. As many runs train in parallel as there are
cores. After each quarter of its steps, a policy is judged on validation data by the area under its accuracy-compute
front from 0.3 to 0.9 of the dense MACs. After one quarter and after two, the worse half of the runs that have come as
far stops (asynchronous successive halving; Li et al. 2020, MLSys). The same command continues an interrupted sweep,
also with more values to try.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro


@dataclass
class Args:
    """These are the settings of `dynrl sweep`."""

    decision: Annotated[str, tyro.conf.Positional]
    """The decision to learn; `dynrl list` shows all of them."""
    out: Path
    """The folder of all runs; the same command continues in it."""
    vary: tuple[str, ...] = ("learning_rate=0.0005,0.002,0.008", "hidden=32,128")
    """The settings to vary, each NAME=VALUE,VALUE..., as in `dynrl train`.
    Names are learning_rate, entropy, hidden, num_envs, steps, reward and baseline."""
    data: str | None = None
    """The data set, as in `dynrl train`; by default, the decision's own."""
    agent: str = "ppo"
    """The agent that learns, as in `dynrl train`."""
    backbone: Path | None = None
    """A folder from `dynrl pretrain` or a run folder; by default, a backbone is pretrained first, in OUT/backbone."""
    steps: int | None = None
    """The number of decisions that a run learns from if it is not stopped; by default, the data set's."""
    seed: int = 0
    """The seed of the policies of all runs."""
    side_by_side: int | None = None
    """The number of runs that train in parallel; by default, one a core."""


def main(args: Args) -> None:
    """Check all combinations, train them and rank them."""
    from dynrl.schema import check_count
    from dynrl.scripts.common import use_threads
    from dynrl.sweep import check_same, trainings
    from dynrl.training import held

    check_count("--side-by-side", 1 if args.side_by_side is None else args.side_by_side, 1, 1_000)
    use_threads(None)
    given = {name: value for name in ("agent", "seed", "steps") if (value := getattr(args, name)) is not None}
    found = trainings(args.decision, args.data, args.backbone, args.vary, given)
    common = {name: value for name, value in asdict(args).items() if name not in ("out", "vary", "side_by_side")}
    check_same(args.out, common | {"backbone": args.backbone and str(args.backbone.resolve())})
    with held(args.out):
        train_and_rank(args, found)


def train_and_rank(args: Args, found: list[dict[str, Any]]) -> None:
    """Train a run for each of the settings `found`, print the runs by rank, and write sweep.json."""
    import torch

    from dynrl.agents.rllib import start_ray
    from dynrl.files import write_json
    from dynrl.plans import plan, plan_again
    from dynrl.runs import RunFolder
    from dynrl.sweep import search
    from dynrl.training import find_prices, make_run, pretrain_into

    backbone = args.backbone or args.out / "backbone"
    if args.backbone is None:
        backbone.mkdir(parents=True, exist_ok=True)
        pretrain_into(backbone, plan(args.decision, args.data, seed=args.seed))
    varied, runs = [setting.partition("=")[0] for setting in args.vary], []
    for given in found:
        run = RunFolder(args.out / (",".join(f"{name}={given[name]}" for name in varied) or "default"))
        run.drop_half_made()
        planned = plan_again(run, args.data) if run.path.is_dir() else plan(args.decision, args.data, **given)
        if not run.path.is_dir():
            make_run(planned, run.path, backbone)
        find_prices(run, planned)
        runs.append(str(run.path.resolve()))
    start_ray(args.side_by_side or torch.get_num_threads())
    rows = search(runs, args.out.resolve())
    if not rows:
        raise KeyboardInterrupt
    write_json(args.out / "sweep.json", rows)
    print(f"\n{'area':>8} {'steps':>10} {'seconds':>8}  run")
    for row in rows:
        print(f"{row['area']:8.4f} {row['steps']:10} {row['seconds']:8.0f}  {Path(row['run']).name}")
    best = args.out / Path(rows[0]["run"]).name
    print(f"\nreport of the best: dynrl train {args.decision} --resume {best}\ncurves: tensorboard --logdir {args.out}")


if __name__ == "__main__":
    from dynrl.scripts.cli import run

    run("sweep")
