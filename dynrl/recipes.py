"""For each decision and data set, there are defaults: a backbone, its pretraining, and how a policy learns on it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dynrl.backbones import FAMILIES, Backbone
from dynrl.data import Dataset, check_dataset, load_dataset
from dynrl.files import limited
from dynrl.finetuning import Finetuning
from dynrl.ops.backend import float32
from dynrl.pretraining import Recipe
from dynrl.schema import accepted, arguments, check_known
from dynrl.settings import Learning


@dataclass(frozen=True)
class Defaults:
    """The defaults of one decision on one data set: a row of the table.

    Attributes:
        family: the family of the backbone.
        backbone: the keyword arguments of the family, other than `input_shape` and `classes`.
        pretraining: how the backbone is trained.
        learning: how a policy learns by default. A linear policy (`hidden=0`) suits networks whose steps cost little.
        finetuning: how backbone and policy are trained in turn afterwards.
        joint: whether they are always trained in turn, because no backbone survives random routes. If False, this
            happens on request.
    """

    family: str
    backbone: dict[str, Any]
    pretraining: Recipe
    learning: Learning = field(default_factory=Learning)
    finetuning: Finetuning = field(default_factory=Finetuning)
    joint: bool = False

    def changed(self, settings: Sequence[str]) -> Defaults:
        """Return these defaults with other settings of the backbone, each NAME=VALUE, where VALUE is JSON or a word.

        A name is that of an argument of the family, or `family` itself, which begins without settings.

        Raises:
            ValueError: an entry is not NAME=VALUE, names no setting, or has a value of the wrong type.
        """
        if not settings:
            return self
        families = [word for name, _, word in (setting.partition("=") for setting in settings) if name == FAMILY]
        family, backbone = (families[-1], {}) if families else (self.family, dict(self.backbone))
        check_known("family", family, FAMILIES)
        known = accepted(FAMILIES[family])
        for setting in settings:
            name, equals, word = setting.partition("=")
            if name == FAMILY:
                continue
            fits = name not in GIVEN if known is None else name in {*backbone, *known} - GIVEN
            if not equals or not fits:
                listed = sorted({*backbone, *(known or ())} - GIVEN)
                raise ValueError(f"expected NAME=VALUE with a name in {listed}, or {FAMILY}, got {setting!r}")
            try:
                value = json.loads(word)
            except json.JSONDecodeError:
                value = word
            value = tuple(value) if isinstance(value, list) else value
            if name in backbone and type(value) is not type(backbone[name]):
                raise ValueError(f"expected {name} to be of the type of {backbone[name]!r}, got {value!r}")
            backbone[name] = value
        return replace(self, family=family, backbone=backbone)

    def build(self, dataset: Dataset, seed: int) -> Backbone:
        """Build a fresh backbone for `dataset`; its weights are drawn from `seed`.

        Raises:
            ValueError: a setting is out of range or of the wrong type, or the network would be too large.
        """
        family, form = FAMILIES[self.family], dataset.form.config | {"input_shape": dataset.input_shape}
        form |= dataset.vocabulary.settings if dataset.vocabulary is not None else {}
        known = accepted(family)
        form = {name: value for name, value in form.items() if known is None or name in known}
        config = {**form, "classes": dataset.classes, **self.backbone}
        with torch.random.fork_rng(), float32(), limited(MOST_WEIGHTS, MOST_NUMBERS):
            torch.manual_seed(seed)
            try:
                return family(**arguments(family, config, "network: "))
            except (RuntimeError, TypeError) as error:
                raise ValueError(
                    f"no {self.family} of {self.backbone} can be built for {dataset.name}: {error}"
                ) from error


MOST_WEIGHTS, MOST_NUMBERS = 10_000, 500_000_000  # of a network that is made from settings
_FASHION_IMAGES, _NEEDLE_TEXTS = 55_000, 20_000  # the training inputs of fashion-mnist and of needle
_BATCHES = 4_000  # the batches of pretraining if no row says how long
_MOST_EPOCHS = 100  # of pretraining if no row says how long: with more, few inputs would only be learned by heart
FAMILY = "family"  # the name by which settings of a network choose its family
GIVEN = {"self", "input_shape", "input_dtype", "classes", FAMILY}  # what data say of a network, no setting


def _resnet(layers: tuple[int, ...], widths: tuple[int, ...], stem_stride: int = 1) -> dict[str, Any]:
    """Return the settings of a ResNet that is one of several models."""
    return {"family": "skip_resnet", "layers": list(layers), "widths": list(widths), "stem_stride": stem_stride}


def _routing(channels: int, kernels: tuple[int, ...], epochs: int, tuned: int) -> Defaults:
    """Return the defaults of a routing network for many tasks, tuned for some epochs a round."""
    return Defaults(
        family="routing_net",
        backbone={"image_channels": 1, "channels": channels, "layers": 3, "kernels": kernels, "own": "head"},
        pretraining=Recipe(
            epochs=epochs, batch_size=128, learning_rate=5e-3, weight_decay=0.01, label_smoothing=0.0,
            rates=(0.6, 0.3), full_share=0.25, optimizer="adam",
        ),
        learning=Learning(steps=100_000, hidden=32, reward="log_likelihood", price_range=(0.01, 10.0)),
        # The full route is a trunk that serves all tasks: nothing is distilled from it, and no row must keep to it.
        finetuning=Finetuning(
            epochs=tuned, steps=30_000, optimizer="adam", learning_rate=2e-3, weight_decay=0.01, label_smoothing=0.0,
            full_share=0.0, sampled=True, distillation=0.0,
        ),
    )  # fmt: skip


def _tokens(patch: int, width: int, hidden: int, steps: int, tuned: int, then: int) -> Defaults:
    """Return the defaults of a transformer of three blocks, tuned for some epochs and `then` decisions a round."""
    return Defaults(
        family="token_vit",
        backbone={"patch": patch, "width": width, "depth": 3, "heads": 2, "hidden": hidden},
        pretraining=Recipe(
            epochs=14, batch_size=100, learning_rate=4e-3, weight_decay=0.05, label_smoothing=0.0,
            rates=(0.5, 0.2, 0.0), full_share=0.25, optimizer="adam", plain_epochs=0,
        ),
        learning=Learning(steps=steps),
        finetuning=Finetuning(
            epochs=tuned, steps=then, batch_size=100, optimizer="adam", learning_rate=1e-3, weight_decay=0.05,
        ),
    )  # fmt: skip


def _tree(epochs: int, tuned: int, **settings: Any) -> Defaults:
    """Return the defaults of a tree of modules, tuned for some epochs a round."""
    return Defaults(
        family="neural_tree",
        backbone={"layers": (1, 1, 1, 1), "widths": (8, 16, 32, 64), **settings},
        pretraining=Recipe(
            epochs=epochs, batch_size=100, learning_rate=5e-3, weight_decay=0.01, rates=(0.6, 0.3, 0.0),
            full_share=0.25, optimizer="adam",
        ),
        learning=Learning(steps=200_000, price_range=(0.002, 2.0)),
        finetuning=Finetuning(
            epochs=tuned, steps=60_000, batch_size=100, optimizer="adam", learning_rate=1e-3, weight_decay=0.01,
        ),
    )  # fmt: skip


def _glimpses(
    side: int,
    hidden: int,
    epochs: int,
    tuned: int,
    scales: tuple[int, ...] = (1, 2),
    rate: float = 0.3,
    learning_rate: float = 3e-3,
    dearest: float = 4.0,
) -> Defaults:
    """Return the defaults of a network that looks through windows, tuned for some epochs a round."""
    return Defaults(
        family="glimpses",
        backbone={"side": side, "scales": scales, "looks": 6, "width": 16, "hidden": hidden},
        pretraining=Recipe(
            epochs=epochs, batch_size=64, learning_rate=learning_rate, weight_decay=0.01, label_smoothing=0.0,
            rates=(rate,), full_share=0.1, optimizer="adam", plain_epochs=0,
        ),
        learning=Learning(steps=400_000, hidden=64, num_envs=128, reward="gain", price_range=(0.005, dearest)),
        finetuning=Finetuning(
            rounds=3, epochs=tuned, steps=50_000, optimizer="adam", learning_rate=1e-3, weight_decay=0.01,
            label_smoothing=0.0, full_share=0.1, sampled=True, distillation=0.0,
        ),
    )  # fmt: skip


DEFAULTS: dict[tuple[str, str], Defaults] = {
    ("skip", "digits"): Defaults(
        family="skip_resnet",
        backbone={"layers": (3, 4, 4), "widths": (16, 32, 64)},
        pretraining=Recipe(epochs=24, batch_size=100),
        learning=Learning(steps=300_000),
        finetuning=Finetuning(rounds=2, epochs=6, steps=60_000, batch_size=100),
    ),
    ("skip", "fashion-mnist"): Defaults(
        family="skip_resnet",
        backbone={"layers": (3, 4, 4), "widths": (32, 64, 128), "stem_stride": 2},
        pretraining=Recipe(epochs=16, batch_size=128, rates=(0.6, 0.35, 0.35), full_share=0.25),
        learning=Learning(steps=1_000_000),
        # With half as many epochs a round, the metric at half of the MACs stays visibly below that of the full route.
        finetuning=Finetuning(rounds=2, epochs=8, steps=200_000, learning_rate=0.1),
    ),
    ("skip", "cluttered-fashion-mnist"): Defaults(
        family="skip_resnet",
        backbone={"layers": (3, 4, 4), "widths": (32, 64, 128), "stem": "imagenet"},
        pretraining=Recipe(epochs=16, batch_size=128, rates=(0.6, 0.35, 0.35), full_share=0.25),
        learning=Learning(steps=600_000),
        finetuning=Finetuning(rounds=2, epochs=4, steps=200_000, learning_rate=0.1),
    ),
    ("skip", "trace-small"): Defaults(
        family="skip_resnet",
        backbone={"layers": (2, 4), "widths": (16, 32)},
        pretraining=Recipe(epochs=6, batch_size=128, rates=(0.6, 0.35, 0.35), plain_epochs=12),
        learning=Learning(steps=150_000),
        finetuning=Finetuning(rounds=2, epochs=3, steps=50_000, learning_rate=0.05),
    ),
    ("skip", "trace"): Defaults(
        family="skip_resnet",
        backbone={"layers": (1, 7), "widths": (12, 24)},
        pretraining=Recipe(epochs=6, batch_size=128, rates=(0.6, 0.35, 0.35), plain_epochs=24),
        learning=Learning(steps=300_000),
        finetuning=Finetuning(rounds=3, epochs=4, steps=100_000, learning_rate=0.05),
    ),
    ("skip", "trace-long"): Defaults(
        family="skip_resnet",
        backbone={"layers": (1, 7), "widths": (16, 32)},
        pretraining=Recipe(epochs=6, batch_size=128, rates=(0.6, 0.35, 0.35), plain_epochs=24),
        learning=Learning(steps=300_000),
        finetuning=Finetuning(rounds=3, epochs=4, steps=100_000, learning_rate=0.05),
    ),
    ("exit", "digits"): Defaults(
        family="exit_resnet",
        backbone={"layers": (3, 4, 4), "widths": (16, 32, 64), "exits": (0, 2, 4, 6, 8)},
        pretraining=Recipe(epochs=16, batch_size=100),
        learning=Learning(steps=200_000),
        finetuning=Finetuning(rounds=3, epochs=6, steps=60_000, batch_size=100),
    ),
    ("exit", "fashion-mnist"): Defaults(
        family="exit_resnet",
        backbone={"layers": (3, 4, 4), "widths": (32, 64, 128), "stem_stride": 2, "exits": (1, 3, 5, 7, 9)},
        pretraining=Recipe(epochs=8, batch_size=128),
        learning=Learning(steps=600_000),
    ),
    ("exit", "varied-fashion-mnist"): Defaults(
        family="exit_resnet",
        backbone={
            "layers": (3, 4, 4), "widths": (16, 32, 64), "stem_stride": 2, "exits": (0, 2, 4, 6, 8), "sees": "scores",
        },
        pretraining=Recipe(epochs=8, batch_size=128),
        learning=Learning(steps=300_000, reward="correct"),
    ),
    # The plain network needs most of the time: exits are soon trained on it.
    ("exit", "trace-small"): Defaults(
        family="exit_resnet",
        backbone={"layers": (2, 4), "widths": (24, 48), "exits": (1, 2, 3, 4)},
        pretraining=Recipe(epochs=4, batch_size=128, plain_epochs=12),
        learning=Learning(steps=150_000),
    ),
    ("exit", "trace"): Defaults(
        family="exit_resnet",
        backbone={"layers": (1, 7), "widths": (12, 24), "exits": (1, 2, 3, 5)},
        pretraining=Recipe(epochs=6, batch_size=128, plain_epochs=24),
        learning=Learning(steps=300_000),
        finetuning=Finetuning(rounds=3, epochs=4, steps=100_000, learning_rate=0.05),
    ),
    ("exit", "trace-long"): Defaults(
        family="exit_resnet",
        backbone={"layers": (1, 7), "widths": (16, 32), "exits": (0, 1, 2, 3, 4, 5, 6)},
        pretraining=Recipe(epochs=6, batch_size=128, plain_epochs=24),
        learning=Learning(steps=300_000),
    ),
    ("expert", "digits"): Defaults(
        family="expert_net",
        backbone={"stem": 16, "channels": 64, "layers": 4, "widths": (0, 32, 64, 64, 128, 256)},
        pretraining=Recipe(epochs=40, batch_size=100, rates=(0.6, 0.0, 0.0), full_share=0.2),
        learning=Learning(steps=200_000),
    ),
    ("expert", "fashion-mnist"): Defaults(
        family="expert_net",
        backbone={"stem": 32, "channels": 128, "layers": 4, "widths": (0, 64, 128, 128, 256, 512)},
        # If all routes are equally likely, all experts learn the same. The full route gets better if dear experts are
        # preferred and half of the images take it.
        pretraining=Recipe(epochs=8, batch_size=128, rates=(0.6, 0.3, 0.3), full_share=0.5),
        learning=Learning(steps=600_000),
        finetuning=Finetuning(rounds=2, epochs=6, steps=150_000, learning_rate=0.1),
    ),
    ("channel", "digits"): Defaults(
        family="slimmable_resnet",
        backbone={"layers": (3, 4, 4), "widths": (32, 64, 128), "stem_stride": 2},
        pretraining=Recipe(epochs=24, batch_size=100, rates=(0.6, 0.0, 0.0), full_share=0.25),
        learning=Learning(steps=300_000),
    ),
    ("channel", "fashion-mnist"): Defaults(
        family="slimmable_resnet",
        backbone={"layers": (3, 4, 4), "widths": (32, 64, 128), "stem_stride": 2},
        pretraining=Recipe(epochs=8, batch_size=128, rates=(0.6, 0.0, 0.0), full_share=0.25),
        learning=Learning(steps=1_000_000),
        finetuning=Finetuning(rounds=2, epochs=4, steps=200_000, learning_rate=0.1),
    ),
    ("channel", "trace"): Defaults(
        family="slimmable_resnet",
        backbone={"layers": (1, 7), "widths": (12, 24)},
        pretraining=Recipe(epochs=6, batch_size=128, rates=(0.6, 0.3, 0.3), plain_epochs=24),
        learning=Learning(steps=300_000),
        finetuning=Finetuning(rounds=3, epochs=4, steps=100_000, learning_rate=0.05),
    ),
    ("channel", "cluttered-fashion-mnist"): Defaults(
        family="slimmable_resnet",
        backbone={"layers": (3, 4, 4), "widths": (32, 64, 128), "stem": "imagenet"},
        pretraining=Recipe(epochs=16, batch_size=128, rates=(0.6, 0.0, 0.0), full_share=0.25),
        learning=Learning(steps=600_000),
        finetuning=Finetuning(rounds=2, epochs=4, steps=200_000, learning_rate=0.1),
    ),
    ("positions", "digits"): Defaults(
        family="token_vit",
        backbone={"patch": 4, "width": 32, "depth": 3, "heads": 2, "hidden": 64},
        pretraining=Recipe(
            epochs=40, batch_size=50, learning_rate=4e-3, weight_decay=0.05, rates=(0.5, 0.2, 0.0), full_share=0.25,
            optimizer="adam", plain_epochs=30,
        ),
        learning=Learning(steps=100_000),
        finetuning=Finetuning(
            rounds=2, epochs=8, steps=30_000, batch_size=50, optimizer="adam", learning_rate=1e-3, weight_decay=0.05,
        ),
    ),
    ("positions", "digit-scenes"): _tokens(8, 32, 64, steps=150_000, tuned=4, then=50_000),
    ("positions", "digit-pages"): _tokens(4, 24, 96, steps=100_000, tuned=3, then=40_000),
    ("hidden-update", "sequential-digits"): Defaults(
        family="skip_gru",
        backbone={"hidden": 64, "sees": "state", "knots": 32},
        pretraining=Recipe(epochs=100, batch_size=64, learning_rate=5e-3, weight_decay=0.01, optimizer="adam"),
        learning=Learning(steps=1_000_000, hidden=0, num_envs=256, price_range=(0.01, 5.0)),
        finetuning=Finetuning(
            rounds=8, epochs=15, steps=400_000, batch_size=64, optimizer="adam", learning_rate=2e-3, weight_decay=0.01,
            sampled=True,
        ),
    ),
    ("hidden-update", "sequential-fashion-mnist"): Defaults(
        family="skip_gru",
        backbone={"hidden": 128, "sees": "state", "knots": 16},
        pretraining=Recipe(epochs=8, batch_size=128, learning_rate=5e-3, weight_decay=0.01, optimizer="adam"),
        learning=Learning(steps=1_000_000, hidden=0),
    ),
    # Most routes have few boundaries, as a sentence in twelve is enough.
    ("hidden-update", "needle"): Defaults(
        family="multi_scale_rnn",
        backbone={"tokens": 200, "width": 32, "lower": 32, "hidden": 128},
        pretraining=Recipe(
            epochs=4, batch_size=128, learning_rate=5e-3, weight_decay=0.0, label_smoothing=0.0, rates=(0.2, 0.02),
            full_share=0.0, optimizer="adam", plain_epochs=1,
        ),
        learning=Learning(steps=600_000, hidden=0, num_envs=128, reward="log_likelihood", price_range=(0.05, 5.0)),
        finetuning=Finetuning(
            rounds=2, epochs=1, steps=200_000, optimizer="adam", learning_rate=2e-3, weight_decay=0.0,
            label_smoothing=0.0, full_share=0.0, sampled=True, distillation=0.0,
        ),
    ),
    # Half of the rows take the full route: most other routes miss a number, so little can be learned on them.
    ("hidden-update", "adding"): Defaults(
        family="skip_gru",
        backbone={"hidden": 110, "sees": "state", "knots": 16},
        pretraining=Recipe(
            epochs=13, batch_size=128, learning_rate=2e-3, weight_decay=0.0, label_smoothing=0.0, rates=(0.6, 0.0, 0.0),
            full_share=0.5, optimizer="adam",
        ),
        learning=Learning(steps=100_000, hidden=0, num_envs=256, price_range=(0.03, 1.0)),
        finetuning=Finetuning(
            rounds=16, epochs=0.3, steps=120_000, optimizer="adam", learning_rate=1e-3, weight_decay=0.0,
            label_smoothing=0.0, sampled=True,
        ),
        joint=True,
    ),
    # The dearest model is the plain network. The epochs after it are those of the other models, each alone.
    ("model", "digits"): Defaults(
        family="members",
        backbone={
            "members": (_resnet((1, 1), (8, 16), 4), _resnet((1, 1), (16, 32), 2), _resnet((1, 1, 1), (16, 32, 64))),
        },
        pretraining=Recipe(epochs=24, batch_size=100),
        learning=Learning(steps=100_000),
    ),
    ("model", "fashion-mnist"): Defaults(
        family="members",
        backbone={
            "members": (
                _resnet((1, 1), (16, 32), 4), _resnet((1, 1, 1), (16, 32, 64), 2), _resnet((2, 2, 2), (48, 96, 192), 2)
            ),
        },
        pretraining=Recipe(epochs=12, batch_size=128),
        learning=Learning(steps=400_000),
    ),
    ("model", "varied-fashion-mnist"): Defaults(
        family="resolutions",
        backbone={"network": _resnet((1, 1, 1), (16, 32, 64), 2), "sizes": (24, 32, 48)},
        pretraining=Recipe(epochs=8, batch_size=128, plain_epochs=4),
        learning=Learning(steps=150_000),
    ),
    # Nearly all windows are background, so the first model's compute is nearly all that a cascade spends.
    ("model", "windows"): Defaults(
        family="members",
        backbone={
            "members": (
                _resnet((1,), (8,), 4), _resnet((1, 1), (16, 32), 4), _resnet((1, 1, 1), (16, 32, 64), 2),
                _resnet((2, 2, 2), (32, 64, 128), 2),
            ),
        },
        pretraining=Recipe(
            epochs=12, batch_size=100, learning_rate=5e-3, weight_decay=0.01, label_smoothing=0.0, optimizer="adam",
            plain_epochs=7,
        ),
        learning=Learning(steps=300_000, hidden=16, reward="log_likelihood"),
    ),
    ("unroll", "hops"): Defaults(
        family="unrolled",
        backbone={"hidden": 64, "steps": 8},
        pretraining=Recipe(
            epochs=2, batch_size=128, learning_rate=4e-3, weight_decay=0.01, label_smoothing=0.0, optimizer="adam"
        ),
        learning=Learning(steps=150_000, hidden=16, reward="gain"),
        finetuning=Finetuning(epochs=1, optimizer="adam", learning_rate=1e-3, label_smoothing=0.0, distillation=0.0),
    ),
    ("unroll", "prefix"): Defaults(
        family="recall_net",
        backbone={"width": 16, "steps": 12},
        pretraining=Recipe(
            epochs=4, batch_size=256, learning_rate=3e-3, weight_decay=1e-4, label_smoothing=0.0, optimizer="adam",
            plain_epochs=18,
        ),
        learning=Learning(steps=150_000, hidden=16, reward="gain"),
    ),
    # A longer walk may be worse: no image is distilled from the longest.
    ("unroll", "noisy-photos"): Defaults(
        family="restorer",
        backbone={"width": 16, "steps": 12},
        pretraining=Recipe(
            epochs=8, batch_size=64, learning_rate=4e-3, weight_decay=0.01, label_smoothing=0.0, optimizer="adam",
            plain_epochs=2,
        ),
        learning=Learning(steps=800_000, hidden=32, reward="gain", price_range=(0.0002, 2.0)),
        finetuning=Finetuning(
            epochs=4, batch_size=64, optimizer="adam", learning_rate=1e-3, label_smoothing=0.0, full_share=0.0,
            distillation=0.0,
        ),
    ),
    ("jump", "find-small"): Defaults(
        family="jump_rnn",
        backbone={
            "tokens": 11, "width": 16, "hidden": 32, "jumps": (1, 2, 5), "ends": (), "follow": True,
        },
        pretraining=Recipe(
            epochs=15, batch_size=128, learning_rate=5e-3, weight_decay=0.0, label_smoothing=0.0, rates=(0.0,),
            full_share=0.0, optimizer="adam", plain_epochs=1,
        ),
        learning=Learning(steps=100_000, hidden=0, reward="gain", price_range=(0.1, 30.0)),
    ),
    ("jump", "find"): Defaults(
        family="jump_rnn",
        backbone={
            "tokens": 101, "width": 64, "hidden": 384, "jumps": (1, 2, 5, 10, 20), "ends": (), "follow": True,
        },
        pretraining=Recipe(
            epochs=3, batch_size=128, learning_rate=5e-3, weight_decay=0.0, label_smoothing=0.0, rates=(0.0,),
            full_share=0.0, optimizer="adam", plain_epochs=0,
        ),
        learning=Learning(steps=100_000, hidden=0, reward="gain", price_range=(0.1, 1000.0)),
    ),
    ("jump", "needle"): Defaults(
        family="jump_rnn",
        backbone={
            "tokens": 200, "width": 32, "hidden": 64, "jumps": (1, 2, 5, 10), "ends": ((1, 2), (2,)), "follow": False,
        },
        pretraining=Recipe(
            epochs=2, batch_size=128, learning_rate=1e-2, weight_decay=0.0, label_smoothing=0.0, rates=(0.8, 0.5),
            full_share=0.2, optimizer="adam", plain_epochs=4,
        ),
        learning=Learning(steps=300_000, hidden=0, num_envs=128, reward="gain", price_range=(0.1, 10.0)),
        # No row takes the full route, which would be most of the time; the plain network stays as it is.
        finetuning=Finetuning(
            rounds=4, epochs=1, steps=100_000, optimizer="adam", learning_rate=3e-3, weight_decay=0.0,
            label_smoothing=0.0, full_share=0.0, sampled=True, distillation=0.0,
        ),
    ),
    ("look", "digit-scenes"): _glimpses(12, 48, epochs=24, tuned=2),
    ("look", "digit-scenes-large"): _glimpses(
        24, 128, epochs=40, tuned=3, scales=(1,), rate=0.5, learning_rate=2e-3, dearest=16.0,
    ),
    ("look", "fashion-scenes"): _glimpses(16, 96, epochs=10, tuned=1),
    ("look", "clips"): Defaults(
        family="frames",
        backbone={"peek": 1, "looks": 0, "width": 64, "hidden": 48},
        pretraining=Recipe(
            epochs=4, batch_size=128, learning_rate=5e-3, weight_decay=0.0, label_smoothing=0.0, rates=(0.5,),
            full_share=0.1, optimizer="adam", plain_epochs=0,
        ),
        learning=Learning(steps=800_000, hidden=0, num_envs=256, reward="gain", price_range=(0.1, 5.0)),
        finetuning=Finetuning(
            rounds=2, epochs=1, steps=50_000, optimizer="adam", learning_rate=1e-3, weight_decay=0.0,
            label_smoothing=0.0, full_share=0.1, sampled=True, distillation=0.0,
        ),
    ),
    ("branch", "digits"): _tree(epochs=20, tuned=4),
    ("branch", "fashion-mnist"): _tree(epochs=6, tuned=2, stem_stride=2),
    ("branch", "digit-tasks"): _routing(32, (0, 1, 3, 3), epochs=10, tuned=3),
    # The one network answers other questions than it was trained on badly: nothing is distilled from it.
    ("branch", "shapes"): Defaults(
        family="neural_modules",
        backbone={"properties": 6, "moves": 4, "cell": 10, "channels": 32, "width": 64, "depth": 2, "steps": 10},
        pretraining=Recipe(
            epochs=5, batch_size=100, learning_rate=3e-3, weight_decay=0.01, label_smoothing=0.1, rates=(0.0,),
            full_share=0.1, optimizer="adam", plain_epochs=12,
        ),
        learning=Learning(
            steps=600_000, hidden=0, num_envs=256, reward="probability", price_range=(0.3, 2.0),
            learning_rate=1e-2,
        ),
        finetuning=Finetuning(
            epochs=1, steps=50_000, optimizer="adam", learning_rate=1e-3, weight_decay=0.01, label_smoothing=0.0,
            full_share=0.1, sampled=True, distillation=0.0,
        ),
    ),
    ("branch", "many-tasks"): _routing(16, (0, 1, 3, 3, 3), epochs=8, tuned=3),
    ("branch", "digit-views"): Defaults(
        family="scale_grid",
        backbone={"layers": 4, "scales": 3, "width": 12},
        pretraining=Recipe(
            epochs=8, batch_size=64, learning_rate=5e-3, weight_decay=0.01, label_smoothing=0.0, rates=(0.5, 0.2, 0.0),
            full_share=0.1, optimizer="adam", plain_epochs=5,
        ),
        learning=Learning(steps=150_000, hidden=64, reward="correct", price_range=(0.01, 1.0)),
        finetuning=Finetuning(
            epochs=2, steps=50_000, batch_size=64, optimizer="adam", learning_rate=2e-3, weight_decay=0.01,
            label_smoothing=0.0, distillation=0.0,
        ),
    ),
}  # fmt: skip


def defaults(decision: str, data: str | Dataset, own_backbone: bool = False) -> Defaults:
    """Return the defaults for a decision on a data set.

    Images without a row of their own (CIFAR, a folder, `DATASETS["mine"]`) take the row of fashion-mnist, with as many
    training batches, but at most 100 epochs. From 96 pixels on, they take an ImageNet stem. Texts of a vocabulary take
    the row of needle, likewise.

    Args:
        decision: the decision's name.
        data: the data set or its name.
        own_backbone: whether a backbone was given; if so, data without a row take defaults that suit most networks.

    Raises:
        ValueError: there is no row; the message lists the data sets that have one for the decision.
    """
    name = data.name if isinstance(data, Dataset) else check_dataset(data)
    if (decision, name) in DEFAULTS:
        return DEFAULTS[decision, name]
    dataset = data if isinstance(data, Dataset) else load_dataset(name)
    shape = dataset.input_shape
    images, row = isinstance(shape, tuple) and len(shape) == 3, DEFAULTS.get((decision, "fashion-mnist"))
    if row is not None and images:
        return _for_images(row, dataset)
    row = DEFAULTS.get((decision, "needle"))
    if row is not None and dataset.vocabulary is not None:
        return _for_texts(row, dataset)
    if own_backbone:
        inputs = len(dataset.for_backbone.train)
        size = min(128, inputs)
        epochs = min(_MOST_EPOCHS, math.ceil(_BATCHES * size / inputs))
        pretraining = Recipe(epochs, size, learning_rate=2e-3, weight_decay=0.01, optimizer="adam")
        return Defaults("", {}, pretraining, finetuning=Finetuning(epochs=epochs / 4, batch_size=size))
    known = sorted(d for one, d in DEFAULTS if one == decision)
    raise ValueError(
        f"no defaults for {decision!r} on {name!r}; there are for {known}. Give --backbone FOLDER, or a network of "
        "your own by --network family=NAME and a plugin: dynrl --plugin FILE.py VERB ..."
    )


def _for_images(row: Defaults, dataset: Dataset) -> Defaults:
    """Adapt fashion-mnist's row to other images, with as many training batches, up to `_MOST_EPOCHS`."""
    backbone = dict(row.backbone)
    if backbone.pop("stem_stride", None):
        backbone |= {"stem": "imagenet"} if dataset.input_shape[1] >= 96 else {"stem_stride": 2}
    return _as_long(row, backbone, dataset, _FASHION_IMAGES)


def _for_texts(row: Defaults, dataset: Dataset) -> Defaults:
    """Adapt needle's row to other texts, whose vocabulary says how many words there are and which ones end a part."""
    assert dataset.vocabulary is not None, "only texts come here"
    told = dataset.vocabulary.settings
    backbone = {name: value for name, value in row.backbone.items() if name not in told}
    return _as_long(row, backbone, dataset, _NEEDLE_TEXTS)


def _as_long(row: Defaults, backbone: dict[str, Any], dataset: Dataset, inputs: int) -> Defaults:
    """Return a row for other data and as many training batches, up to `_MOST_EPOCHS`; it was for so many `inputs`."""
    longest = _MOST_EPOCHS / row.pretraining.epochs
    longer = min(longest, inputs / len(dataset.train))
    size = min(row.pretraining.batch_size, len(dataset.for_backbone.train))
    pretraining = replace(row.pretraining, epochs=math.ceil(longer * row.pretraining.epochs), batch_size=size)
    if row.pretraining.plain_epochs:
        pretraining = replace(pretraining, plain_epochs=math.ceil(longer * row.pretraining.plain_epochs))
    finetuning = replace(row.finetuning, epochs=longer * row.finetuning.epochs, batch_size=size)
    return replace(row, backbone=backbone, pretraining=pretraining, finetuning=finetuning)
