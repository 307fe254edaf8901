"""These functions predict what `scripts/gpu_check.py` will measure, from what was measured before, and judge it.

The predictions stand in `results/gpu-predicted-DATE.json`. This module writes the file anew:
`python -m dynrl.scripts.bench.predicted MEASURED.json OUT.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WAIT_MS = 0.010  # the host waits for one number at a point, and launches the next piece
CALL_MS = 0.030  # what `model(x)` does around a replay: the check of inputs, and copies of outputs and route
BYTES_A_MS = 4.0e9  # what an H200 reads and writes of its memory; its maker says 4.8e9
STEPS = 16  # a point was recorded for so many numbers of rows when this was predicted
READS = 3  # how often the features of a point are read or written as a whole, so as to gather, put back and pool
POINTS = {"resnet20 32x32": 7, "resnet50 224x224": 12}
EAGER = ("dense", "ideal", "routed", "with_router")


@dataclass(frozen=True)
class Pieces:
    """This is a network that is recorded in pieces.

    Attributes:
        measured: its name among the modules that were measured; that batch is the largest one.
        batches: the batch sizes to predict.
        points: the number of its points.
        row_bytes: the bytes of a row's features, added up over the points.
        ideal: what the ideal takes, as a share of the dense network; None for as long as was measured.
    """

    measured: str
    batches: tuple[int, ...]
    points: int
    row_bytes: int
    ideal: float | None = None


def _maps(*stages: tuple[int, int, int]) -> int:
    """Return the bytes of (count, channels, side) bfloat16 maps."""
    return sum(2 * count * channels * side * side for count, channels, side in stages)


PIECES = {
    "timm vit_b16 224x224": Pieces("timm vit_b16", (256, 32), 12, 2 * 12 * 197 * 768),
    "torchvision convnext_t 224x224": Pieces(
        "tv convnext_t", (128,), 18, _maps((3, 96, 56), (3, 192, 28), (9, 384, 14), (3, 768, 7))
    ),
    # Skipped blocks were measured, and no exits.
    "torchvision resnet50 224x224, exits": Pieces(
        "tv resnet50", (256,), 3, _maps((1, 256, 56), (1, 512, 28), (1, 1024, 14)), 0.5
    ),
}  # fmt: skip
WITHIN = {"captured_dense_ms": 1.02}  # no row may take longer than its dense graph by more
# (network, batch) -> the most milliseconds that `model(x)` may take on the machine that was measured; elsewhere, the
# ratios to the dense network and to the ideal that this makes there.
MOST = {
    ("resnet20 32x32", 256): 0.40, ("resnet50 224x224", 64): 2.48, ("resnet50 224x224", 256): 8.05,
    ("timm vit_b16 224x224", 256): 14.9,
}  # fmt: skip
TIMES_AS_FAST = {("timm vit_b16 224x224", 32): 1.3}


def predictions(measured: dict[str, Any], source: str) -> dict[str, Any]:
    """Return a prediction for each figure of the table, with the arithmetic in words, and the bars.

    Args:
        measured: what was measured on 28 November 2026, before models recorded graphs by themselves.
        source: the name of its file.
    """
    rows = [row for found in (_whole(measured), _in_pieces(measured)) for row in found]
    of = {(row["network"], row["batch"], row["column"]): row["ms"] for row in rows}
    bars: list[dict[str, Any]] = [{"of": WITHIN}]
    for (network, batch), ms in MOST.items():
        ratios = {side: ms / of[network, batch, side] for side in ("captured_dense_ms", "captured_ideal_ms")}
        bars.append({"network": network, "batch": batch, "ms": ms, "of": ratios})
    for (network, batch), times in TIMES_AS_FAST.items():
        bars.append({"network": network, "batch": batch, "of": {"captured_dense_ms": 1 / times}})
    about = {key: measured[key] for key in ("device", "torch", "commit")}
    return {"source": source, **about, "rows": rows, "bars": bars}


def _whole(measured: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield predictions for networks that are one graph: as measured, less what pooling took in the router."""
    router = _router_ms(measured)
    for row in measured["model"]:
        network, batch = row["network"], row["batch"]
        columns = [f"{side}_ms" for side in EAGER] + [f"captured_{side}_ms" for side in EAGER[:3]]
        yield from (_row(network, batch, column, row[column], "as measured") for column in columns)
        count = POINTS[network]
        whole = row["captured_routed_ms"] + count * router
        how = f"the walk as measured, and {count} points of {1e3 * router:.1f} us, the router on the smallest maps"
        yield _row(network, batch, "captured_with_router_ms", whole, how)
        yield _row(network, batch, "replayed_ms", whole + CALL_MS, f"{how}; {1e3 * CALL_MS:.0f} us around the replay")


def _in_pieces(measured: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield predictions for networks of others: the ideal, rounded up to recorded sizes, with waits and moves."""
    found, router = {(row["net"], row["batch"]): row for row in measured["vision"]}, _router_ms(measured)
    for network, pieces in PIECES.items():
        largest = max(batch for net, batch in found if net == pieces.measured)
        row = found[pieces.measured, largest]
        for batch in pieces.batches:
            share, kept = batch / largest, pieces.ideal is None
            dense = share * row["dense"]
            yield _row(network, batch, "captured_dense_ms", dense, f"eager at batch {largest}, a row")
            ideal = share * row["ideal"] if pieces.ideal is None else pieces.ideal * dense
            how = f"eager at batch {largest}, a row" if kept else f"{pieces.ideal} of the dense network, a guess"
            yield _row(network, batch, "captured_ideal_ms", ideal, how)
            over = (batch / STEPS - 1) / batch
            moved = READS * pieces.row_bytes * batch / BYTES_A_MS
            at_points = pieces.points * (WAIT_MS + router)
            how = (
                f"the ideal on {over:.1%} more rows, {pieces.points} points of {1e3 * (WAIT_MS + router):.1f} us (wait "
                f"and router), {READS} passes over the features at 4 TB/s ({moved:.2f} ms), {1e3 * CALL_MS:.0f} us "
                "around it"
            )
            yield _row(network, batch, "replayed_ms", ideal * (1 + over) + at_points + moved + CALL_MS, how)
            if kept and (pieces.measured, batch) in found:
                same = found[pieces.measured, batch]
                yield from (_row(network, batch, f"{side}_ms", same[side], "as measured") for side in EAGER)


def _router_ms(measured: dict[str, Any]) -> float:
    """Return what the router takes a point where maps are smallest, so that pooling reads next to nothing."""
    network, batch = "resnet20 32x32", 64
    row = next(row for row in measured["model"] if (row["network"], row["batch"]) == (network, batch))
    return (row["captured_with_router_ms"] - row["captured_routed_ms"]) / POINTS[network]


def _row(network: str, batch: int, column: str, ms: float, how: str) -> dict[str, Any]:
    return {"network": network, "batch": batch, "column": column, "ms": round(ms, 4), "how": how}


def judged(row: dict[str, Any], predicted: dict[str, Any], device: str) -> dict[str, Any]:
    """Return a measured row of the table with the predictions for its figures, and with the bars and if they hold.

    A bar holds for what `model(x)` takes. It is None if that was not measured.
    """
    mine = {bar["column"]: bar["ms"] for bar in predicted["rows"] if _same(bar, row)}
    bars = []
    for bar in predicted["bars"]:
        if not _same(bar, row):
            continue
        if "ms" in bar and device == predicted["device"]:
            most, says = bar["ms"], f"at most {bar['ms']} ms"
        else:
            sides = [None if row.get(side) is None else ratio * row[side] for side, ratio in bar["of"].items()]
            most = None if None in sides else min(side for side in sides if side is not None)
            says = " and ".join(f"at most {ratio:.3f} of {side}" for side, ratio in bar["of"].items())
        took = row.get("replayed_ms")
        bars.append({"bar": says, "most_ms": most, "holds": None if None in (most, took) else took <= most})
    return row | {"predicted": mine, "bars": bars}


def _same(one: dict[str, Any], row: dict[str, Any]) -> bool:
    """Tell whether a prediction or a bar is of this row; a bar that names no network is of all rows."""
    return all(one.get(key, row[key]) == row[key] for key in ("network", "batch"))


if __name__ == "__main__":
    given, out = map(Path, sys.argv[1:])
    out.write_text(json.dumps(predictions(json.loads(given.read_text()), given.name), indent=1) + "\n")
