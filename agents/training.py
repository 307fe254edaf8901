"""Train a policy to the end, through kills and Ctrl-C: alone, or in turn with its backbone."""

from __future__ import annotations

import importlib
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dynrl.agents.metrics import TrainingLog
from dynrl.backbones import Backbone, load_backbone
from dynrl.data import load_dataset
from dynrl.finetuning import Finetuner, Finetuning
from dynrl.observation import Layout, View
from dynrl.policies import LearnedPolicy, build_policy
from dynrl.progress import progress
from dynrl.tasks import TASKS

EXPLORATION = (1.0, 0.05)  # DQN's share of random choices, at the first step and from a fifth of all on
UPFRONT_WALKS = 16  # of each sub-environment a training iteration: a walk is one sample to learn from, not one a step
GROUP = 8  # routes of one input that are compared with each other, where the baseline is "group"
# Names are strings, so that gates are trained without ray.
AGENTS = {
    "ppo": "dynrl.agents.ppo:PPO", "appo": "dynrl.agents.appo:APPO", "dqn": "dynrl.agents.dqn:DQN",
    "sb3-ppo": "dynrl.agents.sb3:SB3PPO", "sb3-dqn": "dynrl.agents.sb3:SB3DQN", "gate": "dynrl.agents.gates:Gates",
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What decides how a policy is trained.

    Attributes:
        decision, data: names.
        steps: decisions in all; with a plan of fine-tuning, those before its first round.
        agent: a name in `AGENTS`.
        seed: of weights, inputs, prices and exploration.
        router_hidden: units of the policy's hidden layer, 0 for a linear one.
        num_envs: inputs that walk side by side in one runner; of gates, a batch.
        num_env_runners: remote processes that sample (RLlib's agents only); 0 samples in this one.
        price_range, accuracy_term, upfront: see `RoutingVectorEnv`.
        baseline: of PPO's advantages: "value"; "group", what several routes of the same input earn on average, the
            likeliest among them; or "greedy", what the likeliest alone earns (upfront only; self-critical training,
            Rennie et al. 2017, CVPR, which BlockDrop uses).
        learning_rate: at the start; it falls to a tenth. None: the agent's own.
        entropy: the bonus of PPO and APPO for undecided policies at the start, see `entropy_bonus`; falls to a tenth.
        times: what is charged instead of MACs; see `RoutingVectorEnv`. Not of gates.
        device, dtype: of the backbone; see `RoutingVectorEnv`. Of gates: the CPU, in float32.
        num_learners: remote processes that learn (RLlib's agents only); 0: this one does.
        address: of a ray cluster to join (RLlib's agents only), "auto" for the one on this machine; None starts ray
            here.
        checkpoint_every: training iterations between checkpoints.
    """

    decision: str
    data: str
    steps: int
    agent: str = "ppo"
    seed: int = 0
    router_hidden: int = 64
    num_envs: int = 64
    num_env_runners: int = 0
    price_range: tuple[float, float] = (0.002, 2.0)
    accuracy_term: str = "distillation"
    upfront: bool = False
    baseline: str = "value"
    learning_rate: float | None = None
    entropy: float = 0.01
    times: dict[str, Any] | None = None
    device: str = "cpu"
    dtype: str = "float32"
    num_learners: int = 0
    address: str | None = None
    checkpoint_every: int = 10


class Stop:
    """Whether the user wants to stop."""

    is_set = False


class Agent:
    """What learns a policy, the backbone frozen. A context: it may hold processes, and holds open files.

    An agent's file fills in the hooks of the first part. Checkpoints go to `folder/checkpoints`, TensorBoard's files
    to `folder`.

    Args:
        settings: as they are.
        backbone_file: the backbone; `reload` reads it again.
        folder: of the run. Training goes on from its newest checkpoint.
        total: decisions in all: the end of its schedules.
    """

    steps: int  # decisions learned from so far

    def __init__(self, settings: Settings, backbone_file: Path, folder: Path, total: int) -> None:
        self.settings, self.backbone_file, self.total = settings, backbone_file, total
        self.checkpoints = folder / "checkpoints"
        self._iteration, self._folder = 0, folder
        self._held = ExitStack()

    # for the agent to write --------------------------------------------------------------------------------

    def start(self) -> None:
        """Set up, restore the newest checkpoint and set `steps`; what must end again goes on the stack `_held`."""
        raise NotImplementedError

    def iterate(self) -> dict[str, float]:
        """Learn from some more decisions, counted in `steps`; scalars by the tags of `TrainingLog`."""
        raise NotImplementedError

    def router(self) -> LearnedPolicy:
        """The policy as it is; a copy."""
        raise NotImplementedError

    def save(self) -> None:
        """Write a checkpoint, all or nothing."""
        raise NotImplementedError

    def reload(self) -> None:
        """Go on with the backbone that now lies in `backbone_file`."""
        raise NotImplementedError

    # the same for all --------------------------------------------------------------------------------------

    def __enter__(self) -> Agent:
        with ExitStack() as held:
            self._held = held
            self.start()
            self._log = held.enter_context(TrainingLog(self._folder, begins_after=self.steps))
            self._bar = held.enter_context(
                progress(total=self.total, initial=self.steps, desc="learning", unit="step", unit_scale=True)
            )
            self._held = held.pop_all()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._held.close()

    def write(self, scalars: dict[str, float]) -> None:
        """Show `scalars` in TensorBoard at the present step."""
        self._log.write(self.steps, scalars)

    def learn(self, until: int, stop: Stop) -> None:
        """Learn until `steps` has reached `until` or `stop` is set, and write a checkpoint.

        Raises:
            ValueError: the weights are no longer finite; the last checkpoint stays.
        """
        while self.steps < until and not stop.is_set:
            before, start = self.steps, time.perf_counter()
            scalars = self.iterate()
            self._iteration += 1
            scalars["throughput/steps_per_s"] = (self.steps - before) / (time.perf_counter() - start)
            self.write(scalars)
            self._bar.update(min(self.steps, self.total) - min(before, self.total))
            shown = ("reward", *TASKS, "macs_fraction", "routes/distinct")
            self._bar.set_postfix({tag: f"{scalars[tag]:.3g}" for tag in shown if tag in scalars}, refresh=False)
            if not all(torch.isfinite(p).all() for p in self.router().parameters()):
                raise ValueError(
                    f"the policy's weights are no longer finite after {self.steps} steps; see {self.checkpoints}"
                )
            if self.steps >= until or stop.is_set or self._iteration % self.settings.checkpoint_every == 0:
                self.save()


def open_agent(settings: Settings, backbone_file: Path, folder: Path, total: int) -> Agent:
    """The agent that `settings` name; to be entered."""
    module, name = AGENTS[settings.agent].split(":")
    agent: Agent = getattr(importlib.import_module(module), name)(settings, backbone_file, folder, total)
    return agent


def router_arguments(backbone: Backbone, settings: Settings) -> tuple[str, dict[str, Any]]:
    """`build_policy`'s arguments for a policy of `backbone`."""
    common = {"price_range": list(settings.price_range), "hidden": settings.router_hidden}
    # The full network's choice is the favoured one at the start.
    if settings.upfront:
        return "upfront", {**View.of(backbone).to_dict(), **common, "start": list(backbone.full_route)}
    # Where points differ in it, the commonest.
    return "sequential", {**Layout.of(backbone).to_dict(), **common, "start": statistics.mode(backbone.full_route)}


def env_arguments(settings: Settings, backbone_file: Path) -> dict[str, Any]:
    """The environment's arguments, but for how many rows it has and how it resets."""
    return {
        "backbone": str(backbone_file.resolve()), "data": settings.data,
        "price_range": list(settings.price_range), "accuracy_term": settings.accuracy_term,
        "upfront": settings.upfront, "times": settings.times, "device": settings.device, "dtype": settings.dtype,
    }  # fmt: skip


def rollout_steps(settings: Settings, backbone: Backbone) -> int:
    """Environment steps of each row in a training iteration; upfront one is all of a walk."""
    return UPFRONT_WALKS if settings.upfront else walks(backbone) * backbone.max_steps


def build_q(kind: str, config: dict[str, Any]) -> LearnedPolicy:
    """`build_policy` for Q-learning: the favour for the full network's choice would be an expected return here."""
    net = build_policy(kind, config)
    head: Any = net.head
    torch.nn.init.zeros_(head.bias)
    return net


def check_shares(num_envs: int, num_learners: int, baseline: str) -> None:
    """Refuse, with a ValueError, environments of which PPO's learners cannot have equal shares, of whole groups."""
    learners, group = max(1, num_learners), GROUP if baseline == "group" else 1
    if num_envs % (learners * group):
        raise ValueError(
            f"{learners} learners, groups of {group} routes of one input: expected {learners * group} x n environments "
            f"(--num-envs), got {num_envs}"
        )


def entropy_bonus(settings: Settings, backbone: Backbone) -> float:
    """For each decision: what the settings say for walks of up to eight. Of a longer one each moves the return less: at
    the same bonus policies stay undecided, and the likeliest choices, taken throughout, lead where training never was.
    """
    return settings.entropy * min(1.0, 8 / backbone.max_steps)


def walks(backbone: Backbone) -> int:
    """How many walks of each slot a training iteration has, all whole: eight, or of long ones some seventy steps."""
    return max(1, min(8, 72 // backbone.max_steps))


def train_policy(settings: Settings, backbone_file: Path, folder: Path) -> tuple[LearnedPolicy, bool]:
    """Train a policy for a backbone that stays as it is, going on from the newest checkpoint in `folder`.

    Returns:
        the policy, and whether all steps were done (False after Ctrl-C).
    """
    with stop_on_interrupt() as stop, open_agent(settings, backbone_file, folder, settings.steps) as agent:
        agent.learn(settings.steps, stop)
        return agent.router(), agent.steps >= settings.steps


def train_jointly(
    settings: Settings, plan: Finetuning, backbone_file: Path, reference: Backbone, folder: Path
) -> tuple[LearnedPolicy, bool]:
    """Train a policy and its backbone in turn, going on where `folder` says they are.

    First the policy learns from `settings.steps` decisions; then each round fine-tunes the backbone on the routes of
    the policy as it is, writes it, and lets the policy learn on it.

    Args:
        backbone_file: changed after each round, all or nothing; its notes say how many there were (`rounds`).
        reference: the dense network that the backbone is distilled from: one for all rounds, since a backbone that
            follows itself drifts (measured: its full route lost up to 0.7 points).

    Returns:
        the policy, and whether all rounds were done (False after Ctrl-C).
    """
    backbone, notes = load_backbone(backbone_file)
    done, total = notes.get("rounds", 0), settings.steps + plan.rounds * plan.steps
    tuner = Finetuner(
        backbone, reference, load_dataset(settings.data), plan, settings.price_range, settings.seed,
        folder / "checkpoints" / "finetuning.pt", settings.device,
    )  # fmt: skip
    with (
        stop_on_interrupt() as stop,
        open_agent(settings, backbone_file, folder, total) as agent,
        progress(total=tuner.total, initial=tuner.batches, desc="fine-tuning", unit="batch") as bar,
    ):
        while True:
            agent.learn(settings.steps + done * plan.steps, stop)
            if stop.is_set or done >= plan.rounds:
                break
            scalars = tuner.train(agent.router(), done + 1, lambda: stop.is_set, bar.update)
            agent.write({f"finetuning/{tag}": value for tag, value in scalars.items()})
            if stop.is_set:
                break
            done += 1
            tuner.backbone.save(backbone_file, **notes | {"rounds": done})
            agent.reload()
        return agent.router(), done >= plan.rounds and agent.steps >= total


@contextmanager
def stop_on_interrupt() -> Iterator[Stop]:
    """Within the block the first Ctrl-C sets `is_set`, so that an iteration is never torn; the second raises."""
    stop = Stop()

    def note(number: int, frame: Any) -> None:
        if stop.is_set:
            raise KeyboardInterrupt
        stop.is_set = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
