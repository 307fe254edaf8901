"""A report on one or more runs has figures as JSON, a picture, and a table to print."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import date
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import torch

from dynrl.backbones import Backbone, load_backbone
from dynrl.data import Dataset, Split
from dynrl.deploy import policy_fingerprint
from dynrl.evaluation.budgeted import budgeted, budgeted_text, check_leaving
from dynrl.evaluation.contenders import (
    Contender,
    Dense,
    Ground,
    Learned,
    Reached,
    by_chance,
    check_budgets,
    check_rules,
    rivals,
)
from dynrl.evaluation.difficulty import bin_name, correlations
from dynrl.evaluation.merged import merge_reports
from dynrl.evaluation.scores import Score, Usage, mean_metric, pictures
from dynrl.evaluation.timing import dense_sides, medians_in_turn
from dynrl.files import write_json, writing_into
from dynrl.machine import check_device, check_dtype, commit, hardware
from dynrl.progress import progress, talking
from dynrl.runs import RunFolder, by_backbone, by_kind
from dynrl.schema import MOST_ROWS, check_count
from dynrl.tasks import TASKS, Task

ROUNDS = 11  # how often each side is timed
SHOWN = 4  # how many of the inputs that least is spent on are shown with their answers, and as many of the others
Run = str | Path | RunFolder


def evaluate(
    runs: Run | Iterable[Run],
    *,
    out: str | Path | None = None,
    smaller: Sequence[str | Path] = (),
    data: Any = None,
    batch_size: int = 256,
    device: str = "cpu",
    dtype: str = "float32",
    budgets: Sequence[float] | None = None,
    protocol: Literal["budgeted"] | None = None,
    show: bool = False,
) -> dict[str, Any]:
    """Evaluate runs on the test split, beside everything that they must beat.

    Args:
        runs: one or more run folders. Runs of several pretrained backbones make one report of means over these.
        out: a folder for `report.json` and `report.png`; None writes nothing.
        smaller: folders whose `plain.safetensors`, smaller networks, stand beside them.
        data: where the runs' data are now (whatever `dynrl.data.as_dataset` takes); None finds them by their name.
        batch_size: rows of the batch that is timed.
        device, dtype: of networks and inputs.
        budgets: shares of the dense MACs, rising, at which contenders are asked; None takes the family's
            (`Backbone.budgets`).
        protocol: "budgeted" also measures MSDNet's curves, of networks with exits in a row (see `budgeted`).
        show: whether to show progress.

    Returns:
        the report, as a dictionary that JSON can hold.

    Raises:
        ValueError: a folder holds no run, there is no such device or dtype, a batch has no row, budgets are no rising
            shares, the runs do not belong in one report (see `by_backbone` and `by_kind`), or their network does not
            fit the protocol.
    """
    folders = [RunFolder(run) if not isinstance(run, RunFolder) else run for run in _several(runs)]
    if not folders:
        raise ValueError("expected at least one run folder")
    check_device(device)
    kind = check_dtype(dtype)
    check_count("batch_size", batch_size, 1, MOST_ROWS)
    if protocol not in (None, "budgeted"):
        raise ValueError(f"expected the protocol 'budgeted', or None for none, got {protocol!r}")
    if budgets is not None:
        check_budgets(budgets)
    with writing_into(out):
        groups = list(by_backbone(folders).values())
        dataset = folders[0].dataset(data)
        beside = [plain_network(folder, dataset) for folder in smaller]
        common = {
            "decision": folders[0].decision, "data": dataset.name, "metric": dataset.task.metric,
            "date": f"{date.today()}", "commit": commit(), "device": device, "dtype": dtype,
        }  # fmt: skip
        found: list[dict[str, Any]] = []
        shown, seen = None, dataset
        for mine in groups:
            kinds, ground = by_kind(mine), Ground(mine[0].pretrained, dataset, device, kind)
            seen = ground.dataset if not found else seen  # as the first network sees them, whose usage is drawn
            exits = check_leaving(ground) if protocol == "budgeted" else None
            learned = [Learned(kind, [run.model for run in alike], ground) for kind, alike in kinds.items()]
            seeds = {kind.label: [run.seed for run in alike] for kind, alike in kinds.items()}
            told = {kind.label: [policy_fingerprint(run.model) for run in alike] for kind, alike in kinds.items()}
            measured = measure(ground, learned, mine[0].plain, beside, batch_size, budgets, show)
            if exits is not None:
                measured["budgeted"] = budgeted(ground, learned, exits, show)
            found.append(common | {"seeds": seeds, "policies": told} | measured)
            if dataset.task.pictures and shown is None and learned:
                shown = _pictures(learned[0], ground, measured["usage"])
        report = merge_reports(found)
        if out is not None:
            _write(report, Path(out), seen.test, shown)
    return report


def _write(report: dict[str, Any], out: Path, test: Split, shown: dict[str, torch.Tensor] | None) -> None:
    """Write `report.json` and its pictures."""
    from dynrl.evaluation.figures import draw_regions, draw_report, draw_words

    write_json(out / "report.json", report)
    draw_report(report, test, out / "report.png", shown)
    if report["usage"] is not None and any(report["usage"]["regions"]):
        if any(report["usage"]["words"]):
            draw_words(report["usage"], out / "words.png")
        else:
            draw_regions(report["usage"], test, out / "regions.png")


def _several(runs: Run | Iterable[Run]) -> list[Run]:
    return [runs] if isinstance(runs, str | Path | RunFolder) else list(runs)


def plain_network(folder: str | Path, dataset: Dataset) -> Backbone:
    """Load the plain network in a folder of `dynrl pretrain`; raise a ValueError if it is for another data set."""
    backbone, _ = load_backbone(Path(folder) / "plain.safetensors")
    if backbone.trained_on is None:
        raise ValueError(f"{folder} does not say what its network was trained on; train it by dynrl pretrain")
    try:
        dataset.check_same(backbone.trained_on)
    except ValueError as error:
        raise ValueError(f"{folder} holds a network that was trained on other data than these runs: {error}") from None
    return backbone


def measure(
    ground: Ground,
    learned: Sequence[Learned],
    plain: Backbone | None = None,
    smaller: Sequence[Backbone] = (),
    batch_size: int = 256,
    budgets: Sequence[float] | None = None,
    show: bool = False,
) -> dict[str, Any]:
    """Measure all figures of a report; docs/reports.md explains them.

    Args:
        ground: the pretrained network and the data.
        learned: the learned policies, one contender a kind.
        plain: the same network trained on its full route only.
        smaller: plain networks of fewer MACs.
        batch_size: rows of the batch that is timed.
        budgets: at which contenders are asked; None takes the family's.
        show: whether to show progress.
    """
    dense, budgets = Dense(ground, plain, learned), budgets or ground.network.budgets
    random, *others = rivals(ground, smaller, learned)
    others = [*by_chance(learned, ground), *others]
    everybody: list[Contender] = [dense, *learned, random, *others]
    check_rules(everybody)
    points = _Points(ground, ground.test.inputs[:batch_size])
    total = sum(contender.passes(budgets) for contender in everybody) + ROUNDS
    with talking(show), progress(total=total, desc="evaluating", unit="pass") as bar:
        dense.prepare(bar.update)
        _learned_and_random(points, learned, random, budgets, bar.update)
        usage = _usage(learned[0], ground) if learned else None
        for contender in others:
            contender.prepare(bar.update)
            for budget in contender.rows(budgets):
                points.add(contender, budget, contender.reach(budget))
                bar.update()
        times = points.time(bar.update)
    return {
        "classes": list(ground.dataset.names),
        "budgets": list(budgets),
        "dense": _dense_figures(dense, times, points),
        "points": points.rows,
        "usage": usage,
        "hardware": hardware(),
    }


class _Points:
    """The rows of a report are collected here, with what is timed for each: the first seed, on one batch."""

    def __init__(self, ground: Ground, batch: torch.Tensor) -> None:
        self.ground, self.batch, self.rows = ground, batch, list[dict[str, Any]]()
        self._sides: dict[str, Callable[[], Any]] = {}
        self._timed: list[int] = []  # of each row, the row whose times it has: its own, or one of the same routes
        self._last: dict[str, tuple[int, Reached]] = {}  # of each contender

    def add(self, contender: Contender, budget: float | None, reached: list[Reached] | None) -> float | None:
        """Add a row with means over seeds, if the contender reached anything, and return the share of MACs spent."""
        if reached is None:
            return None
        task, targets = self.ground.test.task, self.ground.test.targets.cpu()
        scores = [Score.of(of.network, task.mean(of.metric, targets), of.macs, of.router, of.route) for of in reached]
        metrics = torch.tensor([score.metric for score in scores], dtype=torch.float64)
        macs = sum(score.macs_fraction for score in scores) / len(scores)
        metric, first = task.metric, reached[0]
        hard = [correlations(self.ground.test, of.macs) for of in reached]
        rates = [task.rates(of.metric, targets) for of in reached]
        timed, known = self._last.get(contender.name, (-1, first))
        if timed < 0 or not (torch.equal(known.route, first.route) and torch.equal(known.macs, first.macs)):
            timed = len(self.rows)
            self._last[contender.name] = timed, first
            self._sides[f"{timed}/routed"] = first.start(self.batch)
            route = first.route[: len(self.batch)].to(self.batch.device)
            self._sides[f"{timed}/ideal"] = first.network.ideal(self.batch, route)
        self._timed.append(timed)
        self.rows.append(
            {
                "policy": contender.name, "kind": contender.kind and contender.kind.to_dict(), "price": first.price,
                "budget": budget, "runs": len(scores), metric: float(metrics.mean()),
                f"{metric}_std": float(metrics.std()) if len(scores) > 1 else 0.0,
                **{name: _mean([of[name] for of in rates]) for name in rates[0]},
                "macs_fraction": macs, "mac_speedup": 1 / macs,
                "router_fraction": sum(score.router_fraction for score in scores) / len(scores),
                "decisions": sum(score.decisions for score in scores) / len(scores),
                "distinct_routes": max(score.distinct_routes for score in scores),
                "choice_rates": {tag: sum(s.rates[tag] for s in scores) / len(scores) for tag in scores[0].rates},
                "spearman": {name: _mean([of[name] for of in hard]) for name in hard[0]},
            }
        )  # fmt: skip
        return macs

    def time(self, tick: Callable[[], Any]) -> dict[str, float]:
        """Time all rows and the dense network in turn, add each row's times to it, and return the dense ones."""
        dense = dense_sides(self.ground.network, self.batch)
        with torch.inference_mode():
            times = medians_in_turn(self._sides | dense, ROUNDS, tick, self.ground.wait)
        fastest = min(times[name] for name in dense)
        for timed, row in zip(self._timed, self.rows, strict=True):
            ms, ideal = times[f"{timed}/routed"], times[f"{timed}/ideal"]
            row |= {"latency_ms": ms, "speedup": fastest / ms, "realised_ratio": ideal / ms}
        return {name.removeprefix("dense "): times[name] for name in dense}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _learned_and_random(
    points: _Points,
    learned: Sequence[Learned],
    random: Contender,
    budgets: Sequence[float],
    tick: Callable[[], Any],
) -> None:
    """Add the learned policies, budget by budget, and random routes that spend as much as the first policy did."""
    for budget in (*budgets, None):
        spent = None
        for contender in learned:
            if budget in contender.rows(budgets):
                macs = points.add(contender, budget, contender.reach(budget))
                spent = spent or macs
            tick()
        if spent:
            points.add(random, budget, random.reach(spent))
        tick()


def _usage(contender: Learned, ground: Ground) -> dict[str, Any]:
    """Describe where the first seed spends at half of the dense MACs, or else at its lowest price."""
    model = contender.models[0]
    ends = [macs for _, macs in model.curve]
    if contender.asked and min(ends) <= 0.5 <= max(ends):
        model.set_budget(0.5)
    elif model.price_range is not None:
        model.set_price(model.price_range[0])
    return {"policy": contender.name, "price": model.price, **asdict(Usage.of(model, ground.test))}


def _pictures(contender: Learned, ground: Ground, usage: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return raw images that the first seed spends least and most on, as `usage` tells, and what it makes of them."""
    model = contender.models[0]
    if usage["price"] is not None:
        model.set_price(usage["price"])
    shown = pictures(model, ground.test, usage["cheapest"][:SHOWN] + usage["dearest"][:SHOWN])
    return shown | {"input": ground.dataset.raw(shown["input"])}


def _dense_figures(dense: Dense, times: dict[str, float], points: _Points) -> dict[str, Any]:
    """Return what each kind of dense network reaches on the test split, and how long the dense network takes."""
    metric, test = dense.ground.task.metric, dense.ground.test
    own = {"pretrained", "plain"}
    groups = {
        "all_execute": dense.networks["pretrained"],
        "plain": dense.networks.get("plain", []),
        "tuned": [network for name, mine in dense.networks.items() if name not in own for network in mine],
    }
    return {
        metric: mean_metric(dense.networks[dense.best], test),
        "network": dense.best,
        **{f"{name}_{metric}": mean_metric(mine, test) if mine else None for name, mine in groups.items()},
        "macs": dense.ground.network.dense_macs,
        "latency_ms": min(times.values()),
        "latency_ms_by_side": times,
        "batch_size": len(points.batch),
    }


def seeds_text(report: dict[str, Any]) -> str:
    """Return a text that names the seeds behind each row, and says on how many backbones they learned."""
    text = "; ".join(f"{name} {', '.join(map(str, seeds))}" for name, seeds in report["seeds"].items())
    return f"{text}, on {report['backbones']} backbones" if report.get("backbones", 1) > 1 else text


def report_text(report: dict[str, Any]) -> str:
    """Return the report as a table to print."""
    dense, metric, task = report["dense"], report["metric"], TASKS[report["metric"]]
    wide = max(len(p["policy"]) for p in report["points"])
    lines = [
        f"{report['decision']} on {report['data']}, test split, policy seeds: {seeds_text(report)}",
        f"times: a batch of {dense['batch_size']} on {report['hardware']['threads']} threads",
        f"{'policy':{wide}} {'budget':>6} {task.heading:>16} {'MACs':>6} {'ms':>8} {'speed-up':>9} {'of ideal':>9}",
        f"{'dense':{wide}} {'':6} {task.show(dense[metric]):>8} {'':7} {1:6.2f} {dense['latency_ms']:8.2f} {1:9.2f}",
    ]
    for p in report["points"]:
        budget = "" if p["budget"] is None else f"{p['budget']:g}"
        spread = f"±{task.show(p[f'{metric}_std'])}" if p[f"{metric}_std"] else ""
        lines.append(
            f"{p['policy']:{wide}} {budget:>6} {task.show(p[metric]):>8} {spread:>7} {p['macs_fraction']:6.2f}"
            f" {p['latency_ms']:8.2f} {p['speedup']:9.2f} {p['realised_ratio']:9.2f}"
            + "".join(f"  {name.replace('_', ' ')} {100 * p[name]:.2f} %" for name in task.figures if name in p)
        )
    lines.append(
        "MACs: shares of the dense network's, router included. oracle: each input's best route, of equals the cheapest."
    )
    if (usage := report["usage"]) is not None:
        spent = {group["class"]: group["macs_fraction"] for group in usage["groups"]}
        least, most = (choose(spent, key=lambda of: spent[of]) for choose in (min, max))
        between = ""
        if len(spent) > 1:
            names = report["classes"]
            between = f"; class {names[least]} takes {spent[least]:.2f}, class {names[most]} {spent[most]:.2f}"
        lines.append(
            f"{usage['policy']}: {usage['distinct_routes']} routes, the commonest {usage['commonest']:.0%}{between}"
        )
        lines += _words_lines(usage)
        lines += _difficulty_lines(usage, task)
    lines += [line for name in report["seeds"] for line in _missing_lines(report, name)]
    if "budgeted" in report:
        lines.append(budgeted_text(report))
    return "\n".join(lines)


def _missing_lines(report: dict[str, Any], name: str) -> list[str]:
    """Say at which budgets a learned policy has no row, and why."""
    lines, mine = [], [p["budget"] for p in report["points"] if p["policy"] == name]
    apart = {row["budget"]: row["backbones"] for row in report.get("left_out", ()) if row["policy"] == name}
    if missed := sorted(set(report["budgets"]) - {*mine, *apart}):
        lines.append(f"budgets out of reach of {name}: {', '.join(map(str, missed))}")
    if apart:
        told = [f"{'its lowest price' if at is None else f'{at:g}'} ({count})" for at, count in apart.items()]
        lines.append(
            f"{name} has no row where only some of the {report['backbones']} backbones have one: {', '.join(told)}"
        )
    if mine == [None]:
        lines.append(
            f"{name} has the one row at its lowest price: it needs none of these budgets, has collapsed, or was "
            "trained at one price"
        )
    return lines


def words_read(words: Sequence[str], regions: Sequence[Any]) -> list[bool]:
    """Tell which words of a text were read, by its row of `usage["regions"]`."""
    places = {left for parts in regions for _, left, _, _ in parts}
    return [place in places for place in range(len(words))]


def _words_lines(usage: dict[str, Any]) -> list[str]:
    """Return what was read of some texts, least first: the words read, and … for all between them that were not."""
    lines, half = [], len(usage["cheapest"])
    for words, regions in list(zip(usage["words"], usage["regions"], strict=True))[:: max(1, half // 2)]:
        read = words_read(words, regions)
        runs = groupby(zip(words, read, strict=True), key=itemgetter(1))
        shown = " ".join(" ".join(word for word, _ in run) if was else "…" for was, run in runs)
        if words and regions:
            shown = shown if len(shown) <= 200 else f"{shown[:200]} …"
            lines.append(f"{usage['policy']} read {sum(read)} of {len(words)} words: {shown}")
    return lines


def _difficulty_lines(usage: dict[str, Any], task: type[Task]) -> list[str]:
    lines = []
    for name, found in usage["difficulty"].items():
        lines.append(f"{usage['policy']}, by {name}{correlation_text(found)}:")
        lines.append(f"{name:>16} {'inputs':>8} {task.heading:>11} {'MACs':>6}")
        lines += [
            f"{bin_name(row):>16} {row['inputs']:8} {task.show(row[task.metric]):>11} {row['macs_fraction']:6.2f}"
            for row in found["bins"]
        ]
    return lines


def correlation_text(found: dict[str, Any]) -> str:
    """Say how spending follows a difficulty, if all inputs do not take the same."""
    return "" if found["spearman"] is None else f" (Spearman's correlation with MACs {found['spearman']:.2f})"
