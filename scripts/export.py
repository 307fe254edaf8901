"""Write a run's routed model, at one budget, as a program of torch.export or ONNX that needs no dynrl."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass
class Args:
    """These are the settings of `dynrl export`."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder, or the name of a model that comes with dynrl."""
    out: Path
    """The file to write: *.pt2 (for torch alone) or *.onnx (for onnxruntime)."""
    budget: float = 0.5
    """The share of the dense MACs to spend on average; it is fixed in the file."""


def main(args: Args) -> None:
    """Load the model, set the budget, and export."""
    from dynrl.deploy import load

    model = load(args.run)
    model.set_budget(args.budget)
    model.export(args.out)
    shape = ", ".join(map(str, model.input_shape))
    print(f"{args.out}: inputs [batch, {shape}] to outputs, at {args.budget} of the dense MACs")


if __name__ == "__main__":
    from dynrl.scripts.cli import run

    run("export")
