"""The settings of one training say what is learned, how, and where; `config.json` holds them under the same names."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from dynrl.files import read_json, write_json


@dataclass(frozen=True)
class Problem:
    """The problem says what is decided on which data.

    Attributes:
        decision: The decision to learn; `dynrl list` shows all of them.
        data: The name of a data set; or a folder that has a folder of images for each class; or FOLDER@SIZE, which
            crops the images to squares and resizes them to SIZE pixels.
        network: Settings, each NAME=VALUE, in which the backbone that is pretrained here differs from the data set's
            defaults.
        seed: The seed of the policy and of the inputs it meets, and of a backbone that is pretrained here.
    """

    decision: str
    data: str
    network: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        _in_range("seed", self.seed, 0)


@dataclass(frozen=True)
class Learning:
    """These settings say how a policy is learned. Runs of one problem with equal `Learning` are alike but for seeds.

    Attributes:
        agent: The algorithm that learns: ppo, appo (for many runners) or dqn from RLlib; sb3-ppo or sb3-dqn from
            Stable-Baselines3; gate, which trains soft gates by gradient (straight-through), for comparison; or one that
            a plugin adds.
        policy: The kind of policy: sequential decides step by step from what the network computes; upfront decides all
            steps at once from the input, before the network runs.
        hidden: The number of units in the policy's hidden layer; 0 makes a linear policy.
        steps: The number of decisions to learn from, not counting those of the fine-tuning rounds.
        num_envs: The number of inputs that one runner routes at the same time; for gates, the size of a batch.
        price_range: The lowest and highest price of the dense network's compute, in units of the reward's accuracy
            term. Left out, the range in which a policy goes from spending all to its least is measured on the backbone.
        reward: The accuracy term that the price is weighed against: distillation, log_likelihood, gain, correct,
            blockdrop, or one that a plugin adds.
        baseline: What PPO compares a reward with: value is a learned estimate; group is the mean over eight routes of
            the same input, including the likeliest one; greedy is the reward of the likeliest route alone
            (self-critical training, for policies that decide a whole walk at once).
        learning_rate: The optimiser's learning rate at the start; it falls to a tenth.
        entropy: The bonus for undecided policies at the start; it falls to a tenth. Only for PPO and APPO.
        cost: The cost that the price refers to: macs counts multiply-accumulates; time is the time of each choice on
            this machine, measured first in batches of 256. Budgets remain shares of the MACs, or milliseconds after
            `dynrl calibrate`.
        finetune: Whether backbone and policy are trained in turn afterwards, by the data set's plan. This is always
            done where no backbone survives random routes (recurrent ones on adding).
        dtype: The number type of the backbone while the policy learns on it.
    """

    agent: str = "ppo"
    policy: str = "sequential"
    hidden: int = 64
    steps: int = 300_000
    num_envs: int = 64
    price_range: tuple[float, float] | None = None  # None: found before learning, and then written down
    reward: str = "distillation"
    baseline: str = "value"
    learning_rate: float | None = None  # None takes the agent's own value, here and for the entropy bonus
    entropy: float | None = None
    cost: Literal["macs", "time"] = "macs"
    finetune: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("hidden", 0), ("num_envs", 1)):
            _in_range(name, getattr(self, name), least)
        if self.price_range is not None and not 0 < self.price_range[0] <= self.price_range[1] < math.inf:
            raise ValueError(f"expected a price range (low, high) with 0 < low <= high, got {self.price_range}")
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise ValueError(f"expected a learning_rate above 0 and below 1, got {self.learning_rate}")
        if self.entropy is not None and not 0 <= self.entropy < 1:
            raise ValueError(f"expected an entropy of at least 0 and below 1, got {self.entropy}")

    @property
    def prices(self) -> tuple[float, float]:
        """The price range, once it is known: agents ask no earlier."""
        assert self.price_range is not None, "prices are found before a policy learns"
        return self.price_range


@dataclass(frozen=True)
class Place:
    """The place is where the work is done. It is not saved, because a run may continue elsewhere.

    Attributes:
        device: The device on which the backbone runs and is trained, for example `cuda`. The policy is small and learns
            on the CPU.
        num_env_runners: The number of remote processes that sample, each with `num_envs` inputs; with 0, this process
            samples. Only for agents from RLlib.
        num_learners: The number of remote processes that learn, each from its share of the environments; with 0, this
            process learns. Only for agents from RLlib.
        address: The address of a ray cluster to run on, or `auto` for the one on this machine; its machines must share
            the run folder. By default, ray is started here. Only for agents from RLlib.
    """

    device: str = "cpu"
    num_env_runners: int = 0
    num_learners: int = 0
    address: str | None = None

    def __post_init__(self) -> None:
        _in_range("num_env_runners", self.num_env_runners, 0)
        _in_range("num_learners", self.num_learners, 0)


@dataclass(frozen=True)
class Settings:
    """These are all settings of one training."""

    problem: Problem
    learning: Learning = field(default_factory=Learning)
    place: Place = field(default_factory=Place)

    def save(self, path: str | Path) -> None:
        """Write `problem` and `learning` to a JSON file."""
        write_json(path, {"problem": asdict(self.problem), "learning": asdict(self.learning)})

    @classmethod
    def read(cls, path: str | Path, place: Place | None = None) -> Settings:
        """Read what `save` wrote.

        Raises:
            ValueError: a field is unknown or missing, or a value has the wrong type; the message names file and field.
        """
        written = read_json(path)
        _same_names(f"{path}: ", written, ("problem", "learning"))
        try:
            problem = parse(Problem, written["problem"], "problem.")
            return cls(problem, parse(Learning, written["learning"], "learning."), place or Place())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def names(*kinds: type) -> list[str]:
    """Return the names of all fields of settings classes."""
    return [each.name for kind in kinds for each in fields(kind)]


def parse(kind: type, values: Any, prefix: str = "") -> Any:
    """Make an instance of a settings class from JSON values, which have lists in place of tuples.

    Raises:
        ValueError: a field is unknown or missing, or a value has the wrong type.
    """
    _same_names(prefix, values, names(kind))
    hints, found = typing.get_type_hints(kind), {}
    for name, value in values.items():
        found[name] = tuple(value) if isinstance(value, list) else value
        if not _fits(found[name], hints[name]):
            said = getattr(hints[name], "__name__", None) if isinstance(hints[name], type) else None
            raise ValueError(f"{prefix}{name}: expected {said or hints[name]}, got {value!r}")
    return kind(**found)


def _same_names(prefix: str, values: Any, expected: typing.Sequence[str]) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix.rstrip('.: ')}: expected an object with {', '.join(expected)}, got {values!r}")
    for what, differ in (
        ("unknown", [n for n in values if n not in expected]), ("missing", [n for n in expected if n not in values]),
    ):  # fmt: skip
        if differ:
            raise ValueError(f"{prefix}{differ[0]}: {what} setting; expected {', '.join(expected)}, got {list(values)}")


def _fits(value: Any, hint: Any) -> bool:
    """Tell whether a value has the type that a field is annotated with."""
    origin, given = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in given
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in given)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        each = given[:1] * len(value) if given[1:] == (...,) else given
        return len(value) == len(each) and all(map(_fits, value, each))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def _in_range(name: str, value: int, least: int) -> None:
    if not least <= value < 2**31:
        raise ValueError(f"expected {name} of at least {least} and below 2^31, got {value}")
