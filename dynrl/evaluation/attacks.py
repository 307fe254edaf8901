"""An attack report says what changed inputs, a limit and random noise do to what a routed model saves."""

from __future__ import annotations

import copy
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from dynrl.backbones import Backbone
from dynrl.data import Split
from dynrl.deploy import RoutedModel, policy_fingerprint
from dynrl.evaluation.scores import score_rows
from dynrl.files import write_json, writing_into
from dynrl.machine import check_device, commit, hardware
from dynrl.perturb import STEPS, Ball, check_attackable, spending, uncertainty
from dynrl.progress import progress, talking
from dynrl.runs import RunFolder
from dynrl.schema import MOST_ROWS, check_count
from dynrl.tasks import TASKS

BATCH = 120  # the inputs that are attacked at a time
QUANTILES = 101  # the points of a curve of inputs against cost


def attack(
    run: str | Path | RunFolder,
    *,
    out: str | Path | None = None,
    budget: float = 0.5,
    price: float | None = None,
    epsilon: float | None = None,
    steps: int = STEPS,
    limit: float | None = 0.6,
    rows: int = 1000,
    seed: int = 0,
    data: Any = None,
    device: str = "cpu",
    show: bool = False,
) -> dict[str, Any]:
    """Attack what a run's routed model saves, and say what is left: clean, in random noise, and attacked.

    There are two attacks within one ball of the maximum norm, both by projected gradient descent. *uncertainty* is
    DeepSloth's: it makes the network unsure wherever it says something before its end, and knows no policy. *spending*
    raises the MACs that the policy spends (`dynrl.perturb.spending`); it begins once from the input, and once from what
    was found before. Noise moves each number as far, up or down at random.

    Efficacy is the share of the savable MACs that is saved, averaged over inputs: 1 if each takes the cheapest route, 0
    if each takes the dense one. It is the area under the curve of inputs that are done within a cost, from the cheapest
    route's to the dense network's, over that range (Hong et al. 2021, ICLR, section 3). The router is not in it.

    Args:
        run: the run folder.
        out: a folder for `attack.json` and `attack.png`; None writes nothing.
        budget: the share of the dense MACs that the model is asked to spend on average.
        price: the price of compute in place of a budget.
        epsilon: how far each number of an input may change, in raw units (see `Ball.of`).
        steps: the gradient steps of an attack.
        limit: the most that one input may spend in the second half of the report (`RoutedModel.set_limit`); None leaves
            that half out.
        rows: how many inputs of the test split are taken.
        seed: the seed of the noise.
        data: where the run's data are now (whatever `dynrl.data.as_dataset` takes); None finds them by their name.
        device: where networks run.
        show: whether to show progress.

    Returns:
        the report, as a dictionary that JSON can hold.

    Raises:
        ValueError: the folder holds no run, the backbone has no differentiable walk, raw inputs are whole numbers, or
            the budget, the price or the limit cannot be kept.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder(run)
    _ = folder.config  # a folder that holds no run is refused here, with the reason
    check_count("steps", steps, 1)
    check_count("rows", rows, 1, MOST_ROWS)
    with writing_into(out), talking(show):
        # Copies: the run's own backbone and model stay as they are.
        backbone = copy.deepcopy(folder.backbone).to(check_device(device)).requires_grad_(False)
        check_attackable(backbone)
        dataset = folder.dataset(data).seen_by(backbone.known)
        ball, model = Ball.of(dataset, epsilon), copy.deepcopy(folder.model).to(device)
        if price is None:
            model.set_budget(budget)
        else:
            model.set_price(price)
        model.set_limit(limit)  # which refuses one that cannot be kept, before anything is attacked
        test = dataset.test.head(rows)
        test = replace(test, inputs=test.inputs[:])
        found = _attacked(backbone, model, test, ball, steps, seed)
        report = {
            "decision": folder.decision, "data": dataset.name, "metric": test.task.metric,
            "policy": folder.kind.label, "seed": folder.seed,
            "policies": {folder.kind.label: [policy_fingerprint(model)]},
            "date": f"{date.today()}", "commit": commit(), "inputs": len(test),
            "budget": budget if price is None else None, "price": model.price, "steps": steps,
            "epsilon": ball.radius, "low": ball.low, "high": ball.high,
            "least": _cheapest(model) / backbone.dense_macs, "limit": limit, "free": _measured(model, None, found),
            "limited": None if limit is None else _measured(model, limit, found),
            "device": device, "hardware": hardware(),
        }  # fmt: skip
        if out is not None:
            from dynrl.evaluation.figures import draw_attack

            write_json(Path(out) / "attack.json", report)
            draw_attack(report, Path(out) / "attack.png")
    return report


def _attacked(
    backbone: Backbone, model: RoutedModel, test: Split, ball: Ball, steps: int, seed: int
) -> dict[str, Split]:
    """Return the test inputs by what was done to them: nothing first."""
    device = next(backbone.parameters()).device
    noisy = ball.noise(test.inputs, torch.Generator().manual_seed(seed))
    moved = {"clean": test.inputs.to(device), "noise": noisy.to(device)}
    unsure = uncertainty(backbone, test.task)
    spent = spending(backbone, model.policy, model.price)  # type: ignore[arg-type]
    for name, goal in (("uncertainty", unsure), ("spending", spent)):
        if goal is None:
            continue
        other = [*moved.values()][-1]  # the climb begins a second time from what the attack before has found
        starts = [] if goal is unsure else [other]
        parts = [part.split(BATCH) for part in (moved["clean"], *starts)]
        batches = progress([*zip(*parts, strict=True)], desc=f"attacking: {name}", unit="batch")
        moved[name] = torch.cat([ball.climb(part, goal, steps, more) for part, *more in batches])
    return {name: replace(test, inputs=inputs) for name, inputs in moved.items()}


def _cheapest(model: RoutedModel) -> int:
    """Return the MACs of the cheapest route, the router's left out."""
    return model.backbone.start_macs + int(model.backbone.least_macs()[0].min())


def _measured(model: RoutedModel, limit: float | None, found: dict[str, Split]) -> list[dict[str, Any]]:
    """Return a row for each kind of inputs, with what the model reaches, spends and saves on them within `limit`."""
    model.set_limit(limit)
    dense, rows = model.backbone.dense_macs, list[dict[str, Any]]()
    for name, split in found.items():
        metric, route = score_rows(model, replace(split, targets=split.targets.to(split.inputs.device)))
        saved = (dense - route.macs.double()) / (dense - _cheapest(model))
        macs, efficacy = route.macs_fraction, float(saved.mean())
        clean = rows[0]["efficacy"] if rows else efficacy
        rows.append(
            {
                "inputs": name, split.task.metric: split.task.mean(metric, split.targets),
                "macs_fraction": float(macs.mean()), "most": float(macs.max()), "efficacy": efficacy,
                "lost": 1 - efficacy / clean if clean > 0 else 0.0,
                "quantiles": torch.quantile(macs.double(), torch.linspace(0, 1, QUANTILES).double()).tolist(),
            }
        )  # fmt: skip
    return rows


def attack_text(report: dict[str, Any]) -> str:
    """Return the report as a table to print."""
    metric, at = report["metric"], report["budget"]
    task = TASKS[metric]
    asked = f"a budget of {at:g}" if at is not None else f"the price {report['price']:.3g}"
    lines = [
        f"{report['decision']} on {report['data']}, {report['policy']}, {report['inputs']} test inputs, at {asked}",
        f"each number of an input changes by {report['epsilon']:.4g} at most, in a range from {report['low']:.3g} to "
        f"{report['high']:.3g}; {report['steps']} steps",
        f"{'inputs':12} {task.heading:>11} {'MACs':>6} {'most':>6} {'efficacy':>9} {'lost':>6}",
    ]
    for title, rows in (("", report["free"]), (f"with set_limit({report['limit']})", report["limited"] or [])):
        lines += [title] if title and rows else []
        lines += [
            f"{row['inputs']:12} {task.show(row[metric]):>11} {row['macs_fraction']:6.2f} {row['most']:6.2f} "
            f"{row['efficacy']:9.3f} {row['lost']:6.0%}"
            for row in rows
        ]
    lines.append(
        "MACs, most: mean and maximum over inputs, shares of the dense network's, router included. efficacy: the share "
        "of the savable MACs that is saved."
    )
    return "\n".join(lines)
