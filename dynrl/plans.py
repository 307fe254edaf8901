"""A plan is a training whose settings are complete and checked; `dynrl.training` carries it out."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from dynrl.agents.base import agent_class, sight_of
from dynrl.backbones import FAMILIES, Backbone, load_backbone
from dynrl.data import Dataset, as_dataset, check_dataset, load_dataset
from dynrl.data.own import is_own
from dynrl.envs import decision as decision_row
from dynrl.envs.rewards import check_reward, try_reward
from dynrl.files import read_json, reading
from dynrl.machine import check_device
from dynrl.perturb import Ball, check_attackable
from dynrl.pretraining import Recipe, check_learns
from dynrl.recipes import FAMILY, Defaults, defaults
from dynrl.runs import RunFolder, read_times
from dynrl.schema import parse
from dynrl.settings import PRETRAINED_HERE, Learning, Place, Problem, Settings, names
from dynrl.trial import try_out


@dataclass(frozen=True)
class Plan:
    """A plan is a training whose settings have been checked, and of which nothing has been made yet.

    Attributes:
        settings: the complete settings, as they will be saved.
        dataset: the data set that `settings.problem.data` names.
        recipe: how the backbone is pretrained and fine-tuned.
        backbone: a backbone of the shape to learn on, with its first weights.
    """

    settings: Settings
    dataset: Dataset
    recipe: Defaults
    backbone: Backbone


def plan(decision: str | Backbone, data: Any = None, source: str | Path | None = None, **given: Any) -> Plan:
    """Fill in settings and check them; see `train` for the arguments; `source` is the folder of a given backbone.

    Raises:
        ValueError: see `train`.
    """
    if unknown := set(given) - set(names(Problem, Learning, Place)):
        expected = ", ".join(n for n in names(Problem, Learning, Place) if n not in names(Problem)[:2])
        raise ValueError(f"unknown settings {', '.join(sorted(unknown))}; expected {expected}")
    if not isinstance(decision, str | Backbone):
        raise ValueError(
            f"expected a decision's name or a backbone, got {type(decision).__name__}; a module becomes a backbone by "
            "SkipModule or ExitModule"
        )
    own = decision if isinstance(decision, Backbone) else None
    name = own.decision if own is not None else str(decision)
    row = decision_row(name)
    if not isinstance(data, str | Path | None):
        dataset = as_dataset(data)
        data = dataset.name
    data = check_dataset(str(data or row.data))
    problem = _given(Problem(name, data), given)
    if own is not None and problem.network:
        raise ValueError("network is for a backbone that is built here; leave it out")
    recipe = _recipe(problem, own is not None or source is not None)
    if recipe.joint and given.get("finetune") is False:
        raise ValueError(
            f"{name} on {data} is always fine-tuned, as no backbone survives random routes; leave out finetune"
        )
    agent = agent_class(given.get("agent", recipe.learning.agent))
    usual = replace(recipe.learning, steps=int(agent.steps_share * recipe.learning.steps))
    learning = _given(usual, given)
    tuned = learning.finetune or recipe.joint or learning.attacked > 0
    settings = Settings(problem, replace(learning, finetune=tuned), _given(Place(), given))
    dataset = load_dataset(data)
    if source is not None:
        backbone = _backbone_of(source, problem)
    elif own is None:
        backbone = recipe.build(dataset, problem.seed)
    else:
        backbone = copy.deepcopy(own).eval()
        _keep(own)
    return _checked(Plan(settings, dataset.seen_by(backbone.known), recipe, backbone))


def _recipe(problem: Problem, own_backbone: bool) -> Defaults:
    """Return the defaults of a problem, changed by its settings of the network and by its epochs."""
    own_family = any(setting.startswith(f"{FAMILY}=") for setting in problem.network)
    recipe = defaults(problem.decision, problem.data, own_backbone or own_family).changed(problem.network)
    pretraining = recipe.pretraining
    if problem.epochs is not None:
        pretraining = replace(pretraining, epochs=problem.epochs, plain_epochs=None)
    if not problem.plain:
        pretraining = replace(pretraining, plain_epochs=0)
    return replace(recipe, pretraining=pretraining)


def plan_again(run: RunFolder, data: Any = None, backbone: Backbone | None = None, **given: Any) -> Plan:
    """Return the plan of an existing run folder, in which nothing is changed; see `resume`."""
    _ = run.config  # a folder that holds no run is refused here, with the reason
    if unknown := set(given) - set(names(Problem, Learning, Place)):
        raise ValueError(f"unknown settings {', '.join(sorted(unknown))}; {run} continues by its own")
    before = Settings.read(run.config_file, _given(Place(), given))
    settings = _going_on(run, before, given)
    dataset = run.dataset(data)
    problem = replace(settings.problem, data=dataset.name)
    if backbone is not None:
        _keep(backbone)
    with reading(run.config_file, "settings of dynrl train"):
        decision_row(problem.decision)
        recipe = _recipe(problem, own_backbone=True)
    begun = run.backbone_file.is_file()
    if not begun and (run.policy_file.is_file() or run.kept_file.is_file()):
        raise ValueError(f"{run} has a policy but no {run.backbone_file.name}; put that back, or train a new run")
    for file in (run.recipe_file, run.first_file):
        if not begun and not file.is_file():
            # What the settings say now may be another network, or another training of it.
            raise ValueError(f"{run} has no {file.name}, which its backbone needs; put that back, or train a new run")
    if run.recipe_file.is_file():
        written = read_json(run.recipe_file)
        with reading(run.recipe_file, "recipe"):
            recipe = replace(recipe, pretraining=parse(Recipe, written))
    network, notes = load_backbone(run.backbone_file if begun else run.first_file)
    if backbone is not None and (backbone.family, backbone.config) != (network.family, network.config):
        raise ValueError(
            f"expected the backbone that {run} was given, or none, got another: {backbone.family} {backbone.config}, "
            f"not {network.family} {network.config}"
        )
    with reading(run.first_file, "backbone file"):
        for name in notes.get("frozen", ()):
            network.get_parameter(name).requires_grad_(False)
    if run.times_file.is_file():
        read_times(run.times_file, network)
    dataset = dataset.seen_by(run.backbone.known if begun else run.data_known)
    return _checked(Plan(replace(settings, problem=problem), dataset, recipe, network))


def _going_on(run: RunFolder, settings: Settings, given: Mapping[str, Any]) -> Settings:
    """Return a run's settings with more steps, or with fine-tuning, where these are given; refuse other changes."""
    problem, learning = (
        _given(settings.problem, {**given, "data": settings.problem.data}),
        _given(settings.learning, given),
    )
    for before, after in ((settings.problem, problem), (settings.learning, learning)):
        for name in names(type(before)):
            was, said = getattr(before, name), getattr(after, name)
            if was != said and not (name == "steps" and said > was) and not (name == "finetune" and said):
                raise ValueError(
                    f"{run} was begun with {name}={was!r}, not {said!r}; leave it out, or train a new run (a run goes "
                    "on with more steps, with fine-tuning, and elsewhere)"
                )
    begins = learning.finetune and not settings.learning.finetune and run.backbone_file.is_file()
    if begins and run.rounds:
        # It would be tuned from the backbone of before, on which its policy has not learned.
        raise ValueError(
            f"{run} learned on a backbone that was tuned with another policy; to tune one with a policy of its own, "
            f"train a new run: dynrl train {run.decision} --backbone {quote(str(run))} --finetune"
        )
    return replace(settings, learning=learning)


def _given(settings: Any, given: Mapping[str, Any]) -> Any:
    """Return `settings` changed by the entries of `given` that are its fields, checked."""
    kind = type(settings)
    mine = {name: value for name, value in given.items() if name in names(kind)}
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in mine.items()}
    return parse(kind, asdict(settings) | lists)


_OWN = dict[str, list[Backbone]]()  # copies of backbones of your own, by the names of their families


def _keep(backbone: Backbone) -> None:
    """Have `FAMILIES` make copies of a backbone of your own, into which files load weights, if nothing there does.

    A program may train several of one family. Their settings tell them apart, and the last one counts if these agree.
    """
    name = backbone.family
    if name in FAMILIES and name not in _OWN:
        return
    others = [each for each in _OWN.get(name, ()) if each.config != backbone.config]
    _OWN[name] = [*others, copy.deepcopy(backbone)]

    def build(**config: Any) -> Backbone:
        found = [each for each in _OWN[name] if each.config == config]
        if not found:
            raise ValueError(
                f"the family {name!r} is known here with other settings: expected {_OWN[name][-1].config}, got "
                f"{config}; put a function that builds it into dynrl.backbones.FAMILIES"
            )
        return copy.deepcopy(found[0])

    FAMILIES[name] = build


def _checked(planned: Plan) -> Plan:
    """Return the plan, or raise a ValueError if its parts do not go together."""
    settings, backbone, dataset = planned.settings, planned.backbone, planned.dataset
    learning = settings.learning
    check_device(settings.place.device)
    if backbone.form != dataset.form:
        raise ValueError(
            f"expected inputs {backbone.form}, which the backbone is for, got {dataset.form} in {dataset.name}; bring "
            "the data to that form (images by FOLDER@SIZE or by a Dataset's transforms, texts by padding), or make the "
            "backbone for theirs. Integers such as token ids keep their type in inputs by name"
        )
    if "classes" not in backbone.config:
        raise ValueError(
            f"expected the config of {type(backbone).__name__} to say how many outputs it has, as `classes`, got "
            f"{backbone.config}"
        )
    if (outputs := backbone.config["classes"]) != dataset.classes:
        what = "classes" if dataset.names else "numbers as a target"
        raise ValueError(
            f"expected {outputs} {what}, as many as the backbone has outputs, got {dataset.classes} in {dataset.name}; "
            "give the network a last layer of as many outputs, or give other data (a torch Dataset may name classes "
            "that it has no example of: `classes`)"
        )
    if kinds := {str(p.dtype) for p in backbone.parameters() if p.is_floating_point() and p.dtype != torch.float32}:
        raise ValueError(
            f"expected a backbone with weights of torch.float32, as learning needs, got {', '.join(sorted(kinds))}; "
            "train it so, and convert the plugged model: model.to(dtype=torch.bfloat16)"
        )
    if learning.finetune:
        check_learns(backbone)
    sight = sight_of(learning.policy, backbone)
    reward = check_reward(learning.reward, dataset.task, sight.span >= backbone.max_steps)
    try_reward(reward, dataset.task, dataset.validation.targets[:64], dataset.classes)
    if settings.place.num_env_runners and is_own(dataset.name):
        raise ValueError(
            "remote processes do not see the data of this one: bring it by a plugin, or leave out num_env_runners"
        )
    agent_class(learning.agent).refuse(settings, backbone)
    if learning.attacked:
        check_attackable(backbone)
        Ball.of(dataset)
    try_out(learning, backbone, dataset.validation)
    return planned


def join_sources(planned: Plan, sources: Sequence[str | Path]) -> Backbone:
    """Return one backbone made of the networks of several folders; raise a ValueError if it is not for the run.

    A folder's network is the plain one, or the backbone where there is no plain one.
    """
    files = [RunFolder(source) for source in sources]
    networks = [load_backbone(f.plain_file if f.plain_file.is_file() else f.backbone_file)[0] for f in files]
    joined = type(planned.backbone).joined(networks)
    _check_given(planned, joined)
    return joined


def _check_given(planned: Plan, backbone: Backbone) -> None:
    for name in PRETRAINED_HERE:
        if getattr(planned.settings.problem, name) != getattr(Problem, name):
            raise ValueError(f"{name} is for a backbone that is pretrained here; leave out {name} or the backbone")
    _checked(replace(planned, backbone=backbone, dataset=planned.dataset.seen_by(backbone.known)))


def check_source(planned: Plan, source: str | Path) -> RunFolder:
    """Return the folder whose backbone a run takes; raise a ValueError if that backbone is not for the run."""
    _check_given(planned, _backbone_of(source, planned.settings.problem))
    return RunFolder(source)


def _backbone_of(source: str | Path, problem: Problem) -> Backbone:
    given = RunFolder(source)
    if not Path(source).is_dir():
        raise ValueError(f"expected a folder that holds {given.backbone_file.name} as the backbone, got {source}")
    backbone, _ = load_backbone(given.backbone_file)
    if backbone.decision != problem.decision:
        raise ValueError(f"{source} poses {backbone.decision!r}, not {problem.decision!r}")
    return backbone
