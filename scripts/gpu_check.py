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
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "triton", "numpy", "safetensors", "pytest")


def refusal(words: list[str]) -> str | None:
    """Why the check cannot run here, if so."""
    if len(words) != 1:
        return "usage: python scripts/gpu_check.py OUT.json"
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return f"gpu_check: needs {', '.join(missing)}; install them, or bring their wheels"
    import torch

    return None if torch.cuda.is_available() else "gpu_check: torch finds no CUDA device; run it on a GPU machine"


def main() -> int:
    """Lay the sources out in a folder of their own, and run `scripts/bench/gpu.py` there."""
    if reason := refusal(sys.argv[1:]):
        print(reason, file=sys.stderr)
        return 2
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, ROOT / "scripts" / "lay_out.py", folder], check=True)
        out = str(Path(sys.argv[1]).resolve())
        command = [sys.executable, "-m", "dynrl.scripts.bench.gpu", out, git.stdout.strip(), " ".join(sys.argv)]
        environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        return subprocess.run(command, cwd=folder, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
