"""These functions write reports and comparisons as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from dynrl.deploy import SHIPPED, shipped
from dynrl.evaluation.intervals import verdict
from dynrl.evaluation.merged import keyed
from dynrl.evaluation.report import seeds_text
from dynrl.files import read_json
from dynrl.runs import RunKind
from dynrl.tasks import TASKS

HALF = 0.5  # the budget of one-row tables, a share of the dense MACs
NO_RIVALS = ("random", "static", "uniform", "oracle")  # in columns of their own, or none at all


def report_table(report: Mapping[str, Any]) -> list[str]:
    """Write one report as a table: a row a contender, a column a budget, and times at half of the dense MACs."""
    metric = report["metric"]
    budgets = sorted({p["budget"] for p in report["points"]} - {None})
    lines = [
        f"| {TASKS[metric].heading}, by budget | {' | '.join(map(str, budgets))} | other MACs | speed-up | of ideal |",
        "|" + "---|" * (len(budgets) + 4),
    ]
    for text, value in _full_networks(report):
        lines.append(f"| {text} |{' |' * len(budgets)} {TASKS[metric].show(value)} at 1.00 | | |")
    lines_of: dict[tuple[str, int], dict[float | None, Any]] = {}  # rows that share a name and a budget: a line each
    for (name, budget, before), point in keyed(report["points"]).items():
        if name != "uniform":
            lines_of.setdefault((name, before), {})[budget] = point
    for (name, _), mine in lines_of.items():
        cells = [_reached(mine[budget], metric) if budget in mine else "" for budget in budgets]
        own, timed = mine.get(None), mine.get(HALF, mine.get(None))
        cells.append("" if own is None else f"{_reached(own, metric)} at {own['macs_fraction']:.2f}")
        cells += ["", ""] if timed is None else [f"{timed[of]:.2f}" for of in ("speedup", "realised_ratio")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += _further_figures(report)
    dense, hardware = report["dense"], report["hardware"]
    lines += ["", f"Policy seeds: {seeds_text(dict(report))}. {report['date']}, batch {dense['batch_size']}, "
              f"{hardware['threads']} threads of {hardware['processor']}, torch {hardware['torch']}."]  # fmt: skip
    return lines


def _further_figures(report: Mapping[str, Any]) -> list[str]:
    """Write, for a task with further figures, a row for each policy and budget with all of them and its time."""
    names = [name for name in TASKS[report["metric"]].figures if name in report["points"][0]]
    if not names:
        return []
    heads = [name.replace("_", " ") + " %" for name in names]
    lines = ["", f"| policy | budget | MACs | {' | '.join(heads)} | speed-up |", "|" + "---|" * (len(names) + 4)]
    for p in report["points"]:
        cells = [p["policy"], "" if p["budget"] is None else str(p["budget"]), f"{p['macs_fraction']:.3f}"]
        cells += [f"{100 * p[name]:.2f}" for name in names] + [f"{p['speedup']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _full_networks(report: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return all networks of a report that run in full, each with its metric."""
    named = {"plain": "plain network", "all_execute": "full route, pretrained", "tuned": "full route, tuned"}
    found = [(text, report["dense"].get(f"{name}_{report['metric']}")) for name, text in named.items()]
    return [(text, value) for text, value in found if value is not None]


def _reached(point: Mapping[str, Any], metric: str) -> str:
    show, spread = TASKS[metric].show, point[f"{metric}_std"]
    return show(point[metric]) + (f" ±{show(spread)}" if spread else "")


def by_decision_table(reports: Mapping[str, Mapping[str, Any]], budgets: Sequence[float]) -> list[str]:
    """Write one row for each report, by its folder: what it says at its share of the dense MACs in `budgets`.

    Of a contender that has no row there, as where not all backbones have one, nothing is said.

    The dense network is the best of a report's full networks. The learned policy is PPO's, chosen by its kind, whatever
    it reaches: at the budget before at a price of its own, finished before unfinished, fine-tuned before not, and then
    the kind that differs least from a default run's. At a price of its own it must be as cheap, unless it is the
    report's only row. The strongest rival is the most accurate of the rest within the budget: gates, rules of thumb,
    and smaller plain networks. What is worse than random routes is none.
    """
    lines = [
        "| report | dense | learned | its MACs | random | static | strongest rival | speed-up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (folder, report), budget in zip(reports.items(), budgets, strict=True):
        metric = report["metric"]
        task = TASKS[metric]
        best = max if task.rises else min
        mine = [p for p in report["points"] if p["kind"] is not None and p["kind"]["agent"] == "ppo"]
        near = [p for p in mine if p["budget"] == budget or (p["budget"] is None and _as_cheap(p, budget))]
        if [p["budget"] for p in mine] == [None]:
            near = mine
        learned = min(near, key=_precedence, default=None)
        random, static = (_at(report, name, budget) for name in ("random", "static"))
        others = [p for p in report["points"] if p not in mine and p["policy"] not in NO_RIVALS]
        rest = [p for p in others if p["budget"] == budget or ((p["budget"] or 0) < budget and _as_cheap(p, budget))]
        rest = [p for p in rest if random is None or best(p, random, key=itemgetter(metric)) is p]
        rival = best(sorted(rest, key=lambda p: p["kind"] is not None), key=itemgetter(metric), default=None)
        shown, macs, speedup = "", "", ""
        if learned is not None:
            shown = f"**{task.show(learned[metric])}**" + (" tuned" if learned["kind"]["tuned"] else "")
            macs, speedup = f"{learned['macs_fraction']:.2f}", f"{learned['speedup']:.2f}"
        cells = [
            task.show(report["dense"][metric]), shown, macs,
            *("" if row is None else task.show(row[metric]) for row in (random, static)),
            "" if rival is None else f"{rival['policy']} {task.show(rival[metric])}", speedup,
        ]  # fmt: skip
        lines.append(f"| [{report['decision']}, {report['data']}](results/{folder}) | {' | '.join(cells)} |")
    return lines


def _precedence(point: Mapping[str, Any]) -> tuple[bool, bool, bool, int]:
    """Return what the learned policy of a row is chosen by, least first: no test figure."""
    usual = RunKind().to_dict()
    kind = usual | point["kind"]  # older reports lack what was not there to choose
    unusual = sum(kind[name] != value for name, value in usual.items())
    return point["budget"] is None, not kind["finished"], not kind["tuned"], unusual


def _as_cheap(point: Mapping[str, Any], budget: float) -> bool:
    """Tell whether a row of another budget, or of none, costs no more than rows at `budget` do; these miss it, too."""
    return point["macs_fraction"] <= 1.1 * budget


def _at(report: Mapping[str, Any], name: str, budget: float) -> Any:
    """Return a contender's row at `budget`, or beside the one row of a learned policy that no budget asks for.

    None is returned of one that has no rows.
    """
    found = [p for p in report["points"] if p["policy"] == name]
    return min(found, key=lambda p: 0 if p["budget"] is None else abs(p["budget"] - budget), default=None)


def comparison_table(results: list[dict[str, Any]]) -> list[str]:
    """Write what comparisons say about the areas under the fronts and about half of the dense MACs."""
    lines = [
        "| decision, data | policy (seeds) | less (seeds) | area | over, of the MACs | at half | |",
        "|" + "---|" * 7,
    ]
    for result in results:
        show, seeds = TASKS[result["metric"]].show, result["seeds"]
        for row in result["differences"]:
            if row["rival"] == "oracle":
                continue
            policy, rival = (
                f"{name} ({len(seeds[name])})" if name in seeds else name for name in (row["policy"], row["rival"])
            )
            area, half = (
                f"{show(of['difference'])} [{show(of['low'])}, {show(of['high'])}]" if (of := row.get(at)) else ""
                for at in ("area", "0.5")
            )
            lines.append(
                f"| {result['decision']}, {result['data']} | {policy} | {rival} | {area} | {_span(row)} | {half} "
                f"| {verdict(row['area']) if 'area' in row else ''} |"
            )
    dates = sorted({result["date"] for result in results})
    return [*lines, "", f"{', '.join(dates)}; accuracy in points, mse in its own units turned so that more is better."]


def _span(row: Mapping[str, Any]) -> str:
    """Return the budgets between which a difference of areas was taken; comparisons of before only list them all."""
    if "area" not in row:
        return ""
    budgets = [float(name) for name in row if name not in ("policy", "rival", "area")]
    span = {"from": min(budgets), "to": max(budgets)} | row["area"]
    return f"{span['from']:.2g} to {span['to']:.2g}"


def one_price_table(results: list[dict[str, Any]]) -> list[str]:
    """Write how policies for all prices compare with policies for one price, at equal MACs."""
    lines = [
        "| decision, data | at one price | MACs | alone | for all prices | difference |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        show = TASKS[result["metric"]].show
        for row in sorted(result["one_price"], key=lambda row: row["one_price_macs_fraction"]):
            lines.append(
                f"| {result['decision']}, {result['data']} | {row['price']:g} | {row['one_price_macs_fraction']:.2f} "
                f"| {show(row['one_price_metric'])} | {show(row['metric'])} "
                f"| {show(row['difference'])} [{show(row['low'])}, {show(row['high'])}] |"
            )
    return lines


def attacks_table(reports: list[dict[str, Any]]) -> list[str]:
    """Write what attacks take of what models save: two rows for each report, without and with its limit."""
    lines = [
        "| decision, data | policy | asked | limit | clean, % | efficacy | noise takes | DeepSloth takes "
        "| spending takes | attacked, % | its MACs | most |",
        "|" + "---|" * 12,
    ]
    for report in reports:
        show, budget = TASKS[report["metric"]].show, report["budget"]
        asked = f"price {report['price']:.3g}" if budget is None else f"budget {budget:g}"
        for limit, rows in ((None, report["free"]), (report["limit"], report["limited"] or [])):
            found = {row["inputs"]: row for row in rows}
            if not found:
                continue
            clean, spending = found["clean"], found["spending"]
            took = [
                f"{found[name]['lost']:.0%}" if name in found else "" for name in ("noise", "uncertainty", "spending")
            ]
            cells = [
                f"{report['decision']}, {report['data']}", report["policy"], asked,
                "" if limit is None else f"{limit:g}",
                show(clean[report["metric"]]), f"{clean['efficacy']:.2f}", *took, show(spending[report["metric"]]),
                f"{spending['macs_fraction']:.2f}", f"{max(row['most'] for row in rows):.2f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    dates, counts = (sorted({report[name] for report in reports}) for name in ("date", "inputs"))
    return [*lines, "", f"{', '.join(dates)}; the first {' or '.join(map(str, counts))} test inputs, one seed each."]


def shipped_table() -> list[str]:
    """Write what the reports of the shipped models say at half of the dense MACs."""
    lines = [
        "| `dynrl.load` | kB | its full route | at half of the MACs | random routes | static | speed-up, batch 256 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in shipped():
        report = read_json(SHIPPED / name / "report.json")
        size = sum(file.stat().st_size for file in (SHIPPED / name).glob("*.safetensors")) / 1e3
        learned = _at(report, next(p["policy"] for p in report["points"] if p["kind"] is not None), HALF)
        rivals = [_at(report, rival, HALF) for rival in ("random", "static")]
        own = report["dense"]["tuned_accuracy"] or report["dense"]["all_execute_accuracy"]
        cells = [f"{100 * accuracy:.2f} %" for accuracy in (own, *(p["accuracy"] for p in (learned, *rivals)))]
        lines.append(f"| `{name}` | {size:.0f} | {' | '.join(cells)} | {learned['speedup']:.2f} |")
    return lines
