"""Run folders are loaded as routed models, and so are the small models that come with the package."""

from __future__ import annotations

from pathlib import Path

from dynrl.backbones import load_backbone
from dynrl.deploy.routed import RoutedModel, plug
from dynrl.files import fingerprint, read_json
from dynrl.machine import hardware

LATENCY = "latency.json"  # the file in a run folder that says how long a batch took, and on which machine

SHIPPED = Path(__file__).parents[1] / "pretrained"  # it has a folder for each model that comes with the package


def shipped() -> list[str]:
    """Return the names of the models that come with the package."""
    return sorted(file.parent.name for file in SHIPPED.glob("*/policy.safetensors"))


def load(run: str | Path) -> RoutedModel:
    """Load the routed model of a run folder, with the times of this machine if `dynrl calibrate` measured them.

    Args:
        run: a run folder, or the name of a model that comes with the package (`shipped`), such as "skip-digits".

    Raises:
        ValueError: there is no such folder or model, or its files are damaged or do not belong together.
    """
    run = Path(run)
    if not run.is_dir() and str(run) in shipped():
        run = SHIPPED / run
    if not run.is_dir():
        raise ValueError(f"{run} is no run folder, nor one of the models that come with dynrl: {shipped()}")
    backbone, _ = load_backbone(run / "backbone.safetensors")
    model = plug(backbone, run / "policy.safetensors")
    if (run / LATENCY).is_file():
        model.latency = _times_of_here(run / LATENCY, policy_fingerprint(model))
    return model


def _times_of_here(file: Path, policy: str) -> list[tuple[float, float]]:
    """Return what `dynrl calibrate` wrote to `file`, or nothing if it timed another policy or on another machine."""
    times, here = read_json(file), hardware()
    try:
        same = all(times["hardware"].get(name) == here[name] for name in ("processor", "threads", "torch"))
        curve = [(float(price), float(ms)) for price, ms in times["curve"]]
        return curve if same and times["policy"] == policy else []
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{file} is not what dynrl calibrate writes; run it again, or take the file away") from None


def policy_fingerprint(model: RoutedModel) -> str:
    """Return a digest that tells whether a model's policy is the one that was timed."""
    return fingerprint(model.policy.state_dict(), model.curve)
