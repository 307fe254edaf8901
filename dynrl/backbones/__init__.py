"""Backbones: dynamic networks as walks through decision points; one file a family."""

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

# What builds the backbones of files, by family. Your own: FAMILIES["my-vit"] = a function of a file's `config`.
FAMILIES: dict[str, Callable[..., Backbone]] = {
    family.family: family for family in (SkipResNet, ExitResNet, ExpertNet, SlimmableResNet, SkipGRU, SkipLSTM)
}

__all__ = [
    "END", "FAMILIES", "Backbone", "CostTable", "ExitModule", "ExitResNet", "ExpertNet", "Point", "SkipGRU", "SkipLSTM",
    "SkipModule", "SkipResNet", "SlimmableResNet", "State", "Walk", "choice_rates", "load_backbone", "merge",
]  # fmt: skip


def load_backbone(path: str | Path) -> tuple[Backbone, dict[str, Any]]:
    """Load a backbone file: the backbone in eval mode, and the notes it was saved with.

    Raises:
        ValueError: the file is missing, damaged, altered, of another kind, or of an unknown family.
    """
    tensors, metadata = read_backbone_file(path)
    family = FAMILIES.get(str(metadata.get("family")))
    if family is None:
        raise ValueError(
            f"{path}: unknown backbone family {metadata.get('family')!r}; known: {sorted(FAMILIES)}. One of your own "
            "must be in dynrl.backbones.FAMILIES first: a function that builds it"
        )
    backbone = family(**metadata["config"])
    backbone.load_state_dict(tensors)
    return backbone.eval(), metadata["notes"]


@functools.lru_cache(maxsize=4)
def shared_backbone(path: str, modified_ns: int) -> Backbone:
    """A frozen, inference-ready backbone, loaded once a process. `modified_ns` renews it when the file changes."""
    return load_backbone(path)[0].for_inference()
