"""Search settings of training with Ray Tune: every combination, the poor ones stopped early, the best named.

Each combination is a run folder, OUT/NAME=VALUE,..., on one backbone; as many are trained side by side as there are
cores. After each quarter of its steps a policy is judged on validation data by the area under its accuracy-compute
front from 0.3 to 0.9 of the dense MACs; after one quarter and after two, the worse half of those that have come as far
stops (asynchronous successive halving; Li et al. 2020, MLSys). The same command goes on with what was interrupted, and
with more values of what is varied.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import tyro

NUMBERS = {"learning_rate": float, "entropy": float, "hidden": int, "num_envs": int, "steps": int}
VARIED = (*NUMBERS, "reward", "baseline")
QUARTERS = 4


@dataclass
class Args:
    """Settings of `dynrl sweep`."""

    decision: Annotated[str, tyro.conf.Positional]
    """What to decide; see `dynrl list`."""
    out: Path
    """Folder of all runs; the same command goes on with it."""
    vary: tuple[str, ...] = ("learning_rate=0.0005,0.002,0.008", "hidden=32,128")
    """What to try, each NAME=VALUE,VALUE...; names: learning_rate, entropy, hidden, num_envs, steps, reward,
    baseline, all as of `dynrl train`."""
    data: str | None = None
    """Data set, as of `dynrl train`; default: the decision's."""
    agent: str = "ppo"
    """What learns, as of `dynrl train`."""
    backbone: Path | None = None
    """A folder from `dynrl pretrain` or a run; default: pretrain one first, in OUT/backbone."""
    steps: int | None = None
    """Decisions to learn from, of those that are not stopped; default: the data set's."""
    seed: int = 0
    """Policy seed of all."""
    side_by_side: int | None = None
    """Runs at a time; default: one a core."""


def main(args: Args) -> None:
    """Check all combinations, train them, rank them."""
    import torch

    from dynrl.agents.rllib import start_ray
    from dynrl.files import write_json
    from dynrl.runs import RunFolder
    from dynrl.scripts.common import drop_half_made, use_threads
    from dynrl.training import make_run, plan, plan_again, pretrain_into

    if args.side_by_side is not None and args.side_by_side < 1:
        raise ValueError(f"expected --side-by-side of at least 1, got {args.side_by_side}")
    use_threads(None)
    found = combinations(args)
    check_same(args)
    backbone = args.backbone or args.out / "backbone"
    if args.backbone is None:
        backbone.mkdir(parents=True, exist_ok=True)
        pretrain_into(backbone, plan(args.decision, args.data, seed=args.seed))
    runs = []
    for given in found:
        run = args.out / (",".join(f"{name}={given[name]}" for name in given if name in varied(args)) or "default")
        drop_half_made(run)
        if run.is_dir():
            plan_again(RunFolder(run))
        else:
            make_run(plan(args.decision, args.data, **given), run, backbone)
        runs.append(str(run.resolve()))
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


def check_same(args: Args) -> None:
    """Keep what all runs of a sweep have in common; a ValueError for a sweep that goes on with something else."""
    from dynrl.files import read_json, write_json

    common = {name: value for name, value in asdict(args).items() if name not in ("out", "vary", "side_by_side")}
    common["backbone"] = None if args.backbone is None else str(args.backbone.resolve())
    kept = args.out / "sweep-settings.json"
    if kept.is_file() and (before := read_json(kept)) != common:
        changed = [name for name in common if before.get(name) != common[name]]
        raise ValueError(f"{args.out} is a sweep with another {', '.join(changed)}; choose another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(kept, common)


def varied(args: Args) -> list[str]:
    """The names of what is varied, in order."""
    return [setting.partition("=")[0] for setting in args.vary]


def combinations(args: Args) -> list[dict[str, Any]]:
    """The settings of each training; a ValueError for any that `dynrl train` would refuse."""
    from dynrl.training import plan

    given: dict[str, Any] = {"agent": args.agent, "seed": args.seed} | ({"steps": args.steps} if args.steps else {})
    choices: dict[str, list[Any]] = {}
    for setting in args.vary:
        name, _, words = setting.partition("=")
        if name not in VARIED or not words or name in choices:
            raise ValueError(
                f"expected --vary NAME=VALUE,... with names of {', '.join(VARIED)}, once each; got {setting}"
            )
        try:
            choices[name] = [NUMBERS.get(name, str)(word) for word in words.split(",")]
        except ValueError:
            raise ValueError(f"expected numbers for {name}, got {words}") from None
        if len(set(choices[name])) < len(choices[name]):
            raise ValueError(f"expected each value of {name} once, got {words}")
    found = [given | dict(zip(choices, values, strict=True)) for values in product(*choices.values())]
    for training in found:
        if plan(args.decision, args.data, **training).settings.learning.finetune:
            raise ValueError(
                f"{args.decision} on {args.data} is trained with its backbone; a sweep is for policies on a frozen one"
            )
    return found


def search(runs: list[str], out: Path) -> list[dict[str, Any]]:
    """Train all by Ray Tune, whose own files go to `out/tune-*`: a row each, those that came furthest first, and of
    them the best. Runs that failed are named on stderr, and have none.

    Raises:
        ValueError: all failed.
    """
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    from dynrl.data import load_dataset
    from dynrl.runs import RunFolder

    class Shown(tune.Callback):
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            quarter, run = result["quarter"], Path(result["config"]["run"]).name
            print(f"{run}: area {result['area']:.4f} after quarter {quarter} of {QUARTERS}", flush=True)

    task = load_dataset(RunFolder(runs[0]).data).task
    mode = "max" if task.error(1.0) < task.error(0.0) else "min"
    trainable = tune.with_resources(learn_in_quarters, {"cpu": 1})
    # Of these very runs: others are another search, in which runs say once more what they said before.
    name = f"tune-{hashlib.sha256(' '.join(runs).encode()).hexdigest()[:8]}"
    if tune.Tuner.can_restore(str(out / name)):
        tuner = tune.Tuner.restore(str(out / name), trainable, resume_errored=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space={"run": tune.grid_search(runs)},
            tune_config=tune.TuneConfig(
                metric="area", mode=mode,
                scheduler=ASHAScheduler(time_attr="quarter", max_t=QUARTERS, grace_period=1, reduction_factor=2),
            ),
            run_config=tune.RunConfig(name, str(out), verbose=0, callbacks=[Shown()]),
        )  # fmt: skip
    results = tuner.fit()  # after Ctrl-C, too, it returns: what there is so far
    ended = [results[i] for i in range(len(results))]
    failed = [of for of in ended if of.error is not None]
    for of in failed:
        run, reason = Path((of.config or {}).get("run", of.path)).name, str(of.error).strip().rpartition("\n")[2]
        print(f"{run} failed: {reason}", file=sys.stderr)
    if failed and len(failed) == len(ended):
        raise ValueError(f"all {len(failed)} runs failed, for the reasons above")
    last = [metrics for of in ended if of.error is None and "area" in (metrics := of.metrics or {})]
    rows = [{name: of[name] for name in ("run", "quarter", "steps", "seconds", "area")} for of in last]
    return sorted(rows, key=lambda row: (-row["quarter"], task.error(row["area"])))


def learn_in_quarters(config: dict[str, Any]) -> None:
    """Train the run folder `config["run"]` from its newest checkpoint on; in a process of Ray's."""
    import time

    import torch
    from ray import tune

    from dynrl.agents.base import open_agent
    from dynrl.backbones import load_backbone
    from dynrl.data import load_dataset
    from dynrl.files import read_json, write_json
    from dynrl.settings import Settings

    torch.set_num_threads(1)
    run = Path(config["run"])
    settings, kept = Settings.read(run / "config.json"), run / "quarters.json"
    steps = settings.learning.steps
    said: list[dict[str, Any]] = read_json(kept) if kept.is_file() else []
    file, validation = run / "backbone.safetensors", load_dataset(settings.problem.data).validation.head(1024)
    with open_agent(settings, file, run, steps) as agent:
        for quarter in range(1, QUARTERS + 1):
            if quarter > len(said):
                start = time.perf_counter()
                agent.learn(steps * quarter // QUARTERS)
                seconds = (said[-1]["seconds"] if said else 0.0) + time.perf_counter() - start
                area = front_area(load_backbone(file)[0], agent.router(), validation)
                said.append(
                    {"run": str(run), "quarter": quarter, "steps": agent.steps, "seconds": seconds, "area": area}
                )
                write_json(kept, said)
            tune.report(said[quarter - 1])


def front_area(backbone: Any, router: Any, split: Any) -> float:
    """The metric's mean over budgets from 0.3 to 0.9 of the dense MACs. What a policy cannot reach is the cheapest
    choice at all points, which everybody can take.
    """
    from dynrl import comparison as cp
    from dynrl import evaluation as ev
    from dynrl.deploy import RoutedModel

    model = RoutedModel(backbone, router)
    ev.calibrate(model, split)
    costs = backbone.column_costs
    cheapest = costs.where(costs >= 0, costs.max() + 1).argmin(1)
    nothing = ev.score_routes(model.backbone, cheapest.expand(len(split), -1), split).metric
    reach = cp.model_reach(model, split)
    fallback = cp.fixed_reach(nothing, 0.0)
    front = cp.Front.of([lambda budget: reach(budget) or fallback(budget)], len(split))
    return float(cp.area(front, front.reached).mean())


if __name__ == "__main__":
    from dynrl.scripts.cli import run

    run("sweep")
