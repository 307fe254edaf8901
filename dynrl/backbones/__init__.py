"""Backbones are dynamic networks: walks through decision points. Each family has one file."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrl.backbones.base import Backbone
from dynrl.backbones.cells import CellResNet
from dynrl.backbones.channel import SlimmableResNet
from dynrl.backbones.exit import ExitResNet
from dynrl.backbones.exit_module import ExitModule
from dynrl.backbones.expert import ExpertNet
from dynrl.backbones.expert_module import ExpertModule
from dynrl.backbones.frames import Frames
from dynrl.backbones.glimpses import Glimpses
from dynrl.backbones.grid import ScaleGrid
from dynrl.backbones.hierarchical import MultiScaleRNN
from dynrl.backbones.looks import Looks
from dynrl.backbones.models import Members, Models, Resolutions
from dynrl.backbones.multipath import MultiPathResNet
from dynrl.backbones.multiscale import MultiScaleNet
from dynrl.backbones.neural_modules import NeuralModules
from dynrl.backbones.reader import JumpRNN
from dynrl.backbones.recurrent import SkipGRU, SkipLSTM
from dynrl.backbones.resolution import ResolutionNet
from dynrl.backbones.routing import RoutingNet
from dynrl.backbones.skip import SkipResNet
from dynrl.backbones.skip_module import SkipModule
from dynrl.backbones.token_module import TokenModule
from dynrl.backbones.tree import NeuralTree
from dynrl.backbones.unroll import RecallNet, Restorer, Unrolled
from dynrl.backbones.vit import TokenViT
from dynrl.backbones.walk import END, CostTable, Point, State, Walk, choice_rates, merge
from dynrl.files import filled, load_tensors, reading
from dynrl.ops.backend import float32
from dynrl.provenance import Provenance, Standard
from dynrl.schema import arguments, check_known, parse

# These functions build a backbone from the `config` of its file, by family. A plugin adds a row:
# FAMILIES["my-vit"] = a function of `config`.
FAMILIES: dict[str, Callable[..., Backbone]] = {
    family.family: family
    for family in (
        SkipResNet, MultiPathResNet, ExitResNet, MultiScaleNet, ResolutionNet, ExpertNet, SlimmableResNet, SkipGRU,
        SkipLSTM, MultiScaleRNN, Members, Resolutions, Unrolled, RecallNet, Restorer, JumpRNN, Glimpses, Frames,
        TokenViT, CellResNet, RoutingNet, NeuralTree, ScaleGrid, NeuralModules,
    )
}  # fmt: skip

__all__ = [
    "END", "FAMILIES", "Backbone", "CellResNet", "CostTable", "ExitModule", "ExitResNet", "ExpertModule", "ExpertNet",
    "Frames", "Glimpses", "JumpRNN", "Looks", "Members", "Models", "MultiPathResNet", "MultiScaleNet", "MultiScaleRNN",
    "NeuralModules", "NeuralTree", "Point", "RecallNet", "ResolutionNet", "Resolutions", "Restorer", "RoutingNet",
    "ScaleGrid", "SkipGRU", "SkipLSTM", "SkipModule", "SkipResNet", "SlimmableResNet", "State", "TokenModule",
    "TokenViT", "Unrolled", "Walk", "choice_rates", "load_backbone", "merge",
]  # fmt: skip


def load_backbone(path: str | Path) -> tuple[Backbone, dict[str, Any]]:
    """Load a backbone file and return the backbone, in eval mode, and the notes that it was saved with.

    Raises:
        ValueError: the file is missing, damaged, altered, of another kind, or of an unknown family.
    """
    tensors, metadata = load_tensors(path, "backbone")
    with reading(path, "backbone file"):
        written = parse(BackboneFile, metadata)
        check_known("family", written.family, FAMILIES, ", or what your program adds to dynrl.backbones.FAMILIES")
        family, trained_on = FAMILIES[written.family], None
        if "trained_on" in written.notes:
            trained_on = Provenance.read(written.notes["trained_on"], "notes.trained_on")
            _check_shape(written.config.get("input_shape"), trained_on)
        with float32():
            backbone = filled(lambda: family(**arguments(family, written.config, "config.")), tensors)
        backbone.trained_on = trained_on
        if "standard" in written.notes:
            backbone.standard = parse(Standard, written.notes["standard"], "notes.standard.")
    return backbone.eval(), written.notes


def _check_shape(written: Any, trained_on: Provenance) -> None:
    """Refuse inputs of another shape before a network is built for them, which may be large."""
    expected = trained_on.input_shape
    if isinstance(written, list) and isinstance(expected, tuple) and written != list(expected):
        raise ValueError(f"config.input_shape: expected {list(expected)}, as it was trained on, got {written}")


@dataclass(frozen=True)
class BackboneFile:
    """The metadata of a backbone file.

    Attributes:
        family: a name in `FAMILIES`.
        config: the keyword arguments that rebuild the backbone.
        notes: what the backbone was saved with.
    """

    family: str
    config: dict[str, Any]
    notes: dict[str, Any]


@functools.lru_cache(maxsize=4)
def shared_backbone(path: str, modified_ns: int) -> Backbone:
    """Return a frozen backbone for inference, loaded once a process and again when `modified_ns` changes."""
    return load_backbone(path)[0].for_inference()
