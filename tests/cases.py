"""Cases found in the registry: a new decision is tested without a new test."""

from __future__ import annotations

from typing import Any

import torch
from gymnasium.envs.registration import load_env_creator
from torch import nn

import dynrl  # noqa: F401 (registers the environments)
from dynrl.backbones import (
    Backbone,
    CellResNet,
    ExitModule,
    ExpertModule,
    Frames,
    JumpRNN,
    Members,
    MultiPathResNet,
    MultiScaleNet,
    MultiScaleRNN,
    NeuralModules,
    NeuralTree,
    RecallNet,
    ResolutionNet,
    Resolutions,
    ScaleGrid,
    SkipGRU,
    SkipLSTM,
    SkipModule,
    TokenModule,
)
from dynrl.data import Augmentation, Dataset, Split, load_dataset
from dynrl.envs import DECISIONS
from dynrl.policies import LearnedPolicy, PolicySpec
from dynrl.tasks import Regression
from tests.toys import Branching, Convolutional, Exiting, Looping, Reader, Roundabout, Transformer, sparse

REGISTERED = sorted(DECISIONS)
TOYS = {"exiting": Exiting, "looping": Looping, "branching": Branching, "roundabout": Roundabout}
OWN = {  # modules of a user's
    "hidden update of an LSTM": lambda: SkipLSTM.from_module(nn.LSTM(3, 12), nn.Linear(12, 4), steps=6),
    "skip in a transformer": lambda: SkipModule(Transformer(), (1, 8, 8), [f"blocks.{i}" for i in range(3)]),
    "skip in a network": lambda: SkipModule(Convolutional(), (1, 8, 8), ["stage1.1", "stage1.2", "stage2.2"]),
    "tokens of a transformer": lambda: TokenModule(Transformer(), (1, 8, 8), ["blocks.0", "blocks.2"]),
    "exits in a transformer": lambda: ExitModule(Transformer(), (1, 8, 8), ["blocks.0", "blocks.1"]),
    "exits in a network": lambda: ExitModule(Convolutional(), (1, 8, 8), ["stage1.0", "stage2"]),
    "skip in place": lambda: SkipModule(Reader(), (5, 8), [f"blocks.{i}" for i in range(3)]),
    "tokens in place": lambda: TokenModule(Reader(), (5, 8), ["blocks.0", "blocks.2"]),
    "experts in a transformer": lambda: ExpertModule(
        sparse(Transformer(), shared=True), (1, 8, 8), ["blocks.0", "blocks.2"], "mlp", counts=(0, 1, 3)
    ),
    "exits in place": lambda: ExitModule(Reader(depth=4), (5, 8), ["blocks.0", "blocks.2"]),
}
KINDS = [  # settings of models; the own walks of all but the last are charged more than the models alone
    {"family": "skip_resnet", "layers": [1], "widths": [4]},
    {"family": "exit_resnet", "layers": [2, 1], "widths": [4, 8], "exits": [0, 1]},
    {"family": "cell_resnet", "layers": [2, 2], "widths": [4, 8], "grid": 2},
    {"family": "slimmable_resnet", "layers": [2, 2], "widths": [4, 8]},
]
SET = {  # networks of ours whose settings change how they are walked
    "skip of paths": lambda: MultiPathResNet((1, 8, 8), 4, (1, 1), (6, 12), paths=3),
    "exits at scales": lambda: MultiScaleNet((1, 8, 8), 4, (1, 1, 2), width=4, growth=3),
    "exits of resolutions": lambda: ResolutionNet((1, 8, 8), 4, layers=1, width=4, growth=4),
    "positions of cells": lambda: CellResNet((1, 8, 8), 2, layers=(2, 2), widths=(4, 8)),
    "branch in a tree": lambda: NeuralTree((1, 8, 8), 4, layers=(1, 1, 1), widths=(4, 6, 8)),
    "branch in a forest": lambda: NeuralTree((1, 8, 8), 4, layers=(1, 1), widths=(4, 6), forest=3),
    "branch in a grid of scales": lambda: ScaleGrid((1, 8, 8), 4, layers=3, scales=2, width=4, stem_stride=1),
    "branch of a layout": lambda: NeuralModules((2, 6, 6), 3, 2, 2, cell=2, channels=4, width=5, depth=3, steps=7),
    "jumps over sentences": lambda: JumpRNN((12,), 4, 9, 4, 6, (1, 2, 5), ((1, 2), (2,)), follow=True),
    "hidden update of parts": lambda: SkipGRU((6, 3), 4, hidden=12, shares=(0.0, 0.25, 0.5, 1.0)),
    "hidden update of an upper layer": lambda: MultiScaleRNN((6,), 4, tokens=9, width=4, lower=5, hidden=6),
    "look at frames": lambda: Frames((6, 3), 4, peek=1, looks=3, width=6, hidden=6),
    "unroll with recall": lambda: RecallNet((6, 2), 10, width=5, steps=4),
    "model at two sizes": lambda: Resolutions(
        (1, 8, 8), 10, {"family": "skip_resnet", "layers": [1], "widths": [4]}, (5, 8)
    ),
}
HELD = {  # models of which parts never run, and learn nothing, where they are held
    "model of several kinds": lambda: Members((1, 8, 8), 4, tuple(KINDS)),
}
BUILT = [*REGISTERED, *OWN, *SET]
BACKBONES = [*BUILT, *TOYS]


@torch.inference_mode()
def full_metric(backbone: Backbone, split: Split) -> float:
    """The mean metric of the rows on the full route, all in one batch."""
    return float(split.task.score(backbone(split.inputs), split.targets).mean())


def numbers_split(size: int) -> Split:
    """A regression on small images."""
    numbers = torch.randn(size, 1)
    return Split(torch.randn(size, 1, 8, 8), numbers, Regression.of(numbers))


def answered_by(backbone: Backbone, size: int = 256) -> Dataset:
    """A regression on what the full route of `backbone` says, whatever it says: no other route is as good."""
    inputs = backbone.random_inputs(size, torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = backbone(inputs)
    split = Split(inputs, outputs, Regression.of(outputs))
    return Dataset("answered", outputs.shape[1], split, split, split, Augmentation())


def vector_env(name: str):
    return load_env_creator(DECISIONS[name].vector_entry_point)


def make_backbone(name: str) -> Backbone:
    made = {**TOYS, **OWN, **SET, **HELD}
    if name in made:
        return made[name]().eval()
    return vector_env(name).seeded_backbone(load_dataset(DECISIONS[name].data).input_shape).eval()


def trained(backbone: Backbone) -> Any:
    """Return `backbone` in eval mode as if it had been trained: no batch norm is the identity."""
    for norm in (m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return backbone.eval()


def make_policy(
    backbone: Backbone,
    prices: tuple[float, float] = (0.01, 1.0),
    hidden: int = 64,
    kind: str = "sequential",
    start: list[int] | None = None,
) -> LearnedPolicy:
    """An untrained policy, which favours the full route, or `start`."""
    spec = PolicySpec.of(kind, backbone, prices, hidden)
    return PolicySpec(kind, spec.config | ({} if start is None else {"start": start})).build()


EXAMPLES = {name: make_backbone(name) for name in BACKBONES}  # to be asked what they can; a test makes its own
GATED = [name for name in BACKBONES if EXAMPLES[name].gates]  # those on which gates can be trained
