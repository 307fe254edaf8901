"""The Triton kernels against torch in float64: on CUDA where there is one, else interpreted on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from dynrl.ops.kernels.conv import conv_rows
from dynrl.ops.kernels.conv_tiles import map_parts, tile_count
from dynrl.ops.kernels.decide import decide, pool, pool_sums, record
from dynrl.ops.kernels.gru import gru_rows, scatter_rows
from dynrl.ops.kernels.linear import INTERPRETED, grad_weight_rows, linear_rows
from dynrl.ops.kernels.partition import partition, tile_bound
from dynrl.ops.kernels.slices import finish_slices
from dynrl.ops.record import record_ref
from tests.devices import NoHostSync

pytestmark = pytest.mark.usefixtures("kernel_case", "full_precision")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN = float("nan")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def images(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random images in channels_last, a slice of a tensor with more channels, which hold NaN."""
    whole = torch.full((shape[0], shape[1] + 8, *shape[2:]), NAN, device=DEVICE, dtype=dtype)
    part = whole.contiguous(memory_format=torch.channels_last)[:, : shape[1]]
    return part.copy_(randn(*shape))


def rows(n: int, width: int, dtype: torch.dtype) -> Tensor:
    """[n, width] as a slice of a wider tensor, the rest of which holds NaN."""
    whole = torch.full((n, width + 3), NAN, device=DEVICE, dtype=dtype)
    return whole[:, :width].copy_(randn(n, width))


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def int64(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def assert_close(got: Tensor, exact: Tensor, plain: Tensor) -> None:
    """Check that the error is at most twice what torch itself makes in this dtype."""
    assert got.shape == exact.shape == plain.shape and got.dtype == plain.dtype
    if got.numel() == 0:
        return
    scale = exact.abs().max().clamp(min=1)
    allowed = 2 * (plain.double() - exact).abs().max() + 1e-6 * scale
    if INTERPRETED and got.dtype == torch.bfloat16:
        allowed += scale * 2**-7  # the interpreter cuts off what a GPU rounds, in the result and in what it is made of
    error = (got.double() - exact).abs().max()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def chosen(kind: str, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """(chosen rows, order, offsets), as `gated_residual` hands them on: first in the order come the rows not chosen."""
    run = {
        "none": torch.zeros(n, dtype=torch.bool),
        "all": torch.ones(n, dtype=torch.bool),
        "one": torch.arange(n) == n // 2,
        "some": torch.arange(n) % 3 != 1,
    }[kind]
    order, offsets = partition(run.to(DEVICE), 2)
    return run.nonzero().squeeze(1).to(DEVICE), order, offsets[1:]


@pytest.mark.parametrize("n", [0, 1, 37, 5000])
@pytest.mark.parametrize(("dtype", "num_choices"), [(torch.int64, 5), (torch.int32, 1), (torch.bool, 2)])
def test_partition_is_a_stable_sort(n: int, dtype: torch.dtype, num_choices: int) -> None:
    # One column of a table of choices: strided.
    choice = torch.randint(num_choices, (n, 3), device=DEVICE).to(dtype)[:, 1]
    order, offsets = partition(choice, num_choices)
    torch.testing.assert_close(order, torch.sort(choice.long(), stable=True)[1])
    counts = torch.bincount(choice.long(), minlength=num_choices)
    torch.testing.assert_close(offsets, F.pad(counts.cumsum(0), (1, 0)).to(torch.int32))


@pytest.mark.parametrize("block", [1, 16])
def test_tile_bound_is_enough(block: int) -> None:
    for counts in ([0, 0, 0], [1, 1, 1], [0, 33, 0], [17, 1, 15]):
        assert sum(-(-count // block) for count in counts) <= tile_bound(sum(counts), 3, block)


# Which rows are chosen is the same to all types.
CHOSEN = [*((dtype, "some") for dtype in DTYPES), *((torch.float32, kind) for kind in ("none", "one", "all"))]


@pytest.mark.parametrize(("taps", "stride"), [(1, 1), (3, 1), (3, 2), (1, 2)])
@pytest.mark.parametrize(("dtype", "kind"), CHOSEN)
@pytest.mark.parametrize(("c", "k"), [(20, 17), (32, 24)])  # tensor copies cannot address the first
def test_conv_rows(dtype: torch.dtype, kind: str, taps: int, stride: int, c: int, k: int) -> None:
    n, height, width, padding = 4, 3, 5, taps // 2
    x = images(n, c, height, width, dtype=dtype)
    weight = (randn(k, c, taps, taps) / (c * taps * taps) ** 0.5).to(dtype)
    if taps == 3:
        weight = weight.contiguous(memory_format=torch.channels_last)
    picked, order, offsets = chosen(kind, n)
    left = torch.tensor([i for i in range(n) if i not in picked.tolist()], dtype=torch.long, device=DEVICE)
    x[left] = NAN
    scale, shift, factor = randn(1, k), randn(1, k), randn(n)
    out = images(n, k, (height - 1) // stride + 1, (width - 1) // stride + 1, dtype=dtype)
    out[left] = NAN
    before = out.clone()
    sums = torch.full((n, map_parts(*out.shape[2:]), k), NAN, device=DEVICE)

    def expected(as_dtype: torch.dtype) -> Tensor:
        y = F.conv2d(x[picked].to(as_dtype), weight.to(as_dtype), stride=stride, padding=padding)
        y = y * scale.view(1, k, 1, 1).to(as_dtype) + shift.view(1, k, 1, 1).to(as_dtype)
        return torch.relu(y * factor[picked].view(-1, 1, 1, 1).to(as_dtype) + before[picked].to(as_dtype))

    with NoHostSync():
        conv_rows(
            x, weight, out, offsets, in_rows=order, out_rows=order, scale=scale, shift=shift, factor=factor,
            residual=out, relu=True, stride=stride, padding=padding, sums=sums,
        )  # fmt: skip
    assert out[left].isnan().all() and sums[left].isnan().all()
    torch.testing.assert_close(sums.sum(1)[picked], out[picked].sum((2, 3), dtype=torch.float32), atol=1e-5, rtol=1e-5)
    if len(picked):
        assert_close(out[picked], expected(torch.float64), expected(dtype))


def test_parts_of_maps_that_tiles_do_not_make_are_zeros() -> None:
    """Here, tiles are lines of pixels or rectangles, which differ in number; others write to the same sums later."""
    height, width = (3, 5) if INTERPRETED else (3, 17)
    counts = {tile_count(*sides, 16 if INTERPRETED else 64) for sides in ((height, width), (1, height * width))}
    assert len(counts) == 2 and map_parts(height, width) == max(counts)
    sums = torch.full((1, max(counts), 16), NAN, device=DEVICE)
    for taps in (1, 3):
        x, weight = images(1, 16, height, width, dtype=torch.float32), randn(16, 16, taps, taps)
        out = images(1, 16, height, width, dtype=torch.float32)
        weight = weight.contiguous(memory_format=torch.channels_last)
        conv_rows(x, weight, out, int32([0, 1]), padding=taps // 2, sums=sums)
        torch.testing.assert_close(sums.sum(1), out.sum((2, 3)), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_conv_rows_without_rows_reads_every_image_in_place(dtype: torch.dtype) -> None:
    x, weight = images(2, 3, 7, 7, dtype=dtype), randn(8, 3, 7, 7, dtype=dtype)
    out = torch.full((2, 8, 4, 4), NAN, device=DEVICE, dtype=dtype).contiguous(memory_format=torch.channels_last)
    conv_rows(x, weight, out, int32([0, 2]), stride=2, padding=3)
    assert_close(out, F.conv2d(x.double(), weight.double(), stride=2, padding=3), F.conv2d(x, weight, None, 2, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_conv_rows_touches_nothing_beyond_the_widths(dtype: torch.dtype) -> None:
    n, c, k = 7, 40, 36
    in_widths, out_widths = [32, 5, 40, 16], [16, 36, 7, 32]
    offsets = [1, 3, 4, 4, 7]  # item 0 is not done, the third group is empty
    order = int64([6, 0, 3, 2, 5, 1, 4])
    x, out = images(n, c, 4, 5, dtype=dtype), images(n, k, 4, 5, dtype=dtype)
    before = out.clone()
    weight = (randn(k, c, 3, 3) / 20).to(dtype).contiguous(memory_format=torch.channels_last)
    scale, shift = randn(4, k), randn(4, k)
    groups = [(*bounds, *widths) for bounds, *widths in zip(pairwise(offsets), in_widths, out_widths, strict=True)]
    x[order[0]] = NAN
    for begin, end, in_width, _ in groups:
        x[order[begin:end], in_width:] = NAN
    with NoHostSync():
        conv_rows(
            x, weight, out, int32(offsets), in_rows=order, out_rows=order, scale=scale, shift=shift,
            residual=out, in_widths=int32(in_widths), out_widths=int32(out_widths), padding=1,
        )  # fmt: skip
    assert torch.equal(out[order[0]], before[order[0]])
    for g, (begin, end, in_width, out_width) in enumerate(groups):
        picked = order[begin:end]
        if begin == end:
            continue
        inputs, part = x[picked, :in_width], weight[:out_width, :in_width]
        exact, plain = (
            F.conv2d(inputs.to(t), part.to(t), padding=1) * scale[g, :out_width].view(-1, 1, 1).to(t)
            + shift[g, :out_width].view(-1, 1, 1).to(t)
            + before[picked, :out_width].to(t)
            for t in (torch.float64, dtype)
        )
        assert_close(out[picked, :out_width], exact, plain)
        assert torch.equal(out[picked, out_width:], before[picked, out_width:])


@pytest.mark.parametrize(("c", "height", "width"), [(20, 5, 7), (70, 13, 11), (16, 1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_finish_slices(dtype: torch.dtype, c: int, height: int, width: int) -> None:
    """Each map has its row's scale and shift; beyond its width there is 0, also where the convolution's result is NaN."""
    widths, choice = int32([3, c, c - 1]), int64([[2], [0], [1], [0]]).expand(-1, 2)[:, 1]  # as a column of a route is
    y, x = (randn(4, c, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last) for _ in range(2))
    inside = torch.arange(c, device=DEVICE) < widths[choice].unsqueeze(1)
    y.masked_fill_(~inside[:, :, None, None], NAN)
    scale, shift = (randn(3, c, dtype=dtype) for _ in range(2))

    def expected(to: torch.dtype, residual: Tensor | None) -> Tensor:
        made = y.nan_to_num().to(to) * scale[choice].to(to)[:, :, None, None] + shift[choice].to(to)[:, :, None, None]
        return made.relu() * inside[:, :, None, None] if residual is None else (made + residual.to(to)).relu()

    with NoHostSync():
        found = finish_slices(y, y.clone(), choice, scale, shift, widths=widths)
    assert_close(found, expected(torch.float64, None), expected(dtype, None))
    before, given = x.clone(), y.nan_to_num().contiguous(memory_format=torch.channels_last)
    sums = torch.full((4, map_parts(height, width), c), NAN, device=DEVICE)
    finish_slices(given, x, choice, scale, shift, residual=x, sums=sums)
    assert_close(x, expected(torch.float64, before), expected(dtype, before))
    torch.testing.assert_close(sums.sum(1), x.sum((2, 3), dtype=torch.float32), atol=1e-3, rtol=1e-5)
    y[1, 0, 0, 0] = NAN  # of a channel that this row has
    assert finish_slices(y, y, choice, scale, shift, widths=widths)[1, 0].isnan().sum() == 1


@pytest.mark.parametrize("counts", [[0, 0, 0], [1, 0, 0], [3, 0, 17], [9, 20, 4]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_rows(dtype: torch.dtype, counts: list[int]) -> None:
    n, k, m, experts = 33, 40, 37, len(counts)
    offsets = [n - sum(counts)]  # items before it belong to nobody
    for count in counts:
        offsets.append(offsets[-1] + count)
    order = torch.randperm(n, device=DEVICE)
    x, weight, bias = rows(n, k, dtype), (randn(experts, m, k) / k**0.5).to(dtype), randn(experts, m, dtype=dtype)
    scale = torch.rand(n, device=DEVICE).to(dtype)
    out = torch.full((n, m), NAN, device=DEVICE, dtype=dtype)
    starts, bias_starts = int64([e * m * k for e in range(experts)]), int64([e * m for e in range(experts)])
    x[order[: offsets[0]]] = NAN
    with NoHostSync():
        linear_rows(
            x, weight, out, int32(offsets), starts, in_rows=order, out_rows=order, bias=bias, bias_starts=bias_starts,
            scale=scale, relu=True,
        )  # fmt: skip
    assert out[order[: offsets[0]]].isnan().all()
    for e, (begin, end) in enumerate(pairwise(offsets)):
        picked = order[begin:end]
        exact, plain = (
            torch.relu(F.linear(x[picked].to(t), weight[e].to(t), bias[e].to(t))) * scale[picked].to(t)[:, None]
            for t in (torch.float64, dtype)
        )
        assert_close(out[picked], exact, plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_rows_of_one_shared_matrix_touches_nothing_beyond_the_widths(dtype: torch.dtype) -> None:
    n, k, m, offsets = 9, 48, 33, [0, 4, 6, 9]
    in_widths, out_widths = [16, 48, 7], [32, 33, 5]
    x, weight = rows(n, k, dtype), (randn(m, k) / k**0.5).to(dtype)
    out = torch.full((n, m), NAN, device=DEVICE, dtype=dtype)
    groups = [(*bounds, *widths) for bounds, *widths in zip(pairwise(offsets), in_widths, out_widths, strict=True)]
    for begin, end, in_width, _ in groups:
        x[begin:end, in_width:] = NAN
    linear_rows(
        x, weight, out, int32(offsets), int64([0, 0, 0]), in_widths=int32(in_widths), out_widths=int32(out_widths)
    )
    for begin, end, in_width, out_width in groups:
        inputs, part = x[begin:end, :in_width], weight[:out_width, :in_width]
        assert_close(out[begin:end, :out_width], inputs.double() @ part.double().T, inputs @ part.T)
        assert out[begin:end, out_width:].isnan().all()


@pytest.mark.parametrize("stacked", ["matrices", "rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_rows_transposed_and_grad_weight_rows(dtype: torch.dtype, stacked: str) -> None:
    """Both gradients of a grouped product whose experts have their own widths, for each way to store the matrices."""
    n, offsets, order = 40, [3, 23, 23, 40], torch.randperm(40, device=DEVICE)
    widths = [32, 24, 19]
    k, m = (28, 32) if stacked == "rows" else (32, 28)
    weight = {"matrices": (3, 28, 32), "rows": (sum(widths), 28), "columns": (28, sum(widths))}[stacked]
    matrix = (randn(*weight) / 5).to(dtype)
    starts = {
        "matrices": [0, 28 * 32, 2 * 28 * 32],
        "rows": [0, 28 * widths[0], 28 * (widths[0] + widths[1])],
        "columns": [0, widths[0], widths[0] + widths[1]],
    }[stacked]
    split = {"in_widths": int32(widths)} if stacked != "rows" else {"out_widths": int32(widths)}
    x, dy, scale = rows(n, k, dtype), rows(n, m, dtype), torch.rand(n, device=DEVICE).to(dtype)
    dx = torch.full((n, k), NAN, device=DEVICE, dtype=dtype)
    # dx: outputs and inputs change places.
    other = {"out_widths" if name == "in_widths" else "in_widths": value for name, value in split.items()}
    dw = torch.full_like(matrix, NAN)
    with NoHostSync():
        linear_rows(
            dy, matrix.transpose(-1, -2), dx, int32(offsets), int64(starts), in_rows=order, out_rows=order, **other
        )
        grad_weight_rows(x, dy, dw, int32(offsets), int64(starts), x_rows=order, dy_rows=order, scale=scale, **split)
    again = torch.full_like(matrix, NAN)
    grad_weight_rows(x, dy, again, int32(offsets), int64(starts), x_rows=order, dy_rows=order, scale=scale, **split)
    torch.testing.assert_close(again, dw, rtol=0, atol=0, equal_nan=True)
    for e, width in enumerate(widths):
        view = {
            "matrices": lambda w, e=e, width=width: w[e, :, :width],
            "rows": lambda w, e=e, width=width: w[sum(widths[:e]) : sum(widths[: e + 1])],
            "columns": lambda w, e=e, width=width: w[:, sum(widths[:e]) : sum(widths[: e + 1])],
        }[stacked]
        m_g, k_g = view(matrix).shape
        picked = order[offsets[e] : offsets[e + 1]]
        outer, inner = dy[picked, :m_g], x[picked, :k_g]
        gated = (outer.double() * scale[picked].double()[:, None], outer * scale[picked][:, None])
        assert_close(view(dw), gated[0].T @ inner.double(), gated[1].T @ inner)
        assert_close(dx[picked, :k_g], outer.double() @ view(matrix).double(), outer @ view(matrix))
        assert dx[picked, k_g:].isnan().all()
        if stacked == "matrices":
            assert dw[e, :, width:].isnan().all()


def test_linear_rows_with_64_groups() -> None:
    choice = torch.randint(64, (50,), device=DEVICE)
    order, offsets = partition(choice, 64)
    x, weight, out = randn(50, 16), randn(64, 16, 16), torch.full((50, 16), NAN, device=DEVICE)
    linear_rows(x, weight, out, offsets, torch.arange(64, device=DEVICE) * 256, in_rows=order, out_rows=order)
    torch.testing.assert_close(out, torch.einsum("nk,nmk->nm", x, weight[choice]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["none", "one", "some", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gru_rows_and_scatter_rows(dtype: torch.dtype, kind: str) -> None:
    n, size, hidden = 19, 21, 35
    cell = torch.nn.GRUCell(size, hidden, device=DEVICE).to(dtype)
    x, h = rows(n, size, dtype), rows(n, hidden, dtype)
    picked, order, offsets = chosen(kind, n)
    left = torch.tensor([i for i in range(n) if i not in picked.tolist()], dtype=torch.long, device=DEVICE)
    x[left], h[left] = NAN, NAN
    new = torch.full((n, hidden), NAN, device=DEVICE, dtype=dtype)
    saved = torch.full((n, 4, hidden), NAN, device=DEVICE, dtype=dtype)
    weights = [p.detach() for p in (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)]
    old = h.clone()
    with NoHostSync():
        gru_rows(x, h, *weights, new, offsets, x_rows=order, h_rows=order, saved=saved)
        scatter_rows(new, h, order, offsets)
    assert h[left].isnan().all() and new[: n - len(picked)].isnan().all() and saved[: n - len(picked)].isnan().all()
    if not len(picked):
        return

    def expected(as_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        w_ih, w_hh, b_ih, b_hh = (w.to(as_dtype) for w in weights)
        from_x = F.linear(x[picked].to(as_dtype), w_ih, b_ih).chunk(3, 1)
        from_h = F.linear(old[picked].to(as_dtype), w_hh, b_hh).chunk(3, 1)
        r, z = torch.sigmoid(from_x[0] + from_h[0]), torch.sigmoid(from_x[1] + from_h[1])
        candidate = torch.tanh(from_x[2] + r * from_h[2])
        y = (1 - z) * candidate + z * old[picked].to(as_dtype)
        return y, torch.stack([r, z, candidate, from_h[2]], 1)

    (exact, exact_saved), (plain, plain_saved) = expected(torch.float64), expected(dtype)
    with torch.no_grad():
        reference = cell.double()(x[picked].double(), old[picked].double())
    torch.testing.assert_close(exact, reference)
    assert_close(h[picked], exact, plain)
    assert_close(saved[n - len(picked) :], exact_saved, plain_saved)


def test_gru_rows_writes_out_rows() -> None:
    cell = torch.nn.GRUCell(8, 16, device=DEVICE)
    x, h, out = randn(5, 8), randn(5, 16), torch.full((5, 16), NAN, device=DEVICE)
    weights = [p.detach() for p in (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)]
    gru_rows(x, h, *weights, out, int32([0, 3]), out_rows=int64([4, 0, 2, 1, 3]))
    with torch.no_grad():
        torch.testing.assert_close(out[[4, 0, 2]], cell(x[:3], h[:3]), rtol=1e-5, atol=1e-5)
    assert out[[1, 3]].isnan().all()


# From 64 rows on, blocks of channels are wide.
@pytest.mark.parametrize(("n", "c", "dtype"), [*((3, 20, dtype) for dtype in DTYPES), (64, 70, torch.bfloat16)])
def test_pool(n: int, c: int, dtype: torch.dtype) -> None:
    x = images(n, c, 5, 7, dtype=dtype)
    expected = x.double().mean((2, 3)).float()
    torch.testing.assert_close(pool(x, torch.full((n, c), NAN, device=DEVICE)), expected, atol=1e-5, rtol=1e-5)
    sums = torch.full((n, 40, c), NAN, device=DEVICE)
    pool(x, torch.empty(n, c, device=DEVICE), sums)
    torch.testing.assert_close(sums.sum(1) / 35, expected, atol=1e-5, rtol=1e-5)
    parts = randn(n, 40, c)
    got = pool_sums(parts, 35, torch.full((n, c), NAN, device=DEVICE))
    torch.testing.assert_close(got, (parts.double().sum(1) / 35).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("n", "f", "hidden", "choices"), [(37, 70, 64, 3), (900, 5, 9, 2), (37, 130, None, 4)])
def test_decide(n: int, f: int, hidden: int | None, choices: int) -> None:
    h = hidden or choices
    features, weight, bias, last_weight, spent = randn(n, f), randn(f, h), randn(h), randn(1 + choices, h), randn(h)
    head, head_bias = (randn(h, choices), randn(choices)) if hidden else (None, None)
    last, macs = torch.randint(0, choices + 1, (n,), device=DEVICE), torch.randint(0, 100, (n,), device=DEVICE)
    scores = features @ weight + bias + last_weight[last] + (macs / 100).unsqueeze(1) * spent
    if head is not None:
        scores = scores.relu() @ head + head_bias
    action = torch.full((n,), -1, device=DEVICE)
    decide(features, weight, bias, last_weight, spent, head, head_bias, last, macs, 100, action)
    assert torch.equal(action, scores.argmax(1))


def test_record() -> None:
    n, costs, books = 300, int64([1, 10, 100]), []
    actions = [torch.randint(3, (n,), device=DEVICE) for _ in range(3)]
    for f in (record, record_ref):
        route = torch.full((n, 5), -1, device=DEVICE)
        steps, last, macs = (torch.zeros(n, dtype=torch.int64, device=DEVICE) for _ in range(3))
        for step, action in enumerate(actions):
            f(action, costs, route[:, step], steps, last, macs)
        books.append((route, steps, last, macs))
    for ours, theirs in zip(*books, strict=True):
        assert torch.equal(ours, theirs)


def test_rows_more_than_2_to_the_31_elements_apart() -> None:
    # Only the pages that are written take memory.
    far = torch.empty(2**31 + 4096, dtype=torch.float16, device=DEVICE)
    x = far.as_strided((3, 16), (2**30, 1))
    x.copy_(randn(3, 16))
    weight, out = randn(16, 16, dtype=torch.float16), torch.full((1, 16), NAN, dtype=torch.float16, device=DEVICE)
    linear_rows(x, weight, out, int32([0, 1]), int64([0]), in_rows=int64([2]), out_rows=int64([0]))
    assert_close(out, x[2:].double() @ weight.double().T, x[2:] @ weight.T)
    picture = x.as_strided((3, 16, 1, 1), (2**30, 1, 16, 16))
    images_out = torch.full((1, 16, 1, 1), NAN, dtype=torch.float16, device=DEVICE)
    conv_rows(picture, weight.view(16, 16, 1, 1), images_out, int32([0, 1]), in_rows=int64([2]), out_rows=int64([0]))
    assert_close(images_out.view(1, 16), x[2:].double() @ weight.double().T, x[2:] @ weight.T)


def test_kernels_compile_for_hopper_without_spills() -> None:
    # In a process of its own: where this one interprets kernels, it cannot compile them.
    program = Path(__file__).with_name("aot.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {
        "_partition",
        "_conv_rows",
        "_conv_tiles",
        "_linear_rows",
        "_grad_weight_rows",
        "_gru_rows",
        "_scatter_rows",
    }
    kernels |= {"_running", "_pool", "_decide", "_record", "_take_positions", "_put_positions", "_finish_slices"}
    assert {case["kernel"] for case in cases} == {name + "_kernel" for name in kernels}
    assert {case["dtype"] for case in cases} == {"float32", "float16", "bfloat16"}
    for case in cases:
        assert case["spills"] == 0, case
        assert case["shared"] <= 227 * 1024, case
