"""These are the parts of `scripts/gpu_check.py`, which run in a tree laid out as a wheel installs it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from dynrl.scripts.bench import Keep
from dynrl.scripts.bench.model import NETWORKS

SECONDS = 460  # the time for everything
WARMING = 120  # the time in which all tests run, and all parts once
LEAST = 15  # a part that would have less time is left out
TRAINING = 60
# The tests, with what chooses among those of a file: what runs on a CPU all the same is left out.
TESTS = {
    "tests/test_capture.py": (), "tests/test_graphs.py": ("-k", "a_device"), "tests/test_kernels.py": ("-n", "6"),
    "tests/test_ops.py": ("-n", "8"),
}  # fmt: skip
IMPORTS = (
    "from dynrl.scripts.bench.env import bench_env; from dynrl.scripts.bench.model import bench_model; "
    "from dynrl.scripts.bench.ops import bench_ops; "
)
TRAINERS = {"ray": "ppo", "stable_baselines3": "sb3-ppo"}  # the agent of each package, the better one first


@dataclass(frozen=True)
class Part:
    """A part is a call, in which `rounds` is how often each side is timed and `keep` takes each row as it comes.

    Attributes:
        call: the call, of a function that `IMPORTS` imports.
        seconds: the most that it may take.
        missing: a package that it needs and that is not here.
    """

    call: str
    seconds: float
    missing: str | None = None


# The order in which the networks of the table are measured: what is asked most of comes first.
ORDER = ("resnet20 32x32", "resnet50 224x224", "timm vit_b16 224x224")
TABLE = (*ORDER, *(name for name, network in NETWORKS.items() if network.cuda and name not in ORDER))
PARTS = {
    name: Part(f"bench_model('cuda', 'bfloat16', rounds, ({name!r},), keep=keep)", 55, NETWORKS[name].missing)
    for name in TABLE
} | {
    "ops bfloat16": Part("bench_ops('cuda', 'bfloat16', 0.1, batches=(256, 64), keep=keep)", 70),
    "env": Part("bench_env(min(rounds, 3), counts=(256, 4096), device='cuda', keep=keep)", 30),
    "env resnet50": Part("bench_env(min(rounds, 3), ('resnet50 224x224',), (64,), 'cuda', 'bfloat16', keep=keep)", 30),
    "env exits": Part("bench_env(min(rounds, 3), ('resnet20 28x28, exits',), (256, 4096), 'cuda', keep=keep)", 20),
    "ops float32": Part("bench_ops('cuda', 'float32', 0.1, batches=(256, 64), keep=keep)", 60),
    "ops bfloat16, small": Part("bench_ops('cuda', 'bfloat16', 0.1, batches=(1, 8), keep=keep)", 60),
}  # fmt: skip


def keeper(path: str) -> Keep:
    """Return a function that adds each row to a file at once: its process may be ended at any time."""

    def keep(row: dict[str, Any]) -> None:
        with open(path, "a") as out:
            out.write(f"{json.dumps(row, default=str)}\n")

    return keep


def machine() -> dict[str, Any]:
    """Return what is measured, and by which versions."""
    import torch

    return {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "triton": __import__("triton").__version__, "python": sys.version.split()[0],
    }  # fmt: skip


class Job:
    """A job is a process of its own that runs Python, with its output in a file."""

    def __init__(self, name: str, *command: str, **environment: str) -> None:
        self.began, self._log = monotonic(), Path(f"{name.replace('/', '-')}.log")
        with self._log.open("w") as out:
            self._process = subprocess.Popen(
                [sys.executable, *command], stdout=out, stderr=subprocess.STDOUT, env=os.environ | environment
            )

    def wait(self, until: float, look: Callable[[], None] = lambda: None) -> int:
        """Wait until that time at most, look around meanwhile, and return the exit status, 124 if it was ended."""
        while True:
            try:
                return self._process.wait(min(max(until - monotonic(), 0), 1))
            except subprocess.TimeoutExpired:
                if monotonic() >= until:
                    self._process.kill()
                    self._process.wait()
                    return 124
            finally:
                look()

    @property
    def log(self) -> str:
        """The output so far."""
        return self._log.read_text(errors="replace")


class Check:
    """A check keeps the time that is left and the results so far, in `result`. It runs in the present folder.

    Args:
        out: the file to write.
        commit: the commit of the sources.
        command: the command line that was typed.
        predicted: what the table is expected to show, and its bars (`results/gpu-predicted-DATE.json`).
    """

    def __init__(self, out: Path, commit: str, command: str, predicted: dict[str, Any]) -> None:
        self._end, self._out, self._predicted = monotonic() + SECONDS, out, predicted
        self.result: dict[str, Any] = {
            **machine(), "commit": commit, "command": command, "date": time.strftime("%Y-%m-%d"),
            "left_out": [], "cut": [], "failed": {}, "tests": {}, "rows": [],
        }  # fmt: skip

    def left(self) -> float:
        """Return the seconds that are left."""
        return self._end - monotonic()

    def write(self) -> None:
        """Write the results so far."""
        aside = self._out.with_suffix(".part")
        aside.write_text(json.dumps(self.result, indent=1))
        aside.replace(self._out)

    def warm_up(self) -> int:
        """Run all tests, and all parts once to fill Triton's cache, each on a core; return the status of a test that
        failed, or 0.

        Compiling takes most of the time, and what runs beside it cannot be timed, so tests run meanwhile.
        """
        until, alone = monotonic() + WARMING, {"OMP_NUM_THREADS": "1"}
        quick = IMPORTS + "rounds, keep = 1, lambda row: None; "
        pytest = ("-m", "pytest", "-q", "-rsf", "--tb=short", "-p", "no:cacheprovider")
        tests = {name: Job(name, *pytest, name, *words, **alone) for name, words in TESTS.items()}
        parts = [
            Job(f"warm {name}", "-c", quick + part.call, **alone) for name, part in PARTS.items() if not part.missing
        ]
        for name, job in tests.items():
            self.result["tests"][name] = {"status": job.wait(until), "log": job.log[-6000:]}
            print(job.log[-1500:], flush=True)
            self.write()
        for job in parts:
            job.wait(until)
        self.result["warm_up_seconds"] = SECONDS - self.left()
        return next((found["status"] for found in self.result["tests"].values() if found["status"]), 0)

    def bench(self, name: str, part: Part) -> None:
        """Run one part, if there is time left for it; rows are written as they come."""
        if part.missing or self.left() < LEAST:
            self.result["left_out"].append(f"{name}: {part.missing} is missing" if part.missing else name)
            return
        rows, seen = Path(f"{name}.rows"), 0
        rows.touch()

        def look() -> None:
            nonlocal seen
            done = [line for line in rows.read_text().splitlines(keepends=True) if line.endswith("\n")]
            for line in done[seen:]:
                self.result["rows"].append(self._row(json.loads(line)))
            if len(done) > seen:
                seen = len(done)
                self.write()

        kept = f"from dynrl.scripts.bench.gpu import keeper; rounds, keep = 10, keeper({str(rows)!r}); "
        job = Job(name, "-c", IMPORTS + kept + part.call)
        status = job.wait(monotonic() + min(part.seconds, self.left()), look)
        if status == 124:
            self.result["cut"].append(f"{name}, after {monotonic() - job.began:.0f} s and {seen} rows")
        elif status:
            self.result["failed"][name] = job.log[-4000:]
        print(job.log[-2500:], flush=True)
        self.write()

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        row["commit"] = self.result["commit"]
        return judged(row, self._predicted, self.result["device"]) if "with_router_ms" in row else row

    def train(self) -> None:
        """Train a policy, if there are an agent and time left."""
        agent = next((TRAINERS[name] for name in TRAINERS if importlib.util.find_spec(name)), None)
        if agent is None or self.left() < TRAINING:
            self.result["left_out"].append("train")
            return
        words = ("train", "skip", "--data", "digits", "--agent", agent, "--device", "cuda", "--out", "run")
        job = Job("train", "-m", "dynrl.scripts.cli", *words)
        status = job.wait(monotonic() + self.left())
        seconds = monotonic() - job.began
        self.result["training"] = {"words": words, "status": status, "seconds": seconds, "log": job.log[-6000:]}
        print(job.log[-2500:], flush=True)


def bars(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line for each bar: what was measured, the most that it may be, and whether it holds."""
    said = {True: "holds", False: "FAILS", None: "not measured"}
    return [
        f"{row['network']}, batch {row['batch']}: {row.get('replayed_ms')} ms, predicted "
        f"{row['predicted'].get('replayed_ms')}; {bar['bar']} ({bar['most_ms']} ms): {said[bar['holds']]}"
        for row in rows for bar in row.get("bars", ())
    ]  # fmt: skip


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


def main(out: str, commit: str, command: str, predicted: str) -> int:
    """Run all parts; the exit status is that of the tests."""
    check = Check(Path(out), commit, command, json.loads(Path(predicted).read_text()))
    status = check.warm_up()
    for name, part in PARTS.items():
        check.bench(name, part)
    check.train()
    check.result["seconds"] = SECONDS - check.left()
    check.write()
    print(*bars(check.result["rows"]), sep="\n")
    print(*(f"{name.replace('_', ' ')}: {check.result[name] or 'nothing'}" for name in ("left_out", "cut")), sep="\n")
    print(f"failed: {sorted(check.result['failed']) or 'nothing'}")
    print(f"written to {out} after {check.result['seconds']:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
