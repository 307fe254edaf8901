"""Train a plain network, then a backbone from its weights under random routes, so that every route works."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass
class Args:
    """These are the settings of `dynrl pretrain`."""

    decision: Annotated[str, tyro.conf.Positional]
    """The decision that the backbone poses; `dynrl list` shows all of them."""
    data: str | None = None
    """The data set, as in `dynrl train`; by default, the decision's own."""
    out: Path | None = None
    """The folder to make; after a kill, the same command continues in it. Default: runs/backbone-DECISION-DATA-TIME."""
    network: tuple[str, ...] = ()
    """Settings of the backbone that differ from the data set's defaults, each NAME=VALUE."""
    epochs: int | None = None
    """The epochs of the plain network and of the backbone; by default, as many as suit the data."""
    plain: tyro.conf.FlagCreatePairsOff[bool] = False  # `--no-plain` means something else in dynrl train
    """Only train the plain network, as long as a backbone in all: one of a front of smaller ones that stands beside
    routed ones (`dynrl evaluate --smaller`)."""
    finetune: bool = False
    """With --plain: train as long as a backbone that is fine-tuned, too."""
    seed: int = 0
    """The seed of weights, order, augmentation and routes."""
    device: str = "cpu"
    """The device to train on, for example cuda."""
    threads: int | None = None
    """The number of CPU threads; by default, all available cores."""


def main(args: Args) -> None:
    """Train, and write `backbone.safetensors` and `plain.safetensors`, or only the latter, into a folder."""
    from dynrl.scripts.common import use_threads
    from dynrl.training import pretrain

    use_threads(args.threads)
    folder = pretrain(
        args.decision, args.data, out=args.out, plain=args.plain, finetune=args.finetune,
        device=args.device, network=args.network, epochs=args.epochs, seed=args.seed,
    )  # fmt: skip
    name, file = ("plain network", "plain") if args.plain else ("backbone", "backbone")
    print(f"{name}: {folder}/{file}.safetensors")


if __name__ == "__main__":
    from dynrl.scripts.cli import run

    run("pretrain")
