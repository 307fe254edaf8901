"""`gated_cell` runs a GRU or LSTM cell on the rows that update their state. All other rows keep theirs untouched."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynrl.ops.backend import Path, path
from dynrl.ops.costs import COSTS
from dynrl.ops.move import put_rows
from dynrl.ops.partition import partition
from dynrl.ops.routed_linear import GroupedProduct


def gated_cell_macs(rows: int, inputs: int, hidden: int, gates: int = 3) -> int:
    """Return the MACs of a GRU (3 gates) or an LSTM (4 gates) for `rows` rows that update."""
    return rows * gates * hidden * (inputs + hidden)


def gated_cell_ref(
    x: Tensor,
    h: Tensor,
    update: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor,
    b_hh: Tensor,
    x_rows: Tensor | None = None,
    widths: Sequence[int] | None = None,
) -> Tensor:
    """Compute the definition of `gated_cell`: it computes every row and then selects, so it saves nothing.

    Args:
        x: [m, I], inputs; m = n without `x_rows`.
        h: [n, H], hidden states; for an LSTM [n, 2H], the hidden state and behind it the cell's.
        update: [n] bool (or 0/1), the rows that update; with `widths` [n] integers, how much each row updates.
        w_ih: [3H, I], for the reset, update and new gates of a `torch.nn.GRUCell`; or [4H, I] of a
            `torch.nn.LSTMCell`. This size tells the two apart.
        w_hh: [3H, H] or [4H, H].
        b_ih: [3H] or [4H].
        b_hh: [3H] or [4H].
        x_rows: [n], or None. Row i's input is x[x_rows[i]], such as its step of a sequence.
        widths: rising numbers of units, or None: (0, H). Row i updates its first widths[update[i]] units, and of its
            state only these are read: the cell runs as if it had no others.

    Returns:
        [n, H] or [n, 2H]: the cell's new state where `update`, else `h`.

    Source: Cho et al. 2014 (EMNLP), Hochreiter & Schmidhuber 1997 (Neural Computation 9), in torch's forms; the copied
    state of Skip RNN (Campos et al. 2018, ICLR, eq. 6); the part of the state of variable computation in recurrent
    networks (Jernite et al. 2017, ICLR, section 3), without the soft edge.
    """
    x = x if x_rows is None else x[x_rows]
    if widths is not None:
        inside = _inside(tuple(widths), w_hh.shape[1], h.shape[1], h.device)[update]
        new = gated_cell_ref(x, torch.where(inside, h, 0), torch.ones_like(update), w_ih, w_hh, b_ih, b_hh)
        return torch.where(inside, new, h)
    if _is_lstm(w_hh):
        new = torch.cat(torch.lstm_cell(x, h.chunk(2, 1), w_ih, w_hh, b_ih, b_hh), 1)
    else:
        new = torch.gru_cell(x, h, w_ih, w_hh, b_ih, b_hh)
    return torch.where(update.bool().unsqueeze(1), new, h)


def gated_cell(
    x: Tensor,
    h: Tensor,
    update: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor,
    b_hh: Tensor,
    x_rows: Tensor | None = None,
    widths: Sequence[int] | None = None,
) -> Tensor:
    """Do `gated_cell_ref`, computing only the rows that update. Differentiable.

    If no gradient is recorded, `h` itself is overwritten and returned, and of rows that update some units only these
    are computed.

    The MACs are `gated_cell_macs` for the rows that update.
    """
    args = (x, h, update, w_ih, w_hh, b_ih, b_hh, x_rows)
    match path(h):
        case Path.REF:
            return gated_cell_ref(*args, widths)
        case Path.TRACED if not torch.is_grad_enabled():
            return torch.ops.dynrl.gated_cell(*args, widths)
        case _ if widths is not None and torch.is_grad_enabled():
            inside = _inside(tuple(widths), w_hh.shape[1], h.shape[1], h.device)[update]
            # The first unit is inside if any is.
            new = gated_cell(x, torch.where(inside, h, 0), inside[:, 0], w_ih, w_hh, b_ih, b_hh, x_rows)
            return torch.where(inside, new, h)
        case Path.TRITON:
            return _on_triton(*args) if widths is None else _parts_on_triton(*args, widths)
        case _:
            return _on_host(*args) if widths is None else _parts_on_host(*args, widths)


@cache  # without a bound: a CUDA graph keeps reading the tensors that it read when it was recorded
@torch.inference_mode(False)  # otherwise training could not use tensors made in inference
def _inside(widths: tuple[int, ...], hidden: int, numbers: int, device: torch.device) -> Tensor:
    """Return which numbers of a state each choice updates, [choices, numbers] bool, where units repeat by `hidden`."""
    units = torch.arange(numbers, device=device) % hidden
    return units < torch.tensor(widths, device=device).unsqueeze(1)


def _on_host(
    x: Tensor, h: Tensor, update: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, x_rows: Tensor | None
) -> Tensor:
    weights = (w_ih, w_hh, b_ih, b_hh)
    into = None if torch.is_grad_enabled() else h
    n = h.shape[0]  # faster than len()
    macs = w_ih.numel() + w_hh.numel()
    # The number of rows that update is not known yet, so the most that could be saved decides.
    if into is not None and not COSTS.worth_compacting(COSTS.rows_time(n, macs), COSTS.moving_vectors):
        count = sum(update.tolist())
        if count == 0:
            return h
        x = x if x_rows is None else x[x_rows]
        if count == n:
            return recurrent_cell(x, h, *weights, out=into)
        mask = (update if update.dtype is torch.bool else update != 0).unsqueeze(1)
        new = recurrent_cell(x, h, *weights)
        return torch.where(mask, new, h, out=h)
    index = update.nonzero().squeeze(1)
    count = index.shape[0]
    if count == 0:
        return h
    if count == n:
        return recurrent_cell(x if x_rows is None else x[x_rows], h, *weights, out=into)
    inputs = index if x_rows is None else x_rows.index_select(0, index)
    new = recurrent_cell(x.index_select(0, inputs), h.index_select(0, index), *weights)
    return h.index_copy(0, index, new) if into is None else put_rows(h, index, new)


def _parts_on_host(
    x: Tensor, h: Tensor, update: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor,
    x_rows: Tensor | None, widths: Sequence[int],
) -> Tensor:  # fmt: skip
    weights, n = (w_ih, w_hh, b_ih, b_hh), len(h)
    choices = update.tolist()
    alike = n > 0 and choices.count(choices[0]) == n
    if not alike and not COSTS.worth_compacting(
        COSTS.rows_time(n, w_ih.numel() + w_hh.numel()), len(widths) * COSTS.moving_vectors
    ):
        inside = _inside(tuple(widths), w_hh.shape[1], h.shape[1], h.device)[update]
        new = recurrent_cell(x if x_rows is None else x[x_rows], torch.where(inside, h, 0), *weights)
        return torch.where(inside, new, h, out=h)
    if alike:
        width = widths[choices[0]]
        return leading_units(x if x_rows is None else x[x_rows], h, *weights, width) if width else h
    copied = choices.count(0) if widths[0] == 0 else 0
    order = update.argsort()[copied:]  # rows of a width lie side by side, so that they move once
    inputs = order if x_rows is None else x_rows.index_select(0, order)
    some_x, some_h, start = x.index_select(0, inputs), h.index_select(0, order), 0
    for choice, width in enumerate(widths):
        end = start + (choices.count(choice) if width else 0)
        if end > start:
            leading_units(some_x[start:end], some_h[start:end], *weights, width)
        start = end
    return put_rows(h, order, some_h)


@torch.library.custom_op("dynrl::gated_cell", mutates_args=())
def _traced(
    x: Tensor, h: Tensor, update: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor,
    x_rows: Tensor | None, widths: Sequence[int] | None,
) -> Tensor:  # fmt: skip
    return gated_cell(x, h.clone(), update, w_ih, w_hh, b_ih, b_hh, x_rows, widths)


@_traced.register_fake
def _(
    x: Tensor, h: Tensor, update: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor,
    x_rows: Tensor | None, widths: Sequence[int] | None,
) -> Tensor:  # fmt: skip
    return torch.empty_like(h)


def recurrent_cell(
    x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, out: Tensor | None = None
) -> Tensor:
    """Run the cell on all rows, like `gated_cell_ref` with every row updating. Differentiable.

    Without gradients, it takes fewer and smaller steps than torch's cell, and writes into `out`.

    Args:
        x: [n, I].
        h: [n, H] or [n, 2H].
        w_ih, w_hh, b_ih, b_hh: as in `gated_cell_ref`.
        out: None or like `h`; it may be `h`.

    Returns:
        like `h`.
    """
    step = _lstm_cell if _is_lstm(w_hh) else _gru_cell
    return step(x, h, w_ih, w_hh, b_ih, b_hh, out)


def leading_units(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, width: int) -> Tensor:
    """Run the cell on the first `width` units of `h`, in place and without gradients, as if there were no others."""
    size = w_hh.shape[1]
    if width == size:
        return recurrent_cell(x, h, w_ih, w_hh, b_ih, b_hh, out=h)
    first = h[:, :width]
    if not _is_lstm(w_hh):
        of_x, of_h = _product(x, w_ih, _shift(b_ih, size, width)), _product(first, w_hh, _shift(b_hh, size, width))
        reset, keep = of_x[:2].add_(of_h[:2]).sigmoid_()
        torch.lerp(of_x[2].addcmul_(reset, of_h[2]).tanh_(), first, keep, out=first)
        return h
    cell = h[:, size : size + width]
    gates = _product(first, w_hh, _product(x, w_ih, _shift(b_ih + b_hh, size, width)))
    admit, forget = gates[:2].sigmoid_()
    cell.mul_(forget).addcmul_(admit, gates[2].tanh_())
    torch.mul(gates[3].sigmoid_(), cell.tanh(), out=first)
    return h


# The slices are multiplied where they lie, since copies of them would take longer than the products of few rows. They
# are one view each: slicing step by step takes as long as a small product.
def _shift(bias: Tensor, size: int, width: int) -> Tensor:
    """Return the first `width` of each gate's `size` biases: [gates, 1, width]."""
    step = bias.stride(0)
    return bias.as_strided((bias.shape[0] // size, 1, width), (size * step, 0, step))


def _product(x: Tensor, weight: Tensor, start: Tensor) -> Tensor:
    """Add x [n, k] times the first k columns and `width` rows of each gate's part of `weight` to `start`.

    The start is [gates, 1 or n, width]; one of n rows is overwritten. All gates' sums are returned: [gates, n, width].
    """
    gates, rows, width = start.shape
    row, column = weight.stride()
    parts = weight.as_strided((gates, x.shape[1], width), (weight.shape[0] // gates * row, column, row))
    given = x.expand(gates, -1, -1)
    return torch.baddbmm(start, given, parts) if rows == 1 else start.baddbmm_(given, parts)


def _is_lstm(w_hh: Tensor) -> bool:
    return w_hh.shape[0] == 4 * w_hh.shape[1]


def _gru_cell(
    x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, out: Tensor | None
) -> Tensor:
    if torch.is_grad_enabled():
        return torch.gru_cell(x, h, w_ih, w_hh, b_ih, b_hh)
    size = h.shape[1]
    of_x, of_h = F.linear(x, w_ih, b_ih), F.linear(h, w_hh, b_hh)
    reset, keep = of_x[:, : 2 * size].add_(of_h[:, : 2 * size]).sigmoid_().chunk(2, 1)
    new = of_x[:, 2 * size :].addcmul_(reset, of_h[:, 2 * size :]).tanh_()
    return torch.lerp(new, h, keep) if out is None else torch.lerp(new, h, keep, out=out)


def _lstm_cell(
    x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, out: Tensor | None
) -> Tensor:
    if torch.is_grad_enabled():
        return torch.cat(torch.lstm_cell(x, h.chunk(2, 1), w_ih, w_hh, b_ih, b_hh), 1)
    size = w_hh.shape[1]
    gates = F.linear(x, w_ih, b_ih).add_(b_hh)
    torch.addmm(gates, h[:, :size], w_hh.t(), out=gates)
    return _lstm_state(gates, h[:, size:], out)


def _lstm_state(gates: Tensor, before: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the state [n, 2H] from the sums [n, 4H] of the input, forget, new and output gates and the cell [n, H]."""
    size = before.shape[1]
    admit, forget = gates[:, : 2 * size].sigmoid().chunk(2, 1)
    new, show = gates[:, 2 * size : 3 * size].tanh(), gates[:, 3 * size :].sigmoid()
    if torch.is_grad_enabled():
        after = forget * before + admit * new
        return torch.cat([show * after.tanh(), after], 1)
    out = gates.new_empty(len(gates), 2 * size) if out is None else out
    after = torch.mul(forget, before, out=out[:, size:]).addcmul_(admit, new)
    torch.mul(show, after.tanh(), out=out[:, :size])
    return out


def _on_triton(
    x: Tensor, h: Tensor, update: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, x_rows: Tensor | None
) -> Tensor:
    x, before, h = x.contiguous(), h, h.contiguous()
    rows_by_choice = partition(update.long(), 2)
    order, offsets = rows_by_choice.order, rows_by_choice.offsets
    # Items offsets[1] ... n - 1 of `order` are the rows that update.
    inputs = order if x_rows is None else x_rows.index_select(0, order)
    if _is_lstm(w_hh):
        new = _lstm_on_triton(x, h, order, offsets[1:], inputs, w_ih, w_hh, b_ih, b_hh)
        return new if torch.is_grad_enabled() else before.copy_(new)
    if torch.is_grad_enabled():
        return _Cell.apply(x, h, order, offsets[1:], inputs, w_ih, w_hh, b_ih, b_hh)
    from dynrl.ops.kernels.gru import gru_rows, scatter_rows

    new = torch.empty_like(h, memory_format=torch.contiguous_format)
    gru_rows(x, h, w_ih, w_hh, b_ih, b_hh, new, offsets[1:], x_rows=inputs, h_rows=order)
    scatter_rows(new, h, order, offsets[1:])
    return h if h is before else before.copy_(h)


def _lstm_on_triton(
    x: Tensor, h: Tensor, order: Tensor, offsets: Tensor, inputs: Tensor,
    w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor,
) -> Tensor:  # fmt: skip
    """Run an LSTM by the kernels of `routed_linear`, with pointwise steps on all rows: [n, 2H]."""
    size, starts = w_hh.shape[1], torch.zeros(1, dtype=torch.int64, device=h.device)
    ran = (torch.arange(len(order), device=h.device) >= offsets[0]).unsqueeze(1)
    ways = dict.fromkeys(("in_rows", "out_rows", "in_widths", "out_widths"))
    state = h[order]
    gates = b_ih + b_hh
    for rows, weight in ((x[inputs], w_ih), (state[:, :size], w_hh)):
        gates = gates + GroupedProduct.apply(rows, weight, offsets, starts, 4 * size, ways)
    # NaN in a row that keeps its state must not reach the weights as 0 * NaN.
    new = _lstm_state(gates, torch.where(ran, state[:, size:], 0.0))
    return torch.empty_like(h).index_copy(0, order, torch.where(ran, new, state))


def _parts_on_triton(
    x: Tensor, h: Tensor, update: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor,
    x_rows: Tensor | None, widths: Sequence[int],
) -> Tensor:  # fmt: skip
    from dynrl.ops.kernels.gru import gru_rows, scatter_rows

    x, before, h = x.contiguous(), h, h.contiguous()
    rows_by_choice = partition(update.long(), len(widths))
    order, offsets = rows_by_choice.order, rows_by_choice.offsets
    inputs = order if x_rows is None else x_rows.index_select(0, order)
    if _is_lstm(w_hh):
        return before.copy_(
            _lstm_parts_on_triton(x, h, update, order, offsets, inputs, w_ih, w_hh, b_ih + b_hh, widths)
        )
    new = torch.empty_like(h, memory_format=torch.contiguous_format)
    for choice, width in enumerate(widths):
        if width:
            some = offsets[choice : choice + 2]
            gru_rows(x, h, w_ih, w_hh, b_ih, b_hh, new, some, x_rows=inputs, h_rows=order, width=width)
            scatter_rows(new[:, :width], h[:, :width], order, some)
    return h if h is before else before.copy_(h)


def _lstm_parts_on_triton(
    x: Tensor, h: Tensor, update: Tensor, order: Tensor, offsets: Tensor, inputs: Tensor,
    w_ih: Tensor, w_hh: Tensor, bias: Tensor, widths: Sequence[int],
) -> Tensor:  # fmt: skip
    """Run the first units of an LSTM, each gate's products for all widths at once: [n, 2H]."""
    from dynrl.ops.kernels.linear import linear_rows

    size, inside = w_hh.shape[1], _inside(tuple(widths), w_hh.shape[1], h.shape[1], h.device)
    counts, starts = _counts(tuple(widths), h.device)
    gates = h.new_zeros(2, len(h), 4 * size)
    for gate in range(4):
        part = slice(gate * size, (gate + 1) * size)
        linear_rows(x, w_ih[part], gates[0, :, part], offsets, starts, in_rows=inputs, out_widths=counts)
        linear_rows(
            h[:, :size], w_hh[part], gates[1, :, part], offsets, starts, in_rows=order, in_widths=counts,
            out_widths=counts,
        )  # fmt: skip
    state, ran = h[order], inside[update[order]]
    new = _lstm_state(gates.sum(0) + bias, torch.where(ran[:, size:], state[:, size:], 0.0))
    return torch.empty_like(h).index_copy(0, order, torch.where(ran, new, state))


@cache  # as `_inside`
@torch.inference_mode(False)
def _counts(widths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the units of each choice, and where the matrices of each choice start, for kernels."""
    return torch.tensor(widths, dtype=torch.int32, device=device), torch.zeros(
        len(widths), dtype=torch.int64, device=device
    )


class _Cell(torch.autograd.Function):
    """The gated cell with its gradients: kernels run it forward, and grouped products backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor, order: Tensor, offsets: Tensor, inputs: Tensor,
        w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor,
    ) -> Tensor:  # fmt: skip
        from dynrl.ops.kernels.gru import gru_rows, scatter_rows

        # Items of rows that keep their state stay zero, and with them their gradients.
        saved = h.new_zeros(len(h), 4, h.shape[1])
        new = torch.empty_like(h, memory_format=torch.contiguous_format)
        gru_rows(x, h, w_ih, w_hh, b_ih, b_hh, new, offsets, x_rows=inputs, h_rows=order, saved=saved)
        ctx.save_for_backward(x, h, order, offsets, inputs, w_ih, w_hh, saved)
        return scatter_rows(new, h.clone(memory_format=torch.contiguous_format), order, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, h, order, offsets, inputs, w_ih, w_hh, saved = ctx.saved_tensors
        ran = (torch.arange(len(order), device=h.device) >= offsets[0]).unsqueeze(1)
        reset, keep, new, of_h = saved.unbind(1)
        # NaN in a row that keeps its state must not reach the weights as 0 * NaN.
        before, seen = torch.where(ran, h[order], 0.0), torch.where(ran, x[inputs], 0.0)
        grad = torch.where(ran, grads[0][order], 0.0)
        d_new = grad * (1 - keep) * (1 - new * new)
        d_keep = grad * (before - new) * keep * (1 - keep)
        d_reset = d_new * of_h * reset * (1 - reset)
        d_x = torch.cat([d_reset, d_keep, d_new], 1)  # with respect to the products with w_ih
        d_h = torch.cat([d_reset, d_keep, d_new * reset], 1)
        grad_h = grads[0].clone()
        grad_h[order] = torch.where(ran, grad * keep + d_h @ w_hh, grads[0][order])
        grad_x = torch.zeros_like(x).index_add(0, inputs, d_x @ w_ih)
        return (
            grad_x, grad_h, None, None, None,
            d_x.t() @ seen, d_h.t() @ before, d_x.sum(0), d_h.sum(0),
        )  # fmt: skip
