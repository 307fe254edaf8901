"""Train a plain network, then a backbone from its weights under random routes, so that every route works."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass
class Args:
    """Settings of `dynrl pretrain`."""

    decision: Annotated[str, tyro.conf.Positional]
    """The decision the backbone poses; see `dynrl list`."""
    data: str | None = None
    """Data set, as `dynrl train` takes it; default: the decision's."""
    out: Path | None = None
    """Folder to make; the same command goes on with it after a kill. Default: runs/backbone-DECISION-DATA-TIME."""
    network: tuple[str, ...] = ()
    """Settings of the backbone that differ from the data set's defaults, each NAME=VALUE."""
    plain: bool = False
    """Only train the plain network, as long as a backbone in all: one of a front of smaller ones that stands beside
    routed ones (`dynrl evaluate --smaller`)."""
    seed: int = 0
    """Seed of weights, order, augmentation and routes."""
    device: str = "cpu"
    """Where to train, `cuda` say."""
    threads: int | None = None
    """CPU threads; default: all available cores."""


def main(args: Args) -> None:
    """Write `backbone.safetensors` and `plain.safetensors`, or only the latter, into a new folder or one of before."""
    from dynrl.scripts.common import use_threads
    from dynrl.training import pretrain

    use_threads(args.threads)
    folder = pretrain(
        args.decision, args.data, out=args.out, plain=args.plain, device=args.device, network=args.network,
        seed=args.seed,
    )  # fmt: skip
    name, file = ("plain network", "plain") if args.plain else ("backbone", "backbone")
    print(f"{name}: {folder}/{file}.safetensors")


if __name__ == "__main__":
    from dynrl.scripts.cli import run

    run("pretrain")
