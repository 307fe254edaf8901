"""A sweep searches for good settings with Ray Tune: it trains runs in parallel and stops poor ones early."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from dynrl.agents.base import open_agent
from dynrl.backbones import Backbone
from dynrl.data import Split, load_dataset
from dynrl.deploy import RoutedModel
from dynrl.evaluation import COMPARED, calibrate, cheapest_choices, score_routes, score_rows
from dynrl.evaluation.intervals import Front, area
from dynrl.files import locked, read_json, reading, write_json
from dynrl.plans import check_source, plan
from dynrl.policies import LearnedPolicy
from dynrl.runs import RunFolder
from dynrl.schema import parse
from dynrl.settings import Settings

NUMBERS = {"learning_rate": float, "entropy": float, "hidden": int, "num_envs": int, "steps": int}
VARIED = (*NUMBERS, "reward", "baseline")
QUARTERS = 4


def combinations(vary: Sequence[str]) -> list[dict[str, Any]]:
    """Parse settings NAME=VALUE,VALUE... and return every combination of their values, by names.

    Raises:
        ValueError: a name is not in `VARIED` or comes twice, or a value is missing, comes twice or is no number.
    """
    choices: dict[str, list[Any]] = {}
    for setting in vary:
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
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


def trainings(
    decision: str, data: str | None, backbone: Path | None, vary: Sequence[str], given: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the settings of each training: those `given`, and each combination of `vary` (see `combinations`).

    Raises:
        ValueError: a training would be refused, or would tune the backbone that all share.
    """
    varied = combinations(vary)
    for values in varied:
        planned = plan(decision, data, **{**given, **values})
        if backbone is not None:
            check_source(planned, backbone)
        if planned.settings.learning.finetune:
            raise ValueError(
                f"{decision} on {data} is trained with its backbone; a sweep is for policies on a frozen one"
            )
    return [{**given, **values} for values in varied]


def check_same(out: Path, common: dict[str, Any]) -> None:
    """Keep in `out` the settings that its runs share; raise a ValueError if it holds a sweep with other settings."""
    kept = out / "sweep-settings.json"
    common = {name: value for name, value in common.items() if name != "data"}  # each run compares what it is
    if kept.is_file() and (before := read_json(kept)) != common:
        if not isinstance(before, dict):
            raise ValueError(f"{kept}: expected an object with {', '.join(common)}, got {str(before)[:80]}")
        changed = [name for name in common if before.get(name) != common[name]]
        raise ValueError(f"{out} is a sweep with another {', '.join(changed)}; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(kept, common)


def search(runs: Sequence[str], out: Path) -> list[dict[str, Any]]:
    """Train all run folders with Ray Tune, whose own files go to `out/tune-*`.

    Returns:
        a row for each run. Runs that trained longest come first, and the best come first among these. Runs that failed
        have no row and are named on stderr.

    Raises:
        ValueError: all runs failed.
    """
    task = load_dataset(RunFolder(runs[0]).data).task
    ended = _tuned(runs, out, "max" if task.error(1.0) < task.error(0.0) else "min")
    failed = [of for of in ended if of.error is not None]
    for of in failed:
        run, reason = Path((of.config or {}).get("run", of.path)).name, str(of.error).strip().rpartition("\n")[2]
        print(f"{run} failed: {reason}", file=sys.stderr)
    if failed and len(failed) == len(ended):
        raise ValueError(f"all {len(failed)} runs failed, for the reasons above")
    last = [metrics for of in ended if of.error is None and "area" in (metrics := of.metrics or {})]
    rows = [{name: of[name] for name in ("run", "quarter", "steps", "seconds", "area")} for of in last]
    return sorted(rows, key=lambda row: (-row["quarter"], task.error(row["area"])))


def _tuned(runs: Sequence[str], out: Path, mode: str) -> list[Any]:
    """Return Ray Tune's result of each run, from a new search or from one that was interrupted."""
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # else `fit` would return after Ctrl-C, as if all were done
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    class Shown(tune.Callback):
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            quarter, run = result["quarter"], Path(result["config"]["run"]).name
            print(f"{run}: area {result['area']:.4f} after quarter {quarter} of {QUARTERS}", flush=True)

    trainable = tune.with_resources(learn_in_quarters, {"cpu": 1})
    # The name depends on the runs: with other runs, this is a new search, to which finished runs report again.
    name = f"tune-{hashlib.sha256(' '.join(runs).encode()).hexdigest()[:8]}"
    if tune.Tuner.can_restore(str(out / name)):
        tuner = tune.Tuner.restore(str(out / name), trainable, resume_errored=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space={"run": tune.grid_search(list(runs))},
            tune_config=tune.TuneConfig(
                metric="area", mode=mode,
                scheduler=ASHAScheduler(time_attr="quarter", max_t=QUARTERS, grace_period=1, reduction_factor=2),
            ),
            run_config=tune.RunConfig(name, str(out), verbose=0, callbacks=[Shown()]),
        )  # fmt: skip
    results = tuner.fit()
    return [results[i] for i in range(len(results))]


def learn_in_quarters(config: dict[str, Any]) -> None:
    """Train the run folder `config["run"]` from its newest checkpoint on, in a process of Ray."""
    from ray import tune

    torch.set_num_threads(1)
    run = RunFolder(config["run"])
    settings = Settings.read(run.config_file)
    steps, kept = settings.learning.steps, run.path / "quarters.json"
    validation = run.dataset().seen_by(run.backbone.known).validation.head(1024)
    with locked(run.path), open_agent(settings, run.backbone_file, run.path, steps) as agent:
        said = quarters(kept)
        for quarter in range(1, QUARTERS + 1):
            if quarter > len(said):
                start = time.perf_counter()
                agent.learn(steps * quarter // QUARTERS)
                seconds = (said[-1]["seconds"] if said else 0.0) + time.perf_counter() - start
                area = front_area(run.backbone, agent.router(), validation)
                said.append(
                    {"run": str(run), "quarter": quarter, "steps": agent.steps, "seconds": seconds, "area": area}
                )
                write_json(kept, said)
            tune.report(said[quarter - 1])


def quarters(file: Path) -> list[dict[str, Any]]:
    """Return what `learn_in_quarters` has written, a row for each quarter, with the run where it is now."""
    if not file.is_file():
        return []
    written = read_json(file)
    with reading(file, "file of dynrl sweep"):
        if not isinstance(written, list) or len(written) > QUARTERS:
            raise ValueError(f"expected a list of at most {QUARTERS} rows, got {str(written)[:80]}")
        return [asdict(parse(Quarter, row)) | {"run": str(file.parent)} for row in written]


@dataclass(frozen=True)
class Quarter:
    """A row of quarters.json: what a run had reached after a quarter of its steps.

    Attributes:
        run: the run folder when this was written; it may have been moved or copied since.
        quarter, steps, seconds: how far training had come, and how long it had taken.
        area: the policy's `front_area`.
    """

    run: str
    quarter: int
    steps: int
    seconds: float
    area: float


def front_area(backbone: Backbone, policy: LearnedPolicy, split: Split) -> float:
    """Return the mean metric over budgets from 0.3 to 0.9 of the dense MACs.

    If a budget is out of the policy's reach, the cheapest choice at all points counts, which needs no policy.
    """
    model = RoutedModel(backbone, policy)
    fractions = [macs for _, macs in calibrate(model, split)]
    nothing = score_routes(model.backbone, cheapest_choices(backbone).expand(len(split), -1), split).metric
    rows = []
    for budget in COMPARED:
        if budget < min(fractions):
            rows.append(nothing)
            continue
        model.set_budget(min(budget, max(fractions)))
        rows.append(score_rows(model, split)[0])
    metric = torch.stack(rows).unsqueeze(0)
    front = Front(COMPARED, metric, torch.zeros(1, len(COMPARED)))
    return float(area(front, front.reached).mean())
