"""These functions train a policy into a run folder; `dynrl train` calls them.

A run is planned first (`dynrl.plans`). Then `make_run` makes its folder, and `learn` trains. `train` does all three;
`resume` continues in an existing folder.
"""

from __future__ import annotations

import copy
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from dynrl import plugins, pretraining
from dynrl.agents.base import agent_class, attacked_file, train_policy
from dynrl.agents.joint import train_jointly, tuning_file
from dynrl.backbones import Backbone, load_backbone
from dynrl.data import Split
from dynrl.deploy import RoutedModel, policy_fingerprint
from dynrl.envs.rewards import REWARDS
from dynrl.evaluation import calibrate, collapse, find_price_range, step_times
from dynrl.evaluation.scores import mean_metric
from dynrl.files import locked, make_aside, read_json, remove_leftovers, write_aside, write_json
from dynrl.machine import check_dtype, hardware
from dynrl.plans import Plan, check_source, join_sources, plan, plan_again
from dynrl.plugins import given_plugins
from dynrl.policies import LearnedPolicy, load_policy, save_policy
from dynrl.pretraining import Recipe, check_learns
from dynrl.progress import progress, say, talking
from dynrl.runs import RunFolder, read_times
from dynrl.settings import Settings

LITTLE = 0.97  # a network that errs more often than this share of what a blind answer does has learned nothing
CALIBRATED = 8192  # at most so many validation inputs calibrate budgets: 1,024 are several percent off at small ones
TIMED_ROUNDS, TIMED_BATCH = 11, 256
PRETRAINING = "pretraining-"  # how names of checkpoints of backbones begin


def train(
    decision: str | Backbone,
    data: Any = None,
    *,
    out: str | Path | None = None,
    backbone: str | Path | Sequence[str | Path] | None = None,
    pretrain: bool | Recipe = True,
    show: bool = False,
    **settings: Any,
) -> RunFolder:
    """Train a policy: pretrain a backbone if none is given, learn, fine-tune if asked, calibrate budgets.

    Ctrl-C ends training early and leaves the policy that was learned so far; `resume` continues.

    Args:
        decision: a decision's name, or a backbone of your own (a module in `SkipModule`, for example), which is not
            changed.
        data: a data set's name, a folder of images or texts, a `dynrl.data.Dataset`, any torch `Dataset` of (input,
            target) pairs, or a pair of tensors (see `dynrl.data.own_dataset`); None takes the decision's own data set.
        out: the run folder to make; None makes runs/DECISION-DATA-TIME.
        backbone: a folder of `dynrl pretrain` or of another run, whose backbone is copied; for the choice of a model,
            several folders, of any decisions, whose networks are the models.
        pretrain: whether a backbone of your own is first trained under random routes, or the recipe for that. Without
            this training, routes other than the full one may be worth little.
        show: whether progress and results are shown.
        settings: fields of `dynrl.settings.Problem`, `Learning` and `Place`; those left out take the data set's values.

    Returns:
        the run folder; its `model` is the backbone with the policy plugged in.

    Raises:
        ValueError: a setting is unknown or out of range, or settings do not go together. This is raised before any
            folder is made.
    """
    own = isinstance(decision, Backbone)
    if own and backbone is not None:
        raise ValueError(
            "a backbone was given twice: as the decision and as the folder `backbone`; leave one of them out"
        )
    if not own and pretrain is not True:
        raise ValueError(
            "pretrain is for a backbone of your own; leave it out, or give `backbone`, a folder that holds one"
        )
    planned = plan(decision, data, backbone if isinstance(backbone, str | Path) else None, **settings)
    if isinstance(pretrain, Recipe):
        planned = replace(planned, recipe=replace(planned.recipe, pretraining=pretrain))
    if own and pretrain is not False:
        check_learns(planned.backbone)
    with talking(show):
        if pretrain is False:
            planned.backbone.trained_on = planned.dataset.provenance
        run = make_run(planned, out, planned.backbone if pretrain is False else backbone)
        with gone_if_not_begun(run):
            learn(run, planned)
    return run


def resume(
    run: str | Path, data: Any = None, *, backbone: Backbone | None = None, show: bool = False, **settings: Any
) -> RunFolder:
    """Continue a run folder by its own settings, whether it was killed, was interrupted or is done.

    Args:
        run: the run folder.
        data: the data that the run was given as tensors or as a `Dataset`, or where its data are now; data that lie
            where they were need not be given again.
        backbone: the backbone of your own that the run was given, unless `FAMILIES` can build it. Its weights are those
            in the folder.
        show: whether progress and results are shown.
        settings: fields of `Place`, which say where training continues; more `steps`, with which a finished run goes
            on; `finetune=True`, which fine-tunes a run that was not. Other settings may be repeated, not changed.

    Raises:
        ValueError: it is no run folder, `data` are other data, `backbone` is another one, or a setting would change.
    """
    folder = RunFolder(run)
    with talking(show):
        learn(folder, plan_again(folder, data, backbone, **settings))
    return folder


# Folders ----------------------------------------------------------------------------------------------------------


def folder_name(data: str) -> str:
    """Return what a data set is called in names of folders: for a folder, the last part of its path."""
    return Path(data).name


def folder_for(out: str | Path | None, *parts: str) -> Path:
    """Return the path `out`, or `runs/<parts>-<time>` if `out` is None."""
    return Path(out or Path("runs") / "-".join([*map(folder_name, parts), time.strftime("%Y%m%d-%H%M%S")]))


def make_run(
    planned: Plan, out: str | Path | None = None, source: str | Path | Sequence[str | Path] | Backbone | None = None
) -> RunFolder:
    """Make the folder of a planned run, whole or not at all.

    If `source` is given, take the backbone of that folder, or that backbone, as trained. Else keep what it is trained
    from and by, so that a run that is killed goes on with the same.

    Raises:
        ValueError: the folder exists, or the backbone is for another decision or other data.
    """
    problem, given, trained = planned.settings.problem, None, None
    if isinstance(source, str | Path):
        given = check_source(planned, source)
    elif isinstance(source, Backbone):
        trained = source
    elif source:
        trained = join_sources(planned, source)
    folder = folder_for(out, problem.decision, problem.data)
    with make_aside(folder) as aside:
        files, tunes = RunFolder(aside), planned.settings.learning.finetune
        if given is not None:
            # What fine-tunes begins where the given run began, or it would be tuned for twice as long, unnoticed.
            before = given.pretrained_file  # needed in any case: a tuned backbone must not pass for an untuned one
            begun = before if tunes else given.backbone_file
            taken = {files.backbone_file: begun, files.plain_file: given.plain_file}
            if not tunes:
                taken[files.kept_file] = given.kept_file
            for copied, file in taken.items():
                if file.is_file():
                    shutil.copyfile(file, copied)
            if given.backbone.trained_on is None:  # weights from elsewhere: their file says from now on for which data
                backbone, notes = load_backbone(begun)
                backbone.trained_on = planned.dataset.seen_by(backbone.known).provenance
                backbone.save(files.backbone_file, **notes)
        elif trained is not None:
            trained.save(files.backbone_file)
        else:
            frozen = [name for name, weight in planned.backbone.named_parameters() if not weight.requires_grad]
            planned.backbone.save(files.first_file, frozen=frozen)
            write_json(files.recipe_file, asdict(planned.recipe.pretraining))
        write_json(files.data_file, planned.dataset.provenance.to_dict())
        _name_plugins(aside)
        planned.settings.save(files.config_file)
    return RunFolder(folder)


def _name_plugins(folder: Path) -> None:
    if named := given_plugins():
        write_json(folder / plugins.FILE, named)


@contextmanager
def gone_if_not_begun(run: RunFolder) -> Iterator[None]:
    """If the block fails before it has trained anything, remove the new folder `run`, which the next try would find."""
    before = set(run.path.iterdir())
    try:
        yield
    except Exception:
        made = {path for path in run.path.rglob("*") if path.is_file()} - before
        if all(path.name.startswith("events.") or path.suffix == ".json" for path in made):
            shutil.rmtree(run.path)
        raise


# Backbones --------------------------------------------------------------------------------------------------------


def pretrain(
    decision: str,
    data: Any = None,
    *,
    out: str | Path | None = None,
    plain: bool = False,
    finetune: bool = False,
    device: str = "cpu",
    show: bool = False,
    **problem: Any,
) -> Path:
    """Train a plain network, then a backbone from its weights under random routes, so that every route works.

    After a kill, the same call continues in its folder.

    Args:
        decision, data: what is decided on which data (see `train`).
        out: the folder to make; None makes runs/backbone-DECISION-DATA-TIME.
        plain: whether only the plain network is trained, for as many epochs as a backbone in all,
            for example a smaller one to compare routed networks with.
        finetune: whether such a network is trained for as many epochs as a fine-tuned backbone in all.
        device: the device to train on.
        show: whether progress and results are shown.
        problem: `network` and `seed` (see `dynrl.settings.Problem`).

    Returns:
        the folder.

    Raises:
        ValueError: the folder exists and was not made by this call with the same settings; see also `train`.
    """
    if finetune and not plain:
        raise ValueError("a backbone is fine-tuned with its policy: leave out finetune, or train a plain network alone")
    planned = plan(decision, data, device=device, **problem)
    posed = asdict(planned.settings.problem) | {"network": list(planned.settings.problem.network)}
    settings = {"problem": posed, "plain": plain, "finetune": finetune}
    if out is not None and Path(out).exists():
        folder = Path(out)
        _check_same(folder, settings)
    else:
        folder = folder_for(out, "backbone", decision, planned.settings.problem.data)
        with make_aside(folder) as aside:
            _name_plugins(aside)
            write_json(aside / "config.json", settings)
    try:
        with talking(show):
            pretrain_into(folder, planned, plain, finetune)
    except KeyboardInterrupt:
        kept = "all up to the last epoch is kept"
        raise KeyboardInterrupt(f"{kept}; to go on, give the same command with --out {quote(str(folder))}") from None
    return folder


def _check_same(folder: Path, settings: dict[str, Any]) -> None:
    kept = folder / "config.json"
    before = read_json(kept) if kept.is_file() else None
    if not isinstance(before, dict) or before.keys() != settings.keys():
        raise ValueError(f"{folder} exists and is no folder of dynrl pretrain to continue; choose another --out")
    was, now = (each["problem"] | {"plain": each["plain"], "finetune": each["finetune"]} for each in (before, settings))
    # The data may have moved: `pretrain_into` compares what they are.
    if changed := [name for name, value in now.items() if was.get(name) != value and name != "data"]:
        raise ValueError(f"{folder} was made by dynrl pretrain with another {', '.join(changed)}; choose another --out")


def pretrain_into(folder: Path, planned: Plan, plain_only: bool = False, finetune: bool = False) -> None:
    """Train whichever of `plain.safetensors` and `backbone.safetensors` is missing in `folder`; resume after kills.

    A plain network alone is trained for as many epochs as a backbone in all, with those of fine-tuning if `finetune`.

    Raises:
        ValueError: another process works in the folder.
    """
    with held(folder):
        _pretrain_into(folder, planned, plain_only, finetune)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Within the block, no other process works in a run folder; what kills left there is removed first."""
    with locked(folder):
        for each in (folder, RunFolder(folder).checkpoints):
            remove_leftovers(each)
        yield


def _pretrain_into(folder: Path, planned: Plan, plain_only: bool = False, finetune: bool = False) -> None:
    files, seed = RunFolder(folder), planned.settings.problem.seed
    if not files.data_file.is_file():
        write_json(files.data_file, planned.dataset.provenance.to_dict())
    known = files.data_known
    assert known is not None
    planned.dataset.check_same(known)
    dataset = planned.dataset.seen_by(known)  # images that were added since pretraining began change no standardisation
    recipe = planned.recipe.pretraining
    if plain_only:
        tuning = planned.recipe.finetuning
        more = math.ceil(tuning.rounds * tuning.epochs) if finetune else 0
        recipe = replace(recipe, plain_epochs=recipe.length(False) + recipe.length(True) + more)
    for path, random_routes, label in (
        # The backbone comes last: if its file exists, both files do, so a killed run knows what is left to do.
        (files.plain_file, False, "training the plain network"),
        (files.backbone_file, True, "pretraining under random routes"),
    ):
        if path.exists() or (random_routes and plain_only):
            continue
        checkpoint = files.checkpoints / f"{PRETRAINING}{path.stem}.safetensors"
        backbone = copy.deepcopy(planned.backbone)  # which knows what is frozen
        if random_routes:
            backbone.load_state_dict(load_backbone(files.plain_file)[0].state_dict())
        backbone.trained_on = known
        backbone = pretraining.pretrain(
            backbone, dataset.for_backbone, recipe, random_routes=random_routes, seed=seed, checkpoint=checkpoint,
            label=label, device=planned.settings.place.device,
        )  # fmt: skip
        value, metric = mean_metric([backbone], dataset.validation), dataset.task.metric
        epochs = recipe.length(random_routes)
        backbone.save(path, seed=seed, random_routes=random_routes, epochs=epochs, **{f"validation_{metric}": value})
        checkpoint.unlink(missing_ok=True)  # only now: if a kill came before, the training would be lost
        if not epochs:
            continue
        macs = backbone.dense_macs / 1e6
        whole = not random_routes or recipe.full_share > 0  # else no full route was trained, and it says little
        where = "on validation data" if whole else "on validation data along the full route, which was not trained"
        say(f"{path.stem}: {metric} {value:.4g} {where}, {macs:.1f} million MACs an input")
        if whole and (advice := nothing_learned(dataset.validation, value)):
            say(f"{path.stem}: {advice}", sys.stderr)
    files.first_file.unlink(missing_ok=True)


def nothing_learned(split: Split, value: float) -> str | None:
    """Say, with advice, that a network of mean metric `value` is no better than one answer for all inputs; else None.

    Some tasks are learned all at once or not at all: without a word, all that follows would route chance.
    """
    task, targets = split.task, split.targets
    blind = task.mean(task.score(task.blind(targets), targets), targets)
    if task.error(value) < LITTLE * task.error(blind):
        return None
    return (
        f"has learned nothing: {task.metric} is {value:.4g}, and one answer for all inputs has {blind:.4g}. Try more "
        "epochs (--epochs), another seed (--seed), or a wider network (--network)"
    )


# Learning ---------------------------------------------------------------------------------------------------------


def learn(run: RunFolder, planned: Plan) -> bool:
    """Train the run's backbone and policy, and return whether training is done; False after Ctrl-C or SIGTERM.

    After these, the folder holds the policy that was learned so far. A run that is done stays as it is.

    Raises:
        ValueError: another process works in the folder; or the run is to go on, and what it would go on from is gone.
    """
    with held(run.path):
        run.forget()
        before = Settings.read(run.config_file, planned.settings.place)
        done = before.learning == planned.settings.learning and _done(run, planned)
        if not done and run.backbone_file.is_file():
            _check_whole(run, planned)
        if before != planned.settings:
            if planned.settings.learning.steps > before.learning.steps and run.finished:
                policy, metadata = load_policy(run.policy_file)
                save_policy(run.policy_file, policy, metadata | {"finished": False})
            planned.settings.save(run.config_file)
            run.forget()
        if done:
            say(f"policy: {run.policy_file} is finished, and stays as it is")
        return done or _learn(run, planned)


def _check_whole(run: RunFolder, planned: Plan) -> None:
    """Refuse, with a ValueError, a run that is to go on and lacks a file for it, before anything is changed."""
    _ = run.pretrained_file  # which refuses a tuned backbone without the one from before
    learning, working = planned.settings.learning, _working_file(run)
    anew = f"train a new run: dynrl train {run.decision} --backbone {quote(str(run))}"
    theirs = {"units.json", working.name, attacked_file(working).name, tuning_file(run.checkpoints).name}
    begun = any(path.name not in theirs and not path.name.startswith(PRETRAINING) for path in run.checkpoints.glob("*"))
    if run.policy is not None and not begun:
        raise ValueError(
            f"{run} has a policy, but {run.checkpoints.name}/ has no checkpoint of its agent, {learning.agent}: the "
            f"policy would be learned anew, and replaced. Put that back, or {anew}"
        )
    met = learning.attacked > 0 and not agent_class(learning.agent).attacks
    for needed, file in (
        (learning.cost == "time" and begun, run.times_file),
        (tuning_file(run.checkpoints).is_file(), working),
        (met and working.is_file() and load_backbone(working)[1].get("rounds", 0) > 0, attacked_file(working)),
    ):
        if needed and not file.is_file():
            raise ValueError(f"{file} is not there, which {run} has learned by; put that back, or {anew}")


def _working_file(run: RunFolder) -> Path:
    """Return the file of the backbone that is tuned in turn with its policy; it is the run's when training ends."""
    return run.checkpoints / "backbone.safetensors"


def _done(run: RunFolder, planned: Plan) -> bool:
    """Return whether a run has done all that its settings say; one that was killed in tuning still has a policy."""
    rounds = planned.recipe.finetuning.rounds if planned.settings.learning.finetune else 0
    return run.policy is not None and run.finished and run.rounds >= rounds


def _learn(run: RunFolder, planned: Plan) -> bool:
    newest = run.backbone_file
    if not newest.exists():
        _pretrain_into(run.path, planned)
    planned = find_prices(run, planned)
    validation = planned.dataset.validation.head(CALIBRATED)
    settings = planned.settings
    times = _times(run, planned) if settings.learning.cost == "time" else None
    if settings.learning.finetune:
        newest = _working_file(run)
        router, finished = _learn_jointly(run, planned, newest, times)
    else:
        router, finished = train_policy(settings, newest, run.path, times)
    backbone, notes = load_backbone(newest)
    model = RoutedModel(backbone, router)
    with progress(desc="calibrating budgets", unit="price") as bar:
        curve = calibrate(model, validation, tick=bar.update)
    if (now := policy_fingerprint(model)) != run.policy:
        run.drop_measured(now)  # before the policy is saved: a kill must not leave another one's report beside it
    if newest != run.backbone_file:  # only now: a policy that the folder may hold fits the backbone it has until here
        backbone.save(run.backbone_file, **notes)
    save_policy(
        run.policy_file, router,
        {
            "decision": settings.problem.decision, "data": settings.problem.data, "backbone": backbone.fingerprint(),
            "curve": curve, "finished": finished,
        },
    )  # fmt: skip
    run.forget()
    low, high = min(macs for _, macs in curve), max(macs for _, macs in curve)
    say(f"policy: {run.policy_file}, budgets from {low:.2g} to {high:.2g} of the dense MACs")
    if advice := collapse(model, validation):
        say(advice, sys.stderr)
    return finished


def find_prices(run: RunFolder, planned: Plan) -> Plan:
    """Return the plan with data as the run's backbone sees them, and with a price range.

    A range that is not given is found on the backbone, and written down.
    """
    backbone, _ = load_backbone(run.pretrained_file)
    settings, dataset = planned.settings, planned.dataset.seen_by(backbone.known)
    validation = dataset.validation
    if settings.learning.price_range is None:
        low, high = find_price_range(backbone, validation, REWARDS[settings.learning.reward].accuracy)
        say(f"prices: from {low:g} to {high:g}, as the backbone's routes lose and cost")
        settings = replace(settings, learning=replace(settings.learning, price_range=(low, high)))
        settings.save(run.config_file)
        run.forget()
    return replace(planned, settings=settings, dataset=dataset)


def _times(run: RunFolder, planned: Plan) -> dict[str, Any]:
    """Return the time of each choice on this machine, which is measured once a run."""
    if not run.times_file.exists():
        device, dtype = planned.settings.place.device, check_dtype(planned.settings.learning.dtype)
        inputs = planned.dataset.validation.head(TIMED_BATCH).to(torch.device(device), dtype).inputs[:]
        backbone = load_backbone(run.backbone_file)[0].for_inference().to(device, dtype)
        wait = torch.cuda.synchronize if inputs.is_cuda else lambda: None
        with progress(total=TIMED_ROUNDS + 1, desc="timing choices", unit="round") as bar:
            measured = step_times(backbone, inputs, TIMED_ROUNDS, bar.update, wait)
        write_json(run.times_file, {**measured, "batch_size": len(inputs), "device": device, "hardware": hardware()})
    return read_times(run.times_file, load_backbone(run.backbone_file)[0])


def _learn_jointly(
    run: RunFolder, planned: Plan, working: Path, times: Mapping[str, Any] | None
) -> tuple[LearnedPolicy, bool]:
    """Call `train_jointly` on the file `working`, which begins as the backbone from before fine-tuning; keep that."""
    dataset, tuning = planned.dataset, planned.recipe.finetuning
    if not run.kept_file.exists():
        with write_aside(run.kept_file) as aside:
            shutil.copyfile(run.backbone_file, aside)
    begun = load_backbone(working)[1].get("rounds", 0) if working.exists() else 0
    if 0 < begun < tuning.rounds and not tuning_file(run.checkpoints).exists():
        # The next rounds would be done at the learning rate of the first ones, on a backbone that has had these.
        say(f"{tuning_file(run.checkpoints)} is not there: fine-tuning and its policy begin again", sys.stderr)
        shutil.rmtree(run.checkpoints)
    if not working.exists():
        # The run's own backbone may have been tuned before its checkpoints were removed.
        backbone, notes = load_backbone(run.pretrained_file)
        backbone.save(working, **notes)
    # The teacher is the network that reports call dense: the better of the two on validation data.
    known = [load_backbone(path)[0] for path in (run.pretrained_file, run.plain_file) if path.is_file()]
    reference = min(known, key=lambda b: dataset.task.error(mean_metric([b], dataset.validation)))
    return train_jointly(planned.settings, tuning, working, reference, run.path, times)
