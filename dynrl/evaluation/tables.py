"""These functions write reports and comparisons as Markdown tables."""

from __future__ import annotations

from typing import Any

from dynrl.deploy import SHIPPED, shipped
from dynrl.evaluation.intervals import verdict
from dynrl.evaluation.report import seeds_text
from dynrl.files import read_json
from dynrl.tasks import TASKS


def report_table(report: dict[str, Any]) -> list[str]:
    """Write one report."""
    dense, hardware, metric = report["dense"], report["hardware"], report["metric"]
    task = TASKS[metric]
    lines = [
        f"| policy | budget | {task.heading} | MACs | ms | speed-up | of ideal |",
        "|---|---|---|---|---|---|---|",
        f"| dense | | {task.show(dense[metric])} | 1.00 | {dense['latency_ms']:.1f} | 1.00 | |",
    ]
    for p in report["points"]:
        lines.append(
            f"| {p['policy']} | {p['budget'] or ''} | {_reached(p, metric)} | {p['macs_fraction']:.2f} "
            f"| {p['latency_ms']:.1f} | {p['speedup']:.2f} | {p['realised_ratio']:.2f} |"
        )
    lines.append("")
    lines.append(
        f"Policy seeds: {seeds_text(report)}, on one pretrained backbone; batch {dense['batch_size']}, "
        f"{hardware['threads']} threads of {hardware['processor']}, torch {hardware['torch']}."
    )
    return lines


def _reached(point: dict[str, Any], metric: str) -> str:
    show, spread = TASKS[metric].show, point[f"{metric}_std"]
    return show(point[metric]) + (f" ±{show(spread)}" if spread else "")


def at_half_table(reports: dict[str, dict[str, Any]]) -> list[str]:
    """Write what reports, by their folders, say at half of the dense MACs and of contenders without budgets."""
    lines = [
        "| report | policy | accuracy % or mse | MACs | speed-up | of ideal |",
        "|---|---|---|---|---|---|",
    ]
    for name, report in reports.items():
        metric = report["metric"]
        dense = TASKS[metric].show(report["dense"][metric])
        lines.append(f"| [{name}](results/{name}) | dense | {dense} | 1.00 | 1.00 | |")
        for p in report["points"]:
            if p["budget"] in (0.5, None) and p["policy"] != "uniform":
                lines.append(
                    f"| | {p['policy']} | {_reached(p, metric)} | {p['macs_fraction']:.2f} | {p['speedup']:.2f} "
                    f"| {p['realised_ratio']:.2f} |"
                )
    lines += ["", "Policy seeds: " + ". ".join(f"{name}: {seeds_text(r)}" for name, r in reports.items()) + "."]
    return lines


def comparison_table(results: list[dict[str, Any]]) -> list[str]:
    """Write what comparisons say of areas under the fronts and of half of the dense MACs."""
    lines = [
        "| decision, data | policy (seeds) | less (seeds) | area, 0.3 to 0.9 of the MACs | at half | |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        show, seeds = TASKS[result["metric"]].show, result["seeds"]
        for row in result["differences"]:
            if row["rival"] == "oracle":
                continue
            policy, rival = (
                f"{name} ({len(seeds[name])})" if name in seeds else name for name in (row["policy"], row["rival"])
            )
            cells = [
                f"{show(of['difference'])} [{show(of['low'])}, {show(of['high'])}]" if (of := row.get(at)) else ""
                for at in ("area", "0.5")
            ]
            lines.append(
                f"| {result['decision']}, {result['data']} | {policy} | {rival} | {' | '.join(cells)} "
                f"| {verdict(row['area']) if 'area' in row else ''} |"
            )
    dates = sorted({result["date"] for result in results})
    return [*lines, "", f"{', '.join(dates)}; accuracy in points, mse in its own units turned so that more is better."]


def one_price_table(results: list[dict[str, Any]]) -> list[str]:
    """Write policies for all prices beside those for one, at equal MACs."""
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


def shipped_table() -> list[str]:
    """Write what the reports of the models in the package say at half of the dense MACs."""
    lines = [
        "| `dynrl.load` | kB | its full route | at half of the MACs | random routes | static | speed-up, batch 256 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in shipped():
        report = read_json(SHIPPED / name / "report.json")
        size = sum(file.stat().st_size for file in (SHIPPED / name).glob("*.safetensors")) / 1e3
        half = [p for p in report["points"] if p["budget"] == 0.5]
        learned = next(p for p in half if p["kind"] is not None)
        rivals = [next(p for p in half if p["policy"] == rival) for rival in ("random", "static")]
        own = report["dense"]["tuned_accuracy"] or report["dense"]["all_execute_accuracy"]
        cells = [f"{100 * accuracy:.2f} %" for accuracy in (own, *(p["accuracy"] for p in (learned, *rivals)))]
        lines.append(f"| `{name}` | {size:.0f} | {' | '.join(cells)} | {learned['speedup']:.2f} |")
    return lines
