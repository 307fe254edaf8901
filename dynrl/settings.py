"""The settings of one training: what is learned, how, and where. They are saved as they are, in `config.json`."""

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
    """What is decided on which data.

    Attributes:
        decision: What to decide; see `dynrl list`.
        data: A data set by name, a folder with a folder of images for each class, or FOLDER@SIZE, to which their
            squares are brought.
        network: Settings of a backbone that is pretrained here and differs from the data set's defaults, each
            NAME=VALUE.
        seed: Seed of the policy and of what it meets, and of a backbone that is pretrained here.
    """

    decision: str
    data: str
    network: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        _in_range("seed", self.seed, 0)


@dataclass(frozen=True)
class Learning:
    """How a policy is learned. Two runs whose `Learning` is equal differ in their seeds at most.

    Attributes:
        agent: What learns: RLlib's ppo, appo (for many runners) or dqn; Stable-Baselines3's sb3-ppo or sb3-dqn; gate,
            gates trained by gradient (straight-through), beside which the others must stand; or what a plugin brings.
        policy: The kind of policy: sequential decides step by step from what the network computes, upfront all at once
            from the input, before the network runs.
        hidden: Units of the policy's hidden layer; 0 makes a linear policy.
        steps: Decisions to learn from, those of fine-tuning's rounds not counted.
        num_envs: Inputs that walk side by side in one runner; for gates, the size of a batch.
        num_env_runners: Remote processes that sample, each with `num_envs` inputs; with 0 this process samples. For
            RLlib's agents.
        price_range: Lowest and highest price of the dense network's compute, in units of the reward's accuracy term.
            Left out, the range in which a policy goes from spending all to its least is measured on the backbone.
        reward: What is set against the price: distillation, log_likelihood, gain, correct, blockdrop, or what a plugin
            brings.
        baseline: What PPO compares a reward with: value, a learned one; group, what eight routes of the same input earn
            on average, the likeliest among them; greedy, what the likeliest route alone earns (self-critical, for
            policies that decide a whole walk at once).
        learning_rate: Of the optimiser, at the start; it falls to a tenth.
        entropy: Bonus for undecided policies, at the start; it falls to a tenth. For PPO and APPO.
        cost: What the price is of: macs (multiply-accumulates) or time, that of each choice on this machine, which is
            measured first in batches of 256. Budgets stay shares of the MACs, or milliseconds after dynrl calibrate.
        finetune: Whether backbone and policy are then trained in turn, by the data set's plan. Where no backbone
            survives random routes (recurrent ones on adding) that is always done.
        dtype: Type of the backbone's numbers while the policy learns on it.
    """

    agent: str = "ppo"
    policy: str = "sequential"
    hidden: int = 64
    steps: int = 300_000
    num_envs: int = 64
    num_env_runners: int = 0
    price_range: tuple[float, float] | None = None  # None: found before learning, and then written down
    reward: str = "distillation"
    baseline: str = "value"
    learning_rate: float | None = None  # None: the agent's own; so is the entropy bonus
    entropy: float | None = None
    cost: Literal["macs", "time"] = "macs"
    finetune: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("hidden", 0), ("num_envs", 1), ("num_env_runners", 0)):
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
    """Where the work is done. It is not saved: a run may go on elsewhere.

    Attributes:
        device: Where the backbone runs and is trained, `cuda` say; the policy, which is small, learns on the CPU.
        num_learners: Remote processes that learn, each from its share of the environments; with 0 this process learns.
            For RLlib's agents.
        address: Address of a ray cluster to run on, `auto` for the one on this machine; its machines must share the
            run's folder. By default ray is started here. For RLlib's agents.
    """

    device: str = "cpu"
    num_learners: int = 0
    address: str | None = None

    def __post_init__(self) -> None:
        _in_range("num_learners", self.num_learners, 0)


@dataclass(frozen=True)
class Settings:
    """All settings of one training."""

    problem: Problem
    learning: Learning = field(default_factory=Learning)
    place: Place = field(default_factory=Place)

    def save(self, path: str | Path) -> None:
        """Write problem and learning as JSON."""
        write_json(path, {"problem": asdict(self.problem), "learning": asdict(self.learning)})

    @classmethod
    def read(cls, path: str | Path, place: Place | None = None) -> Settings:
        """Read what `save` wrote.

        Raises:
            ValueError: an unknown or missing field, or a value of another type; it names the file and the field.
        """
        written = read_json(path)
        _same_names(f"{path}: ", written, ("problem", "learning"))
        try:
            problem = parse(Problem, written["problem"], "problem.")
            return cls(problem, parse(Learning, written["learning"], "learning."), place or Place())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def names(*kinds: type) -> list[str]:
    """The names of all fields of settings classes."""
    return [each.name for kind in kinds for each in fields(kind)]


def parse(kind: type, values: Any, prefix: str = "") -> Any:
    """An instance of a settings class from values as JSON has them: lists where it has tuples.

    Raises:
        ValueError: an unknown or missing field, or a value of another type.
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
    """Whether a value is of the type that a field is annotated with."""
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
