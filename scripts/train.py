"""Learn a routing policy, by reinforcement or by gradient, and write a run folder."""

from __future__ import annotations

import dataclasses
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dynrl.settings import Learning, Place, Problem

BY_DATA = {  # whose default is no number
    "data": "the decision's", "steps": "the data set's; for gates half as many", "hidden": "the data set's",
    "num_envs": "the data set's", "price_range": "measured", "learning_rate": "the agent's own",
    "entropy": "the agent's own",
}  # fmt: skip


def optional(*kinds: type) -> Any:
    """A dataclass of the fields of settings classes, all of which may be left out: None, or False, is not given."""
    made: list[tuple[str, Any, Any]] = []
    for kind in kinds:
        hints, about = typing.get_type_hints(kind), texts(kind)
        for each in dataclasses.fields(kind):
            usual = BY_DATA.get(each.name, each.default)
            help = tyro.conf.arg(help=about[each.name], help_behavior_hint=f"(default: {usual})")
            if each.default is dataclasses.MISSING and each.name not in BY_DATA:
                made.append((each.name, Annotated[hints[each.name], tyro.conf.Positional, help], dataclasses.field()))
            elif hints[each.name] is bool:
                made.append((each.name, Annotated[bool, help], False))
            else:
                made.append((each.name, Annotated[hints[each.name] | None, help], None))
    return dataclasses.make_dataclass("Given", made)


def texts(kind: type) -> dict[str, str]:
    """What a settings class says of each of its fields, under `Attributes:`."""
    _, _, listed = (kind.__doc__ or "").partition("Attributes:")
    found = re.findall(r"^        (\w+): (.*?)(?=^        \w+: |\Z)", listed, re.DOTALL | re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


@dataclass
class Args:
    """Settings of `dynrl train`."""

    settings: tyro.conf.OmitArgPrefixes[optional(Problem, Learning, Place)]  # type: ignore[valid-type]
    backbone: Path | None = None
    """A folder from `dynrl pretrain` or another run; default: pretrain one first."""
    out: Path | None = None
    """Run folder to make; default runs/DECISION-DATA-TIME."""
    resume: Path | None = None
    """Go on with this run folder, by its own settings; where it runs may change, and --finetune may be added."""
    threads: int | None = None
    """CPU threads; default: all available cores."""


def main(args: Args) -> None:
    """Pretrain if needed, learn, fine-tune if wanted, calibrate budgets, evaluate."""
    from dynrl.envs import decision
    from dynrl.runs import RunFolder
    from dynrl.scripts.common import use_threads
    from dynrl.training import learn, make_run, plan, plan_again

    given = {name: value for name, value in vars(args.settings).items() if value is not None and value is not False}
    name = decision(given.pop("decision")).name
    if args.resume is not None:
        if args.out or args.backbone:
            raise ValueError(f"--resume goes on by {args.resume}'s own settings; leave out --out and --backbone")
        run = RunFolder(args.resume)
        planned = plan_again(run, **given)
    else:
        planned = plan(name, **given)
    use_threads(args.threads)
    if args.resume is None:
        run = make_run(planned, args.out, args.backbone)
    print(f"run folder: {run}   (watch: tensorboard --logdir {run.path.parent})", flush=True)
    if learn(run, planned):
        from dynrl.scripts.evaluate import report_runs

        report_runs([run.path], run.path)
        print(f"\ncurves:   tensorboard --logdir {run.path.parent}\npicture:  {run}/report.png")
        low, high = run.settings["price_range"]
        budget = "" if low == high else "model.set_budget(0.5); "
        print(f"plug it:  model = dynrl.load({str(run)!r}); {budget}outputs = model(inputs)")


if __name__ == "__main__":
    from dynrl.scripts.cli import run

    run("train")
