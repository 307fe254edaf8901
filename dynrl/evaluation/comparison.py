"""A comparison of runs of one backbone says which policy is better, by how much, and how certain that is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynrl.evaluation.calibration import COLLAPSED
from dynrl.evaluation.contenders import (
    BUDGETS,
    ByChance,
    Contender,
    Dense,
    Ground,
    Learned,
    by_chance,
    check_budgets,
    check_rules,
    rivals,
)
from dynrl.evaluation.intervals import Front, better, differences, verdict
from dynrl.evaluation.report import Run, plain_network
from dynrl.files import check_folder, write_json
from dynrl.machine import commit
from dynrl.progress import progress, talking
from dynrl.runs import RunFolder, by_kind
from dynrl.tasks import TASKS, Task

ADDED = (1 / 3, 0.9)  # papers often name a third; 0.9 is nearly all
COMPARED = tuple(sorted((*BUDGETS, *ADDED)))


def compare(
    runs: Iterable[Run],
    *,
    out: str | Path | None = None,
    smaller: Sequence[str | Path] = (),
    data: Any = None,
    budgets: Sequence[float] | None = None,
    show: bool = False,
) -> dict[str, Any]:
    """Compare policies on the test split by fronts and by paired differences with 95 % intervals.

    The intervals are over inputs and seeds. Each PPO policy is compared with every other contender; if no run is PPO's,
    each learned policy is. Policies trained at one price are compared at equal MACs with policies of the same kind that
    were trained for all prices.

    Args:
        runs: finished run folders of one backbone.
        out: a folder for `comparison.json` and `comparison.png`; None writes nothing.
        smaller: folders that each hold a smaller plain network, `plain.safetensors`, to compare with.
        data: where the runs' data are now (whatever `dynrl.data.as_dataset` takes); None finds them by their name.
        budgets: the shares of the dense MACs, rising, over which areas are taken; None takes those at which reports ask
            of the family, a third, and 0.9.
        show: whether to show progress.

    Returns:
        the comparison, as a dictionary that JSON can hold.

    Raises:
        ValueError: there are no runs, they do not belong in one comparison (see `by_kind`), or budgets are no rising
            shares.
    """
    folders = [RunFolder(run) if not isinstance(run, RunFolder) else run for run in runs]
    if not folders:
        raise ValueError("expected at least one finished run to compare")
    if budgets is not None:
        check_budgets(budgets)
    check_folder(out)
    kinds = by_kind(folders)
    ground = Ground(folders[0].pretrained, folders[0].dataset(data))
    dataset, budgets = ground.dataset, budgets or sorted((*ground.network.budgets, *ADDED))
    everyone = [Learned(kind, [run.model for run in mine], ground) for kind, mine in kinds.items()]
    learned, alone = ([of for of in everyone if of.asked is asked] for asked in (True, False))
    dense = Dense(ground, folders[0].plain, learned)
    *others, oracle = rivals(ground, [plain_network(folder, dataset) for folder in smaller], learned)
    chance = by_chance(learned, ground)
    others = [*chance, *others]
    check_rules([dense, *everyone, *others, oracle])
    others = [rival for rival in others if rival.asked]  # uniform routes heed no budget; the static ones include them
    fronts, one_price = _ask([*learned, *others, dense, oracle], learned, alone, ground, budgets, show)
    result = {
        "decision": folders[0].decision, "data": dataset.name, "metric": dataset.task.metric,
        "classes": list(dataset.names),
        "seeds": {kind.label: [run.seed for run in mine] for kind, mine in kinds.items()},
        "kinds": {kind.label: kind.to_dict() for kind in kinds},
        "date": f"{date.today()}", "commit": commit(), "budgets": list(budgets), "inputs": len(ground.test),
        "dense": dense.best, "fronts": {name: _figures(front) for name, front in fronts.items()},
        "reachable": {of.name: list(of.reachable) for of in learned},
        "differences": _all_differences(fronts, learned, chance, dense, ground.task), "one_price": one_price,
    }  # fmt: skip
    if out is not None:
        from dynrl.evaluation.figures import draw_comparison

        write_json(Path(out) / "comparison.json", result)
        draw_comparison(result, Path(out) / "comparison.png")
    return result


def _ask(
    contenders: Sequence[Contender],
    learned: Sequence[Learned],
    alone: Sequence[Learned],
    ground: Ground,
    budgets: Sequence[float],
    show: bool,
) -> tuple[dict[str, Front], list[dict[str, Any]]]:
    """Return the fronts of all contenders, and how policies for one price compare with policies for all prices."""
    total = sum(contender.passes(budgets) for contender in contenders) + len(alone)
    fronts, one_price = {}, []
    with talking(show), progress(total=total, desc="comparing", unit="pass") as bar:
        for contender in contenders:
            contender.prepare(bar.update)
            fronts[contender.name] = Front.of(contender, budgets, len(ground.test), bar.update)
        for single in alone:
            assert single.kind is not None
            twins = [of for of in learned if of.kind == replace(single.kind, price=None)]
            if twins and (row := at_equal_macs(twins[0], single, ground.task)):
                one_price.append({"policy": single.name, "price": single.kind.price, **row})
            bar.update()
    return fronts, one_price


def _all_differences(
    fronts: dict[str, Front], learned: Sequence[Learned], chance: Sequence[ByChance], dense: Dense, task: Task
) -> list[dict[str, Any]]:
    """Compare each PPO policy (or, if there is none, each learned policy) with every other contender."""
    held = [of.name for of in learned if of.kind is not None and of.kind.agent == "ppo"]
    # Where a rival runs a policy's own networks, seed by seed, what the two results of a seed share cancels out.
    own = {(dense.best, dense.name), *((of.of, of.name) for of in chance)}
    return [
        {"policy": name, "rival": rival, **differences(fronts[name], fronts[rival], task, (name, rival) in own)}
        for name in held or [of.name for of in learned]
        for rival in fronts
        if rival != name
    ]


def at_equal_macs(every: Learned, alone: Learned, task: Task) -> dict[str, float] | None:
    """Measure how much better policies for all prices (`every`) are than policies for one price only (`alone`).

    The policies for all prices are told to spend what the others spend on average. The result is None if one of them
    cannot.
    """
    theirs = alone.reach(None)
    assert theirs is not None, "its only point is in reach"
    budget = sum(float(of.macs.mean()) for of in theirs) / len(theirs)
    ours = every.reach(budget) if every.spends(budget) else None
    if ours is None:
        return None

    def metric(reached: list[Any]) -> Tensor:
        return torch.stack([of.metric for of in reached])

    gain, low, high = better(metric(ours), metric(theirs), task)
    return {
        "difference": gain, "low": low, "high": high,
        "macs_fraction": sum(float(of.macs.mean()) for of in ours) / len(ours), "one_price_macs_fraction": budget,
        "metric": float(metric(ours).mean()), "one_price_metric": float(metric(theirs).mean()),
    }  # fmt: skip


def _figures(front: Front) -> dict[str, list[float | None]]:
    """Return the mean and the spread over seeds at each budget; None stands where a budget is out of reach."""

    def listed(values: Tensor) -> list[float | None]:
        return [float(v) if ok else None for v, ok in zip(values, front.reached.tolist(), strict=True)]

    means = front.metric.mean(2)
    spread = means.std(0) if len(means) > 1 else means[0] * 0
    return {"metric": listed(means.mean(0)), "std": listed(spread), "macs_fraction": listed(front.macs.mean(0))}


def comparison_text(result: dict[str, Any]) -> str:
    """Return the differences as a table to print."""
    task = TASKS[result["metric"]]
    lines = [
        f"{result['decision']} on {result['data']}, {result['inputs']} test inputs; seeds: {result['seeds']}",
        f"difference in {task.heading}, positive where the policy is better; 95 % interval over inputs and seeds",
    ]
    for row in result["differences"]:
        for at in ("area", "0.333", "0.5"):
            if of := row.get(at):
                gain, low, high = (task.show(of[name]) for name in ("difference", "low", "high"))
                lines.append(f"{row['policy']} less {row['rival']:20} {at:>6} {gain:>8} [{low}, {high}]  {verdict(of)}")
        if "area" not in row:
            lines.append(f"{row['policy']} less {row['rival']:20}   none  they have no budget in common")
    for name, (least, most) in result["reachable"].items():
        if most - least < COLLAPSED * most:
            spends = f"between {most:.2f} and {least:.2f}, seed by seed," if most < least else f"{most:.2f}"
            lines.append(f"{name} collapsed: it spends {spends} of the dense MACs at every price")
    for row in result["one_price"]:
        gain, low, high = (task.show(row[name]) for name in ("difference", "low", "high"))
        said = f"at {row['macs_fraction']:.3f} and {row['one_price_macs_fraction']:.3f} of the MACs"
        lines.append(f"all prices less {row['policy']}, {said}: {gain} [{low}, {high}]  {verdict(row)}")
    return "\n".join(lines)
