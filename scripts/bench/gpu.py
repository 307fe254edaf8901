"""The results of a GPU as Markdown tables: ops, whole networks, and modules of users."""

from __future__ import annotations

from statistics import geometric_mean
from typing import Any

from dynrl.scripts.bench.ops import summary


def gpu_table(result: dict[str, Any]) -> list[str]:
    """Ops at batch 64 and more, networks outside and inside CUDA graphs, and modules of users, where there are any."""
    rows = [row for part in ("rows", "ops", "model") for row in result.get(part, ())]
    ops = [r for r in rows if "op" in r and r.get("realised_ratio") and r["batch"] >= 64 and r["dtype"] == "bfloat16"]
    lines = [
        "| op | rows | of ideal, geometric mean | worst | slower than dense | speed-up over dense, geometric mean |",
        "|---|---|---|---|---|---|",
    ]
    for s in summary(ops, least_ms=0.0):
        gains = [r["dense_ms"] / r["routed_ms"] for r in ops if r["op"] == s["op"] and r["dense_ms"]]
        beside = f"{s['slower_than_dense']} of {len(gains)} | {geometric_mean(gains):.2f}" if gains else " | "
        lines.append(f"| {s['op']} | {s['rows']} | {s['geometric_mean']:.2f} | {s['worst']:.2f} | {beside} |")
    lines += ["", *_networks([r for r in rows if "captured_dense_ms" in r]), "", *_modules(result.get("vision", []))]
    return [*lines, "", f"{result['date']}, {result['device']}, bfloat16, torch {result['torch']}."]


def _networks(rows: list[dict[str, Any]]) -> list[str]:
    sides = ("dense", "routed", "with_router", "captured_dense", "captured_ideal", "captured_routed",
             "captured_with_router")  # fmt: skip
    lines = [
        "| network | batch | dense ms | routed | with router | captured: dense | ideal | routed | with router |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = " | ".join(f"{r[f'{side}_ms']:.2f}" for side in sides)
        lines.append(f"| {r['network']} | {r['batch']} | {cells} |")
    return lines


def _modules(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| module | batch | MACs | the module itself ms | all blocks | ideal | routed | with router |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = " | ".join(f"{r[side]:.1f}" for side in ("dense", "full_route", "ideal", "routed", "with_router"))
        lines.append(f"| {r['net']} | {r['batch']} | {r['macs']:.2f} | {cells} |")
    return lines
