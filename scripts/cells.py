"""The runs that `dynrl compare` trains, the cells of a matrix, are planned and made here."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynrl.plans import plan, plan_again
from dynrl.runs import RunFolder, check_one_backbone, price_word, steps_beside

if TYPE_CHECKING:
    from dynrl.scripts.compare import Args

TUNED = "-tuned"  # ends the names of plain networks that trained as long as tuned backbones


def check(args: Args, matrix: list[tuple[Path, str, str]]) -> None:
    """Refuse, before hours of training, what any cell would; `matrix` holds each (folder, decision, data set)."""
    from dynrl.data import load_dataset
    from dynrl.recipes import defaults
    from dynrl.schema import check_price_range

    for option in ("decisions", "agents", "seeds", "prices", "plain"):
        given = getattr(args, option)
        if len(set(given)) < len(given):
            raise ValueError(f"expected each of the {option} once, got {' '.join(map(str, given))}")
    if args.backbone is not None and len(matrix) > 1:
        raise ValueError(f"a backbone poses one decision: compare {', '.join(args.decisions)} apart, or leave it out")
    for price in args.prices:
        check_price_range((price, price))
    if args.prices and "ppo" not in args.agents:
        raise ValueError("--prices trains PPO at one price each, to compare with PPO over a range: add ppo to --agents")
    for folder, name, data in matrix:
        planned_cells(folder, name, data, args)
        for setting in args.plain:
            defaults(name, data).changed(_settings(setting)).build(load_dataset(data), args.seeds[0])


def tunes(decision: str, data: str, args: Args) -> bool:
    """Return whether backbones are tuned, too, as some always are."""
    return plan(decision, data, args.backbone, **_learning(args)).settings.learning.finetune


def planned_cells(folder: Path, decision: str, data: str, args: Args) -> dict[str, dict[str, Any]]:
    """Return what each cell is trained with, by its name in `folder`; refuse what could not be compared there."""
    kinds: list[tuple[str, dict[str, Any]]] = [(agent, {"agent": agent}) for agent in args.agents]
    kinds += [(f"ppo-at-{price_word(price)}", {"agent": "ppo", "price_range": (price, price)}) for price in args.prices]
    cells = {
        f"{kind}{'-tuned' if args.finetune else ''}-{seed}": {**given, **_learning(args), "seed": seed}
        for (kind, given), seed in product(kinds, args.seeds)
    }
    planned = {name: plan(decision, data, args.backbone, **given).settings for name, given in cells.items()}
    steps = steps_beside(folder, planned, args.steps)
    return {name: {**given, "steps": steps[name]} for name, given in cells.items()}


def _learning(args: Args) -> dict[str, Any]:
    """The settings that all policies share, if they are given."""
    return {name: value for name in ("steps", "finetune") if (value := getattr(args, name))}


def _settings(words: str) -> tuple[str, ...]:
    """The settings of one network; their values may have spaces."""
    return tuple(re.split(r"\s+(?=\w+=)", words.strip()))


def train_cells(folder: Path, decision: str, data: str, args: Args) -> bool:
    """Train the runs that are missing in `folder`, and return whether all are done; False after Ctrl-C."""
    from dynrl.training import pretrain_into, resume, train

    cells, tuned = planned_cells(folder, decision, data, args), tunes(decision, data, args)
    backbone = args.backbone or folder / "backbone"
    check_one_backbone(folder, backbone)
    if args.backbone is None:
        backbone.mkdir(parents=True, exist_ok=True)
        pretrain_into(backbone, plan(decision, data, seed=args.seeds[0]))
    for setting in args.plain:
        words = re.sub(r"[^a-z0-9]+", "-", setting.lower()).strip("-")
        plain = folder / f"plain-{words}{TUNED if tuned else ''}"
        plain.mkdir(exist_ok=True)
        smaller = plan(decision, data, seed=args.seeds[0], network=_settings(setting))
        pretrain_into(plain, smaller, plain_only=True, finetune=tuned)
    for name, given in cells.items():
        run = RunFolder(folder / name)
        run.drop_half_made()
        if run.finished and run.settings["steps"] >= given["steps"]:
            if run.data != data:
                plan_again(run, data)  # the data have moved; two folders of images that have the same name are refused
            continue
        print(f"cell: {run}", flush=True)
        if run.path.is_dir():
            done = resume(run.path, data, show=True, **{**_learning(args), "steps": given["steps"]})
        else:
            done = train(decision, data, out=run.path, backbone=backbone, show=True, **given)
        if not done.finished:
            return False
    return True
