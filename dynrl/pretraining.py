"""Train a plain network, then a backbone from its weights so that every route works: supervised, on targets."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from dynrl.backbones import Backbone
from dynrl.backbones.base import Answer
from dynrl.checkpoints import Checkpoint
from dynrl.data import Dataset
from dynrl.inputs import laid_out, training_format
from dynrl.machine import check_device
from dynrl.progress import progress
from dynrl.schema import MOST_ROWS, check_count, check_one_of
from dynrl.tasks import Task


@dataclass(frozen=True)
class Recipe:
    """How long and how a backbone is trained: first the plain network, then all routes from its weights.

    A backbone that meets random routes from the start may learn little on any of them. The plain network's weights are
    kept good by opening the routes up step by step.

    Attributes:
        epochs: on random routes, from the plain network's weights.
        batch_size: inputs of a batch.
        learning_rate: the peak of a one-cycle schedule, of which the plain network and the random routes have one each.
        weight_decay: of all weights but biases and normalisation.
        label_smoothing: see `Task.loss`.
        rates: the least rates of random routes. The epochs are cut into as many equal parts, and in each part an image
            draws the rate of its route (`Backbone.draw`) between that part's least rate and 1.
        full_share: this share of the images has rate 1.
        optimizer: "sgd" (with momentum) or "adam" (AdamW).
        plain_epochs: of the plain network, on its full route; None: as many as on random routes.
    """

    epochs: int
    batch_size: int
    learning_rate: float = 0.15
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    rates: tuple[float, ...] = (0.6, 0.3, 0.3)
    full_share: float = 0.15
    optimizer: Literal["sgd", "adam"] = "sgd"
    plain_epochs: int | None = None

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs, 1, 1_000_000)
        check_count("batch_size", self.batch_size, 1, MOST_ROWS)
        if self.plain_epochs is not None:
            check_count("plain_epochs", self.plain_epochs, 0, 1_000_000)
        if not 0 < self.learning_rate < 1000:
            raise ValueError(f"expected a learning_rate above 0 and below 1000, got {self.learning_rate}")
        for name in ("weight_decay", "label_smoothing", "full_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"expected {name} between 0 and 1, got {getattr(self, name)}")
        if not self.rates or not all(0 <= rate <= 1 for rate in self.rates):
            raise ValueError(f"expected rates between 0 and 1, got {self.rates}")

    def length(self, random_routes: bool) -> int:
        """The epochs on random routes, or of the plain network."""
        return self.epochs if random_routes or self.plain_epochs is None else self.plain_epochs

    def least_rate(self, epoch: int) -> float:
        """The least rate of random routes in an epoch."""
        return self.rates[epoch * len(self.rates) // self.epochs]


def autocast(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 if the device multiplies it in hardware; other devices would only be slower."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_bf16_supported(including_emulation=False))
    # `torch.ops.mkldnn._is_mkldnn_bf16_supported` is not asked: it is also true where oneDNN emulates bfloat16, which
    # makes training much slower.
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast("cpu", torch.bfloat16, enabled=fast)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within the block, what a user's network draws for itself, as dropout does, follows from `seed`."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def make_optimizer(backbone: Backbone, name: str, learning_rate: float, weight_decay: float) -> Optimizer:
    """Make an optimiser, "sgd" (Nesterov momentum 0.9) or "adam"; biases and normalisation do not decay."""
    decay = [p for p in backbone.parameters() if p.dim() > 1]
    rest = [p for p in backbone.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    check_one_of("optimizer", name, ("sgd", "adam"))
    if name == "sgd":
        return torch.optim.SGD(groups, learning_rate, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, learning_rate)


def pretrain(
    backbone: Backbone,
    dataset: Dataset,
    recipe: Recipe,
    *,
    random_routes: bool = True,
    seed: int = 0,
    checkpoint: Path | None = None,
    label: str = "pretraining",
    device: str | torch.device = "cpu",
) -> Backbone:
    """Train `backbone` in place from the weights it has, and return it, on the CPU in eval mode.

    Args:
        backbone: the backbone, which is trained in place.
        dataset: the data set, whose training split is used.
        recipe: how long and how to train.
        random_routes: whether routes are random. False trains the full route only, which gives the plain network,
            from whose weights random routes begin.
        seed: the seed of all draws.
        checkpoint: the file that is saved after each epoch; training continues from it if it exists, also if there are
            more or fewer inputs by then. It is not deleted: the caller deletes it once the result is saved.
        label: the text before the progress bar.
        device: the device to train on; batches are augmented on the CPU.

    Raises:
        ValueError: there is no such device, nothing can be learned, or the loss is no longer finite; the last
            checkpoint stays.
    """
    if recipe.length(random_routes):
        check_learns(backbone)
    generator, device = torch.Generator().manual_seed(seed), check_device(device)
    backbone.to(device)
    optimizer = make_optimizer(backbone, recipe.optimizer, recipe.learning_rate, recipe.weight_decay)
    train = dataset.train
    batches = len(train) // recipe.batch_size
    if batches == 0:
        raise ValueError(f"a batch of {recipe.batch_size} is larger than the {len(train)} training inputs")
    epochs, before = recipe.length(random_routes), recipe.length(False) if random_routes else 0
    schedule = OneCycleLR(optimizer, recipe.learning_rate, max(1, epochs * batches))
    planned = copy.deepcopy(schedule.state_dict())
    backbone.to(memory_format=training_format(backbone))  # type: ignore[call-overload]
    parts = {"backbone": backbone, "optimizer": optimizer, "schedule": schedule, "generator": generator}
    kept = None if checkpoint is None else Checkpoint(checkpoint, parts)
    first = 0 if kept is None else kept.restore(epochs)
    if schedule.total_steps != planned["total_steps"]:  # there are more or fewer inputs now, and batches of an epoch
        there = {name: planned[name] for name in ("total_steps", "_schedule_phases")} | {"last_epoch": first * batches}
        schedule.load_state_dict(schedule.state_dict() | there)
    if random_routes and not first:
        backbone.open_up()
    with progress(total=epochs * batches, initial=first * batches, desc=label, unit="batch") as bar:
        for epoch in range(first, epochs):
            least_rate = recipe.least_rate(epoch) if random_routes else None
            backbone.train()
            drawn = dataset.in_epoch(seed, before + epoch)
            order = torch.randperm(len(train), generator=generator)
            total = 0.0
            with seeded(1_000_003 * seed + before + epoch, device):
                for index in order.split(recipe.batch_size)[:batches]:
                    optimizer.zero_grad()
                    total += _learn_batch(backbone, drawn, recipe, index, least_rate, generator)
                    optimizer.step()
                    schedule.step()
                    bar.update()
            if not torch.isfinite(torch.tensor(total)):
                raise ValueError(f"the loss is {total} after epoch {epoch + 1}; lower the learning rate")
            bar.set_postfix(loss=f"{total / batches:.3f}", refresh=False)
            if kept is not None:
                kept.save(epoch + 1)
    return backbone.to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]


def check_learns(backbone: Backbone) -> None:
    """Refuse, with a ValueError, a backbone that cannot learn, since all of its parameters are frozen."""
    if not any(parameter.requires_grad for parameter in backbone.parameters()):
        raise ValueError(
            f"expected parameters to train in {type(backbone).__name__}, but none of them needs a gradient; call "
            "requires_grad_(True) on what is to learn, or take the weights as they are: pretrain=False, no finetune"
        )


def _learn_batch(
    backbone: Backbone,
    dataset: Dataset,
    recipe: Recipe,
    index: Tensor,
    least_rate: float | None,
    generator: torch.Generator,
) -> float:
    """Return the loss of the training inputs at `index` [n]; add its gradients to the parameters' and clip them.

    Without a least rate, it is the loss of the full route.
    """
    device = next(backbone.parameters()).device
    images, labels = dataset.augmentation.rows(dataset.train, index, generator)
    images, labels = laid_out(images, training_format(backbone)).to(device), labels.to(device)
    rate = None
    if least_rate is not None:
        rate = least_rate + (1 - least_rate) * torch.rand(len(index), generator=generator)
        rate[torch.rand(len(index), generator=generator) < recipe.full_share] = 1.0
    passes = backbone.training_outputs(images, rate, generator)
    total, learned = 0.0, False
    while True:
        with autocast(device):
            answers = next(passes, None)
        if answers is None:
            break
        if backbone.hindsight:
            loss = loss_of_best(answers, labels, dataset.task)
        else:
            loss = loss_of(answers, labels, dataset.task, recipe.label_smoothing)
        if loss.requires_grad:  # one of several models may be frozen
            loss.backward()
            learned = True
        total += loss.item()
    if not learned:
        raise ValueError(
            "nothing that these answers are made by needs a gradient, so they cannot be trained; call "
            "requires_grad_(True) on what is to learn"
            + (", or leave the plain network as it is: plain=False" if least_rate is None else "")
        )
    nn.utils.clip_grad_norm_(backbone.parameters(), 5.0)
    return total


def loss_of(answers: Sequence[Answer], targets: Tensor, task: Task, label_smoothing: float) -> Tensor:
    """Return the weighted sum of the losses of answers on `targets` [B, ...]."""
    losses = [each.weight * task.loss(each.output.float(), targets[each.rows], label_smoothing) for each in answers]
    return torch.stack(losses).sum()


def loss_of_best(answers: Sequence[Answer], targets: Tensor, task: Task) -> Tensor:
    """Return the mean loss of each row's best answer on `targets` [B, ...]; each answer is of all rows, in order."""
    return -torch.stack([task.log_likelihood(each.output.float(), targets) for each in answers]).amax(0).mean()
