"""Write the README's tables, from registry and `results/`, between their `<!-- table:NAME -->` marks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any


@dataclass
class Args:
    """Settings of `dynrl tables`."""

    readme: Path = Path("README.md")
    """File to rewrite."""
    results: Path = Path("results")
    """Folder to read."""


def report_table(report: dict[str, Any]) -> list[str]:
    """A report as Markdown."""
    from dynrl.scripts.evaluate import show_seeds
    from dynrl.tasks import TASKS

    dense, hardware = report["dense"], report["hardware"]
    metric = report.get("metric", "accuracy")  # reports of before there was another have none
    task = TASKS[metric]
    lines = [
        f"| policy | budget | {task.heading} | MACs | ms | speed-up | of ideal |",
        "|---|---|---|---|---|---|---|",
        f"| dense | | {task.show(dense[metric])} | 1.00 | {dense['latency_ms']:.1f} | 1.00 | |",
    ]
    for p in report["points"]:
        spread = f" ±{task.show(p[f'{metric}_std'])}" if p[f"{metric}_std"] else ""
        lines.append(
            f"| {p['policy']} | {p['budget'] or ''} | {task.show(p[metric])}{spread} | {p['macs_fraction']:.2f} "
            f"| {p['latency_ms']:.1f} | {p['speedup']:.2f} | {p['realised_ratio']:.2f} |"
        )
    lines.append("")
    lines.append(
        f"Policy seeds: {show_seeds(report)}, on one pretrained backbone; batch {dense['batch_size']}, "
        f"{hardware['threads']} threads of {hardware['processor']}, torch {hardware['torch']}."
    )
    return lines


def at_half_table(reports: dict[str, dict[str, Any]]) -> list[str]:
    """What reports, by their folders, say of half of the dense MACs and of what has no budget: one Markdown table."""
    from dynrl.scripts.evaluate import show_seeds
    from dynrl.tasks import TASKS

    lines = [
        "| report | policy | accuracy % or mse | MACs | speed-up | of ideal |",
        "|---|---|---|---|---|---|",
    ]
    for name, report in reports.items():
        dense, metric = report["dense"], report.get("metric", "accuracy")
        show = TASKS[metric].show
        lines.append(f"| [{name}](results/{name}) | dense | {show(dense[metric])} | 1.00 | 1.00 | |")
        for p in report["points"]:
            if p["budget"] in (0.5, None) and p["policy"] != "uniform":
                spread = f" ±{show(p[f'{metric}_std'])}" if p[f"{metric}_std"] else ""
                lines.append(
                    f"| | {p['policy']} | {show(p[metric])}{spread} | {p['macs_fraction']:.2f} | {p['speedup']:.2f} "
                    f"| {p['realised_ratio']:.2f} |"
                )
    lines += ["", "Policy seeds: " + ". ".join(f"{name}: {show_seeds(r)}" for name, r in reports.items()) + "."]
    return lines


def comparison_table(results: list[dict[str, Any]]) -> list[str]:
    """What comparisons say of areas under the fronts and of half of the dense MACs, as Markdown."""
    from dynrl.scripts.compare import verdict
    from dynrl.tasks import TASKS

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
    """Policies for all prices beside those for one, at equal MACs, as Markdown."""
    from dynrl.tasks import TASKS

    lines = [
        "| decision, data | at one price | MACs | alone | for all prices | difference |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        show = TASKS[result["metric"]].show
        for row in sorted(result.get("one_price", []), key=lambda row: row["one_price_macs_fraction"]):
            price = row["policy"].partition(" at ")[2]
            lines.append(
                f"| {result['decision']}, {result['data']} | {price} | {row['one_price_macs_fraction']:.2f} "
                f"| {show(row['one_price_metric'])} | {show(row['metric'])} "
                f"| {show(row['difference'])} [{show(row['low'])}, {show(row['high'])}] |"
            )
    return lines


def bench_agents_table(result: dict[str, Any]) -> list[str]:
    """Rows of `dynrl bench agents` as Markdown, medians over seeds."""
    names = {"ours": "RLlib's PPO, our runner", "sb3": "SB3's PPO", "rllib-stock": "RLlib's PPO, its own runner"}
    lines = [
        "| agent | seeds | decisions a second | 95 % of ours after | gap to random routes, nats | in accuracy "
        "| all decisions |",
        "|---|---|---|---|---|---|---|",
    ]
    for agent, name in names.items():
        mine = [row for row in result["rows"] if row["agent"] == agent]
        if not mine:
            continue
        reached = [row["seconds_to_enough"] for row in mine]
        shown = ", ".join("never" if at is None else f"{at:.0f}" for at in reached) + " s"
        lines.append(
            f"| {name} | {len(mine)} | {median(row['steps_per_s'] for row in mine):.0f} | {shown} "
            f"| {median(row['gap'] for row in mine):.4f} "
            f"| {100 * median(row['gap_in_metric'] for row in mine):.2f} points "
            f"| {median(row['seconds'] for row in mine):.0f} s |"
        )
    shares = [row["shares"] for row in result["rows"] if row["shares"]]
    if not shares:
        return [*lines, "", _machine(result)]
    means = {part: sum(of[part] for of in shares) / len(shares) for part in shares[0]}
    lines += ["", "Of our training time: " + ", ".join(f"{part} {100 * of:.0f} %" for part, of in means.items()) + "."]
    return [*lines, "", _machine(result)]


def bench_known_table(result: dict[str, Any]) -> list[str]:
    """Rows of `dynrl bench known` as Markdown, the slowest of each decision's seeds."""
    lines = ["| decision | seeds | 95 % of the gap after | of the gap at the end |", "|---|---|---|---|"]
    for decision in dict.fromkeys(row["decision"] for row in result["rows"]):
        mine = [row for row in result["rows"] if row["decision"] == decision]
        slowest = [row["seconds_to_enough"] for row in mine]
        shown = "not by all" if None in slowest else f"{max(slowest):.1f} s"
        ends = f"{min(row['share'] for row in mine):.1%} in {max(row['seconds'] for row in mine):.0f} s"
        lines.append(f"| {decision} | {len(mine)} | {shown} | {ends} |")
    return [*lines, "", _machine(result)]


def shipped_table() -> list[str]:
    """The models that come with the package, by their reports: at half of the dense MACs, as Markdown."""
    from dynrl.deploy import SHIPPED, shipped
    from dynrl.files import read_json

    lines = [
        "| `dynrl.load` | kB | its full route | at half of the MACs | random routes | static | speed-up, batch 256 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in shipped():
        report = read_json(SHIPPED / name / "report.json")
        size = sum(file.stat().st_size for file in (SHIPPED / name).glob("*.safetensors")) / 1e3
        learned, *rivals = (
            next(p for p in report["points"] if p["budget"] == 0.5 and p["policy"].startswith(kind))
            for kind in ("learned", "random", "static")
        )
        own = report["dense"]["tuned_accuracy"] or report["dense"]["all_execute_accuracy"]
        cells = [f"{100 * accuracy:.2f} %" for accuracy in (own, *(p["accuracy"] for p in (learned, *rivals)))]
        lines.append(f"| `{name}` | {size:.0f} | {' | '.join(cells)} | {learned['speedup']:.2f} |")
    return lines


def bench_env_table(result: dict[str, Any]) -> list[str]:
    """Rows of `dynrl bench env` as Markdown."""
    processor = result["hardware"]["processor"]
    return [*_sampled(result["rows"]), "", f"{result['date']}, one thread of {processor}, half of the blocks forced."]


def _sampled(rows: list[dict[str, Any]]) -> list[str]:
    names = {
        "walk": "the backbone alone, on known routes", "bare": "a bare loop of backbone and router, in torch",
        "env": "through the environment", "rllib": "our runner",
        "rllib-upfront": "our runner, all of a walk decided at once",
        "rllib-stock": "RLlib's runner, same batched environment", "naive": "RLlib's runner, single environments",
    }  # fmt: skip
    lines = ["| network | path | sub-environments | decisions a second |", "|---|---|---|---|"]
    return lines + [
        f"| {r['network']}, {r['dtype']} | {names[r['path']]} | {r['num_envs']} | {r['steps_per_s']:.0f} |"
        for r in rows
    ]


def _machine(result: dict[str, Any]) -> str:
    hardware = result["hardware"]
    return f"{result['date']}, {hardware['threads']} threads of {hardware['processor']}, torch {hardware['torch']}."


def ms(value: float | None) -> str:
    """A time, or nothing."""
    return "" if value is None else f"{value:.2f}"


def bench_ops_table(result: dict[str, Any]) -> list[str]:
    """Half kept, batch 256, of `dynrl bench ops` as Markdown, and the summary of all rows."""
    from dynrl.scripts.bench_ops import summary

    lines = [
        "| op | shape | dense ms | masked | indexed | routed | ideal | of ideal |",
        "|---|---|---|---|---|---|---|---|",
    ]

    for r in result["rows"]:
        if r["batch"] == 256 and r["kept"] in (0.5, None) and "ideal_ms" in r:
            cells = [ms(r[f"{side}_ms"]) for side in ("dense", "masked", "indexed", "routed", "ideal")]
            lines.append(f"| {r['op']} | {r['shape']} | {' | '.join(cells)} | {r['realised_ratio']:.2f} |")
    lines += [
        "",
        "| op | rows | of ideal, geometric mean | worst | slower than dense | clearly |",
        "|---|---|---|---|---|---|",
    ]
    for s in summary(result["rows"]):
        of = f" of {s['with_dense']}"
        slower = f"{s['slower_than_dense']}{of} | {s['clearly']}{of}" if s["with_dense"] else " | "
        lines.append(f"| {s['op']} | {s['rows']} | {s['geometric_mean']:.3f} | {s['worst']:.2f} | {slower} |")
    note = [result["note"]] if "note" in result else []
    return [*lines, "", _machine(result), *note]


def bench_model_table(result: dict[str, Any]) -> list[str]:
    """Rows of `dynrl bench model` as Markdown."""
    lines = [
        "| network | routes | batch | dense ms | compiled | routed | speed-up | of ideal | with router |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        lines.append(
            f"| {r['network']} | {r['policy']} | {r['batch']} | {r['dense_ms']:.1f} | {ms(r['compiled_ms'])} "
            f"| {r['routed_ms']:.1f} | {r['speedup']:.2f} | {r['realised_ratio']:.2f} "
            f"| {r['speedup_with_router']:.2f}, {r['realised_ratio_with_router']:.2f} |"
        )
    return [*lines, "", _machine(result)]


def gpu_table(result: dict[str, Any]) -> list[str]:
    """Rows of `scripts/gpu_check.py` as Markdown: ops at batch 64 and more in bfloat16, and captured networks."""
    from dynrl.scripts.bench_ops import summary

    ops = [r for r in result["rows"] if r.get("realised_ratio") and "op" in r and r["dtype"] == "bfloat16"]
    large = [r for r in ops if r["batch"] >= 64]
    lines = [
        "| op | rows | of ideal, geometric mean | worst | slower than dense | speed-up over dense, geometric mean |",
        "|---|---|---|---|---|---|",
    ]
    for s in summary(large, least_ms=0.0):
        gains = [r["dense_ms"] / r["routed_ms"] for r in large if r["op"] == s["op"] and r["dense_ms"]]
        beside = f"{s['slower_than_dense']} of {len(gains)} | {geometric_mean(gains):.2f}" if gains else " | "
        lines.append(f"| {s['op']} | {s['rows']} | {s['geometric_mean']:.2f} | {s['worst']:.2f} | {beside} |")
    sides = ("dense", "ideal", "routed", "with_router")
    lines += [
        "",
        "| network, captured | batch | dense ms | ideal | routed | with router | commit |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        if "captured_dense_ms" in r:
            cells = " | ".join(f"{r[f'captured_{side}_ms']:.3f}" for side in sides)
            lines.append(f"| {r['network']} | {r['batch']} | {cells} | {r['commit']} |")
    if sampled := [r for r in result["rows"] if "path" in r]:
        lines += ["", *_sampled(sampled)]
    return [*lines, "", f"{result['date']}, {result['device']}, bfloat16, torch {result['torch']}."]


def decisions_table() -> list[str]:
    """The registry as Markdown."""
    from dynrl.envs import DECISIONS

    lines = ["| decision | environment | what is chosen | source |", "|---|---|---|---|"]
    return lines + [f"| `{d.name}` | `{d.env_id}` | {d.action} | {d.source} |" for d in DECISIONS.values()]


BENCHES = {
    "bench-known": bench_known_table, "bench-agents": bench_agents_table, "bench-env": bench_env_table,
    "bench-ops": bench_ops_table, "bench-model": bench_model_table, "gpu": gpu_table,
}  # fmt: skip


def main(args: Args) -> None:
    """Rewrite the README; a mark without a results file is an error."""
    from dynrl.envs import DECISIONS
    from dynrl.files import read_json, write_aside

    def table(mark: re.Match[str]) -> str:
        name = mark.group(1)
        if name == "decisions":
            lines = decisions_table()
        elif name == "shipped":
            lines = shipped_table()
        elif name in ("comparison", "one-price"):
            compared = [read_json(path) for path in sorted(args.results.glob("*/comparison.json"))]
            lines = comparison_table(compared) if name == "comparison" else one_price_table(compared)
        elif name == "at-half":
            found = {path.parent.name: read_json(path) for path in args.results.glob("*/report.json")}
            order = sorted(found, key=lambda folder: (list(DECISIONS).index(found[folder]["decision"]), folder))
            lines = at_half_table({folder: found[folder] for folder in order if found[folder]["data"] != "digits"})
        elif name in BENCHES:
            newest = max(args.results.glob(f"{name}-*.json"), default=args.results / f"{name}-DATE.json")
            lines = BENCHES[name](read_json(newest))
        else:
            lines = report_table(read_json(args.results / name / "report.json"))
        return "\n".join([f"<!-- table:{name} -->", *lines, "<!-- end -->"])

    text = args.readme.read_text()
    new = re.sub(r"<!-- table:([\w-]+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)
    with write_aside(args.readme) as aside:
        aside.write_text(new)


if __name__ == "__main__":
    from dynrl.scripts.cli import run

    run("tables")
