"""Reports in few rows, as Markdown tables: the README's, and those at the head of pages."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import getdoc
from operator import itemgetter
from typing import Any

from dynrl.backbones import FAMILIES
from dynrl.data import DATASETS
from dynrl.envs import DECISIONS
from dynrl.evaluation.report import seeds_text
from dynrl.tasks import CLASSIFICATION, TASKS

HALF = 0.5


def demo_table(report: Mapping[str, Any]) -> list[str]:
    """One report at half of the dense MACs, in four rows: dense, learned, random, static."""
    dense, metric = report["dense"], report["metric"]
    task = TASKS[metric]
    lines = [
        f"| policy | {task.heading} | MACs | ms | speed-up |",
        "|---|---|---|---|---|",
        f"| dense | {task.show(dense[metric])} | 1.00 | {dense['latency_ms']:.1f} | 1.00 |",
    ]
    for name in ("learned", "random", "static"):
        p = _at_half(report, name)
        lines.append(
            f"| {name} | {task.show(p[metric])} | {p['macs_fraction']:.2f} | {p['latency_ms']:.1f} "
            f"| {p['speedup']:.2f} |"
        )
    return lines


def by_decision_table(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Each report, by its folder, in one row: what it says at half of the dense MACs.

    The learned policy is the fine-tuned one where there is one. The strongest rival is the most accurate of the rest:
    gates, rules of thumb, and a smaller plain network.
    """
    lines = [
        "| report | plain network | learned, half of its MACs | random | static | strongest rival | speed-up |",
        "|---|---|---|---|---|---|---|",
    ]
    for folder, report in reports.items():
        metric = report["metric"]
        task = TASKS[metric]
        half = [p for p in report["points"] if p["budget"] in (HALF, None)]
        best = max if metric == CLASSIFICATION.metric else min
        mine = [p for p in half if p["kind"] is not None and p["kind"]["agent"] == "ppo"]
        learned = best(mine, key=itemgetter(metric))
        random, static = (_at_half(report, name) for name in ("random", "static"))
        rest = [p for p in half if p not in mine and p["policy"] not in ("random", "static", "uniform", "oracle")]
        rival = best(sorted(rest, key=lambda p: p["kind"] is not None), key=itemgetter(metric), default=None)
        cells = [
            task.show(report["dense"][f"plain_{metric}"]),
            f"**{task.show(learned[metric])}**" + (" tuned" if learned["kind"]["tuned"] else ""),
            task.show(random[metric]), task.show(static[metric]),
            "" if rival is None else f"{rival['policy']} {task.show(rival[metric])}", f"{learned['speedup']:.2f}",
        ]  # fmt: skip
        lines.append(f"| [{report['decision']}, {report['data']}](results/{folder}) | {' | '.join(cells)} |")
    return lines


def _at_half(report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = [p for p in report["points"] if p["policy"] == name]
    return min(found, key=lambda p: abs(p["budget"] - HALF))


def front_table(report: Mapping[str, Any]) -> list[str]:
    """One report: a row for each contender, a column for each budget, and times at half of the dense MACs."""
    metric = report["metric"]
    budgets = sorted({p["budget"] for p in report["points"]} - {None})
    lines = [
        f"| {TASKS[metric].heading}, by budget | {' | '.join(map(str, budgets))} | other MACs | speed-up | of ideal |",
        "|" + "---|" * (len(budgets) + 4),
    ]
    for text, value in _full_networks(report):
        lines.append(f"| {text} |{' |' * len(budgets)} {TASKS[metric].show(value)} at 1.00 | | |")
    for name in dict.fromkeys(p["policy"] for p in report["points"] if p["policy"] != "uniform"):
        mine = {p["budget"]: p for p in report["points"] if p["policy"] == name}
        cells = [_reached(mine[budget], metric) if budget in mine else "" for budget in budgets]
        own, timed = mine.get(None), mine.get(HALF, mine.get(None))
        cells.append("" if own is None else f"{_reached(own, metric)} at {own['macs_fraction']:.2f}")
        cells += ["", ""] if timed is None else [f"{timed[of]:.2f}" for of in ("speedup", "realised_ratio")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    dense, hardware = report["dense"], report["hardware"]
    lines += ["", f"Policy seeds: {seeds_text(report)}. {report['date']}, batch {dense['batch_size']}, "
              f"{hardware['threads']} threads of {hardware['processor']}, torch {hardware['torch']}."]  # fmt: skip
    return lines


def _full_networks(report: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The networks of a report that run in full, each with its metric; no choice of the best is made here."""
    named = {"plain": "plain network", "all_execute": "full route, pretrained", "tuned": "full route, tuned"}
    found = [(text, report["dense"].get(f"{name}_{report['metric']}")) for name, text in named.items()]
    return [(text, value) for text, value in found if value is not None]


def _reached(point: Mapping[str, Any], metric: str) -> str:
    show, spread = TASKS[metric].show, point[f"{metric}_std"]
    return show(point[metric]) + (f" ±{show(spread)}" if spread else "")


def decisions_pages() -> list[str]:
    """Each decision's section: its environment's question, and the families that pose it."""
    from importlib import import_module

    from dynrl.envs.pages import families_of

    lines: list[str] = []
    for row in DECISIONS.values():
        module, name = row.vector_entry_point.split(":")
        page = vars(getattr(import_module(module), name))["__doc__"]
        question = page.partition("\n")[0]
        names = {family: name for name, family in FAMILIES.items()}
        poses = [
            f"`{family.__name__}`" + (f" (`{names[family]}`)" if family in names else "")
            for family in families_of(row.name)
        ]
        lines += [
            f"### `{row.name}`: {row.action}", "", question, "",
            f"- Environment: `{row.env_id}`.", f"- Action: {_section(page, 'Action')}",
            f"- Features: {_section(page, 'Features')}", f"- Episode: {_section(page, 'Episode')}",
            f"- Families: {', '.join(poses)}.", f"- Source: {row.source}.", "",
        ]  # fmt: skip
    return lines[:-1]


def _section(page: str, name: str) -> str:
    """One section of an environment's page, in one line."""
    _, _, rest = page.partition(f"## {name}\n")
    return " ".join(rest.partition("\n## ")[0].split())


def data_table() -> list[str]:
    """The data sets by name, each with the first paragraph of what makes it."""
    lines = ["| `--data` | what |", "|---|---|"]
    for name, make in DATASETS.items():
        first, *_ = (getdoc(make) or "").split("\n\n")
        lines.append(f"| `{name}` | {' '.join(first.split())} |")
    return lines
