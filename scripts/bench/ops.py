"""`dynrl bench ops` measures the ops against their ideals. It needs only torch, and triton on CUDA."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dynrl.evaluation import captured, medians_in_turn
from dynrl.scripts.bench import Keep, forget
from dynrl.scripts.bench.op_cases import FAMILIES, Case, Side, small_cases
from dynrl.scripts.bench.op_cases import KEPT as KEPT

REPEATS = 20  # the number of calls in one CUDA graph
PASSES = 3
BATCHES = (1, 8, 64, 256)


def check(case: Case, dtype: torch.dtype) -> None:
    """Raise a RuntimeError if a case's op computes something other than its definition."""
    got, expected = (t.double() for t in case.check())
    error = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-9)) if got.numel() else 0.0
    limit = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}[dtype]
    if not error <= limit:
        raise RuntimeError(
            f"{case.op}, {case.shape}, batch {case.batch}, kept {case.kept}: expected the definition within "
            f"{limit:.0e} of the largest value, got an error of {error:.1e}. Wrong ops are not timed"
        )


def measure(cases: list[Case], device: torch.device, seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Time all sides of the cases of one shape and batch in turn, and return rows of milliseconds.

    Each round has a new order. There are at least `rounds` rounds, or half as many if a round takes seconds.
    """
    sides: dict[tuple[int, str], Side] = {}
    for i, case in enumerate(cases):
        shared = {f"dense {name}": side for name, side in case.dense.items()} if i == 0 else {}
        own = {"masked": case.masked, "indexed": case.indexed, "routed": case.routed}
        own |= {f"ideal {name}": side for name, side in case.ideal.items()}
        sides |= {(i, name): side for name, side in (shared | own).items() if side is not None}
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    if device.type == "cuda":
        sides = {name: captured(side, REPEATS) for name, side in sides.items() if name[1] != "indexed"}
    began = time.perf_counter()
    for side in sides.values():
        side()
    wait()
    once = time.perf_counter() - began
    rounds = min(200, max(rounds if once < 3 else rounds // 2, round(seconds / (2 * once))))
    medians = medians_in_turn(sides, rounds, wait=wait)
    if device.type == "cuda":
        medians = {name: value / REPEATS for name, value in medians.items()}

    def best(i: int, kind: str) -> float | None:
        return min((value for (j, name), value in medians.items() if j == i and name.startswith(kind)), default=None)

    rows = []
    for i, case in enumerate(cases):
        row: dict[str, Any] = {"op": case.op, "shape": case.shape, "batch": case.batch, "kept": case.kept}
        row |= {"routed_ms": medians[i, "routed"], "rounds": rounds}
        if case.ideal or case.dense:
            row |= {
                "dense_ms": best(0, "dense"), "masked_ms": medians.get((i, "masked")),
                "indexed_ms": medians.get((i, "indexed")),
                "ideal_ms": best(i, "ideal") or 0.0,  # if no row is kept, there is nothing to do
            }  # fmt: skip
        rows.append(row)
    return rows


@torch.inference_mode()
def bench_ops(
    device: str = "cpu",
    dtype: str = "float32",
    seconds: float = 1.5,
    ops: tuple[str, ...] = (),
    batches: tuple[int, ...] = BATCHES,
    keep: Keep = forget,
) -> list[dict[str, Any]]:
    """Measure all ops, or some of them, for `seconds` for each shape and batch, and return the rows, batch by batch.

    A CPU is timed in several passes over all cases, and the median of the passes counts: on a shared machine, a
    disturbance may last longer than all rounds of a shape.

    Args:
        keep: called with each row as soon as it is known; rows of the first of `batches` come first.

    Raises:
        RuntimeError: an op computes something other than its definition.
    """
    where, kind = torch.device(device), getattr(torch, dtype)
    unknown = set(ops) - set(FAMILIES)
    if unknown:
        raise ValueError(f"unknown ops {sorted(unknown)}; expected some of {sorted(FAMILIES)}")
    torch.backends.cudnn.benchmark = True  # dense layers run at their best
    passes = 1 if where.type == "cuda" else PASSES
    rounds, taken, found = 6 // passes, list[list[dict[str, Any]]](), list[dict[str, Any]]()
    for i in range(passes):
        torch.manual_seed(0)
        taken.append([])
        for cases, share in _jobs(ops, batches, where, kind):
            if i == 0:
                for case in cases:
                    check(case, kind)
            taken[i] += _show(measure(cases, where, share * seconds / passes, rounds))
            while i == passes - 1 and len(found) < len(taken[i]):
                over = [rows[len(found)] for rows in taken]
                found.append(_over_passes(over) | {"device": device, "dtype": dtype})
                keep(found[-1])
    return found


def _jobs(
    ops: tuple[str, ...], batches: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[list[Case], float]]:
    """Yield the cases of each shape and batch, with the share of the usual time that they are given."""
    for batch in batches:
        for op, (shapes, make) in FAMILIES.items():
            for shape in shapes if not ops or op in ops else ():
                yield list(make(shape, batch, device, dtype)), 1.0
        for case in () if ops else small_cases(batch, device, dtype):
            yield [case], 0.1


def _over_passes(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of each time over the passes, and the figures that follow from these."""
    row = dict(rows[0])
    for name in row:
        if name.endswith("_ms") and row[name] is not None:
            row[name] = statistics.median(r[name] for r in rows)
    if "ideal_ms" in row:
        row["realised_ratio"] = row["ideal_ms"] / row["routed_ms"]
        row["overhead_us"] = 1e3 * (row["routed_ms"] - row["ideal_ms"])
    return row | {"rounds": sum(r["rounds"] for r in rows)}


def _show(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row in rows:
        line = f"{row['op']:14} {row['shape']:20} batch {row['batch']:4} kept {row['kept'] or '':4} "
        line += f"routed {row['routed_ms']:8.3f} ms"
        if "ideal_ms" in row:
            dense = f"{row['dense_ms']:8.3f}" if row["dense_ms"] else "       -"
            line += f" ideal {row['ideal_ms']:8.3f} dense {dense} ratio {row['ideal_ms'] / row['routed_ms']:.3f}"
        print(line, flush=True)
    return rows


def summary(rows: list[dict[str, Any]], least_ms: float = 0.5) -> list[dict[str, Any]]:
    """Return how much of its ideal each op reaches, on average and at worst, and how often it is slower than dense.

    The means are geometric, over rows of batch 64 and more whose ideal takes `least_ms` and more. `clearly` counts rows
    that are slower by more than 5 % and more than 15 us. The ideal is replaced by dense where that is faster;
    otherwise, an op would look good where routing does not pay.
    """
    found = []
    for op in FAMILIES:
        mine = [r for r in rows if r["op"] == op]
        judged = [r for r in mine if r["batch"] >= 64 and r["ideal_ms"] >= least_ms]
        ratios = [min(r["ideal_ms"], r["dense_ms"] or math.inf) / r["routed_ms"] for r in judged]
        if ratios:
            dense = [(r["dense_ms"], r["routed_ms"]) for r in mine if r["dense_ms"]]
            found.append(
                {
                    "op": op, "rows": len(ratios), "geometric_mean": statistics.geometric_mean(ratios),
                    "worst": min(ratios), "slower_than_dense": sum(routed > ms for ms, routed in dense),
                    "clearly": sum(routed > ms + max(0.05 * ms, 0.015) for ms, routed in dense),
                    "with_dense": len(dense),
                }
            )  # fmt: skip
    return found
