"""`python scripts/gpu_check.py OUT.json` checks all that only a GPU can show, in under eight minutes.

It runs on a bare GPU machine from a checkout: torch, triton, numpy, safetensors and pytest, nothing of this project
installed. The parts come in order: the kernel, op and capture tests on CUDA, while all benchmarks run at once to fill
Triton's cache (compiling takes most of the time, and one core each); then, one after the other, `bench model`,
`bench ops` and `bench env`, and a policy trained on digits with its backbone on the GPU. With gymnasium `bench env`
goes through the environment, too, and with ray through RLlib; training takes tensorboard, tyro and matplotlib, and ray
or stable-baselines3. What is left out is named. The file is written anew after each part: a call that is cut short
keeps what it has.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 460  # for all of it; what would begin later is left out, and named so
NEEDED = ("torch", "triton", "numpy", "safetensors", "pytest")
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
TRAINERS = {"ray": "ppo", "stable_baselines3": "sb3-ppo"}  # the agents of packages, the better one first


class Check:
    """A check has a tree that it runs in, a time that is left, and its finds, in `result`."""

    def __init__(self, out: Path, folder: Path) -> None:
        import torch

        self.began, self.out, self.folder = time.monotonic(), out, folder
        subprocess.run([sys.executable, ROOT / "scripts" / "lay_out.py", folder], check=True)
        self.environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        git = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        self.commit = git.stdout.strip()
        self.result: dict[str, Any] = {
            "device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
            "triton": __import__("triton").__version__, "python": sys.version.split()[0], "commit": self.commit,
            "command": " ".join(sys.argv), "date": time.strftime("%Y-%m-%d"), "left_out": [], "failed": {}, "rows": [],
        }  # fmt: skip

    def passed(self) -> float:
        """Return the seconds since it began."""
        return time.monotonic() - self.began

    def write(self) -> None:
        """Write the finds so far."""
        aside = self.out.with_suffix(".part")
        aside.write_text(json.dumps(self.result, indent=1))
        aside.replace(self.out)

    def call(self, *command: str) -> tuple[int, str]:
        """Run Python in the tree; return its exit status, and what it printed."""
        try:
            done = subprocess.run(
                [sys.executable, *command], cwd=self.folder, env=self.environment, check=False, text=True,
                timeout=max(SECONDS - self.passed(), 1), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            return done.returncode, done.stdout
        except subprocess.TimeoutExpired as error:
            return 124, (error.stdout or b"").decode(errors="replace")

    def tests(self) -> int:
        """Run the tests while all benchmarks warm up; return the exit status of the tests."""
        warming = [
            subprocess.Popen(
                [sys.executable, "-c", IMPORTS + code], cwd=self.folder, env=self.environment,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
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
        """Run one part, if there is time."""
        if SECONDS - self.passed() < 20:
            self.result["left_out"].append(name)
            return
        rows = self.folder / "rows.json"
        ending = f"; import json; json.dump(rows, open({str(rows)!r}, 'w'))"
        status, log = self.call("-c", f"{IMPORTS}rows = {code}{ending}")
        if status:
            self.result["failed"][name] = log[-4000:]
        else:
            self.result["rows"] += [row | {"commit": self.commit} for row in json.loads(rows.read_text())]
        print(log[-2500:], flush=True)
        self.write()

    def train(self) -> None:
        """Train a policy, if there is an agent and time."""
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


def refusal(words: list[str]) -> str | None:
    """Tell why the check cannot run here, if so."""
    if len(words) != 1:
        return "usage: python scripts/gpu_check.py OUT.json"
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return f"gpu_check: needs {', '.join(missing)}; install them, or bring their wheels"
    import torch

    return None if torch.cuda.is_available() else "gpu_check: torch finds no CUDA device; run it on a GPU machine"


def main() -> int:
    """Run all parts; return the exit status of the tests."""
    if reason := refusal(sys.argv[1:]):
        print(reason, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        check = Check(Path(sys.argv[1]), Path(folder))
        status = check.tests()
        for name, code in PARTS.items():
            check.bench(name, code)
        check.train()
        check.write()
        left_out = check.result["left_out"] or "nothing"
        print(f"written to {check.out} after {check.passed():.0f} s; left out: {left_out}")
    return status


if __name__ == "__main__":
    sys.exit(main())
