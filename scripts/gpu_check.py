"""`python scripts/gpu_check.py OUT.json` checks everything that needs a GPU, in under eight minutes.

It runs on a bare GPU machine from a checkout. It needs torch, triton, numpy, safetensors, greenlet, pytest and
pytest-xdist, but no install of this project. First, the kernel, op, capture and graph tests run on CUDA, and beside
them all benchmarks once to fill Triton's cache, because compiling takes most of the time; each process has a core. Then
the table of whole networks is measured, the most important ones first, then ops and sampling, and a policy is trained
on digits with its backbone on the GPU. Networks of timm and torchvision need these. With gymnasium, `bench env` also
measures the environment, and with ray also RLlib. Training needs tensorboard, tyro and matplotlib, and ray or
stable-baselines3. What is left out is named.

Each part has so many seconds. What it has measured by then is kept, and the file is written again whenever a network or
an op is done, so a call that is cut short keeps what it has. Beside each figure of the table stands what was predicted
(`results/gpu-predicted-*.json`), and whether the bars hold that were set for it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "triton", "numpy", "safetensors", "greenlet", "pytest", "xdist")


def refusal(words: list[str]) -> str | None:
    """Return the reason why the check cannot run here, or None if it can."""
    if len(words) != 1:
        return "usage: python scripts/gpu_check.py OUT.json"
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return f"gpu_check: needs {', '.join(missing)}; install them, or bring their wheels"
    import torch

    return None if torch.cuda.is_available() else "gpu_check: torch finds no CUDA device; run it on a GPU machine"


def main() -> int:
    """Lay the sources out in a temporary folder, and run `scripts/bench/gpu.py` there."""
    if reason := refusal(sys.argv[1:]):
        print(reason, file=sys.stderr)
        return 2
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, ROOT / "scripts" / "lay_out.py", folder], check=True)
        out = str(Path(sys.argv[1]).resolve())
        predicted = str(max((ROOT / "results").glob("gpu-predicted-*.json")))
        command = [
            sys.executable, "-m", "dynrl.scripts.bench.gpu", out, git.stdout.strip(), " ".join(sys.argv), predicted
        ]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        return subprocess.run(command, cwd=folder, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
