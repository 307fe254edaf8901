"""All that only a GPU can show, in one call under eight minutes: `python scripts/gpu_check.py OUT.json`.

Runs on a bare GPU machine from a checkout: torch, triton, numpy, safetensors and pytest, nothing of this project
installed. Parts in order: the kernel, op and capture tests on CUDA, while all benchmarks run at once to fill Triton's
cache (compiling takes most of the time, and one core each); then, one after the other, `bench model`, `bench ops` and
`bench env` and a policy trained on digits with its backbone on the GPU. With gymnasium `bench env` goes through the
environment, too, and with ray through RLlib; training takes tensorboard, tyro and matplotlib, and ray or
stable-baselines3. What is left out is named. The file is written anew after each part: a call cut short keeps what it
has.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 460  # for all of it; what would begin later is left out, and named so
NEEDED = ("torch", "triton", "numpy", "safetensors", "pytest")
TESTS = ("tests/test_kernels.py", "tests/test_ops.py", "tests/test_capture.py")
IMPORTS = (
    "from dynrl.scripts.bench_env import bench_env; from dynrl.scripts.bench_model import bench_model; "
    "from dynrl.scripts.bench_ops import bench_ops; "
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


def lay_out(folder: Path) -> None:
    """The package as a wheel would install it (folders at the top level are mapped below `dynrl`), and its tests."""
    shutil.copytree(ROOT / "dynrl", folder / "dynrl")
    for name in ("envs", "policies", "agents", "scripts"):
        shutil.copytree(ROOT / name, folder / "dynrl" / name)
    shutil.copytree(ROOT / "tests", folder / "tests")
    shutil.copy(ROOT / "pyproject.toml", folder)


def main() -> int:
    """Run all parts; the exit status is that of the tests."""
    if len(sys.argv) != 2:
        print("usage: python scripts/gpu_check.py OUT.json", file=sys.stderr)
        return 2
    import importlib.util

    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"gpu_check: needs {', '.join(missing)}; install them, or bring their wheels", file=sys.stderr)
        return 2
    import torch

    if not torch.cuda.is_available():
        print("gpu_check: torch finds no CUDA device here; run it on a GPU machine", file=sys.stderr)
        return 2
    began, out = time.monotonic(), Path(sys.argv[1])
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    result: dict[str, object] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "triton": __import__("triton").__version__, "python": sys.version.split()[0], "commit": commit.strip(),
        "command": " ".join(sys.argv), "date": time.strftime("%Y-%m-%d"), "left_out": [],
        "failed": {}, "rows": [],
    }  # fmt: skip

    def write() -> None:
        aside = out.with_suffix(".part")
        aside.write_text(json.dumps(result, indent=1))
        aside.replace(out)

    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder))
        environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}

        def left() -> float:
            return SECONDS - (time.monotonic() - began)

        def call(*command: str) -> tuple[int, str]:
            try:
                done = subprocess.run(
                    [sys.executable, *command], cwd=folder, env=environment, timeout=max(left(), 1), text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
                )  # fmt: skip
                return done.returncode, done.stdout
            except subprocess.TimeoutExpired as error:
                return 124, (error.stdout or b"").decode(errors="replace")

        warming = [
            subprocess.Popen(
                [sys.executable, "-c", IMPORTS + code], cwd=folder, env=environment, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for code in PARTS.values()
        ]  # fmt: skip
        status, log = call("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *TESTS)
        result["tests"] = {"status": status, "seconds": time.monotonic() - began, "log": log[-6000:]}
        print(log[-3000:], flush=True)
        write()
        for process in warming:
            try:
                process.wait(max(WARMING - (time.monotonic() - began), 0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for name, code in PARTS.items():
            if left() < 20:
                result["left_out"].append(name)  # type: ignore[attr-defined]
                continue
            rows = Path(folder) / "rows.json"
            ending = f"; import json; json.dump(rows, open({str(rows)!r}, 'w'))"
            code_status, log = call("-c", f"{IMPORTS}rows = {code}{ending}")
            if code_status:
                result["failed"][name] = log[-4000:]  # type: ignore[index]
            else:
                found = [row | {"commit": commit.strip()} for row in json.loads(rows.read_text())]
                result["rows"] += found  # type: ignore[operator]
            print(log[-2500:], flush=True)
            write()
        agent = next((TRAINERS[name] for name in TRAINERS if importlib.util.find_spec(name)), None)
        if agent is None or left() < 60:
            result["left_out"].append("train")  # type: ignore[attr-defined]
        else:
            start = time.monotonic()
            words = ("train", "skip", "--data", "digits", "--agent", agent, "--device", "cuda", "--out", "run")
            code_status, log = call("-m", "dynrl.scripts.cli", *words)
            result["training"] = {
                "words": words, "status": code_status, "seconds": time.monotonic() - start, "log": log[-6000:]
            }  # fmt: skip
            print(log[-2500:], flush=True)
    write()
    print(f"written to {out} after {time.monotonic() - began:.0f} s; left out: {result['left_out'] or 'nothing'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
