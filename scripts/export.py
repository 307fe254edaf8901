"""Write a run's routed model, at one budget, as a program that needs no dynrl: torch.export's, or ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass
class Args:
    """Settings of `dynrl export`."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    out: Path
    """File to write: *.pt2 (for torch alone) or *.onnx (for onnxruntime)."""
    budget: float = 0.5
    """Share of the dense MACs, on average; it is fixed in the file."""


def main(args: Args) -> None:
    """Plug, set the budget, export."""
    from dynrl.deploy import load

    model = load(args.run)
    model.set_budget(args.budget)
    model.export(args.out)
    shape = ", ".join(map(str, model.input_shape))
    print(f"{args.out}: inputs [batch, {shape}] to outputs, at {args.budget} of the dense MACs")


if __name__ == "__main__":
    from dynrl.scripts.cli import run

    run("export")
