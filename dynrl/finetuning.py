"""Fine-tuning trains a backbone on the routes that a policy takes: the supervised half of training both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dynrl.backbones import Backbone, State
from dynrl.checkpoints import MOST_STEPS, Checkpoint
from dynrl.data import Dataset, Split
from dynrl.inputs import laid_out, training_format
from dynrl.perturb import Ball, spending
from dynrl.policies import LearnedPolicy
from dynrl.pretraining import autocast, loss_of, make_optimizer, seeded
from dynrl.routes import draw_prices

CHECKPOINT_EVERY = 100  # the number of batches between checkpoints
ATTACK_STEPS = 2  # the gradient steps of attacks in training, where few are enough (Wong et al. 2020, ICLR)
EXCESS = 0.3  # the weight of what attacked inputs spend beyond what they spent unattacked, in dense networks
BATCH = 120  # the inputs for policies that are attacked at a time


@dataclass(frozen=True)
class Finetuning:
    """These numbers say how a backbone and its policy are trained in turn.

    Attributes:
        rounds: how often the backbone learns on the policy's routes and then the policy on the new backbone.
        epochs: the backbone's epochs in a round; a fraction makes short rounds.
        steps: the policy's decisions in a round.
        batch_size, weight_decay, label_smoothing: the same as in `Recipe`.
        optimizer: "sgd" (with momentum) or "adam".
        learning_rate: the learning rate at first; it falls to 0 along a cosine over all rounds (Loshchilov & Hutter
            2017).
        full_share: the share of each batch that takes the full route. Without it, the network would forget how to run
            dense, and batch norm in blocks that the policy seldom runs would have no statistics.
        sampled: whether routes are drawn from the policy, as while it learns, or are its likeliest ones, as when
            plugged in. Drawn routes teach a network that fails after a stray choice to survive it.
        attacked: the share of each batch that is attacked first (`dynrl.perturb`). Attacked rows take the routes that
            they would have taken unattacked: where a policy stops early, the network learns to be right there. What
            the policy would have them spend beyond that is a loss, too: it is what the attack raises.
        distillation: the weight of the divergence from the reference's outputs (Hinton et al. 2015, section 2), next to
            the loss on the targets.
    """

    rounds: int = 2
    epochs: float = 2.0
    steps: int = 100_000
    batch_size: int = 128
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = 0.02
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    full_share: float = 0.25
    sampled: bool = False
    attacked: float = 0.0
    distillation: float = 1.0


class Means:
    """Means of some numbers over the batches of a round, which a checkpoint keeps where a round is interrupted."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self.begin()

    def begin(self) -> None:
        """Forget what was added."""
        self.count, self.sums = 0, dict.fromkeys(self._names, 0.0)

    def add(self, numbers: Mapping[str, float]) -> None:
        """Add the numbers of a batch."""
        self.count += 1
        for name, value in numbers.items():
            self.sums[name] += value

    def __call__(self) -> dict[str, float]:
        """Return the means."""
        return {name: value / self.count for name, value in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` takes."""
        return {"count": self.count, "sums": self.sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.count, self.sums = state["count"], dict(state["sums"])


class Finetuner:
    """A fine-tuner trains a backbone on a policy's routes, round by round.

    Args:
        backbone: the backbone, which is trained in place.
        reference: the dense network that the backbone is distilled from, on its full route.
        dataset: the data set, whose training split is used.
        plan: the numbers of the training.
        price_range: the range from which each input draws the price that the policy is told.
        seed: the seed of all draws.
        checkpoint: the file that is saved now and then; training continues from it if it exists, with rounds of as many
            batches as it was begun with, also if there are more or fewer inputs by then.
        device: the device to train on; the backbone moves there.

    Attributes:
        batches: the number of batches done so far.
        total: the number of batches of all rounds.
    """

    def __init__(
        self,
        backbone: Backbone,
        reference: Backbone,
        dataset: Dataset,
        plan: Finetuning,
        price_range: tuple[float, float],
        seed: int,
        checkpoint: Path,
        device: str | torch.device = "cpu",
    ) -> None:
        self._device = torch.device(device)
        self.backbone, self._reference = backbone.to(self._device), reference.for_inference().to(self._device)
        self._dataset, self._plan, self._price_range = dataset, plan, price_range
        self._seed = seed
        self._epoch = len(dataset.train) // plan.batch_size  # the number of batches
        if self._epoch == 0:
            raise ValueError(f"a batch of {plan.batch_size} is larger than the {len(dataset.train)} training inputs")
        self._round = max(1, round(plan.epochs * self._epoch))
        if plan.attacked:
            self._ball = Ball.of(dataset)
        self._generator = torch.Generator().manual_seed(seed)
        self._optimizer = make_optimizer(backbone, plan.optimizer, plan.learning_rate, plan.weight_decay)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, plan.rounds * self._round)
        self._form = training_format(backbone)
        backbone.to(memory_format=self._form)  # type: ignore[call-overload]
        self._means = Means(("loss", "divergence", dataset.task.metric, "macs_fraction"))
        self._checkpoint = Checkpoint(
            checkpoint,
            {
                "backbone": self.backbone, "optimizer": self._optimizer, "schedule": self._schedule,
                "generator": self._generator, "means": self._means,
            },
        )  # fmt: skip
        self.batches = self._checkpoint.restore(MOST_STEPS)
        self.total = self._schedule.T_max  # the checkpoint's: along another cosine, the rate would not end at 0
        if self.batches > self.total:
            raise ValueError(
                f"{checkpoint} is damaged (expected at most {self.total} batches, got {self.batches}); take it away, "
                "and go on from the beginning"
            )
        self._round = max(1, self.total // plan.rounds)

    def train(
        self,
        policy: LearnedPolicy,
        rounds: int,
        stopped: Callable[[], bool] = lambda: False,
        tick: Callable[[], Any] = lambda: None,
    ) -> dict[str, float]:
        """Train on the routes of `policy` until `rounds` are done or `stopped` returns True, and write a checkpoint.

        `tick` is called after each batch.

        Returns:
            means over the batches of the last round of `loss`, `divergence` (from the reference), the task's metric
            and `macs_fraction`, full routes included; empty if it was stopped before the round's end.

        Raises:
            ValueError: the loss is no longer finite; the last checkpoint stays.
        """
        until = rounds * self._round
        self.backbone.train()
        while self.batches < until and not stopped():
            if self.batches % self._round == 0:
                self._means.begin()
            with seeded(1_000_003 * self._seed + self.batches, self._device):
                self._means.add(self._step(policy))
            self.batches += 1
            tick()
            if self.batches == until or self.batches % CHECKPOINT_EVERY == 0 or stopped():
                if not math.isfinite(loss := self._means.sums["loss"]):
                    raise ValueError(f"the loss of fine-tuning is {loss}; lower its learning rate")
                self._checkpoint.save(self.batches)
        self.backbone.eval()
        return self._means() if self.batches >= until else {}

    def _step(self, policy: LearnedPolicy) -> dict[str, float]:
        plan, backbone, task, device = self._plan, self.backbone, self._dataset.task, self._device
        rows, train = self._rows(), self._train
        inputs, targets = self._dataset.augmentation.rows(train, rows, self._generator)
        prices = draw_prices(self._price_range, len(rows), self._generator)
        inputs, targets, prices = laid_out(inputs, self._form).to(device), targets.to(device), prices.to(device)
        policy.to(device)
        moved, fixed, route = self._planned(policy, inputs, prices)
        follow = self._chooser(policy, prices)
        with autocast(device):
            walk, answers = backbone.run_training(
                moved, lambda state: torch.where(fixed[state.rows], state.along(route), follow(state))
            )
        output = answers[0].output.float()
        with torch.no_grad():
            dense = self._reference(inputs)
        divergence = task.divergence(output, dense, targets).mean()
        loss = loss_of(answers, targets, task, plan.label_smoothing) + plan.distillation * divergence
        if moved is not inputs:
            loss = loss + EXCESS * self._excess(policy, inputs, moved, prices)
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(backbone.parameters(), 5.0)
        self._optimizer.step()
        self._schedule.step()
        return {
            "loss": loss.item(), "divergence": divergence.item(),
            task.metric: float(task.score(output.detach(), targets).mean()),
            "macs_fraction": float(walk.macs.double().mean()) / backbone.dense_macs,
        }  # fmt: skip

    def _planned(self, policy: LearnedPolicy, inputs: Tensor, prices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the inputs, of which the last ones are attacked; which rows have their routes; and these routes."""
        count, size, backbone = round(self._plan.attacked * len(inputs)), len(inputs), self.backbone
        rows = torch.arange(size, device=inputs.device)
        whole, route = rows < round(self._plan.full_share * size), backbone.dense_actions(size, inputs.device)
        if not count:
            return inputs, whole, route
        last, told = inputs[-count:], prices[-count:]
        backbone.eval()
        with torch.no_grad():
            taken = backbone.run(last.clone(), self._chooser(policy, told)).route.clamp_min(0)
        moved = self._ball.climb(last, spending(backbone, policy, told), ATTACK_STEPS)
        backbone.train()
        taken = torch.cat([route[:-count], taken])
        route = torch.where(whole.unsqueeze(1), route, taken)
        return torch.cat([inputs[:-count], moved]), whole | (rows >= size - count), route

    def _excess(self, policy: LearnedPolicy, inputs: Tensor, moved: Tensor, prices: Tensor) -> Tensor:
        """Return how much more attacked rows spend than unattacked ones, a mean in dense networks; differentiable."""
        count, backbone = round(self._plan.attacked * len(inputs)), self.backbone
        goal = spending(backbone, policy, prices[-count:])
        backbone.eval()  # as attacks see it
        with torch.no_grad():
            before, _ = goal(inputs[-count:].clone())  # networks write in place
        after, _ = goal(moved[-count:].clone())
        backbone.train()
        return (after - before).clamp_min(0).mean()

    def _chooser(self, policy: LearnedPolicy, prices: Tensor) -> Callable[[State], Tensor]:
        """Return the function from a state to the policy's choices, likeliest or drawn."""
        drawing, backbone = self._plan.sampled, self.backbone
        with torch.no_grad():  # a sight may prepare products of the backbone's weights
            at = policy.logits_on(backbone, prices) if drawing else policy.sight.follow(backbone, policy.act, prices)

        @torch.no_grad()
        def choose(state: State) -> Tensor:
            with torch.autocast(prices.device.type, enabled=False):
                said = at(state)
            if not drawing:
                return said
            drawn = torch.multinomial(said.softmax(1).cpu(), 1, generator=self._generator)
            return drawn.squeeze(1).to(prices.device)

        return choose

    def attack(self, policy: LearnedPolicy, split: Split) -> Tensor:
        """Return attacked copies of the first inputs of `split`, for policies to learn on: the plan's share of them."""
        count = round(self._plan.attacked * len(split))
        # Not the generator of the batches: its state is that of the last checkpoint where this is done again.
        generator = torch.Generator().manual_seed(1_000_003 * self._seed + self.batches)
        prices, moved = draw_prices(self._price_range, count, generator).to(self._device), list[Tensor]()
        policy.to(self._device)
        for inputs, told in zip(split.inputs[:count].split(BATCH), prices.split(BATCH), strict=True):
            goal = spending(self.backbone, policy, told)
            moved.append(self._ball.climb(inputs.to(self._device), goal, ATTACK_STEPS).cpu())
        return torch.cat(moved)

    def _rows(self) -> Tensor:
        """The next batch of an order that is drawn anew for each epoch, so that a round may end within one.

        The training inputs of that epoch are put into `_train`.
        """
        epoch, position = divmod(self.batches, self._epoch)
        if position == 0 or not hasattr(self, "_order"):
            seed = torch.Generator().manual_seed(1_000_003 * self._seed + epoch)
            self._order = torch.randperm(len(self._dataset.train), generator=seed).split(self._plan.batch_size)
            self._train = self._dataset.in_epoch(self._seed, epoch).train
        return self._order[position]
