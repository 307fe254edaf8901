"""Time a run's routed model on this machine, so that budgets may be given in milliseconds."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated

import tyro


@dataclass
class Args:
    """These are the settings of `dynrl calibrate`."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder; latency.json is written into it."""
    batch_size: int = 256
    """The batch size that the model will be used with."""
    threads: int | None = None
    """The number of CPU threads that the model will be used with; by default, all available cores."""
    data: str | None = None
    """Where the run's data are now, if they have moved."""


def main(args: Args) -> None:
    """Time a batch of validation data at each price that the policy was calibrated at."""
    from dynrl.deploy import policy_fingerprint
    from dynrl.evaluation import calibrate_latency, is_deaf
    from dynrl.files import write_json, writing_into
    from dynrl.machine import hardware
    from dynrl.runs import RunFolder
    from dynrl.scripts.common import use_threads

    use_threads(args.threads)
    run = RunFolder(args.run)
    _ = run.config  # a folder that holds no run is refused here, with the reason
    with writing_into(run.path):
        model = run.model
        if len(model.curve) < 2:
            raise ValueError(
                f"{run} has no calibrated budgets, because it was trained at one price; train it over a price range"
            )
        inputs = run.dataset(args.data).seen_by(run.backbone.known).validation.inputs
        curve = calibrate_latency(model, inputs, args.batch_size)
        write_json(
            run.latency_file,
            {
                "curve": curve, "batch_size": args.batch_size, "policy": policy_fingerprint(model),
                "date": f"{date.today()}", "hardware": hardware(),
            },
        )  # fmt: skip
    slow, fast = curve[0][1], curve[-1][1]
    if is_deaf(model):
        print(
            f"{run.latency_file}: a batch of {args.batch_size} takes {(fast + slow) / 2:.1f} ms at every price, since "
            "the price changes nothing; train for more steps, or over a wider --price-range"
        )
        return
    print(f"{run.latency_file}: a batch of {args.batch_size} takes {fast:.1f} to {slow:.1f} ms")
    print(f"use it:  model = dynrl.load({str(run)!r}); model.set_milliseconds({(fast + slow) / 2:.1f})")


if __name__ == "__main__":
    from dynrl.scripts.cli import run

    run("calibrate")
