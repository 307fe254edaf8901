"""Reports on several pretrained backbones are merged into one, with means and spreads over the backbones."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def merge_reports(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge reports of equal problems, each on a pretrained backbone of its own; one report stays as it is.

    A row is kept if every report has it; rows of one policy and budget are told apart by their order. Its numbers are
    means over the backbones, and its spread is that of the backbones' means, since backbones differ more than policies
    on one of them do. `runs` counts all policies. Smaller plain networks are the same beside each backbone, so their
    rows keep the spread and the runs of one report. Usage is that of the first backbone. `left_out` tells on how many
    backbones there are the rows that not all reports have.
    """
    if len(reports) == 1:
        return reports[0]
    first, metric = reports[0], reports[0]["metric"]
    lists = [report["points"] for report in reports]
    points = _merge_rows(lists, metric)
    counts = Counter(key for rows in lists for key in keyed(rows))
    left_out = [
        {"policy": policy, "budget": budget, "backbones": count}
        for (policy, budget, _), count in counts.items()
        if count < len(reports)
    ]
    curves = {
        name: _merge_rows([report["budgeted"][name] for report in reports], metric)
        for name in first.get("budgeted", ())
    }
    dense = [report["dense"] for report in reports]
    kinds = sorted({kind for report in reports for kind in report["seeds"]})
    seeds, policies = (
        {kind: [one for report in reports for one in report.get(of, {}).get(kind, [])] for kind in kinds}
        for of in ("seeds", "policies")
    )
    spread = statistics.stdev(each[metric] for each in dense)
    return first | {
        "backbones": len(reports), "seeds": seeds, "policies": policies, "points": points, "left_out": left_out,
        "dense": _mean(dense) | {f"{metric}_std": spread},
        **({"budgeted": curves} if curves else {}),
    }  # fmt: skip


def _merge_rows(reports: Sequence[Sequence[dict[str, Any]]], metric: str) -> list[dict[str, Any]]:
    """Return the rows that are in each of several lists, with means and spreads."""
    by_key = [keyed(rows) for rows in reports]
    merged = []
    for key in by_key[0]:
        if all(key in rows for rows in by_key):
            mine = [rows[key] for rows in by_key]
            spread, runs = statistics.stdev(row[metric] for row in mine), sum(row["runs"] for row in mine)
            if _beside_all(mine[0]["policy"]):
                spread, runs = mine[0][f"{metric}_std"], mine[0]["runs"]
            merged.append(_mean(mine) | {f"{metric}_std": spread, "runs": runs})
    return merged


def _beside_all(policy: str) -> bool:
    """Tell whether a row is of networks that stand beside every backbone (`contenders.Plain` and `Smaller`)."""
    return policy == "smaller" or policy.startswith("plain ")


def keyed(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, float | None, int], Any]:
    """Return a report's rows by policy, budget, and how many rows with both came before.

    Several routes may share a name: the same choice everywhere, a tree's own routers and its soft walk.
    """
    counts: Counter[tuple[str, float | None]] = Counter()
    found = {}
    for row in rows:
        name = row["policy"], row["budget"]
        found[*name, counts[name]] = row
        counts[name] += 1
    return found


def _mean(values: Sequence[Any]) -> Any:
    """Return the mean of known numbers and, entry by entry, of dictionaries of numbers; of anything else, the first.

    A None is a number that is not known.
    """
    values = [value for value in values if value is not None] or [None]
    first = values[0]
    if isinstance(first, dict) and all(isinstance(value, dict) and value.keys() == first.keys() for value in values):
        return {name: _mean([value[name] for value in values]) for name in first}
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        if all(value == first for value in values):
            return first  # a budget stays what was asked for: the mean's rounding would change it
        return math.fsum(values) / len(values)
    return first
