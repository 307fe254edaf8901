"""A run folder holds the files of one training; its kind says what was trained."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dynrl.backbones import Backbone, load_backbone
from dynrl.data import Dataset, as_dataset, load_dataset
from dynrl.deploy import LATENCY, RoutedModel, check_policy, plug, policy_fingerprint
from dynrl.files import read_json, reading
from dynrl.plugins import find_again
from dynrl.policies import load_policy
from dynrl.provenance import Provenance
from dynrl.schema import parse
from dynrl.settings import PRETRAINED_HERE, Problem, Settings


@dataclass(frozen=True)
class RunKind:
    """A kind says what a run is, apart from its seed; runs of one kind differ in their seeds only.

    Attributes:
        agent: the name of the agent that learned.
        policy: the kind of policy, "sequential" or "upfront".
        baseline: what rewards were compared with.
        reward: the reward's name.
        price: the only price that the policy was trained at; None for a range of prices.
        cost: the cost that the price refers to, "macs" or "time".
        tuned: whether the backbone was fine-tuned, too.
        attacked: whether that was done on attacked inputs.
        finished: whether training came to its end.
    """

    agent: str = "ppo"
    policy: str = "sequential"
    baseline: str = "value"
    reward: str = "distillation"
    price: float | None = None
    cost: str = "macs"
    tuned: bool = False
    attacked: bool = False
    finished: bool = True

    @property
    def label(self) -> str:
        """Return the name that reports show: "learned", and everything that differs from the default."""
        words = ["learned" if self.agent == "ppo" else self.agent]
        words += [word for word, usual in ((self.policy, "sequential"), (self.baseline, "value")) if word != usual]
        words += [self.reward] if self.reward != "distillation" else []
        words += [f"by {self.cost}"] if self.cost != "macs" else []
        words += [f"at {price_word(self.price)}"] if self.price is not None else []
        words += ["tuned"] if self.tuned else []
        words += ["on attacks"] if self.attacked else []
        words += [] if self.finished else ["unfinished"]
        return " ".join(words)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary, for a report."""
        return asdict(self)


def kind_of(settings: Mapping[str, Any], tuned: bool, finished: bool) -> RunKind:
    """Return the kind of a run with these settings (`RunFolder.settings`)."""
    low, high = settings["price_range"] or (None, None)  # not known until there is a backbone
    return RunKind(
        agent=settings["agent"],
        policy=settings["policy"],
        baseline=settings["baseline"],
        reward=settings["reward"],
        price=low if low == high else None,
        cost=settings["cost"],
        tuned=tuned,
        attacked=tuned and settings["attacked"] > 0,
        finished=finished,
    )


def price_word(price: float) -> str:
    """Return a price in as many digits as tell it from all others: 2, 0.1, 0.1000000001."""
    return repr(price).removesuffix(".0")


# The settings in which runs of one kind may differ: backbones are compared by content, not by how they were made.
FREE = {"seed", *PRETRAINED_HERE}
FOUND = {"price_range"}  # what is found on each backbone, and may be another on each
# What is measured on a policy: the files that tell its fingerprint, and the pictures beside them.
MEASURED = {"report.json": ("report.png", "words.png", "regions.png"), "attack.json": ("attack.png",)}


class RunFolder:
    """A run folder reads and checks each of its files once, when the file is first needed.

    Plugins that it was made with are imported at once, if they were given on this machine before.

    Attributes:
        path: the folder.
        config_file: the file of the settings that the run was made with.
        backbone_file: the file of the backbone that the policy was trained for.
        pretrained_file: the file of that backbone from before any fine-tuning.
        plain_file: the file of the same network, trained on its full route only.
        data_file: the file of what the run's data were when it was made (`dynrl.provenance`).
        first_file: the file of what the backbone was before it was trained; it goes when the trained one is there.
        recipe_file: the file of how the backbone is trained, where it is trained in this folder.
        kept_file: the copy of the backbone that is made when fine-tuning begins.
        policy_file, times_file, latency_file, report_file: the files of the policy, of the times of choices, of the
            times of batches, and of the report.
        checkpoints: the folder of the agent's checkpoints.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        self.config_file, self.checkpoints = path / "config.json", path / "checkpoints"
        self.backbone_file, self.plain_file = path / "backbone.safetensors", path / "plain.safetensors"
        self.first_file = path / "backbone-first.safetensors"
        self.data_file, self.recipe_file = path / "data.json", path / "recipe.json"
        self.policy_file, self.report_file = path / "policy.safetensors", path / "report.json"
        self.times_file, self.latency_file = path / "times.json", path / LATENCY
        self.kept_file = path / "backbone-pretrained.safetensors"  # written when fine-tuning begins
        find_again(path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def pretrained_file(self) -> Path:
        """The file of the backbone from before any fine-tuning: the copy that was kept, where it was tuned.

        Raises:
            ValueError: the backbone was tuned, and that copy is missing.
        """
        if self.kept_file.is_file():
            return self.kept_file
        if self.rounds:
            raise ValueError(
                f"{self} was fine-tuned, but its {self.kept_file.name} is not there, which it began from and is "
                "compared by: put that back, or name the run that it was copied from"
            )
        return self.backbone_file

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of `config.json`.

        Raises:
            ValueError: the folder is no run folder, or no run of `dynrl train`.
        """
        if not self.config_file.is_file():
            raise ValueError(f"{self} is no run folder: it has no config.json; name a folder that dynrl train made")
        config = read_json(self.config_file)
        if not isinstance(config, dict) or "problem" not in config:
            raise ValueError(f"{self.config_file} is not what dynrl train writes; name a folder that dynrl train made")
        if "plain" not in config:
            Settings.read(self.config_file)
            return config
        with reading(self.config_file, "settings of dynrl pretrain"):
            parse(Problem, config["problem"], "problem.")
        check_policy(self.path)
        return config

    def forget(self) -> None:
        """Forget what was read, since files were written anew."""
        for name, kept in vars(type(self)).items():
            if isinstance(kept, cached_property):
                vars(self).pop(name, None)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings by their own names, without their groups."""
        return flat(self.config)

    @property
    def decision(self) -> str:
        """The name of the decision."""
        return str(self.settings["decision"])

    @property
    def data(self) -> str:
        """The data set's name."""
        return str(self.settings["data"])

    @property
    def data_known(self) -> Provenance | None:
        """What the run's data were when it was made; None if its folder does not say."""
        if self.data_file.is_file():
            return Provenance.read(read_json(self.data_file), str(self.data_file))
        return self.backbone.trained_on if self.backbone_file.is_file() else None

    def dataset(self, data: Any = None) -> Dataset:
        """Load the run's data set by its name, or `data`, the place where the same data are now.

        Args:
            data: whatever `dynrl.data.as_dataset` takes; None takes the name that the run was made with.

        Raises:
            ValueError: there is no such data set, or `data` are not the run's data.
        """
        if data is None:
            try:
                found = load_dataset(self.data)
            except ValueError as error:
                raise ValueError(f"{self}: {error}; if its data lie elsewhere now, name that place (--data)") from None
            return self._kept(found)
        known = self.data_known
        handed = isinstance(data, Dataset) and data.name == self.data
        if handed and known is not None and known.content not in (None, data.content):
            raise ValueError(f"{self} was trained on other data of the name {data.name!r}; hand those over again")
        found = as_dataset(data)
        if found.name == self.data:
            return self._kept(found)
        if known is None:
            raise ValueError(f"{self} does not say what {self.data} held, so {found.name} cannot take its place")
        try:
            found.check_same(known)
        except ValueError as error:
            raise ValueError(f"{self} was trained on other data: {error}") from None
        return found

    def _kept(self, found: Dataset) -> Dataset:
        """Return data of the run's name; refuse, with a ValueError, those whose rows may have changed their parts."""
        known = self.data_known
        if known is not None:
            try:
                found.check_kept(known)
            except ValueError as error:
                raise ValueError(f"{self}: {error}") from None
        return found

    @property
    def seed(self) -> int:
        """The policy's seed."""
        return int(self.settings["seed"])

    @cached_property
    def _backbone(self) -> tuple[Backbone, dict[str, Any]]:
        if not self.backbone_file.is_file():
            check_policy(self.path)
        return load_backbone(self.backbone_file)

    @property
    def backbone(self) -> Backbone:
        """The backbone that the policy was trained for."""
        return self._backbone[0]

    @property
    def rounds(self) -> int:
        """How many rounds the backbone was fine-tuned for; 0 if it was not."""
        return int(self._backbone[1].get("rounds", 0))

    @cached_property
    def pretrained(self) -> Backbone:
        """The backbone from before any fine-tuning; raises a ValueError if it is missing (`pretrained_file`)."""
        file = self.pretrained_file
        return self.backbone if file == self.backbone_file else load_backbone(file)[0]

    @cached_property
    def plain(self) -> Backbone | None:
        """The same network, trained on its full route only; None if there is none, or it was not trained."""
        if not self.plain_file.is_file():
            return None
        network, known = load_backbone(self.plain_file)
        return None if known.get("epochs") == 0 else network

    @cached_property
    def finished(self) -> bool:
        """Whether the folder holds a policy whose training came to its end."""
        return self.policy_file.is_file() and bool(load_policy(self.policy_file)[1]["finished"])

    @cached_property
    def model(self) -> RoutedModel:
        """The backbone with the policy plugged in.

        Raises:
            ValueError: there is no policy yet, or the files are damaged or do not belong together.
        """
        check_policy(self.path)
        return plug(self.backbone, self.policy_file)

    @property
    def kind(self) -> RunKind:
        """The kind of what the folder holds; a ValueError is raised if there is no policy yet."""
        check_policy(self.path)
        # The backbone's own notes decide: a run that was killed during fine-tuning still has the policy from before.
        return kind_of(self.settings, self.rounds > 0, self.finished)

    @property
    def policy(self) -> str | None:
        """The fingerprint of the policy in the folder; None if there is none that fits the backbone."""
        try:
            return policy_fingerprint(plug(load_backbone(self.backbone_file)[0], self.policy_file))
        except ValueError:
            return None

    def drop_measured(self, policy: str) -> None:
        """Remove reports and attacks, with their pictures, that do not tell the fingerprint `policy`."""
        for name, pictures in MEASURED.items():
            file = self.path / name
            if file.is_file() and policy.encode() not in file.read_bytes():
                for each in (file, *(self.path / picture for picture in pictures)):
                    each.unlink(missing_ok=True)

    def drop_half_made(self) -> None:
        """Remove the folder if a kill left it without settings, which are written before anything is trained.

        Raises:
            ValueError: there are no settings, and yet something that was trained: the settings were lost.
        """
        if not self.path.is_dir() or self.config_file.is_file():
            return
        if trained := sorted([*self.path.rglob("*.safetensors"), *self.checkpoints.glob("*")]):
            raise ValueError(
                f"{self} has no {self.config_file.name}, but it holds {trained[0].relative_to(self.path)}; put that "
                "file back, or move the folder away"
            )
        shutil.rmtree(self.path)


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested settings: {"learning": {"agent": ...}} becomes {"agent": ...}."""
    settings: dict[str, Any] = {}
    for name, value in config.items():
        settings |= flat(value) if isinstance(value, dict) else {name: value}
    return settings


def by_backbone(runs: Iterable[RunFolder]) -> dict[str, list[RunFolder]]:
    """Group runs of one problem by the fingerprints of their pretrained backbones, in the order in which they come.

    Raises:
        ValueError: the runs have different decisions or data sets, or backbones of different shapes, or one is not what
            `dynrl train` writes; or runs of one kind were not trained alike.
    """
    groups: dict[str, list[RunFolder]] = {}
    kinds: dict[RunKind, RunFolder] = {}
    first: RunFolder | None = None
    for run in runs:
        first = first or run
        _ = run.config  # a folder that holds no run is refused before any larger file is read
        for what in ("data", "decision"):
            if (mine := getattr(run, what)) != (other := getattr(first, what)):
                raise ValueError(f"{run} has the {what} {mine!r}, but {first} has {other!r}; report them apart")
        if run.pretrained.config != first.pretrained.config:
            raise ValueError(f"{run} and {first} have backbones of different shapes; report them apart")
        groups.setdefault(run.pretrained.fingerprint(), []).append(run)
        _check_alike(run, kinds.setdefault(run.kind, run), FREE | FOUND)
    return groups


def _check_alike(run: RunFolder, first: RunFolder, free: set[str]) -> None:
    """Refuse a run that differs from the first one of its kind in more settings than those that are `free`."""
    known = first.settings
    differ = {name for name, value in run.settings.items() if value != known.get(name)} - free
    if differ:
        raise ValueError(
            f"{first} and {run} are both {run.kind.label!r} and differ in {sorted(differ)}; report them apart"
        )


def by_kind(runs: Iterable[RunFolder]) -> dict[RunKind, list[RunFolder]]:
    """Group runs of one backbone by their kinds, in the order in which they come.

    Raises:
        ValueError: the runs have different backbones or data sets, or one is not what `dynrl train` writes; runs of one
            kind were not trained alike, or two of them have one seed.
    """
    runs = list(runs)
    for run in runs:
        _ = run.config  # a folder that holds no run is refused before any larger file is read
    if len({run.pretrained.fingerprint() for run in runs}) > 1 or len({run.data for run in runs}) > 1:
        raise ValueError(
            "these runs have different backbones or data sets; give runs that were trained on one backbone "
            "(dynrl train --backbone)"
        )
    kinds: dict[RunKind, list[RunFolder]] = {}
    for run in runs:
        alike = kinds.setdefault(run.kind, [])
        if alike:
            _check_alike(run, alike[0], FREE)
        if run.seed in [other.seed for other in alike]:
            raise ValueError(f"{run} is {run.kind.label!r} of seed {run.seed} a second time; leave one of them out")
        alike.append(run)
    return kinds


def runs_in(folder: Path) -> Iterator[RunFolder]:
    """Yield the run folders in `folder`, begun or finished."""
    for path in sorted(folder.glob("*")):
        run = RunFolder(path)
        if run.config_file.is_file() and "learning" in read_json(run.config_file):  # a pretrained network is no run
            yield run


def steps_beside(folder: Path, cells: Mapping[str, Settings], steps: int | None) -> dict[str, int]:
    """Return how many steps each of `cells` learns from, so that those of one kind learn alike with runs in `folder`.

    Args:
        folder: the folder of runs that will be compared; it need not exist.
        cells: the settings that each run of a matrix would have, by the name of its folder.
        steps: what is asked for; None takes what the runs in the folder have, and where there are none, the settings'.

    Raises:
        ValueError: a run in the folder could not be compared with a cell, also once that has gone on.
    """
    there = {run.path.name: run.settings for run in runs_in(folder) if run.path.name in cells or run.finished}
    found: dict[str, int] = {}
    for name, planned in cells.items():
        settings = there.get(name, flat(asdict(planned)))
        alike = {other: each for other, each in there.items() if _trained_for(each) == _trained_for(settings)}
        near = alike or {other: each for other, each in there.items() if each["agent"] == settings["agent"]}
        found[name] = steps or max((each["steps"] for each in near.values()), default=settings["steps"])
        wanted = {**settings, "steps": found[name]}
        for other, each in alike.items():
            differ = {key for key, value in each.items() if value != wanted[key]} - FREE - FOUND - {"data"}
            if other in cells and each["steps"] < found[name]:
                differ -= {"steps"}  # it goes on
            if differ:
                told = ", ".join(f"{key}={each[key]!r}, not {wanted[key]!r}" for key in sorted(differ))
                raise ValueError(
                    f"{folder / other} was trained with {told} as this command would, so they could not be compared: "
                    "leave out --steps, give more with all seeds that are there, or choose another --out"
                )
    return found


def _trained_for(settings: Mapping[str, Any]) -> RunKind:
    return kind_of(settings, settings["finetune"], finished=True)


def check_one_backbone(folder: Path, source: Path) -> None:
    """Refuse, with a ValueError, a backbone (in the folder `source`) that the runs in `folder` have not learned on."""
    given = RunFolder(source)
    for run in runs_in(folder):
        if not run.backbone_file.is_file():
            continue
        if not given.backbone_file.is_file():
            raise ValueError(
                f"{run} is there, but not the backbone that it learned on, in {source}; name a folder that holds it "
                "(--backbone; a run's will do), or choose another --out"
            )
        if run.pretrained.fingerprint() != given.pretrained.fingerprint():
            raise ValueError(
                f"{run} learned on another backbone than that in {source}; choose another --out, or name a folder that "
                "holds its own (--backbone; a run's will do)"
            )


@dataclass(frozen=True)
class Times:
    """The times of choices are the content of a times.json.

    Attributes:
        start, choices: the milliseconds before the first decision, and of each choice at each point.
        batch_size, device, hardware: how they were measured.
    """

    start: float
    choices: tuple[tuple[float, ...], ...]
    batch_size: int
    device: str
    hardware: dict[str, Any]


def read_times(file: Path, backbone: Backbone) -> dict[str, Any]:
    """Return the times in `file`; raise a ValueError that names the file if it is not for `backbone`."""
    written = read_json(file)
    with reading(file, "file of times"):
        times = parse(Times, written)
        found = {"start": times.start, "choices": times.choices}
        backbone.time_table(found)  # which refuses what does not fit
    return found
