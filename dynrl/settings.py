"""The settings of one training say what is learned, how, and where; `config.json` holds them under the same names."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from dynrl.files import read_json, reading, write_json
from dynrl.schema import MOST_ROWS, Dtype, check_count, check_price_range, parse

MOST_PROCESSES = 1_000  # remote processes of one run
PRETRAINED_HERE = ("network", "epochs", "plain")  # a backbone that is there leaves no room for these


@dataclass(frozen=True)
class Problem:
    """The problem says what is decided on which data.

    Attributes:
        decision: The decision to learn; `dynrl list` shows all of them.
        data: The name of a data set; or a folder that has a folder of images, or a text file with a document a line,
            for each class; or FOLDER@SIZE, which crops the images to squares and resizes them to SIZE pixels, or reads
            SIZE words of each text.
        network: Settings, each NAME=VALUE, in which the backbone that is pretrained here differs from the data set's
            defaults: arguments of its family, and family=NAME for another one.
        epochs: The epochs of the plain network and of the backbone that are pretrained here; by default, as many as
            suit the data.
        plain: Whether the plain network is trained first. Without it, random routes are learned at once, from the
            weights that the network comes with: for a network of your own that is trained already.
        seed: The seed of the policy and of the inputs it meets, and of a backbone that is pretrained here.
    """

    decision: str
    data: str
    network: tuple[str, ...] = ()
    epochs: int | None = None
    plain: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs is not None:
            check_count("epochs", self.epochs, 1, 1_000_000)
        check_count("seed", self.seed, 0)


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
        reward: The accuracy term that the price is weighed against: distillation, log_likelihood, gain,
            probability, correct, blockdrop, or one that a plugin adds.
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
        attacked: The share of inputs that are attacked while backbone and policy are trained in turn, as `dynrl attack`
            does it, so that attacks take less of what the policy saves. More than 0 implies finetune.
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
    attacked: float = 0.0
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 1)
        check_count("hidden", self.hidden, 0, MOST_ROWS)
        check_count("num_envs", self.num_envs, 1, MOST_ROWS)
        if self.price_range is not None:
            check_price_range(self.price_range)
        if self.learning_rate is not None and not 1e-12 <= self.learning_rate < 1:  # less moves no float32 weight
            raise ValueError(f"expected a learning_rate above 0 and below 1, got {self.learning_rate}")
        if self.entropy is not None and not 0 <= self.entropy < 1:
            raise ValueError(f"expected an entropy of at least 0 and below 1, got {self.entropy}")

        if not 0 <= self.attacked <= 1:
            raise ValueError(f"expected attacked, a share of inputs, from 0 to 1, got {self.attacked}")

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
        check_count("num_env_runners", self.num_env_runners, 0, MOST_PROCESSES)
        check_count("num_learners", self.num_learners, 0, MOST_PROCESSES)


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
        with reading(path, "settings of dynrl train"):
            groups = parse(_Written, written)
            problem = parse(Problem, groups.problem, "problem.")
            return cls(problem, parse(Learning, groups.learning, "learning."), place or Place())


@dataclass(frozen=True)
class _Written:
    """The groups of settings that a run folder's config.json holds."""

    problem: Any
    learning: Any


def names(*kinds: type) -> list[str]:
    """Return the names of all fields of settings classes."""
    return [each.name for kind in kinds for each in fields(kind)]
