"""The cases of `dynrl bench ops` are the shapes that each op is timed on, with other ways to do the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrl.backbones.cells import Folded
from dynrl.backbones.vit import Encoder
from dynrl.ops.convolution import FoldedConv2d
from dynrl.ops.exit_scores import exit_scores
from dynrl.ops.gated_cell import gated_cell, gated_cell_ref, recurrent_cell
from dynrl.ops.gated_cells import gated_cells, gated_cells_ref
from dynrl.ops.gated_positions import gated_positions, gated_positions_ref
from dynrl.ops.gated_residual import ResidualBlock, gated_residual, gated_residual_ref
from dynrl.ops.partition import partition, partition_ref
from dynrl.ops.routed_experts import Expert, routed_experts, routed_experts_ref
from dynrl.ops.routed_linear import column_major, routed_linear, routed_linear_ref
from dynrl.ops.sliced_conv import SlicedBlock, sliced_conv, sliced_conv_ref
from dynrl.ops.sliced_linear import SlicedLinear, sliced_linear, sliced_linear_ref

KEPT = (0.25, 0.5, 0.75)
# name -> outer channels, side of the map, inner channels, kernels of the block's convolutions.
MAPS = {
    "resnet20/110 stage 1": (16, 32, 16, (3, 3)),
    "resnet20/110 stage 2": (32, 16, 32, (3, 3)),
    "resnet20/110 stage 3": (64, 8, 64, (3, 3)),
    "resnet50 stage 1": (256, 56, 64, (1, 3, 1)),
    "resnet50 stage 2": (512, 28, 128, (1, 3, 1)),
    "resnet50 stage 3": (1024, 14, 256, (1, 3, 1)),
    "resnet50 stage 4": (2048, 7, 512, (1, 3, 1)),
}
# name -> experts, width and hidden width of a layer of two-layer experts.
EXPERTS = {"8 experts 512-1024": (8, 512, 1024), "64 experts 512-1024": (64, 512, 1024)}
# name -> positions of a row, channels and hidden widths of a residual layer of unequal two-layer experts.
RESIDUAL_EXPERTS = {
    "7x7, 128 channels, 0-512": (49, 128, (0, 64, 128, 128, 256, 512)),
    "1, 512 channels, 0-2048": (1, 512, (0, 256, 512, 512, 1024, 2048)),
}
# name -> width and hidden width of a layer of two products.
LAYERS = {"512-1024": (512, 1024), "1024-4096": (1024, 4096)}
# name -> tokens, width, heads and hidden width of a block of a vision transformer.
BLOCKS = {"vit small, 64 tokens": (64, 96, 4, 192), "vit base, 197 tokens": (197, 768, 12, 3072)}
# name -> channels, side of the map and cells along a side of a block of two 3x3 convolutions.
CELL_MAPS = {
    "64 channels, 32x32, 16 cells": (64, 32, 4),
    "128 channels, 28x28, 16 cells": (128, 28, 4),
    "256 channels, 14x14, 4 cells": (256, 14, 2),
}
CELLS = {"gru 128": (128, 128), "gru 512": (512, 512)}

# The memory orders of weights. A few rows are multiplied faster by columns. A single row is multiplied faster by rows
# if the weights are in no cache. Dense and ideal sides are timed in both.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {"columns": column_major, "rows": Tensor.contiguous}

Side = Callable[[], Any]


@dataclass
class Case:
    """A case has several ways to do the same, which are timed in turn; the fastest dense and ideal form counts.

    Attributes:
        op: the op's name.
        shape: the name of the shape.
        batch: the number of rows.
        kept: the share of the work that is chosen; None if the case has no such number.
        routed: the op.
        check: a function that returns the op's result and the definition's on the same inputs.
        dense: the dense layers on all rows, in several forms.
        masked: the dense layers and a selection.
        indexed: the code that one would write without the ops.
        ideal: the same work with the rows already sorted and the decision known, in several forms.
    """

    op: str
    shape: str
    batch: int
    kept: float | None
    routed: Side
    check: Callable[[], tuple[Tensor, Tensor]]
    dense: dict[str, Side] = field(default_factory=dict)
    masked: Side | None = None
    indexed: Side | None = None
    ideal: dict[str, Side] = field(default_factory=dict)


def kept_rows(batch: int, kept: float, device: torch.device) -> Tensor:
    """Return a mask [batch] bool of round(kept * batch) rows, drawn from a fixed seed."""
    mask = torch.zeros(batch, dtype=torch.bool)
    mask[torch.randperm(batch, generator=torch.Generator().manual_seed(batch))[: round(kept * batch)]] = True
    return mask.to(device)


def copy_of(x: Tensor) -> Tensor:
    """Return a copy in channels_last."""
    return x.clone(memory_format=torch.channels_last)


def _convolutions(shape: str, device: torch.device, dtype: torch.dtype) -> list[nn.Conv2d]:
    outer, _, inner, kernels = MAPS[shape]
    widths = [outer, *[inner] * (len(kernels) - 1), outer]
    made = [nn.Conv2d(i, o, k, padding=k // 2) for i, o, k in zip(widths, widths[1:], kernels, strict=False)]
    for layer in made:  # weights are small, as the block is applied to its own result again and again
        layer.weight.mul_(0.01)
        layer.to(device, dtype)
    return made


def _plain(layers: list[nn.Conv2d]) -> Callable[[Tensor], Tensor]:
    """Return the block as one writes it in torch, with batch norm folded in."""

    def block(x: Tensor) -> Tensor:
        y = x
        for layer in layers[:-1]:
            y = F.relu(layer(y), inplace=True)
        return F.relu(layers[-1](y).add_(x), inplace=True)

    return block


def _formatted(layers: list[nn.Conv2d], form: torch.memory_format) -> list[nn.Conv2d]:
    copies = []
    for layer in layers:
        twin = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding)  # type: ignore[arg-type]
        twin = twin.to(layer.weight.device, layer.weight.dtype)
        twin.load_state_dict(layer.state_dict())
        copies.append(twin.to(memory_format=form))  # type: ignore[call-overload]
    return copies


def gated_residual_cases(shape: str, batch: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yield cases of a residual block that a share of the rows runs."""
    outer, side, _, _ = MAPS[shape]
    layers = _convolutions(shape, device, dtype)
    last, first = _formatted(layers, torch.channels_last), _formatted(layers, torch.contiguous_format)
    block = ResidualBlock([FoldedConv2d.of(layer) for layer in last])
    plain, plain_first = _plain(last), _plain(first)
    x = torch.randn(batch, outer, side, side, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    dense: dict[str, Side] = {"fused": lambda: block(x), "nhwc": lambda: plain(x)}
    # NCHW is left out for large maps: it is not the fastest there, and needs a second copy.
    if not x.is_cuda and outer * side * side * batch <= 1 << 25:
        nchw = x.contiguous()
        dense["nchw"] = lambda: plain_first(nchw)

    def at(kept: float) -> Case:
        run = kept_rows(batch, kept, device)
        together = x[: int(run.sum())].clone(memory_format=torch.channels_last)

        def indexed() -> None:
            index = run.nonzero().squeeze(1)
            if len(index):
                x[index] = plain(x[index])

        return Case(
            "gated_residual", shape, batch, kept,
            routed=lambda: gated_residual(x, run, block),
            check=lambda: (gated_residual(copy_of(x), run, block), gated_residual_ref(x, run, plain)),
            dense=dense, masked=lambda: torch.where(run.view(-1, 1, 1, 1), plain(x), x), indexed=indexed,
            ideal={
                "fused": lambda: block(together), "plain": lambda: plain(together),
            } if len(together) else {},
        )  # fmt: skip

    yield from map(at, KEPT)


def _mixed(kept: float, full: int) -> tuple[int, int, int]:
    """Return three widths whose mean is `kept` * full."""
    step = 0.25 if kept > 0.25 else 0.125
    return tuple(round(full * share) for share in (kept - step, kept, kept + step))  # type: ignore[return-value]


def _thirds(batch: int, device: torch.device) -> Tensor:
    """Return choices [batch] among three, evenly mixed."""
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(batch))
    return ((order + 1) % 3).to(device)


def sliced_conv_cases(shape: str, batch: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yield cases of a residual block at three inner widths, mixed in one batch."""
    outer, side, inner, _ = MAPS[shape]
    layers = _formatted(_convolutions(shape, device, dtype), torch.channels_last)
    full, plain = ResidualBlock([FoldedConv2d.of(layer) for layer in layers]), _plain(layers)
    x = torch.randn(batch, outer, side, side, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    choice = _thirds(batch, device)
    groups = [(choice == c).nonzero().squeeze(1) for c in range(3)]

    def at(kept: float) -> Case:
        widths = _mixed(kept, inner)
        block = SlicedBlock(layers, [[nn.Identity()] * 3] * len(layers), widths).to(device)
        parts = [
            (block.narrow(c), x[: len(index)].clone(memory_format=torch.channels_last))
            for c, index in enumerate(groups)
            if len(index)
        ]

        def indexed() -> None:
            for c, width in enumerate(block.widths):
                index, active = (choice == c).nonzero().squeeze(1), torch.arange(width, device=device)
                if len(index):
                    y = rows = x[index]
                    for i, layer in enumerate(layers):
                        weight, bias = layer.weight, layer.bias
                        assert bias is not None
                        weight = weight if i == 0 else weight.index_select(1, active)
                        if i < len(layers) - 1:
                            weight, bias = weight.index_select(0, active), bias.index_select(0, active)
                        y = F.conv2d(y, weight, bias, padding=layer.padding)
                        y = F.relu(y if i < len(layers) - 1 else y.add_(rows), inplace=True)
                    x[index] = y

        def masked() -> Tensor:
            mask = (torch.arange(inner, device=device) < block.active[choice].unsqueeze(1)).to(dtype)[:, :, None, None]
            y = x
            for layer in layers[:-1]:
                y = F.relu(layer(y), inplace=True).mul_(mask)
            return F.relu(layers[-1](y).add_(x), inplace=True)

        return Case(
            "sliced_conv", shape, batch, kept,
            routed=lambda: sliced_conv(x, choice, block),
            check=lambda: (sliced_conv(copy_of(x), choice, block), sliced_conv_ref(x, choice, block)),
            dense={"fused": lambda: full(x), "nhwc": lambda: plain(x)}, masked=masked, indexed=indexed,
            ideal={"fused": lambda: [narrow(rows) for narrow, rows in parts]},
        )  # fmt: skip

    yield from map(at, KEPT)


def sliced_linear_cases(shape: str, batch: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yield cases of two products that use the first hidden units, at three widths mixed in one batch."""
    outer, inner = LAYERS[shape]
    first, second = nn.Linear(outer, inner).to(device, dtype), nn.Linear(inner, outer).to(device, dtype)
    plain = first.weight, first.bias, second.weight, second.bias
    full = column_major(first.weight), first.bias, column_major(second.weight), second.bias
    x, choice = torch.randn(batch, outer, device=device, dtype=dtype), _thirds(batch, device)
    counts = choice.bincount(minlength=3).tolist()

    def layer(rows: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(rows, w1, b1), inplace=True), w2, b2)

    def at(kept: float) -> Case:
        sliced = SlicedLinear(first, second, _mixed(kept, inner))
        sliced.w1, sliced.b1, sliced.w2, sliced.b2 = full  # one copy for all sides: whose copy is in the cache matters
        w1, b1, w2, b2 = plain
        parts = [(w, rows.clone()) for w, rows in zip(sliced.widths, x.split(counts), strict=True) if len(rows)]
        narrow = {
            name: [(rows, form(w1[:w].clone()), b1[:w].clone(), form(w2[:, :w].clone()), b2) for w, rows in parts]
            for name, form in LAYOUTS.items()
        }

        def indexed() -> Tensor:
            out = torch.empty_like(x)
            for c, width in enumerate(sliced.widths):
                index, active = (choice == c).nonzero().squeeze(1), torch.arange(width, device=device)
                parts = (
                    full[0].index_select(0, active),
                    full[1].index_select(0, active),
                    full[2].index_select(1, active),
                )
                out[index] = layer(x[index], *parts, full[3])
            return out

        return Case(
            "sliced_linear", shape, batch, kept, routed=lambda: sliced_linear(x, choice, sliced),
            check=lambda: (sliced_linear(x, choice, sliced), sliced_linear_ref(x, choice, sliced)),
            dense={"columns": lambda: layer(x, *full), "rows": lambda: layer(x, *plain)}, indexed=indexed,
            masked=lambda: sliced_linear_ref(x, choice, sliced),
            ideal={name: partial(lambda layers: [layer(*of) for of in layers], of) for name, of in narrow.items()},
        )  # fmt: skip

    yield from map(at, KEPT)


def routed_linear_cases(shape: str, batch: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yield the case of rows at their two-layer experts."""
    experts, outer, inner = EXPERTS[shape]
    w1 = torch.randn(experts, inner, outer, device=device, dtype=dtype) / outer**0.5
    w2 = torch.randn(experts, outer, inner, device=device, dtype=dtype) / inner**0.5
    stored = {name: (form(w1), form(w2)) for name, form in LAYOUTS.items()}
    w1, w2 = stored["columns"]
    b1, b2 = (torch.randn(experts, width, device=device, dtype=dtype) for width in (inner, outer))
    x = torch.randn(batch, outer, device=device, dtype=dtype)
    choice = torch.randint(0, experts, (batch,), generator=torch.Generator().manual_seed(batch)).to(device)
    sizes = choice.bincount(minlength=experts).tolist()
    parts = [(e, part) for e, part in enumerate(x.split(sizes)) if len(part)]

    def expert(e: int, rows: Tensor, first: Tensor = w1, second: Tensor = w2) -> Tensor:
        return F.linear(F.relu(F.linear(rows, first[e], b1[e]), inplace=True), second[e], b2[e])

    def routed(product: Callable[..., Tensor], sort: Callable[..., Any]) -> Tensor:
        parts = sort(choice, experts)
        hidden = product(x, w1, parts, b1, relu=True, sorted_out=True)
        return product(hidden, w2, parts, b2, sorted_in=True)

    def indexed() -> Tensor:
        out = torch.empty_like(x)
        for e in choice.unique().tolist():
            index = (choice == e).nonzero().squeeze(1)
            out[index] = expert(e, x[index])
        return out

    ideal: dict[str, Side] = {
        name: partial(lambda first, second: [expert(e, part, first, second) for e, part in parts], *of)
        for name, of in stored.items()
    }
    if x.is_cuda and dtype == torch.bfloat16 and hasattr(torch, "_grouped_mm"):
        ends = torch.tensor(sizes, device=device).cumsum(0).int()

        def grouped() -> Tensor:  # torch's own grouped product, without biases
            hidden = F.relu(torch._grouped_mm(x, w1.transpose(-1, -2), offs=ends), inplace=True)
            return torch._grouped_mm(hidden, w2.transpose(-1, -2), offs=ends)

        ideal["grouped_mm"] = grouped
    yield Case(
        "routed_linear", shape, batch, None, routed=lambda: routed(routed_linear, partition),
        check=lambda: (routed(routed_linear, partition), routed(routed_linear_ref, partition_ref)), indexed=indexed,
        ideal=ideal,
    )  # fmt: skip


def routed_experts_cases(shape: str, batch: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yield the case of rows at their residual experts, all equally frequent."""
    positions, channels, splits = RESIDUAL_EXPERTS[shape]
    # Weights are small, as the layer is applied to its own result again and again.
    w1 = 0.01 * torch.randn(sum(splits), channels, device=device, dtype=dtype)
    w2 = 0.01 * torch.randn(channels, sum(splits), device=device, dtype=dtype)
    w1, w2 = column_major(w1), column_major(w2)
    b1 = torch.zeros(sum(splits), device=device, dtype=dtype)
    x = torch.randn(batch, positions, channels, device=device, dtype=dtype)
    choice = torch.randint(0, len(splits), (batch,), generator=torch.Generator().manual_seed(batch)).to(device)
    layers = list(zip(w1.split(splits), b1.split(splits), w2.split(splits, 1), strict=True))
    experts, parts = [Expert(*layer) for layer in layers], x.split(choice.bincount(minlength=len(splits)).tolist())

    def plain(e: int, rows: Tensor) -> Tensor:
        first, bias, second = layers[e]
        return rows + F.linear(F.relu(F.linear(rows, first, bias), inplace=True), second)

    def indexed() -> None:
        for e in choice.unique().tolist():
            index = (choice == e).nonzero().squeeze(1)
            x[index] = plain(e, x[index])

    given = (choice, w1, b1, w2, splits)
    yield Case(
        "routed_experts", shape, batch, None, routed=lambda: routed_experts(x, *given),
        check=lambda: (routed_experts(x.clone(), *given), routed_experts_ref(x, *given)),
        dense={"ours": lambda: experts[-1](x), "plain": lambda: plain(-1, x)}, indexed=indexed,
        ideal={
            "ours": lambda: [experts[e](part) for e, part in enumerate(parts) if len(part) and splits[e]],
            "plain": lambda: [plain(e, part) for e, part in enumerate(parts) if len(part) and splits[e]],
        },
    )  # fmt: skip


def gated_cell_cases(shape: str, batch: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yield cases of a GRU cell that a share of the rows runs."""
    inputs, hidden = CELLS[shape]
    cell = nn.GRUCell(inputs, hidden).to(device, dtype).requires_grad_(False)
    weights = (column_major(cell.weight_ih), column_major(cell.weight_hh), cell.bias_ih, cell.bias_hh)
    x, h = (
        torch.randn(batch, inputs, device=device, dtype=dtype),
        torch.randn(batch, hidden, device=device, dtype=dtype),
    )

    def at(kept: float) -> Case:
        run = kept_rows(batch, kept, device)
        count = int(run.sum())
        some_x, some_h = x[:count].clone(), h[:count].clone()

        def indexed() -> None:
            index = run.nonzero().squeeze(1)
            h[index] = cell(x[index], h[index])

        return Case(
            "gated_cell", shape, batch, kept,
            routed=lambda: gated_cell(x, h, run, *weights),
            check=lambda: (gated_cell(x, h.clone(), run, *weights), gated_cell_ref(x, h, run, *weights)),
            dense={"ours": lambda: recurrent_cell(x, h, *weights), "torch": lambda: cell(x, h)},
            masked=lambda: torch.where(run.unsqueeze(1), cell(x, h), h), indexed=indexed,
            ideal={
                "ours": lambda: recurrent_cell(some_x, some_h, *weights),
                "torch": lambda: cell(some_x, some_h),
            } if count else {},
        )  # fmt: skip

    yield from map(at, KEPT)


def gated_positions_cases(shape: str, batch: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yield cases of a transformer's block on a share of the tokens, three shares mixed in one batch, and on all."""
    tokens, width, heads, hidden = BLOCKS[shape]
    block = Encoder(width, heads, hidden).to(device, dtype).requires_grad_(False)
    x = torch.randn(batch, tokens, width, device=device, dtype=dtype)
    order = torch.rand(batch, tokens, device=device).argsort(1)
    weight, thirds = torch.rand(batch, tokens, device=device, dtype=dtype), _thirds(batch, device)

    def at(kept: float) -> Case:
        counts = (tokens,) * 3 if kept == 1 else _mixed(kept, tokens)
        choice = torch.zeros_like(thirds) if kept == 1 else thirds
        sizes = choice.bincount(minlength=3).tolist()
        parts = [rows[:, :k].clone() for k, rows in zip(counts, x.split(sizes), strict=True) if len(rows)]

        def indexed() -> None:
            for c, k in enumerate(counts):
                rows = (choice == c).nonzero()
                if len(rows):
                    places = order[rows.squeeze(1), :k]
                    part = x[rows, places]
                    x[rows, places] = torch.lerp(part, block(part), weight[rows, places].unsqueeze(2))

        given = (choice, order, weight, counts, lambda part, rows, places: block(part))
        return Case(
            "gated_positions", shape, batch, kept, routed=lambda: gated_positions(x, *given),
            check=lambda: (gated_positions(x.clone(), *given), gated_positions_ref(x, *given)),
            dense={"plain": lambda: block(x)}, indexed=indexed,
            ideal={"plain": lambda: [block(part) for part in parts]},
        )  # fmt: skip

    yield from map(at, (*KEPT, 1.0))


def gated_cells_cases(shape: str, batch: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yield cases of a residual block on a share of the cells of each map, and on all; none on CUDA.

    A CUDA graph, by which ops are timed there, cannot ask how many cells run.
    """
    channels, side, grid = CELL_MAPS[shape]
    layers = [nn.Conv2d(channels, channels, 3, padding=1).to(device, dtype) for _ in range(2)]
    for layer in layers:  # weights are small, as the block is applied to its own result again and again
        layer.weight.mul_(0.01)
    last = _formatted(layers, torch.channels_last)
    block, plain = Folded(ResidualBlock([FoldedConv2d.of(layer) for layer in last])), _plain(last)
    x = copy_of(torch.randn(batch, channels, side, side, device=device, dtype=dtype))
    weight = torch.rand(batch, grid, grid, device=device, dtype=dtype)

    def at(kept: float) -> Case:
        count = round(kept * grid * grid)
        order = torch.rand(batch, grid * grid, device=device).argsort(1)
        run = (order < count).view(batch, grid, grid)
        together = copy_of(x[: math.ceil(batch * kept)])
        shown = run.unsqueeze(1).repeat_interleave(side // grid, 2).repeat_interleave(side // grid, 3)
        return Case(
            "gated_cells", shape, batch, kept, routed=lambda: gated_cells(x, run, weight, block),
            check=lambda: (gated_cells(copy_of(x), run, weight, block), gated_cells_ref(x, run, weight, block)),
            dense={"fused": lambda: block(x), "nhwc": lambda: plain(x)},
            masked=lambda: torch.where(shown, plain(x), x), ideal={"fused": lambda: block(together)},
        )  # fmt: skip

    if device.type != "cuda":
        yield from map(at, (*KEPT, 1.0))


def small_cases(batch: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Yield cases of the ops that only cost time, which have no dense side and no ideal."""

    def partitions(choices: int) -> Case:
        choice = torch.randint(0, choices, (batch,), device=device)

        def check() -> tuple[Tensor, Tensor]:
            return tuple(
                torch.cat([r.order, r.offsets]) for r in (partition(choice, choices), partition_ref(choice, choices))
            )  # type: ignore[return-value]

        return Case("partition", f"{choices} choices", batch, None, lambda: partition(choice, choices).offsets, check)

    def scores(classes: int) -> Case:
        logits = torch.randn(batch, classes, device=device, dtype=dtype)
        check = lambda: (exit_scores(logits), exit_scores(logits.double()).float())  # noqa: E731
        return Case("exit_scores", f"{classes} classes", batch, None, lambda: exit_scores(logits), check)

    yield from map(partitions, (2, 8, 64))
    yield from map(scores, (10, 1000))


FAMILIES: dict[str, tuple[dict[str, Any], Callable[..., Iterator[Case]]]] = {
    "gated_residual": (MAPS, gated_residual_cases),
    "routed_linear": (EXPERTS, routed_linear_cases),
    "routed_experts": (RESIDUAL_EXPERTS, routed_experts_cases),
    "sliced_conv": ({name: maps for name, maps in MAPS.items() if "resnet50" in name}, sliced_conv_cases),
    "sliced_linear": (LAYERS, sliced_linear_cases),
    "gated_cell": (CELLS, gated_cell_cases),
    "gated_positions": (BLOCKS, gated_positions_cases),
    "gated_cells": (CELL_MAPS, gated_cells_cases),
}
