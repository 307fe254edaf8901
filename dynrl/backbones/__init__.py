"""Backbones are dynamic networks: walks through decision points. Each family has one file."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynrl.backbones.base import Backbone, read_backbone_file
from dynrl.backbones.channel import SlimmableResNet
from dynrl.backbones.exit import ExitResNet
from dynrl.backbones.expert import ExpertNet
from dynrl.backbones.module import ExitModule, SkipModule
from dynrl.backbones.recurrent import SkipGRU, SkipLSTM
from dynrl.backbones.skip import SkipResNet
from dynrl.backbones.walk import END, CostTable, Point, State, Walk, choice_rates, merge
from dynrl.ops.backend import float32
from dynrl.provenance import Provenance

# These functions build a backbone from the `config` of its file, by family. A plugin adds a row:
# FAMILIES["my-vit"] = a function of `config`.
FAMILIES: dict[str, Callable[..., Backbone]] = {
    family.family: family for family in (SkipResNet, ExitResNet, ExpertNet, SlimmableResNet, SkipGRU, SkipLSTM)
}

__all__ = [
    "END", "FAMILIES", "Backbone", "CostTable", "ExitModule", "ExitResNet", "ExpertNet", "Point", "SkipGRU", "SkipLSTM",
    "SkipModule", "SkipResNet", "SlimmableResNet", "State", "Walk", "choice_rates", "load_backbone", "merge",
]  # fmt: skip


def load_backbone(path: str | Path) -> tuple[Backbone, dict[str, Any]]:
    """Load a backbone file and return the backbone, in eval mode, and the notes that it was saved with.

    Raises:
        ValueError: the file is missing, damaged, altered, of another kind, or of an unknown family.
    """
    tensors, metadata = read_backbone_file(path)
    family = FAMILIES.get(str(metadata.get("family")))
    if family is None:
        raise ValueError(
            f"{path}: unknown backbone family {metadata.get('family')!r}; known: {sorted(FAMILIES)}. For one of your "
            "own, first add the function that builds it to dynrl.backbones.FAMILIES"
        )
    with float32():
        backbone = family(**metadata["config"])
    backbone.load_state_dict(tensors, assign=True)  # with the types that the file has
    notes = metadata["notes"]
    if "trained_on" in notes:
        backbone.trained_on = Provenance.read(notes["trained_on"], f"{path}: trained_on")
    return backbone.eval(), notes


@functools.lru_cache(maxsize=4)
def shared_backbone(path: str, modified_ns: int) -> Backbone:
    """Return a frozen backbone for inference, loaded once a process and again when `modified_ns` changes."""
    return load_backbone(path)[0].for_inference()
