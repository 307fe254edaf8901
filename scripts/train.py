"""Learn a routing policy, by reinforcement learning or by gradient, and write a run folder."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import tyro

from dynrl.scripts.options import given, optional
from dynrl.settings import Learning, Place, Problem


@dataclass
class Args:
    """These are the settings of `dynrl train`."""

    settings: tyro.conf.OmitArgPrefixes[optional(Problem, Learning, Place)]  # type: ignore[valid-type]
    """The settings that say what is learned, how, and where."""
    backbone: tuple[Path, ...] = ()
    """A folder from `dynrl pretrain` or another run, whose backbone is taken; by default, one is pretrained first. For
    the choice of a model, several folders, whose networks are the models."""
    out: Path | None = None
    """The run folder to make; by default, runs/DECISION-DATA-TIME."""
    resume: Path | None = None
    """Continue this run folder by its own settings. It may go on elsewhere, with more --steps, with --finetune; --data
    says where its data are now, if they have moved."""
    evaluate: bool = True
    """Whether a report is made at the end, which trains and searches for what a policy is compared with."""
    threads: int | None = None
    """The number of CPU threads; by default, all available cores."""


def main(args: Args) -> None:
    """Pretrain if needed, learn, fine-tune if wanted, calibrate budgets, and evaluate."""
    from dynrl.envs import decision
    from dynrl.plans import plan, plan_again
    from dynrl.runs import RunFolder
    from dynrl.scripts.common import use_threads
    from dynrl.scripts.evaluate import report_runs
    from dynrl.training import gone_if_not_begun, learn, make_run

    settings = given(args.settings)
    name = decision(settings.pop("decision")).name
    if args.resume is not None:
        if args.out or args.backbone:
            raise ValueError(f"--resume continues by {args.resume}'s own settings; leave out --out and --backbone")
        run = RunFolder(args.resume)
        if run.decision != name:
            again = f"dynrl train {run.decision} --resume {quote(str(run))}"
            raise ValueError(f"{run} decides {run.decision!r}, not {name!r}: {again}")
        planned = plan_again(run, **settings)
    else:
        planned = plan(name, source=args.backbone[0] if len(args.backbone) == 1 else None, **settings)
    use_threads(args.threads)
    if args.resume is None:
        run = make_run(planned, args.out, args.backbone[0] if len(args.backbone) == 1 else args.backbone)
    curves = f"tensorboard --logdir {quote(str(run.path.parent))}"
    print(f"run folder: {run}   (watch: {curves})", flush=True)
    try:
        with gone_if_not_begun(run) if args.resume is None else nullcontext():
            done = learn(run, planned)
        if not done:
            raise KeyboardInterrupt("the policy so far is kept; ")
        if args.evaluate:
            report_runs([run.path], run.path)
    except KeyboardInterrupt as stopped:
        kept = f"{stopped}" or "all up to the last checkpoint is kept; "
        raise KeyboardInterrupt(f"{kept}go on with: dynrl train {name} --resume {quote(str(run))}") from None
    report = f"picture:  {run}/report.png" if args.evaluate else f"report:   dynrl evaluate {quote(str(run))}"
    print(f"\ncurves:   {curves}\n{report}")
    reached = [macs for _, macs in run.model.curve]
    budget = "model.set_budget(0.5); " if len(reached) > 1 and min(reached) <= 0.5 <= max(reached) else ""
    print(f"plug it:  model = dynrl.load({str(run)!r}); {budget}outputs = model(inputs)")


if __name__ == "__main__":
    from dynrl.scripts.cli import run

    run("train")
