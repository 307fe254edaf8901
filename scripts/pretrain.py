"""Train a backbone under random routes, so that every route works, and its plain twin on the full route only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro


@dataclass
class Args:
    """Settings of `dynrl pretrain`."""

    decision: Annotated[str, tyro.conf.Positional]
    """The decision the backbone poses; see `dynrl list`."""
    data: str | None = None
    """Data set, as of `dynrl train`; default: the decision's."""
    out: Path | None = None
    """Folder to make; the same command goes on with it after a kill. Default: runs/backbone-DECISION-DATA-TIME."""
    network: tuple[str, ...] = ()
    """Settings of the backbone that differ from the data set's defaults, each NAME=VALUE."""
    plain: bool = False
    """Only the plain network, trained on its full route: a smaller one to stand beside routed ones
    (`dynrl evaluate --smaller`)."""
    seed: int = 0
    """Seed of weights, order, augmentation and routes."""
    device: str = "cpu"
    """Where to train, `cuda` say."""
    threads: int | None = None
    """CPU threads; default: all available cores."""


def main(args: Args) -> None:
    """Write `backbone.safetensors` and `plain.safetensors`, or only the latter, into a new folder or one of before."""
    from dynrl.data import check_dataset, load_dataset
    from dynrl.envs import decision
    from dynrl.files import write_json
    from dynrl.recipes import defaults
    from dynrl.scripts.common import check_device, new_folder, use_threads

    data = check_dataset(args.data or decision(args.decision).data)
    row = defaults(args.decision, data).changed(args.network)
    row.build(load_dataset(data), args.seed)  # before the folder is made: what can be refused is refused
    check_device(args.device)
    use_threads(args.threads)
    settings = {name: value for name, value in asdict(args).items() if name not in ("out", "device", "threads")}
    settings |= {"data": data, "network": list(args.network)}
    if args.out is not None and args.out.exists():
        folder = args.out
        check_same(folder, settings)
    else:
        folder = new_folder(args.out, "backbone", args.decision, data)
        write_json(folder / "config.json", settings)
    pretrain_into(folder, args.decision, data, args.seed, args.network, plain_only=args.plain, device=args.device)
    print(
        f"{'plain network' if args.plain else 'backbone'}: {folder}/{'plain' if args.plain else 'backbone'}.safetensors"
    )


def check_same(folder: Path, settings: dict[str, Any]) -> None:
    """A ValueError for a folder that `dynrl pretrain` did not make by the same settings."""
    from dynrl.files import read_json

    kept = folder / "config.json"
    before = read_json(kept) if kept.is_file() else None
    if not isinstance(before, dict) or before.keys() != settings.keys():
        raise ValueError(f"{folder} exists, and is no folder of dynrl pretrain to go on with; choose another --out")
    if changed := [name for name, value in settings.items() if before[name] != value]:
        raise ValueError(f"{folder} was made by dynrl pretrain with another {', '.join(changed)}; choose another --out")


def pretrain_into(
    folder: Path,
    decision: str,
    data: str,
    seed: int,
    network: Sequence[str] = (),
    plain_only: bool = False,
    device: str = "cpu",
) -> None:
    """Make whichever of `plain.safetensors` and `backbone.safetensors` is missing in `folder`; resumable."""
    from dynrl.data import load_dataset
    from dynrl.pretraining import metric_at_rate, pretrain
    from dynrl.recipes import defaults

    row, dataset = defaults(decision, data).changed(network), load_dataset(data)
    for name, random_routes, label in (
        # The backbone last: where its file is there, both are, and a killed run knows what is left to do.
        ("plain", False, "training the plain network"),
        ("backbone", True, "pretraining under random routes"),
    ):
        path = folder / f"{name}.safetensors"
        if path.exists() or (random_routes and plain_only):
            continue
        backbone, checkpoint = row.build(dataset, seed), folder / "checkpoints" / f"{name}.pt"
        pretrain(
            backbone, dataset, row.pretraining, random_routes=random_routes, seed=seed,
            checkpoint=checkpoint, label=label, device=device,
        )  # fmt: skip
        value, metric = metric_at_rate(backbone, dataset.validation, None), dataset.task.metric
        backbone.save(
            path, data=data, mean=dataset.mean, deviation=dataset.deviation, seed=seed, random_routes=random_routes,
            **{f"validation_{metric}": value},
        )  # fmt: skip
        checkpoint.unlink(missing_ok=True)  # not before: what was trained must not be lost
        print(f"{name}: {metric} {value:.4g} on validation data, {backbone.dense_macs / 1e6:.1f} million MACs an input")


if __name__ == "__main__":
    from dynrl.scripts.cli import run

    run("pretrain")
