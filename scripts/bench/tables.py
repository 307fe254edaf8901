"""These functions write the benches' results as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable
from statistics import geometric_mean, median
from typing import Any

from dynrl.evaluation.difficulty import bin_name
from dynrl.scripts.bench.gpu import judged
from dynrl.scripts.bench.ops import summary
from dynrl.tasks import TASKS


def bench_agents_table(result: dict[str, Any]) -> list[str]:
    """Write rows of `dynrl bench agents`, medians over seeds."""
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
    return [*lines, "", _machine(result)]


def bench_known_table(result: dict[str, Any]) -> list[str]:
    """Write rows of `dynrl bench known`, the slowest of each decision's seeds."""
    lines = ["| decision | seeds | 95 % of the gap after | of the gap at the end |", "|---|---|---|---|"]
    for decision in dict.fromkeys(row["decision"] for row in result["rows"]):
        mine = [row for row in result["rows"] if row["decision"] == decision]
        slowest = [row["seconds_to_enough"] for row in mine]
        shown = "not by all" if None in slowest else f"{max(slowest):.1f} s"
        ends = f"{min(row['share'] for row in mine):.1%} in {max(row['seconds'] for row in mine):.0f} s"
        lines.append(f"| {decision} | {len(mine)} | {shown} | {ends} |")
    return [*lines, "", _machine(result)]


def bench_env_table(result: dict[str, Any]) -> list[str]:
    """Write rows of `dynrl bench env`."""
    processor = result["hardware"]["processor"]
    return [*_sampled(result["rows"]), "", f"{result['date']}, one thread of {processor}, half of the blocks forced."]


def _sampled(rows: list[dict[str, Any]]) -> list[str]:
    names = {
        "walk": "the backbone alone, on known routes", "bare": "a bare loop of backbone and router, in torch",
        "env": "through the environment", "env-eager": "through the environment, without CUDA graphs",
        "rllib": "our runner", "rllib-upfront": "our runner, all of a walk decided at once",
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
    """Return a time as a cell, or an empty cell if there is none."""
    return "" if value is None else f"{value:.2f}"


def bench_ops_table(result: dict[str, Any]) -> list[str]:
    """Write the rows of `dynrl bench ops` with half kept at batch 256, and the summary of all rows."""
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


def summed(found: dict[str, Any]) -> str:
    """Return one row of the summary of `dynrl bench ops` as a line of text."""
    return (
        f"{found['op']:14} {found['rows']} rows of 0.5 ms and more: geometric mean {found['geometric_mean']:.3f}, "
        f"worst {found['worst']:.3f}; slower than dense: {found['slower_than_dense']} of {found['with_dense']}, "
        f"{found['clearly']} clearly"
    )


def bench_tasks_table(result: dict[str, Any]) -> list[str]:
    """Write rows of `dynrl bench tasks`: a table a data set, with the metric by the first of its difficulties."""
    lines = []
    for found in result["summary"]:
        mine = [row for row in result["rows"] if row["data"] == found["data"]]
        name, bins = next(iter(mine[0]["difficulty"].items()), ("", []))
        metric, task = mine[0]["metric"], TASKS[mine[0]["metric"]]
        heads = [f"{name} {bin_name(row)}" if i == 0 else bin_name(row) for i, row in enumerate(bins)]
        heads = [f"{mine[0]['decision']}, {found['data']}", "MMACs", "share", task.heading, *heads]
        lines += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        for row in mine:
            settings = f" `{' '.join(row['settings'])}`" if row["settings"] else ""
            cells = [
                f"{row['network']}{settings}", f"{row['macs'] / 1e6:.2f}", f"{row['macs_fraction']:.2f}",
                task.show(row[metric]) + (f" ±{task.show(row[f'{metric}_std'])}" if row["seeds"] > 1 else ""),
                *(task.show(at[metric]) for at in row["difficulty"].get(name, ())),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", f"{task_summed(found)}.", ""]
    return [*lines, _machine(result)]


def task_summed(found: dict[str, Any]) -> str:
    """Say in words whether a task is fit."""
    said, lost = "fit" if found["fit"] else "not fit", f"{100 * found['margin']:.2f} points"
    rival = f"the best plain network of half of the MACs ({found['best']})"
    return f"{found['data']} is {said}: {rival} loses {lost} to the dense one, mean of {found['seeds']} seeds"


def bench_model_table(result: dict[str, Any]) -> list[str]:
    """Write rows of `dynrl bench model`."""
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
    """Write rows of `scripts/gpu_check.py`: ops at batch 64 and more, networks, and what agents sample."""
    rows = result["rows"]
    ops = [r for r in rows if "op" in r and r.get("realised_ratio") and r["batch"] >= 64 and r["dtype"] == "bfloat16"]
    lines = [
        "| op | rows | of ideal, geometric mean | worst | slower than dense | speed-up over dense, geometric mean |",
        "|---|---|---|---|---|---|",
    ]
    for s in summary(ops, least_ms=0.0):
        gains = [r["dense_ms"] / r["routed_ms"] for r in ops if r["op"] == s["op"] and r["dense_ms"]]
        beside = f"{s['slower_than_dense']} of {len(gains)} | {geometric_mean(gains):.2f}" if gains else " | "
        lines.append(f"| {s['op']} | {s['rows']} | {s['geometric_mean']:.2f} | {s['worst']:.2f} | {beside} |")
    lines += ["", *_networks([r for r in rows if "captured_dense_ms" in r])]
    if sampled := [r for r in rows if "path" in r]:
        lines += ["", *_sampled(sampled)]
    return [*lines, "", f"{result['date']}, {result['device']}, bfloat16, torch {result['torch']}."]


def _networks(rows: list[dict[str, Any]]) -> list[str]:
    """Write each side's milliseconds in eager mode and as a graph, then those of `model(x)` beside the prediction."""
    sides = ("dense", "ideal", "routed", "with_router")
    lines = [
        "| network | batch | dense: eager, graph | ideal | routed | with router | `model(x)` | by | predicted | bars |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        pairs = [f"{ms(r[f'{side}_ms'])}, {ms(r[f'captured_{side}_ms']) or '-'}" for side in sides]
        held = [{True: "hold", False: "fail", None: "not measured"}[bar["holds"]] for bar in r.get("bars", ())]
        replayed = [ms(r.get("replayed_ms")), r.get("way", ""), ms(r.get("predicted", {}).get("replayed_ms"))]
        lines.append(f"| {' | '.join([r['network'], str(r['batch']), *pairs, *replayed, ', '.join(held)])} |")
    return lines


def gpu_predicted_table(result: dict[str, Any]) -> list[str]:
    """Write what `scripts/gpu_check.py` is predicted to measure of whole networks, and the bars that are set for it."""
    sides = ("captured_dense_ms", "captured_ideal_ms", "replayed_ms")
    lines = [
        "| network | batch | dense graph, ms | ideal graph | `model(x)` | at most | by prediction |",
        "|---|---|---|---|---|---|---|",
    ]
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in result["rows"]:
        found.setdefault((row["network"], row["batch"]), {})[row["column"]] = row["ms"]
    for (network, batch), mine in found.items():
        bars = judged(mine | {"network": network, "batch": batch}, result, result["device"])["bars"]
        holds = "holds" if all(bar["holds"] for bar in bars) else "does not hold"
        cells = [network, str(batch), *(ms(mine[side]) for side in sides), ms(min(bar["most_ms"] for bar in bars))]
        lines.append(f"| {' | '.join(cells)} | {holds} |")
    return [*lines, "", f"Nothing here was measured; {result['device']}, bfloat16, from {result['source']}."]


BENCHES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "bench-known": bench_known_table, "bench-agents": bench_agents_table, "bench-env": bench_env_table,
    "bench-ops": bench_ops_table, "bench-model": bench_model_table, "bench-tasks": bench_tasks_table,
    "gpu": gpu_table, "gpu-predicted": gpu_predicted_table,
}  # fmt: skip
SUMMED: dict[str, Callable[[dict[str, Any]], str]] = {"ops": summed, "tasks": task_summed}
