"""All agents share their base class, their registry, and the numbers that a backbone implies for learning on it."""

from __future__ import annotations

import importlib
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from dynrl.agents.metrics import TrainingLog
from dynrl.backbones import Backbone, State
from dynrl.data import Dataset, Split, load_dataset
from dynrl.files import read_json, write_json
from dynrl.policies import LearnedPolicy, PolicySpec, Sight
from dynrl.policies.files import check_kind
from dynrl.progress import progress
from dynrl.routes import draw_routes
from dynrl.schema import check_known
from dynrl.settings import Learning, Place, Settings
from dynrl.tasks import TASKS

# Classes are named by strings, so that gates train without importing ray. A plugin adds a row:
# AGENTS["mine"] = "its_file:Mine".
AGENTS = {
    "ppo": "dynrl.agents.ppo:PPO", "appo": "dynrl.agents.appo:APPO", "dqn": "dynrl.agents.dqn:DQN",
    "sb3-ppo": "dynrl.agents.sb3:SB3PPO", "sb3-dqn": "dynrl.agents.sb3:SB3DQN", "gate": "dynrl.agents.gates:Gates",
}  # fmt: skip
WALKS, ENOUGH_STEPS, LEAST_STEPS = 8, 72, 16  # see `rollout`
MEASURED, LARGE = 256, 8.0  # see `feature_units`
FREE_STEPS = 8  # walks of at most this many decisions get the whole entropy bonus (see `entropy_bonus`)


class Agent:
    """An agent learns a policy for a frozen backbone. It is a context, because it holds open files and maybe processes.

    A subclass writes the methods of the first part below. It learns on `split_on`, or in an environment of
    `env_arguments`, which takes the same inputs. Checkpoints go to `folder/checkpoints`, TensorBoard's files
    to `folder`.

    Args:
        settings: the complete settings of the training.
        backbone_file: the file of the backbone; `reload` reads it again.
        folder: the run folder. Training continues from its newest checkpoint.
        total: the number of decisions in all, at which the schedules end.
        times: the times to charge instead of MACs, as `RoutingVectorEnv` takes them.
    """

    # The settings that this agent cannot follow, by name, each with the reason that a user is told.
    cannot: ClassVar[Mapping[str, str]] = {
        "baseline": "baselines are for agents such as ppo",
        "entropy": "an entropy bonus is for agents such as ppo, appo and sb3-ppo",
        "num_env_runners": "remote processes are for agents such as those of RLlib: ppo, appo, dqn",
        "num_learners": "remote processes are for agents such as those of RLlib: ppo, appo, dqn",
        "address": "ray is for agents such as those of RLlib: ppo, appo, dqn",
    }
    steps_share: ClassVar[float] = 1.0  # the share of a recipe's steps with which it takes about as long as PPO does
    attacks: ClassVar[bool] = False  # whether it attacks what it learns on itself; for others, `train_jointly` does
    checkpoint_every: int = 10  # the number of training iterations between checkpoints
    steps: int  # the number of decisions learned from so far

    def __init__(
        self,
        settings: Settings,
        backbone_file: Path,
        folder: Path,
        total: int,
        times: Mapping[str, Any] | None = None,
    ) -> None:
        self.settings, self.backbone_file, self.total, self.times = settings, backbone_file, total, times
        self.checkpoints = folder / "checkpoints"
        self._iteration, self._folder = 0, folder
        self._held = ExitStack()

    # for the agent to write --------------------------------------------------------------------------------

    @classmethod
    def refuse(cls, settings: Settings, backbone: Backbone) -> None:
        """Refuse, with a ValueError, settings that this agent cannot follow; called before anything is made.

        Args:
            settings: the complete settings of the training.
            backbone: a backbone of the shape to learn on, with any weights.
        """
        for part in (settings.learning, settings.place):
            for each in fields(part):
                name, value = each.name, getattr(part, each.name)
                if name in cls.cannot and value != each.default:
                    agent = settings.learning.agent
                    raise ValueError(f"{cls.cannot[name]}; the agent {agent} takes no {name}, got {value!r}")

    def start(self) -> None:
        """Set up, restore the newest checkpoint and set `steps`; put what must be closed on the stack `_held`."""
        raise NotImplementedError

    def iterate(self) -> dict[str, float]:
        """Learn from more decisions, add their number to `steps`, and return scalars by the tags of `TrainingLog`."""
        raise NotImplementedError

    def router(self) -> LearnedPolicy:
        """Return a copy of the present policy."""
        raise NotImplementedError

    def save(self) -> None:
        """Write a complete checkpoint, or none."""
        raise NotImplementedError

    def reload(self) -> None:
        """Continue on the backbone that `backbone_file` holds now."""
        raise NotImplementedError

    # the same for all --------------------------------------------------------------------------------------

    def data_on(self, backbone: Backbone) -> Dataset:
        """Return the data set as `backbone` sees it."""
        return load_dataset(self.settings.problem.data).seen_by(backbone.known)

    def split_on(self, backbone: Backbone) -> Split:
        """Return what to learn on, as `backbone` sees it: inputs that it was not trained on (`Dataset.unseen`).

        On inputs that it knows by heart, most of the compute would seem needless.
        """
        return self.data_on(backbone).unseen

    def ground_on(self, backbone: Backbone) -> Ground:
        """Return what there is to learn on `backbone`; the units of its features stay those of the first start."""
        kept = self.checkpoints / "units.json"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, feature_units(backbone, self.data_on(backbone).validation))
        return Ground.of(self.settings.learning, backbone, read_json(kept))

    def __enter__(self) -> Self:
        with ExitStack() as held:
            self._held = held
            self.start()
            if not hasattr(self, "steps"):
                raise ValueError(
                    f"expected {type(self).__name__}.start to set `steps`, the decisions learned from so far"
                )
            self._log = held.enter_context(TrainingLog(self._folder, begins_after=self.steps))
            self._bar = held.enter_context(
                progress(total=self.total, initial=self.steps, desc="learning", unit="step", unit_scale=True)
            )
            self._held = held.pop_all()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._held.close()

    @property
    def left(self) -> float:
        """The factor on the learning rate and the entropy bonus at the present step; it falls from 1 to a tenth."""
        return 1 - 0.9 * min(1.0, self.steps / self.total)

    def write(self, scalars: dict[str, float]) -> None:
        """Write `scalars` to TensorBoard at the present step."""
        self._log.write(self.steps, scalars)

    def learn(self, until: int, stop: threading.Event | None = None) -> None:
        """Learn until `steps` has reached `until` or `stop` is set, and write a checkpoint.

        Raises:
            ValueError: the policy's weights are no longer finite; the last checkpoint stays.
        """
        stop = stop or threading.Event()
        while self.steps < until and not stop.is_set():
            before, start = self.steps, time.perf_counter()
            scalars = self.iterate()
            if not isinstance(scalars, dict):
                raise ValueError(
                    f"expected {type(self).__name__}.iterate to return numbers by their names in TensorBoard, a dict, "
                    f"got a {type(scalars).__name__}"
                )
            self._iteration += 1
            scalars["throughput/steps_per_s"] = (self.steps - before) / (time.perf_counter() - start)
            self.write(scalars)
            self._bar.update(min(self.steps, self.total) - min(before, self.total))
            shown = ("reward", *TASKS, "macs_fraction", "routes/distinct")
            self._bar.set_postfix({tag: f"{scalars[tag]:.3g}" for tag in shown if tag in scalars}, refresh=False)
            if not all(torch.isfinite(p).all() for p in self.router().parameters()):
                if not math.isfinite(scalars.get("reward", 0.0)):  # on a CUDA device, steps do not look at it
                    raise ValueError(
                        f"the reward {self.settings.learning.reward!r} gave NaN or infinity by step {self.steps}, and "
                        "the policy learned from it; rewards are finite for all outputs"
                    )
                raise ValueError(
                    f"the policy's weights are no longer finite after {self.steps} steps; lower the learning rate "
                    f"({self.checkpoints} holds the last good checkpoint)"
                )
            if self.steps >= until or stop.is_set() or self._iteration % self.checkpoint_every == 0:
                self.save()
        if not self.steps:  # stopped at once: a policy without a checkpoint could not go on
            self.save()


def agent_class(name: str) -> type[Agent]:
    """Return the class of the agent `name` in `AGENTS`.

    Raises:
        ValueError: there is no such agent (the message lists all), its row names no class of an agent, the class lacks
            a hook, or what it takes is not installed.
    """
    check_known("agent", name, AGENTS)
    row: Any = AGENTS[name]
    module, _, kind = row.partition(":") if isinstance(row, str) else ("", "", "")
    if not module or not kind:
        raise ValueError(
            f"AGENTS[{name!r}]: expected 'module:Class', which is imported where it is needed, got {row!r}"
        )
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or module).partition(".")[0] == module.partition(".")[0]:
            raise ValueError(
                f"AGENTS[{name!r}] is {row!r}, but there is no module {error.name!r} here; a plugin's module is its "
                "file's name without .py"
            ) from None
        raise ValueError(
            f"the agent {name!r} takes {error.name}, which is not installed: pip install 'dynrl[train]' (from a "
            "checkout: pip install '.[train]')"
        ) from None
    found: Any = getattr(imported, kind, None)
    if not isinstance(found, type) or not issubclass(found, Agent):
        got = f"has no {kind}" if found is None else f"has {found!r}"
        raise ValueError(f"AGENTS[{name!r}] is {row!r}: expected a class of Agent, but {module} {got}")
    hooks = ("start", "iterate", "router", "save")  # and `reload`, which not every training calls
    if missing := [hook for hook in hooks if getattr(found, hook) is getattr(Agent, hook)]:
        raise ValueError(f"the agent {name!r} cannot learn: {kind} has no {', '.join(missing)}; write these hooks")
    return found


def open_agent(
    settings: Settings, backbone_file: Path, folder: Path, total: int, times: Mapping[str, Any] | None = None
) -> Agent:
    """Return the agent that `settings` name, a context to enter; see `Agent` for the arguments."""
    return agent_class(settings.learning.agent)(settings, backbone_file, folder, total, times)


def train_policy(
    settings: Settings, backbone_file: Path, folder: Path, times: Mapping[str, Any] | None = None
) -> tuple[LearnedPolicy, bool]:
    """Train a policy for a frozen backbone, from the newest checkpoint in `folder` on; see `Agent` for the arguments.

    Returns:
        the policy, and whether all steps were done; False after Ctrl-C.
    """
    total = settings.learning.steps
    with stop_on_interrupt() as stop, open_agent(settings, backbone_file, folder, total, times) as agent:
        agent.learn(total, stop)
        return agent.router(), agent.steps >= total


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Within the block, the first Ctrl-C or SIGTERM sets the event, so no iteration is cut short; the second raises."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield stop
        return

    def note(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# How to learn on a backbone ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ground:
    """A ground describes the walks of one backbone as one kind of policy sees them; agents learn on it.

    Attributes:
        looks: the environment steps of the longest walk, one for each look.
        decisions: how many decisions an environment step counts as.
        rollout: the environment steps of each row in a training iteration.
        spec: the specification that builds the policy.
    """

    looks: int
    decisions: int
    rollout: int
    spec: PolicySpec

    @classmethod
    def of(cls, learning: Learning, backbone: Backbone, units: Sequence[float] | None = None) -> Ground:
        """Return the ground of a training on `backbone`, whose features have these units (see `feature_units`)."""
        sight = sight_of(learning.policy, backbone)
        looks = sight.looks(backbone.max_steps)
        known = learning.price_range or (1.0, 1.0)  # a plan is checked before prices are found
        spec = PolicySpec.of(learning.policy, backbone, known, learning.hidden, units)
        return cls(looks, min(sight.span, backbone.max_steps), rollout(backbone, looks), spec)


@torch.inference_mode()
def feature_units(backbone: Backbone, split: Split) -> list[float] | None:
    """Return what to divide each feature of a backbone by, so that policies can learn from it.

    A feature whose root mean square over random routes of all rates is beyond `LARGE` is divided by that, rounded to a
    power of 2; all others stay as they are. None stands for a backbone without such features. What a backbone suggests
    stays, since scores are made of it.
    """
    network, split = backbone.for_inference(), split.head(MEASURED)
    rates = torch.linspace(0, 1, len(split))
    route = draw_routes(backbone.thrift, rates, torch.Generator().manual_seed(0))
    squares, rows = torch.zeros(2, backbone.feature_width, dtype=torch.float64)

    def choose(state: State) -> Tensor:
        features = network.observe(state).double()
        squares[: features.shape[1]] += features.square().sum(0)
        rows[: features.shape[1]] += len(features)
        return state.along(route)

    network.run(split.inputs[:], choose)
    size = (squares / rows.clamp_min(1)).sqrt()
    size[backbone.feature_width - backbone.suggested :] = 0
    large = size > LARGE
    return size.log2().round().exp2().where(large, 1.0).tolist() if large.any() else None


def sight_of(kind: str, backbone: Backbone) -> Sight:
    """Return the sight by which policies of the kind `kind` see `backbone`.

    Raises:
        ValueError: the kind is unknown, or its policies cannot see such inputs.
    """
    return check_kind(kind).sight_class.of(backbone)


def walks(backbone: Backbone) -> int:
    """Return how many walks of each row an iteration has: eight, or as many as fit in `ENOUGH_STEPS` decisions."""
    return max(1, min(WALKS, ENOUGH_STEPS // backbone.max_steps))


def rollout(backbone: Backbone, looks: int) -> int:
    """Return the environment steps of each row in a training iteration; they make up whole walks of `looks` steps.

    If a walk has few looks, it gives few samples to learn from. Then there are more walks, with at least `LEAST_STEPS`
    steps in all.
    """
    return math.ceil(max(LEAST_STEPS, walks(backbone) * looks) / looks) * looks


def entropy_bonus(learning: Learning, usual: float, backbone: Backbone) -> float:
    """Return the bonus for each decision, the settings' own or the agent's `usual` one; less of it for long walks.

    Walks of up to `FREE_STEPS` decisions have all of it. Each decision of a longer walk changes the return less. With
    the same bonus, policies would stay undecided, and their likeliest choices, taken at every step, would lead to
    states that training never met.
    """
    entropy = usual if learning.entropy is None else learning.entropy
    return entropy * min(1.0, FREE_STEPS / backbone.max_steps)


def attacked_file(backbone_file: Path) -> Path:
    """Return the file of attacked inputs for policies, beside the backbone that they were found on."""
    return backbone_file.with_name("attacked.safetensors")


def env_arguments(settings: Settings, backbone_file: Path, times: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the environment's arguments, except for the number of rows and the way it resets."""
    learning: Learning = settings.learning
    place: Place = settings.place
    return {
        "backbone": str(backbone_file.resolve()), "data": settings.problem.data, "split": "unseen",
        "price_range": list(learning.prices), "reward": learning.reward,
        "sight": check_kind(learning.policy).sight_class.name, "times": times,
        "device": place.device, "dtype": learning.dtype,
        "attacked": str(attacked_file(backbone_file).resolve()) if learning.attacked else None,
    }  # fmt: skip
