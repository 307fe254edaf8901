"""Pretraining is supervised training of a backbone under random routes, so that every route works."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynrl.backbones import Backbone
from dynrl.data import Dataset, Split
from dynrl.files import whole, write_aside
from dynrl.policies import RandomPolicy
from dynrl.progress import progress


@dataclass(frozen=True)
class Recipe:
    """A recipe says how long and how a backbone is trained."""

    epochs: int
    batch_size: int
    learning_rate: float = 0.15  # the peak of a one-cycle schedule
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    least_rate: float = 0.3  # each image draws the rate of its random route (`draw_routes`) from [least_rate, 1]
    full_share: float = 0.15  # the share of the images that take the full route, at rate 1
    optimizer: Literal["sgd", "adam"] = "sgd"  # "sgd" has momentum; "adam" is AdamW


def autocast(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 if the device multiplies it in hardware; other devices would only be slower."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_bf16_supported(including_emulation=False))
    # `torch.ops.mkldnn._is_mkldnn_bf16_supported` is not asked: it is also true where oneDNN emulates bfloat16, which
    # makes training much slower.
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast("cpu", torch.bfloat16, enabled=fast)


def make_optimizer(backbone: Backbone, name: str, learning_rate: float, weight_decay: float) -> Optimizer:
    """Make an optimiser, "sgd" (Nesterov momentum 0.9) or "adam"; biases and normalisation do not decay."""
    decay = [p for p in backbone.parameters() if p.dim() > 1]
    rest = [p for p in backbone.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    if name == "sgd":
        return torch.optim.SGD(groups, learning_rate, momentum=0.9, nesterov=True)
    if name == "adam":
        return torch.optim.AdamW(groups, learning_rate)
    raise ValueError(f"unknown optimizer {name!r}; expected 'sgd' or 'adam'")


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
    """Train `backbone` in place and return it, on the CPU in eval mode.

    Args:
        backbone: the backbone, which is trained in place.
        dataset: the data set, whose training split is used.
        recipe: how long and how to train.
        random_routes: whether routes are random. False trains the full route only, which gives the plain network that
            learned routes are compared with.
        seed: the seed of all draws.
        checkpoint: the file that is saved after each epoch; training continues from it if it exists. It is not deleted:
            the caller deletes it once the result is saved.
        label: the text before the progress bar.
        device: the device to train on; batches are augmented on the CPU.

    Raises:
        ValueError: the loss is no longer finite; the last checkpoint stays.
    """
    generator, device = torch.Generator().manual_seed(seed), torch.device(device)
    backbone.to(device)
    optimizer = make_optimizer(backbone, recipe.optimizer, recipe.learning_rate, recipe.weight_decay)
    train = dataset.train
    batches = len(train) // recipe.batch_size
    if batches == 0:
        raise ValueError(f"a batch of {recipe.batch_size} is larger than the {len(train)} training inputs")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, recipe.epochs * batches)
    # On a CPU, convolutions train faster on channels_last maps.
    backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    first = 0
    if checkpoint is not None and checkpoint.exists():
        with whole(checkpoint):
            saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
            backbone.load_state_dict(saved["backbone"])
            optimizer.load_state_dict(saved["optimizer"])
            schedule.load_state_dict(saved["schedule"])
            generator.set_state(saved["generator"])
            first = saved["epoch"]
    with progress(total=recipe.epochs * batches, initial=first * batches, desc=label, unit="batch") as bar:
        for epoch in range(first, recipe.epochs):
            backbone.train()
            drawn = dataset.in_epoch(seed, epoch)
            order = torch.randperm(len(train), generator=generator)
            total = 0.0
            for index in order.split(recipe.batch_size)[:batches]:
                optimizer.zero_grad()
                total += _learn_batch(backbone, drawn, recipe, index, random_routes, generator)
                optimizer.step()
                schedule.step()
                bar.update()
            if not torch.isfinite(torch.tensor(total)):
                raise ValueError(f"the loss is {total} after epoch {epoch + 1}; lower the learning rate")
            bar.set_postfix(loss=f"{total / batches:.3f}", refresh=False)
            if checkpoint is not None:
                state = {
                    "backbone": backbone.state_dict(), "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(), "generator": generator.get_state(), "epoch": epoch + 1,
                }  # fmt: skip
                with write_aside(checkpoint) as aside:
                    torch.save(state, aside)
    return backbone.to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]


def _learn_batch(
    backbone: Backbone, dataset: Dataset, recipe: Recipe, index: Tensor, random_routes: bool, generator: torch.Generator
) -> float:
    """Return the loss of the training inputs at `index` [n]; add its gradients to the parameters' and clip them."""
    device = next(backbone.parameters()).device
    images = dataset.augmentation(dataset.train.inputs[index], generator)
    if images.dim() == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    images, labels = images.to(device), dataset.train.targets[index].to(device)
    rate = recipe.least_rate + (1 - recipe.least_rate) * torch.rand(len(index), generator=generator)
    rate[torch.rand(len(index), generator=generator) < recipe.full_share] = 1.0
    outputs = backbone.training_outputs(images, rate if random_routes else None, generator)
    total = 0.0
    while True:
        with autocast(device):
            output = next(outputs, None)
        if output is None:
            break
        each = len(output) // len(index)
        targets = labels.repeat(each, *[1] * (labels.dim() - 1))
        loss = each * dataset.task.loss(output.float(), targets, recipe.label_smoothing)
        loss.backward()
        total += loss.item()
    nn.utils.clip_grad_norm_(backbone.parameters(), 5.0)
    return total


@torch.inference_mode()
def metric_at_rate(backbone: Backbone, split: Split, rate: float | None, seed: int = 0, batch_size: int = 256) -> float:
    """Return the mean metric under random routes at `rate` (see `draw_routes`), or on the full route if it is None."""
    policy = None if rate is None else RandomPolicy(backbone.thrift, rate, seed)
    total = 0.0
    for start in range(0, len(split), batch_size):
        inputs, targets = split.inputs[start : start + batch_size], split.targets[start : start + batch_size]
        outputs = backbone(inputs, None if policy is None else policy.route(inputs))
        total += float(split.task.score(outputs, targets).sum())
    return total / len(split)
