"""Joint training trains a policy and its backbone in turn, and survives kills and Ctrl-C."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynrl.agents.base import attacked_file, open_agent, stop_on_interrupt
from dynrl.backbones import Backbone, load_backbone
from dynrl.data import load_dataset
from dynrl.files import save_tensors
from dynrl.finetuning import Finetuner, Finetuning
from dynrl.policies import LearnedPolicy
from dynrl.progress import progress
from dynrl.settings import Settings


def tuning_file(checkpoints: Path) -> Path:
    """Return the file in the folder `checkpoints` that fine-tuning goes on from."""
    return checkpoints / "finetuning.safetensors"


def train_jointly(
    settings: Settings,
    plan: Finetuning,
    backbone_file: Path,
    reference: Backbone,
    folder: Path,
    times: Mapping[str, Any] | None = None,
) -> tuple[LearnedPolicy, bool]:
    """Train a policy and its backbone in turn, from the state that `folder` holds on.

    First, the policy learns from `settings.learning.steps` decisions. Each round then fine-tunes the backbone on the
    routes of the present policy, writes the backbone, and lets the policy learn on it. If inputs are attacked, then
    a share of those for policies, too, on which the policy learns beside the others.

    Args:
        settings: the complete settings of the training.
        plan: how many rounds there are, and how each fine-tunes; the settings say what share is attacked.
        backbone_file: the backbone's file, replaced as a whole after each round; its notes count the rounds (`rounds`).
        reference: the dense network that the backbone is distilled from. It is the same in all rounds, since a backbone
            that is distilled from itself drifts.
        folder: the run folder, which has the checkpoints.
        times: the times to charge instead of MACs (see `Agent`).

    Returns:
        the policy, and whether all rounds were done; False after Ctrl-C.
    """
    problem, learning = settings.problem, settings.learning
    plan = replace(plan, attacked=learning.attacked)
    backbone, notes = load_backbone(backbone_file)
    done, total = notes.get("rounds", 0), learning.steps + plan.rounds * plan.steps
    data = load_dataset(problem.data).seen_by(backbone.known)
    tuner = Finetuner(
        backbone, reference, data.for_backbone, plan, learning.prices, problem.seed,
        tuning_file(folder / "checkpoints"), settings.place.device,
    )  # fmt: skip
    with (
        stop_on_interrupt() as stop,
        open_agent(settings, backbone_file, folder, total, times) as agent,
        progress(total=tuner.total, initial=tuner.batches, desc="fine-tuning", unit="batch") as bar,
    ):
        while True:
            agent.learn(learning.steps + done * plan.steps, stop)
            if stop.is_set() or done >= plan.rounds:
                break
            scalars = tuner.train(agent.router(), done + 1, stop.is_set, bar.update)
            if stop.is_set():
                break
            agent.write({f"finetuning/{tag}": value for tag, value in scalars.items()})
            done += 1
            if plan.attacked and not agent.attacks:
                moved = tuner.attack(agent.router(), data.unseen)
                save_tensors(attacked_file(backbone_file), "attacked inputs", {"inputs": moved}, {})
            tuner.backbone.save(backbone_file, **notes | {"rounds": done})
            agent.reload()
        return agent.router(), done >= plan.rounds and agent.steps >= total
