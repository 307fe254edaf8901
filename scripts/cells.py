"""The runs that `dynrl compare` and `dynrl sweep` train are made here: cells of a matrix, and combinations."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynrl.plans import check_source, plan, plan_again
from dynrl.runs import RunFolder, check_one_backbone

if TYPE_CHECKING:
    from dynrl.scripts.compare import Args
    from dynrl.scripts.sweep import Args as Sweep


def check(args: Args, matrix: list[tuple[str, str]]) -> None:
    """Refuse, before hours of training, settings that any cell would refuse; `matrix` holds (decision, data set)."""
    from dynrl.data import load_dataset
    from dynrl.recipes import defaults
    from dynrl.schema import check_price_range

    for option in ("decisions", "agents", "seeds", "prices", "plain"):
        given = getattr(args, option)
        if len(set(given)) < len(given):
            raise ValueError(f"expected each of the {option} once, got {' '.join(map(str, given))}")
    if args.backbone is not None and len(matrix) > 1:
        raise ValueError(f"a backbone poses one decision: compare {', '.join(args.decisions)} apart, or leave it out")
    for name, data in matrix:
        for agent, seed in product(args.agents, args.seeds):
            plan(name, data, args.backbone, agent=agent, seed=seed, **_learning(args))
        for setting in args.plain:
            defaults(name, data).changed(_settings(setting)).build(load_dataset(data), args.seeds[0])
    for price in args.prices:
        check_price_range((price, price))
    if args.prices and "ppo" not in args.agents:
        raise ValueError("--prices trains PPO at one price each, to compare with PPO over a range: add ppo to --agents")


def _learning(args: Args) -> dict[str, Any]:
    """The settings that all policies share, if they are given."""
    return {name: value for name in ("steps", "finetune") if (value := getattr(args, name))}


def _settings(words: str) -> tuple[str, ...]:
    """The settings of one network; their values may have spaces."""
    return tuple(re.split(r"\s+(?=\w+=)", words.strip()))


def train_cells(folder: Path, decision: str, data: str, args: Args) -> bool:
    """Train the runs that are missing in `folder`, and return whether all are done; False after Ctrl-C."""
    from dynrl.training import pretrain_into, resume, train

    backbone = args.backbone or folder / "backbone"
    check_one_backbone(folder, backbone)
    if args.backbone is None:
        backbone.mkdir(parents=True, exist_ok=True)
        pretrain_into(backbone, plan(decision, data, seed=args.seeds[0]))
    for setting in args.plain:
        plain = folder / f"plain-{re.sub(r'[^a-z0-9]+', '-', setting.lower()).strip('-')}"
        plain.mkdir(exist_ok=True)
        pretrain_into(plain, plan(decision, data, seed=args.seeds[0], network=_settings(setting)), plain_only=True)
    kinds: list[tuple[str, dict[str, Any]]] = [(agent, {"agent": agent}) for agent in args.agents]
    kinds += [(f"ppo-at-{price:g}", {"agent": "ppo", "price_range": (price, price)}) for price in args.prices]
    for (kind, given), seed in product(kinds, args.seeds):
        run = RunFolder(folder / f"{kind}{'-tuned' if args.finetune else ''}-{seed}")
        run.drop_half_made()
        if run.finished and run.settings["steps"] >= (args.steps or 0):
            if run.data != data:
                plan_again(run, data)  # the data have moved; two folders of images that have the same name are refused
            continue
        print(f"cell: {run}", flush=True)
        if run.path.is_dir():
            done = resume(run.path, data, show=True, **_learning(args))
        else:
            learning = {**given, **_learning(args), "seed": seed}
            done = train(decision, data, out=run.path, backbone=backbone, show=True, **learning)
        if not done.finished:
            return False
    return True


def trainings(args: Sweep) -> list[dict[str, Any]]:
    """Return the settings of each training of a sweep; raise a ValueError for settings that would be refused."""
    from dynrl.sweep import combinations

    given: dict[str, Any] = {"agent": args.agent, "seed": args.seed} | (
        {} if args.steps is None else {"steps": args.steps}
    )
    varied = combinations(args.vary)
    for values in varied:
        planned = plan(args.decision, args.data, **given | values)
        if args.backbone is not None:
            check_source(planned, args.backbone)
        if planned.settings.learning.finetune:
            raise ValueError(
                f"{args.decision} on {args.data} is trained with its backbone; a sweep is for policies on a frozen one"
            )
    return [given | values for values in varied]
