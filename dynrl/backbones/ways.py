"""Networks of modules are those in which a row's choices say which modules come next: rows part, and may meet again."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from dynrl.backbones.base import Backbone
from dynrl.backbones.gated import GatedWalk
from dynrl.backbones.resnet import Block, folded
from dynrl.ops.move import beside

LEAST = 1e-9  # a smaller share of a row counts as this much where shares are divided


class Ways(Backbone):
    """This is the base class of networks of residual blocks with several ways to the end.

    In a compacted walk, `State`s part and merge by themselves. In a gated walk, a share of each row goes each way. What
    comes to a point waits there until it is the point's turn, and where shares meet, they become their weighted mean.
    """

    decision = "branch"

    def _come(self, walk: GatedWalk, point: int, features: tuple[Tensor, ...], weight: Tensor, present: Tensor) -> None:
        """Let shares of all rows come to a later point of a gated walk.

        Args:
            walk: the walk.
            point: the point, or END, where the outputs are the only features.
            features: [B, ...] each.
            weight: [B], the share of each row that comes.
            present: [B] bool, the rows whose likeliest choices lead them this way.
        """
        names = self._waiting(point, len(features))
        if names[0] in walk.own:
            *before, waiting, there = (walk.own[name] for name in names)
            share = weight / (waiting + weight).clamp_min(LEAST)
            met = zip(before, features, strict=True)
            features = tuple(torch.lerp(old, new, beside(share.to(new.dtype), new)) for old, new in met)
            weight, present = waiting + weight, there | present
        walk.own |= dict(zip(names, (*features, weight, present), strict=True))

    def _at(self, walk: GatedWalk, point: int, parts: int) -> Any:
        """Return the features of all rows at `point` of a gated walk, `parts` tensors, and let the walk go on there."""
        *features, walk.weight, walk.present = (walk.own.pop(name) for name in self._waiting(point, parts))
        return tuple(features)

    def _waiting(self, point: int, parts: int) -> list[str]:
        return [f"{part} at {point}" for part in (*range(parts), "weight", "present")]

    def for_inference(self) -> Self:
        """Return a frozen copy with batch norm, ReLU and residual folded into the convolutions, in channels_last."""
        twin = folded(super().for_inference())
        for module in list(twin.modules()):
            for name, part in module.named_children():
                if isinstance(part, Block):  # a copy of a copy is folded already
                    setattr(module, name, part.folded())
        return twin.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
