"""Run folders as routed models, and the small models that come with the package."""

from __future__ import annotations

from pathlib import Path

from dynrl.backbones import load_backbone
from dynrl.deploy.routed import RoutedModel, plug
from dynrl.files import fingerprint, read_json
from dynrl.machine import hardware

LATENCY = "latency.json"  # in a run: what a batch took on which machine

SHIPPED = Path(__file__).parents[1] / "pretrained"  # small models that come with the package, by name


def shipped() -> list[str]:
    """The names of the models that come with the package."""
    return sorted(file.parent.name for file in SHIPPED.glob("*/policy.safetensors"))


def load(run: str | Path) -> RoutedModel:
    """The routed model of a run folder: its backbone with its policy plugged in, and the times of this machine.

    Args:
        run: a folder, or the name of a model that comes with the package (`shipped`), such as "skip-digits".
    """
    run = Path(run)
    if not run.is_dir() and str(run) in shipped():
        run = SHIPPED / run
    if not run.is_dir():
        raise ValueError(f"{run} is no run folder, nor one of the models that come with dynrl: {shipped()}")
    backbone, _ = load_backbone(run / "backbone.safetensors")
    model = plug(backbone, run / "policy.safetensors")
    if (run / LATENCY).is_file():
        times = read_json(run / LATENCY)
        here, there = hardware(), times["hardware"]
        same = all(there.get(name) == here[name] for name in ("processor", "threads", "torch"))
        if same and times["policy"] == policy_fingerprint(model):
            model.latency = [(float(price), float(ms)) for price, ms in times["curve"]]
    return model


def policy_fingerprint(model: RoutedModel) -> str:
    """Tells whether a model's policy is the one that was timed."""
    return fingerprint(model.policy.state_dict(), model.curve)
