"""Attack what a run's routed model saves, and say what is left, as `attack.json`, `attack.png` and a table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass
class Args:
    """These are the settings of `dynrl attack`."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    out: Path | None = None
    """The folder for attack.json and attack.png; by default, the run folder."""
    budget: float = 0.5
    """The share of the dense MACs that the model is asked to spend on average."""
    price: float | None = None
    """The price of compute in place of a budget."""
    epsilon: float | None = None
    """How far each number of an input may change, in raw units: of pixels in 0 to 1, or of what other data hold. By
    default, 8/255 of their range."""
    steps: int = 40
    """The gradient steps of an attack."""
    limit: float | None = 0.6
    """The most that one input may spend in the second half of the table, as a share of the dense MACs; None leaves that
    half out."""
    rows: int = 1000
    """How many inputs of the test split are taken."""
    data: str | None = None
    """Where the run's data are now, if they have moved."""
    device: str = "cpu"
    """The device on which networks run: cpu or cuda."""
    threads: int | None = None
    """The number of CPU threads; by default, all available cores."""


def main(args: Args) -> None:
    """Attack the run, and print the table."""
    from dynrl.evaluation import attack, attack_text
    from dynrl.scripts.common import use_threads

    use_threads(args.threads)
    out = args.out or args.run
    report = attack(
        args.run, out=out, budget=args.budget, price=args.price, epsilon=args.epsilon, steps=args.steps,
        limit=args.limit, rows=args.rows, data=args.data, device=args.device, show=True,
    )  # fmt: skip
    picture = out / "attack.png"
    print(f"\n{attack_text(report)}" + (f"\npicture: {picture}" if picture.is_file() else ""))


if __name__ == "__main__":
    from dynrl.scripts.cli import run

    run("attack")
