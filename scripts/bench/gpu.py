"""These are the parts of `scripts/gpu_check.py`, which run in a tree laid out as a wheel installs it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SECONDS = 460  # the time for all parts; parts that would begin later are left out and named
TESTS = ("tests/test_kernels.py", "tests/test_ops.py", "tests/test_capture.py")
IMPORTS = (
    "from dynrl.scripts.bench.env import bench_env; from dynrl.scripts.bench.model import bench_model; "
    "from dynrl.scripts.bench.ops import bench_ops; "
)
WARMING = 200
PARTS = {
    "model bfloat16": "bench_model('cuda', 'bfloat16', rounds=10)",
    "ops bfloat16": "bench_ops('cuda', 'bfloat16', 0.1, batches=(64, 256))",
    "env": "bench_env(3, counts=(256, 4096), device='cuda')",
    "env resnet50": "bench_env(3, ('resnet50 224x224',), (64,), 'cuda', 'bfloat16')",
    "ops float32": "bench_ops('cuda', 'float32', 0.1, batches=(64, 256))",
    "ops bfloat16, small": "bench_ops('cuda', 'bfloat16', 0.1, batches=(1, 8))",
}
TRAINERS = {"ray": "ppo", "stable_baselines3": "sb3-ppo"}  # the agent of each package, the better one first


class Check:
    """A check keeps the time that is left and the results so far, in `result`. It runs in the present folder.

    Args:
        out: the file to write.
        commit: the commit of the sources.
        command: the command line that was typed.
    """

    def __init__(self, out: Path, commit: str, command: str) -> None:
        import torch

        self.began, self.out, self.commit = time.monotonic(), out, commit
        self.result: dict[str, Any] = {
            "device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
            "triton": __import__("triton").__version__, "python": sys.version.split()[0], "commit": self.commit,
            "command": command, "date": time.strftime("%Y-%m-%d"), "left_out": [], "failed": {}, "rows": [],
        }  # fmt: skip

    def passed(self) -> float:
        """Return the seconds since the check began."""
        return time.monotonic() - self.began

    def write(self) -> None:
        """Write the results so far."""
        aside = self.out.with_suffix(".part")
        aside.write_text(json.dumps(self.result, indent=1))
        aside.replace(self.out)

    def call(self, *command: str) -> tuple[int, str]:
        """Run Python in the tree, and return its exit status and its output."""
        try:
            done = subprocess.run(
                [sys.executable, *command], check=False, text=True,
                timeout=max(SECONDS - self.passed(), 1), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            return done.returncode, done.stdout
        except subprocess.TimeoutExpired as error:
            return 124, (error.stdout or b"").decode(errors="replace")

    def tests(self) -> int:
        """Run the tests while all benchmarks warm up; return the exit status of the tests."""
        warming = [
            subprocess.Popen(
                [sys.executable, "-c", IMPORTS + code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            for code in PARTS.values()
        ]  # fmt: skip
        status, log = self.call("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *TESTS)
        self.result["tests"] = {"status": status, "seconds": self.passed(), "log": log[-6000:]}
        print(log[-3000:], flush=True)
        self.write()
        for process in warming:
            try:
                process.wait(max(WARMING - self.passed(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return status

    def bench(self, name: str, code: str) -> None:
        """Run one part, if there is time left."""
        if SECONDS - self.passed() < 20:
            self.result["left_out"].append(name)
            return
        rows = Path("rows.json")
        ending = f"; import json; json.dump(rows, open({str(rows)!r}, 'w'))"
        status, log = self.call("-c", f"{IMPORTS}rows = {code}{ending}")
        if status:
            self.result["failed"][name] = log[-4000:]
        else:
            self.result["rows"] += [row | {"commit": self.commit} for row in json.loads(rows.read_text())]
        print(log[-2500:], flush=True)
        self.write()

    def train(self) -> None:
        """Train a policy, if there are an agent and time left."""
        agent = next((TRAINERS[name] for name in TRAINERS if importlib.util.find_spec(name)), None)
        if agent is None or SECONDS - self.passed() < 60:
            self.result["left_out"].append("train")
            return
        start = time.monotonic()
        words = ("train", "skip", "--data", "digits", "--agent", agent, "--device", "cuda", "--out", "run")
        status, log = self.call("-m", "dynrl.scripts.cli", *words)
        seconds = time.monotonic() - start
        self.result["training"] = {"words": words, "status": status, "seconds": seconds, "log": log[-6000:]}
        print(log[-2500:], flush=True)


def main(out: str, commit: str, command: str) -> int:
    """Run all parts; the exit status is that of the tests."""
    check = Check(Path(out), commit, command)
    status = check.tests()
    for name, code in PARTS.items():
        check.bench(name, code)
    check.train()
    check.write()
    left_out = check.result["left_out"] or "nothing"
    print(f"written to {check.out} after {check.passed():.0f} s; left out: {left_out}")
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
