"""The ops as torch custom ops (`torch.ops.dynrl.*`): what torch.compile and torch.export put into their graphs.

How many rows make a choice is data, so a tracer cannot look inside. Only traced code calls these: a custom op costs
some 30 us a call where the plain function costs 5 (measured). `gated_residual` needs none: it is traced as plain torch
ops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynrl.ops.gated_cell import gated_cell
from dynrl.ops.route import Routing
from dynrl.ops.routed_linear import routed_linear
from dynrl.ops.sliced_linear import sliced_product


@torch.library.custom_op("dynrl::routed_linear", mutates_args=())
def _routed_linear(
    x: Tensor, weight: Tensor, order: Tensor, offsets: Tensor, bias: Tensor | None, gate: Tensor | None,
    splits: list[int] | None, relu: bool, sorted_in: bool, sorted_out: bool,
) -> Tensor:  # fmt: skip
    routing = Routing(order, len(offsets) - 1, sorted_choice=None, offsets=offsets)
    return routed_linear(
        x, weight, routing, bias, gate, splits=tuple(splits) if splits else None, relu=relu, sorted_in=sorted_in,
        sorted_out=sorted_out,
    )  # fmt: skip


@_routed_linear.register_fake
def _(x: Tensor, weight: Tensor, order: Tensor, offsets: Tensor, bias: Tensor | None, gate: Tensor | None,
      splits: list[int] | None, relu: bool, sorted_in: bool, sorted_out: bool) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], max(splits) if splits and sorted_out else weight.shape[-2])


@torch.library.custom_op("dynrl::sliced_linear", mutates_args=())
def _sliced_linear(
    x: Tensor, choice: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, limit: Tensor,
    widths: list[int],
) -> Tensor:  # fmt: skip
    return sliced_product(x, choice, w1, b1, w2, b2, limit, tuple(widths))


@_sliced_linear.register_fake
def _(x: Tensor, choice: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, limit: Tensor,
      widths: list[int]) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], len(w2))


@torch.library.custom_op("dynrl::gated_cell", mutates_args=())
def _gated_cell(
    x: Tensor, h: Tensor, update: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, x_rows: Tensor | None
) -> Tensor:
    return gated_cell(x, h.clone(), update, w_ih, w_hh, b_ih, b_hh, x_rows)


@_gated_cell.register_fake
def _(x: Tensor, h: Tensor, update: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor,
      x_rows: Tensor | None) -> Tensor:  # fmt: skip
    return torch.empty_like(h)
