"""Run folders are loaded as routed models, and so are the small models that come with the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from dynrl.backbones import load_backbone
from dynrl.deploy.routed import RoutedModel, plug
from dynrl.files import fingerprint, read_json, reading
from dynrl.machine import hardware
from dynrl.plugins import find_again
from dynrl.policies.files import check_curve
from dynrl.schema import parse

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
        ValueError: there is no such folder or model, it has no policy yet, or its files are damaged or do not belong
            together.
    """
    run = Path(run)
    if not run.is_dir() and str(run) in shipped():
        run = SHIPPED / run
    check_policy(run)
    if not any(run.glob("*.safetensors")):
        raise ValueError(f"{run} is no run folder, nor one of the models that come with dynrl: {shipped()}")
    find_again(run)
    backbone, _ = load_backbone(run / "backbone.safetensors")
    model = plug(backbone, run / "policy.safetensors")
    if (run / LATENCY).is_file():
        model.latency = _times_of_here(run / LATENCY, model)
    return model


def check_policy(folder: Path) -> None:
    """Refuse, with a ValueError that says what to do, a folder of dynrl that holds no policy yet."""
    file = folder / "config.json"
    if (folder / "policy.safetensors").is_file() or not file.is_file():
        return
    config = read_json(file)
    problem = config.get("problem") if isinstance(config, dict) else None
    if not isinstance(problem, dict):
        return  # it is none of dynrl, which the caller tells
    train, here = f"dynrl train {quote(str(problem.get('decision')))}", quote(str(folder))
    if "plain" in config:
        raise ValueError(f"{folder} is from dynrl pretrain, it holds no policy; train one: {train} --backbone {here}")
    raise ValueError(f"{folder} has no policy yet; go on with: {train} --resume {here}")


@dataclass(frozen=True)
class Latency:
    """The content of a latency.json.

    Attributes:
        curve: the price and the milliseconds of a batch at each price.
        batch_size: the number of rows of a batch.
        policy: the `policy_fingerprint` of the model that was timed.
        date: the day.
        hardware: the machine, as `dynrl.machine.hardware` describes it.
    """

    curve: tuple[tuple[float, float], ...]
    batch_size: int
    policy: str
    date: str
    hardware: dict[str, Any]


def _times_of_here(file: Path, model: RoutedModel) -> list[tuple[float, float]]:
    """Return what `dynrl calibrate` wrote to `file`, or nothing if it timed another policy or on another machine."""
    written, here = read_json(file), hardware()
    with reading(file, "file of dynrl calibrate"):
        times = parse(Latency, written)
        if times.policy != policy_fingerprint(model):
            return []
        assert model.price_range is not None, "only a policy that knows a price is loaded from a file"
        check_curve(times.curve, model.price_range)
        same = all(times.hardware.get(name) == here[name] for name in ("processor", "threads", "torch"))
        return list(times.curve) if same else []


def policy_fingerprint(model: RoutedModel) -> str:
    """Return a digest that tells whether a model's policy is the one that was timed."""
    return fingerprint(model.policy.state_dict(), model.curve)
