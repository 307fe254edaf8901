"""`dynrl compare` trains the cells of a matrix, `dynrl sweep` combinations of settings: both are made here."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynrl.runs import RunFolder

if TYPE_CHECKING:
    from dynrl.scripts.compare import Args
    from dynrl.scripts.sweep import Args as Sweep
    from dynrl.scripts.train import Args as Training


def check(args: Args, matrix: list[tuple[str, str]]) -> None:
    """Refuse, before hours of training, what some cell would refuse; `matrix` holds (decision, data set)."""
    from dynrl.data import load_dataset
    from dynrl.envs.core import check_price_range
    from dynrl.recipes import defaults
    from dynrl.scripts.train import Args as Training
    from dynrl.scripts.train import check_args

    for name, data in matrix:
        row = defaults(name, data)
        for agent, seed in product(args.agents, args.seeds):
            check_args(Training(name, agent=agent, seed=seed, finetune=args.finetune or row.joint))
        for setting in args.plain:
            row.changed((setting,)).build(load_dataset(data), args.seeds[0])
    for price in args.prices:
        check_price_range((price, price))
    if args.prices and "ppo" not in args.agents:
        raise ValueError("--prices trains PPO at one price each, to stand beside PPO: add ppo to --agents")


def train_cells(folder: Path, decision: str, data: str, args: Args) -> bool:
    """Train what is missing in `folder`; False after Ctrl-C."""
    from dynrl.scripts import train
    from dynrl.scripts.pretrain import pretrain_into

    backbone = folder / "backbone"
    backbone.mkdir(parents=True, exist_ok=True)
    pretrain_into(backbone, decision, data, args.seeds[0])
    for setting in args.plain:
        plain = folder / f"plain-{re.sub(r'[^a-z0-9]+', '-', setting.lower()).strip('-')}"
        plain.mkdir(exist_ok=True)
        pretrain_into(plain, decision, data, args.seeds[0], (setting,), plain_only=True)
    kinds: list[tuple[str, Any, tuple[float, float] | None]] = [(agent, agent, None) for agent in args.agents]
    kinds += [(f"ppo-at-{price:g}", "ppo", (price, price)) for price in args.prices]
    for (kind, agent, price_range), seed in product(kinds, args.seeds):
        run = RunFolder(folder / f"{kind}{'-tuned' if args.finetune else ''}-{seed}")
        if run.finished:
            continue
        run.drop_half_made()
        if run.path.is_dir():
            if run.data != data:  # folders of images may bear the same name
                raise ValueError(f"{run} was trained on {run.data}, not {data}; choose another --out")
            settings = train.Args(decision, resume=run.path)
        else:
            settings = train.Args(
                decision, data=data, agent=agent, finetune=args.finetune, backbone=backbone, out=run.path, seed=seed,
                price_range=price_range,
            )  # fmt: skip
        print(f"cell: {run}", flush=True)
        if not train.learn(*train.open_run(settings)):
            return False
    return True


def trainings(args: Sweep) -> list[Training]:
    """Return `dynrl train`'s arguments for each combination of a sweep; a ValueError for any that it would refuse."""
    from dynrl.agents.training import check_shares
    from dynrl.data import check_dataset, load_dataset
    from dynrl.envs import decision
    from dynrl.envs.core import check_accuracy_term
    from dynrl.recipes import defaults
    from dynrl.scripts.train import Args as Training
    from dynrl.scripts.train import check_args
    from dynrl.sweep import combinations

    data = check_dataset(args.data or decision(args.decision).data)
    row = defaults(args.decision, data)
    if row.joint:
        raise ValueError(
            f"{args.decision} on {data} is trained with its backbone; a sweep is for policies on a frozen one"
        )
    given = Training(args.decision, data=data, agent=args.agent, steps=args.steps, seed=args.seed)
    found = [replace(given, **values) for values in combinations(args.vary)]
    for training in found:
        check_accuracy_term(training.accuracy_term, load_dataset(data).task)
        if training.baseline not in ("value", "group"):
            raise ValueError(f"expected baselines value or group, got {training.baseline}")
        check_args(training)
        if args.agent == "ppo":
            check_shares(training.num_envs or row.num_envs, 0, training.baseline)
    return found
