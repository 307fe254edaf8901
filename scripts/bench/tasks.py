"""Is a task fit for routing: does half of the compute cost accuracy, however a plain network saves it?

A recipe's plain network stands beside plain networks of about half of its MACs: of less depth, of less width, with as
many blocks of which more are behind a stride, and with fewer blocks that are twice as wide behind that stride. All are
trained alone by the same recipe, for as many epochs, and judged on the test split, over several seeds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch

from dynrl.backbones import load_backbone
from dynrl.data import Dataset, Split, check_dataset, load_dataset
from dynrl.envs import DECISIONS
from dynrl.evaluation import by_difficulty, score_routes
from dynrl.files import fingerprint
from dynrl.recipes import DEFAULTS, Defaults, defaults
from dynrl.tasks import TASKS
from dynrl.training import pretrain

DATA = "trace-small"
FOLDER = Path("runs") / "bench-tasks"
LEAST, HALF = 0.35, 0.55  # a network between these shares of the dense MACs counts as one of half of them
MARGIN = 0.015  # by which the dense network must beat each of them, in the task's error
PARTS = 64  # of a size, that is made less by them

Changes = Iterator[dict[str, Any]]


def shallower(settings: dict[str, Any]) -> Changes:
    """Yield fewer layers, in all stages alike, or fewer steps of a loop."""
    yield from _less(settings, ("layers", "steps"))


def narrower(settings: dict[str, Any]) -> Changes:
    """Yield less width everywhere."""
    yield from _less(settings, ("widths", "channels", "hidden", "width"))


def strided(settings: dict[str, Any]) -> Changes:
    """Yield as many blocks in one stage more, so that more of them stand behind a stride."""
    layers, widths = settings.get("layers"), settings.get("widths")
    if isinstance(layers, tuple) and isinstance(widths, tuple):
        for stages in _cut(sum(layers), len(layers) + 1):
            yield {"layers": stages, "widths": (*widths, widths[-1])}


def tapered(settings: dict[str, Any]) -> Changes:
    """Yield at most as many blocks in one stage more, which is twice as wide as the last one."""
    layers, widths = settings.get("layers"), settings.get("widths")
    if isinstance(layers, tuple) and isinstance(widths, tuple):
        for depth in range(len(layers) + 1, sum(layers) + 1):
            for stages in _cut(depth, len(layers) + 1):
                yield {"layers": stages, "widths": (*widths, 2 * widths[-1])}


def _cut(depth: int, stages: int) -> Iterator[tuple[int, ...]]:
    """Yield every way to share `depth` blocks among stages of at least one block each."""
    for ends in combinations(range(1, depth), stages - 1):
        yield tuple(after - before for before, after in pairwise((0, *ends, depth)))


WAYS: dict[str, Callable[[dict[str, Any]], Changes]] = {
    "depth": shallower, "width": narrower, "stride": strided, "taper": tapered,
}  # fmt: skip


def _less(settings: dict[str, Any], names: Sequence[str]) -> Changes:
    mine = {name: settings[name] for name in names if name in settings}
    for part in range(1, PARTS if mine else 0):
        yield {
            name: tuple(_part(each, part) for each in size) if isinstance(size, tuple) else _part(size, part)
            for name, size in mine.items()
        }


def _part(size: int, part: int) -> int:
    return min(size, max(1, round(size * part / PARTS)))  # an expert's width of 0 stays


def _words(change: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"{name}={json.dumps(size, separators=(',', ':'))}" for name, size in change.items())


def halves(row: Defaults, dataset: Dataset) -> dict[str, tuple[str, ...]]:
    """Find, for each of `WAYS`, the dearest network of about half of the MACs: NAME=VALUE, for `Defaults.changed`.

    A way that a family does not have, or that meets no such network, is left out.
    """
    whole, found = row.build(dataset, 0).whole_macs, {}
    for way, changes in WAYS.items():
        fitting = []
        for settings in dict.fromkeys(map(_words, changes(row.backbone))):
            try:
                share = row.changed(settings).build(dataset, 0).whole_macs / whole
            except ValueError:  # no network of this family
                continue
            if LEAST <= share <= HALF:
                fitting.append((share, settings))
        if fitting:
            found[way] = max(fitting)[1]
    return found


def bench_tasks(names: Iterable[str], seeds: int, runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Train and judge all networks for each data set in `names`; a network that is in the folder stays as it is.

    Args:
        names: data sets; none means `DATA`.
        seeds: of each network.
        runs: a folder for the networks; none means `FOLDER`.

    Returns:
        a row for each network, as `judged` makes them.
    """
    if len(runs) > 1:
        raise ValueError(f"expected one folder for the networks, got {len(runs)}")
    posed, rows = [], list[dict[str, Any]]()
    for data in map(check_dataset, tuple(names) or (DATA,)):
        decision = next((name for name in DECISIONS if (name, data) in DEFAULTS), "skip")
        recipe = defaults(decision, data)
        half = halves(recipe, load_dataset(data))
        if not half:
            raise ValueError(f"{decision} on {data} has no plain network of about half of the MACs to stand beside it")
        posed.append((data, decision, recipe, {"dense": (), **half}))
    for data, decision, recipe, networks in posed:
        test, whole = load_dataset(data).test, recipe.build(load_dataset(data), 0).whole_macs
        for name, settings in networks.items():
            # Networks of another recipe have other folders: nothing of them is gone on with.
            key = fingerprint({}, [asdict(recipe.pretraining), recipe.changed(settings).backbone])[:8]
            folders = [(runs or (FOLDER,))[0] / f"{decision}-{Path(data).name}-{name}-{key}-{i}" for i in range(seeds)]
            for seed, folder in enumerate(folders):
                pretrain(decision, data, out=folder, plain=True, show=True, network=settings, seed=seed)
            row = {"data": data, "decision": decision, "network": name, "settings": list(settings)}
            rows.append(row | judged(folders, test, whole))
            print(shown(rows[-1]), flush=True)
    return rows


def judged(folders: Sequence[Path], test: Split, whole: int) -> dict[str, Any]:
    """Return MACs, and what a network's seeds reach on the test split: the mean metric, its spread, it by difficulty.

    `whole` is what the dense network spends, in MACs.
    """
    networks = [load_backbone(folder / "plain.safetensors")[0].for_inference() for folder in folders]
    scores = [score_routes(network, network.dense_actions(len(test)), test).metric for network in networks]
    metric, means = test.task.metric, torch.tensor([float(score.mean()) for score in scores])
    mean = torch.stack(scores).mean(0)
    return {
        "metric": metric, "macs": networks[0].whole_macs,
        "macs_fraction": networks[0].whole_macs / whole, "seeds": len(networks), metric: float(means.mean()),
        f"{metric}_std": float(means.std()) if len(means) > 1 else 0.0, "error": test.task.error(float(means.mean())),
        "difficulty": {
            name: [{key: row[key] for key in ("from", "to", "inputs", metric)} for row in found["bins"]]
            for name, found in by_difficulty(test, mean, torch.ones(len(test))).items()
        },
    }  # fmt: skip


def shown(row: dict[str, Any]) -> str:
    """Say a row in words."""
    task, name = TASKS[row["metric"]], f"{row['network']} {' '.join(row['settings'])}".strip()
    spread = f" ±{task.show(row[row['metric'] + '_std'])}" if row["seeds"] > 1 else ""
    return (
        f"{row['data']}, {name}: {row['macs'] / 1e6:.2f} MMACs, {task.heading} {task.show(row[row['metric']])}{spread}"
    )


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tell of each data set whether it is fit: whether the dense network beats all of half its MACs by `MARGIN`."""
    found = []
    for data in dict.fromkeys(row["data"] for row in rows):
        dense, *half = (row for row in rows if row["data"] == data)
        best = min(half, key=lambda row: row["error"])
        margin = best["error"] - dense["error"]
        found.append(
            {"data": data, "seeds": dense["seeds"], "best": best["network"], "margin": margin, "fit": margin >= MARGIN}
        )
    return found
