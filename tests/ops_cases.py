"""The cases that the tests of the ops run through. An op that is added to `CASES` is tested."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrl.ops.convolution import FoldedConv2d
from dynrl.ops.crops import crops, crops_ref
from dynrl.ops.decide import decide, decide_ref
from dynrl.ops.gated_cell import gated_cell, gated_cell_macs, gated_cell_ref
from dynrl.ops.gated_cells import gated_cells, gated_cells_ref
from dynrl.ops.gated_positions import gated_positions, gated_positions_ref
from dynrl.ops.gated_residual import ResidualBlock, gated_residual, gated_residual_ref
from dynrl.ops.partition import partition, partition_ref
from dynrl.ops.pooled import pooled, pooled_ref
from dynrl.ops.record import record, record_ref
from dynrl.ops.routed_experts import routed_experts, routed_experts_macs, routed_experts_ref
from dynrl.ops.routed_linear import routed_linear, routed_linear_macs, routed_linear_ref
from dynrl.ops.running import running, running_ref
from dynrl.ops.sliced_conv import SlicedBlock, sliced_conv, sliced_conv_ref
from dynrl.ops.sliced_linear import SlicedLinear, sliced_linear, sliced_linear_macs, sliced_linear_ref

Args = dict[str, Any]
Assumed = dict[str, float]  # of `COSTS`
NAN = float("nan")
# Rows of a batch, by what they decide. Where 20 of 21 run, gated_residual runs all.
KINDS = {"no rows": 0, "first": 1, "last": 1, "none": 5, "one": 5, "some": 5, "all": 5, "nearly": 21}
ROWS = ("contiguous", "sliced", "transposed")
# No op computes a row that did not ask for it.
COMPACT: Assumed = {"always": True}
# Two rows, or two positions, at a time; and rows computed where they lie.
MOVES: dict[str, Assumed] = {
    "in pieces": {**COMPACT, "piece": 1, "hidden": 70, "restart": math.inf},
    "in place": {**COMPACT, "piece": 1, "hidden": 70, "restart": -math.inf},
}
MAPS = ("contiguous", "channels_last", "sliced", "sliced channels_last")


@dataclass(frozen=True)
class Setting:
    """The rows, layout, type and device that a case's arguments are made for."""

    kind: str = "some"
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def n(self) -> int:
        return KINDS[self.kind]

    def choice(self, count: int) -> Tensor:
        """[n] int64 in 0 ... count-1."""
        place = torch.arange(self.n)
        if self.kind in ("one", "nearly"):
            common, rare = (0, count - 1) if self.kind == "one" else (count - 1, 0)
            choice = torch.where(place == self.n // 2, rare, common)
        elif self.kind == "some":
            choice = torch.tensor([1, 3, 5, 2, 1]) % count  # of two choices, three neighbours and one more
        else:
            choice = torch.full((self.n,), 0 if self.kind in ("none", "first") else count - 1)
        return choice.to(self.device)

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape) * scale).to(self.device, self.dtype)

    def rows(self, *shape: int, scale: float = 1.0) -> Tensor:
        """[n, ..., width] in this layout; what lies between the rows is `between_rows`."""
        values = self.randn(*shape, scale=scale)
        if self.layout == "sliced":
            whole = values.new_full((*shape[:-1], shape[-1] + 3), between_rows(self.dtype, self.device))
            return whole[..., 1:-2].copy_(values)
        return values.mT.contiguous().mT if self.layout == "transposed" else values

    def maps(self, *shape: int) -> Tensor:
        """[n, C, H, W] in this layout; what lies between the maps is NaN."""
        values = self.randn(*shape)
        if self.layout.startswith("sliced"):
            whole = values.new_full((shape[0], shape[1] + 8, *shape[2:]), NAN)
            if self.layout.endswith("channels_last"):
                whole = whole.contiguous(memory_format=torch.channels_last)
            return whole[:, : shape[1]].copy_(values)
        return values.contiguous(memory_format=torch.channels_last) if self.layout == "channels_last" else values


@cache
def between_rows(dtype: torch.dtype, device: str) -> float:
    """What lies between the rows of sliced inputs: NaN, or a huge number where torch's own products read beyond a row.

    On processors with AMX, oneDNN fills rows of odd length up with whatever follows them, times 0: NaN would be torch's.
    """
    for width, rows in product((11, 31), (5, 40)):
        x = torch.full((rows, width + 3), NAN, dtype=dtype, device=device)[:, 1:-2].copy_(torch.ones(rows, width))
        if F.linear(x, torch.ones(24, width, dtype=dtype, device=device)).isnan().any():
            return 1e30
    return NAN


@dataclass(frozen=True)
class Case:
    """One way to call one op.

    Attributes:
        f: the op, called with what `make` gives.
        f_ref: its definition.
        make: arguments by name.
        layouts: of the inputs.
        dtypes: that make a difference.
        kernels: whether Triton runs it.
        kept: the rows that are computed; None for all.
        passes: the argument whose other rows are handed through.
        overwrites: the argument that is overwritten and returned where no gradient is recorded.
        hide: replaces in the arguments whatever must not be read by NaN.
        defined: the result with 0 where it is undefined.
        grads: arguments to differentiate by; a module stands for its parameters.
        also: further paths on the CPU, by name: what `COSTS` must assume so that small tensors take them.
        macs: makes, for n rows that all choose the same, the arguments and their MACs by the op's formula; None where
            another case of the op has it.
        waits: whether the host must know how many rows made each choice, on the kernels' path, too.
    """

    op: str
    name: str
    f: Callable[..., Any]
    f_ref: Callable[..., Any]
    make: Callable[[Setting], Args]
    layouts: tuple[str, ...] = ROWS
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    kernels: bool = True
    kept: Callable[[Args], Tensor] | None = None
    passes: str = ""
    overwrites: str = ""
    hide: Callable[[Args], None] | None = None
    defined: Callable[[Args, Any], Any] = lambda args, out: out
    grads: tuple[str, ...] = ()
    also: dict[str, Assumed] = field(default_factory=dict)
    macs: Callable[[int], tuple[Args, int]] | None = None
    waits: bool = False

    def __str__(self) -> str:
        return f"{self.op} {self.name}".strip()

    def args(self, setting: Setting) -> Args:
        """The arguments, the same each time."""
        torch.manual_seed(0)
        return self.make(setting)


def same(n: int) -> Tensor:
    """[n] int64: all rows choose 0."""
    return torch.zeros(n, dtype=torch.int64)


def cast(args: Args, dtype: torch.dtype) -> Args:
    """The arguments with all numbers and modules in another type."""

    def one(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return copy.deepcopy(value).to(dtype)
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: one(value) for name, value in args.items()}


def assert_close(got: Tensor, exact: Tensor, plain: Tensor, interpreted: bool = False) -> None:
    """Check that the error is at most twice what the definition makes in this dtype."""
    assert got.shape == exact.shape == plain.shape, (got.shape, exact.shape, plain.shape)
    assert got.dtype == plain.dtype, (got.dtype, plain.dtype)
    if not got.is_floating_point():
        assert torch.equal(got, plain), (got, plain)
    elif got.numel():
        scale = exact.abs().max().clamp(min=1)
        allowed = 2 * (plain.double() - exact).abs().max() + 1e-6 * scale
        if interpreted and got.dtype == torch.bfloat16:
            allowed += scale * 2**-7  # the interpreter cuts off what a GPU rounds
        elif got.is_cuda and got.dtype == torch.bfloat16:
            # A GPU may add up in another order than the definition, and so round to the neighbouring number.
            allowed = allowed + exact.abs() * 2**-7
        error = (got.double() - exact).abs()
        worst = (error - allowed).argmax()
        error, allowed = error.flatten()[worst], allowed.expand_as(exact).flatten()[worst]
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


# gated_residual


class Rowwise(nn.Module):
    """A block that computes tanh(layer(x)) + x."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) + x


class Overwriting(nn.Module):
    """A block that computes 3 x + 1, spoils what it is given and returns something else."""

    def forward(self, x: Tensor) -> Tensor:
        y = 3 * x + 1
        x.fill_(NAN)
        return y


class InPlace(nn.Module):
    """A block that computes relu(3 x + 1), written over x."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(3).add_(1).relu_()


def plain(block: ResidualBlock) -> Callable[[Tensor], Tensor]:
    """What a ResidualBlock computes, by torch's own convolution."""

    def run(x: Tensor) -> Tensor:
        y = x
        for i, c in enumerate(block.convolutions):
            y = F.conv2d(y if i == 0 else y.relu(), c.weight, c.bias, c.stride, c.padding, c.dilation, c.groups)
        return (x + y).relu()

    return run


def frozen_block(s: Setting, sizes: tuple[int, ...], taps: tuple[int, ...], bias: bool) -> ResidualBlock:
    layers = []
    for inputs, outputs, size in zip(sizes, sizes[1:], taps, strict=False):
        convolution = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=bias)
        layers.append(FoldedConv2d.of(convolution))
    return ResidualBlock(layers).to(s.device, s.dtype)


def gated_rows(block: Callable[[], nn.Module]) -> Callable[[Setting], Args]:
    return lambda s: {"x": s.rows(s.n, 5), "run": s.choice(2), "block": block().to(s.device, s.dtype)}


def gated_maps(block: Callable[[Setting], nn.Module], c: int) -> Callable[[Setting], Args]:
    return lambda s: {
        "x": s.maps(s.n, c, 3, 4),
        "run": s.choice(2).bool(),
        "block": block(s).to(s.device, s.dtype),
    }


def gated_case(name: str, make: Callable[[Setting], Args], **more: Any) -> Case:
    def hide(args: Args) -> None:
        args["x"][args["run"] == 0] = NAN

    more = {
        "f": gated_residual,
        "f_ref": gated_residual_ref,
        "kernels": False,
        "overwrites": "x",
        "also": MOVES,
        **more,
    }
    kept = lambda args: args["run"].bool()  # noqa: E731
    return Case("gated_residual", name, make=make, kept=kept, passes="x", hide=hide, **more)


def residual_case(name: str, sizes: tuple[int, ...], taps: tuple[int, ...], bias: bool) -> Case:
    make = gated_maps(lambda s: frozen_block(s, sizes, taps, bias), sizes[0])
    f_ref = lambda x, run, block: gated_residual_ref(x, run, plain(block))  # noqa: E731
    return gated_case(name, make, f_ref=f_ref, layouts=MAPS, kernels=True, also={"compacted": COMPACT, **MOVES})


GATED_RESIDUAL = [
    gated_case("linear", gated_rows(lambda: Rowwise(nn.Linear(5, 5))), grads=("x", "block")),
    gated_case(
        "convolution", gated_maps(lambda s: Rowwise(nn.Conv2d(3, 3, 3, padding=1)), 3), layouts=MAPS, grads=("x", "block")
    ),
    gated_case("block that spoils its input", gated_rows(Overwriting)),
    gated_case("block that overwrites its input", gated_maps(lambda s: InPlace(), 4), layouts=MAPS),
    residual_case("ResidualBlock", (12, 17, 12), (3, 3), True),
    residual_case("ResidualBlock bottleneck", (16, 4, 4, 16), (1, 3, 1), False),
]  # fmt: skip


# routed_linear

EXPERTS, INPUTS, OUTPUTS = 3, 20, 12
SPLITS = (16, 0, 7)


def experts(s: Setting) -> Args:
    parts = partition_ref(s.choice(EXPERTS), EXPERTS)
    return {
        "x": s.rows(s.n, INPUTS),
        "weight": s.rows(EXPERTS, OUTPUTS, INPUTS, scale=INPUTS**-0.5),
        "parts": parts,
        "bias": s.rows(EXPERTS, OUTPUTS),
        "scale": s.randn(s.n),
    }


def only(make: Callable[[Setting], Args], *names: str, **fixed: Any) -> Callable[[Setting], Args]:
    """Make some of the arguments, and fixed ones."""
    return lambda s: {name: value for name, value in make(s).items() if name in names} | fixed


def split_out(s: Setting) -> Args:
    return {
        "x": s.rows(s.n, INPUTS),
        "weight": s.rows(sum(SPLITS), INPUTS, scale=INPUTS**-0.5),
        "parts": partition_ref(s.choice(EXPERTS), EXPERTS),
        "bias": s.randn(sum(SPLITS)),
        "scale": s.randn(s.n),
        "splits": SPLITS,
        "sorted_out": True,
        "relu": True,
    }


def split_in(s: Setting) -> Args:
    return {
        "x": s.rows(s.n, max(SPLITS)),
        "weight": s.rows(OUTPUTS, sum(SPLITS), scale=0.25),
        "parts": partition_ref(s.choice(EXPERTS), EXPERTS),
        "bias": s.randn(EXPERTS, OUTPUTS),
        "scale": s.randn(s.n),
        "splits": SPLITS,
        "sorted_in": True,
    }


def two_layers(linear: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, scale: Tensor, parts: Any) -> Tensor:
        hidden = linear(x, w1, parts, b1, splits=SPLITS, relu=True, sorted_out=True)
        return linear(hidden, w2, parts, b2, scale, splits=SPLITS, sorted_in=True)

    return run


def two_split_layers(s: Setting) -> Args:
    first, second = split_out(s), split_in(s)
    return {
        "x": first["x"], "w1": first["weight"], "b1": first["bias"], "w2": second["weight"], "b2": second["bias"],
        "scale": second["scale"], "parts": first["parts"],
    }  # fmt: skip


def places(parts: Any, widths: tuple[int, ...], most: int) -> Tensor:
    """[n, most] bool, in sorted order: the columns within each row's width."""
    count = parts.offsets[1:] - parts.offsets[:-1]
    width = torch.tensor(widths, device=count.device).repeat_interleave(count)
    return torch.arange(most, device=count.device) < width.unsqueeze(1)


def hide_unread(args: Args) -> None:
    args["x"].masked_fill_(~places(args["parts"], SPLITS, args["x"].shape[1]), NAN)


def within_splits(args: Args, out: Tensor) -> Tensor:
    return torch.where(places(args["parts"], SPLITS, out.shape[1]), out, 0)


def routed_case(name: str, make: Callable[[Setting], Args], **more: Any) -> Case:
    return Case("routed_linear", name, **{"f": routed_linear, "f_ref": routed_linear_ref, "make": make, **more})


def one_expert(n: int) -> tuple[Args, int]:
    args = {"x": torch.randn(n, 11), "weight": torch.randn(1, 7, 11), "bias": torch.randn(1, 7)}
    return {**args, "parts": partition_ref(same(n), 1)}, routed_linear_macs(n, 11, 7)


ROUTED_LINEAR = [
    routed_case("", only(experts, "x", "weight", "parts"), grads=("x", "weight")),
    routed_case(
        "bias", only(experts, "x", "weight", "parts", "bias"), grads=("x", "weight", "bias"), macs=one_expert
    ),
    routed_case("bias relu scale", only(experts, *experts(Setting()), relu=True), grads=("x", "weight", "bias", "scale")),
    routed_case("sorted_in scale", only(experts, "x", "weight", "parts", "scale", sorted_in=True), grads=("x", "scale")),
    routed_case("sorted_out", only(experts, *experts(Setting()), sorted_out=True), grads=("x", "weight", "bias", "scale")),
    routed_case("split out", split_out, defined=within_splits, grads=("x", "weight", "bias", "scale")),
    routed_case("split in", split_in, hide=hide_unread, grads=("x", "weight", "bias", "scale")),
    routed_case(
        "two split layers", two_split_layers, f=two_layers(routed_linear), f_ref=two_layers(routed_linear_ref),
        grads=("x", "w1", "b1", "w2", "b2", "scale"),
    ),
]  # fmt: skip


# routed_experts


def experts_case(name: str, splits: tuple[int, ...], *positions: int) -> Case:
    def make(s: Setting) -> Args:
        width = sum(splits)
        return {
            "x": s.rows(s.n, *positions, INPUTS),
            "choice": s.choice(len(splits)),
            "w1": s.rows(width, INPUTS, scale=INPUTS**-0.5),
            "b1": s.randn(width),
            "w2": s.rows(INPUTS, width, scale=0.25),
            "splits": splits,
        }

    def macs(n: int) -> tuple[Args, int]:
        weights = {"w1": torch.randn(6, 11), "b1": torch.randn(6), "w2": torch.randn(11, 6), "splits": (6,)}
        x = torch.randn(n, *positions, 11)
        return {"x": x, "choice": same(n), **weights}, routed_experts_macs(n * math.prod(positions), 11, 6)

    return Case(
        "routed_experts", name, routed_experts, routed_experts_ref, make, overwrites="x",
        grads=("x", "w1", "b1", "w2"), also=MOVES, macs=macs,
    )  # fmt: skip


ROUTED_EXPERTS = [
    experts_case("", SPLITS),
    experts_case("of maps", (0, 5, 8, 8), 3, 2),
]


# sliced_linear


def sliced_case(name: str, widths: tuple[int, ...], bias: bool = True) -> Case:
    def make(s: Setting) -> Args:
        layer = SlicedLinear(nn.Linear(13, 40, bias=bias), nn.Linear(40, 18, bias=bias), widths)
        return {"x": s.rows(s.n, 13), "choice": s.choice(len(widths)), "layer": layer.to(s.device, s.dtype)}

    def macs(n: int) -> tuple[Args, int]:
        layer = SlicedLinear(nn.Linear(11, 6, bias=bias), nn.Linear(6, 7, bias=bias), (6,))
        return {"x": torch.randn(n, 11), "choice": same(n), "layer": layer}, sliced_linear_macs(n, 11, 6, 7)

    return Case(
        "sliced_linear", name, sliced_linear, sliced_linear_ref, make, grads=("x",), also={"compacted": COMPACT},
        macs=macs,
    )  # fmt: skip


SLICED_LINEAR = [
    sliced_case("", (16, 32, 40)),
    sliced_case("without bias", (3, 20, 25, 33, 39), bias=False),
    sliced_case("with a width of 0", (0, 9, 16)),
    sliced_case("with a width of 0 without bias", (0, 40), bias=False),
    sliced_case("of one width", (17,)),
]


# sliced_conv


def sliced_block(s: Setting, sizes: tuple[int, ...], taps: tuple[int, ...], widths: tuple[int, ...]) -> SlicedBlock:
    convolutions, norms = [], []
    for i, size in enumerate(taps):
        convolutions.append(nn.Conv2d(sizes[i], sizes[i + 1], size, padding=size // 2, bias=i == 0))
        last = i == len(taps) - 1
        norms.append([nn.BatchNorm2d(sizes[i + 1] if last else width) for width in widths])
        for norm in norms[-1]:
            for values in (norm.weight.data, norm.running_var):
                values.uniform_(0.5, 1.5)
            for values in (norm.bias.data, norm.running_mean):
                values.normal_(0, 0.5)
    return SlicedBlock(convolutions, norms, widths).to(s.device, s.dtype)


def sliced_conv_case(name: str, sizes: tuple[int, ...], taps: tuple[int, ...], widths: tuple[int, ...]) -> Case:
    def make(s: Setting) -> Args:
        maps, choice = s.maps(s.n, sizes[0], 3, 3), s.choice(len(widths))
        return {"x": maps, "choice": choice, "block": sliced_block(s, sizes, taps, widths)}

    return Case("sliced_conv", name, sliced_conv, sliced_conv_ref, make, layouts=MAPS, overwrites="x", also=MOVES)


SLICED_CONV = [
    sliced_conv_case("two layers", (16, 20, 16), (3, 3), (7, 16, 20)),
    sliced_conv_case("bottleneck", (9, 6, 6, 9), (1, 3, 1), (1, 6)),
]


# gated_cell


def cell(s: Setting, kind: type[nn.RNNCellBase] = nn.GRUCell) -> Args:
    parameters = kind(6, 9).to(s.device, s.dtype).parameters()
    weights = {
        name: value.detach().clone() for name, value in zip(("w_ih", "w_hh", "b_ih", "b_hh"), parameters, strict=True)
    }
    width = 18 if kind is nn.LSTMCell else 9
    return {"x": s.rows(s.n, 6), "h": s.rows(s.n, width), "update": s.choice(2).bool(), **weights}


def sequence_cell(s: Setting, kind: type[nn.RNNCellBase] = nn.GRUCell) -> Args:
    args = cell(s, kind)
    x = s.rows(3 * s.n, 6)
    return args | {"x": x, "update": s.choice(2), "x_rows": torch.randperm(3 * s.n)[: s.n].to(s.device)}


def partial_cell(s: Setting, kind: type[nn.RNNCellBase] = nn.GRUCell, widths: tuple[int, ...] = (0, 2, 5, 9)) -> Args:
    return sequence_cell(s, kind) | {"update": s.choice(len(widths)), "widths": widths}


def updated(args: Args) -> Tensor:
    """The rows of which a cell updates any unit, [n] bool."""
    return torch.tensor(args.get("widths", (0, 1)), device=args["h"].device)[args["update"].long()] > 0


def cell_case(name: str, make: Callable[[Setting], Args], **more: Any) -> Case:
    def hide(args: Args) -> None:
        left = ~updated(args)
        args["h"][left] = NAN
        args["x"][args["x_rows"][left] if "x_rows" in args else left] = NAN

    def macs(n: int) -> tuple[Args, int]:
        args = make(Setting("all"))
        rows = {name: args[name][:1].repeat(n, 1) for name in ("x", "h")}
        hidden = args["w_hh"].shape[1]
        count = gated_cell_macs(n, args["x"].shape[1], hidden, gates=len(args["b_hh"]) // hidden)
        every = same(n) + len(args["widths"]) - 1 if "widths" in args else same(n) == 0
        return args | rows | {"update": every, "x_rows": None}, count

    return Case(
        "gated_cell", name, gated_cell, gated_cell_ref, make, kept=updated, passes="h",
        overwrites="h", hide=hide, grads=("x", "h", "w_ih", "w_hh", "b_ih", "b_hh"),
        also={"compacted": COMPACT}, macs=macs, **more,
    )  # fmt: skip


# gated_positions


class Mixing(nn.Module):
    """A block in which each position sees the mean of all: how many there are matters."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x - x.mean(1, keepdim=True))) + x


class Told(nn.Module):
    """A block that is also told which rows and positions it is given, and has no use for it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, rows: Tensor | None, places: Tensor | None) -> Tensor:
        return self.block(x)


def positions_case(name: str, block: Callable[[], nn.Module], counts: tuple[int, ...], **more: Any) -> Case:
    def make(s: Setting) -> Args:
        order = torch.rand(s.n, counts[-1]).argsort(1).to(s.device)
        return {
            "x": s.rows(s.n, counts[-1], 6), "choice": s.choice(len(counts)), "order": order,
            "weight": s.randn(s.n, counts[-1]).sigmoid(), "counts": counts,
            "block": Told(block()).to(s.device, s.dtype),
        }  # fmt: skip

    def kept(args: Args) -> Tensor:
        return torch.tensor(counts, device=args["choice"].device)[args["choice"]] > 0

    def hide(args: Args) -> None:
        args["x"][~kept(args)] = NAN

    return Case(
        "gated_positions", name, gated_positions, gated_positions_ref, make, kept=kept, passes="x", overwrites="x",
        hide=hide, waits=True, **more,
    )  # fmt: skip


class Hiding(nn.Module):
    """A block in which each position sees the mean of those that a mask shows."""

    def __init__(self, shown: Tensor) -> None:
        super().__init__()
        self.register_buffer("shown", shown)

    def forward(self, x: Tensor, rows: Tensor | None, places: Tensor | None) -> Tensor:
        shown = self.shown if rows is None else self.shown[rows]
        shown = (shown if places is None else shown.gather(1, places)).to(x.dtype).unsqueeze(2)
        return torch.tanh(x - (shown * x).sum(1, keepdim=True) / shown.sum(1, keepdim=True).clamp_min(1)) + 2 * x


def padded_positions_case() -> Case:
    def make(s: Setting) -> Args:
        real = 1 + (torch.arange(s.n, device=s.device) * 5 + s.choice(2)) % 7
        counts = (torch.tensor([0, 0.25, 0.5, 1], device=s.device) * real.unsqueeze(1)).ceil().long()
        shown = torch.arange(7, device=s.device) < real.unsqueeze(1)
        order = torch.rand(s.n, 7, device=s.device).masked_fill(~shown, 2).argsort(1)
        weight = s.randn(s.n, 7).sigmoid()
        return {
            "x": s.rows(s.n, 7, 6), "choice": s.choice(4), "order": order, "weight": weight, "counts": counts,
            "block": Hiding(shown),
        }  # fmt: skip

    return Case(
        "gated_positions", "padding", gated_positions, gated_positions_ref, make,
        kept=lambda args: args["choice"] > 0, passes="x", overwrites="x", grads=("x", "weight"), waits=True,
    )  # fmt: skip


# gated_cells


class Convolved(nn.Module):
    """A residual block of two convolutions, and its branch as layers on maps that have their border already."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.last = (nn.Conv2d(channels, channels, size, padding=size // 2) for size in (5, 3))

    @property
    def layers(self) -> list[tuple[int, Callable[[Tensor], Tensor]]]:
        return [(2, lambda x: F.relu(self.bare(self.first, x))), (1, lambda x: self.bare(self.last, x))]

    @staticmethod
    def bare(layer: nn.Conv2d, x: Tensor) -> Tensor:
        return F.conv2d(x, layer.weight, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.last(F.relu(self.first(x))))


def cells_case(name: str, share: float) -> Case:
    def make(s: Setting) -> Args:
        chosen = torch.rand(s.n, 2, 3, device=s.device) < share
        run = chosen & (s.choice(2) == 1).view(-1, 1, 1)
        weight, block = s.randn(s.n, 2, 3).sigmoid(), Convolved(4).to(s.device, s.dtype)
        return {"x": s.maps(s.n, 4, 6, 6), "run": run, "weight": weight, "block": block}

    return Case(
        "gated_cells", name, gated_cells, gated_cells_ref, make, layouts=MAPS, kernels=False,
        kept=lambda args: args["run"].flatten(1).any(1), passes="x", overwrites="x", grads=("x", "weight", "block"),
    )  # fmt: skip


# partition


def partition_case(dtype: torch.dtype, count: int) -> Case:
    def make(s: Setting) -> Args:
        table = torch.zeros(s.n, 3, dtype=dtype, device=s.device)
        table[:, 1] = s.choice(count).to(dtype)
        return {"choice": table[:, 1] if s.layout == "sliced" else table[:, 1].contiguous(), "num_choices": count}

    return Case(
        "partition",
        f"{count} {dtype}",
        partition,
        partition_ref,
        make,
        layouts=("contiguous", "sliced"),
        dtypes=(torch.float32,),
    )


# crops, pooled, decide


def crops_case(scales: int) -> Case:
    def make(s: Setting) -> Args:
        places = {"rows": s.choice(3), "top": s.choice(5), "left": s.choice(4), "scale": 1 + s.choice(scales)}
        return {"images": s.maps(3, 2, 10, 9), **places, "side": 3}

    return Case(
        "crops", f"{scales} scales", crops, crops_ref, make, layouts=MAPS, kernels=False, grads=("images",),
    )  # fmt: skip


def pooled_case() -> Case:
    return Case("pooled", "", pooled, pooled_ref, lambda s: {"x": s.maps(s.n, 20, 3, 5)}, layouts=MAPS)


def decide_case(name: str, f: int, hidden: int | None, choices: int) -> Case:
    def make(s: Setting) -> Args:
        h = hidden or choices
        return {
            "features": s.rows(s.n, f), "last": s.choice(choices + 1), "spent": s.choice(90), "dense_macs": 100,
            "weight": s.randn(f, h), "bias": s.randn(h), "last_weight": s.randn(1 + choices, h),
            "spent_weight": s.randn(h), "head": s.randn(h, choices) if hidden else None,
            "head_bias": s.randn(choices) if hidden else None,
        }  # fmt: skip

    return Case("decide", name, decide, decide_ref, make, dtypes=(torch.float32,))


def running_case(arrived: bool) -> Case:
    def make(s: Setting) -> Args:
        index, count = torch.full((s.n + 2,), -1, device=s.device), torch.full((1,), -1, device=s.device)
        there = torch.tensor([s.n - 1], device=s.device) if arrived else None
        rows = torch.arange(s.n, device=s.device).flip(0) + 1
        return {"action": s.choice(3), "rows": rows, "index": index, "count": count, "arrived": there}

    def told(args: Args, out: None) -> Tensor:
        return torch.cat([args["count"], args["index"]])

    return Case(
        "running", "some arrived" if arrived else "", running, running_ref, make, layouts=("contiguous",),
        dtypes=(torch.float32,), defined=told,
    )  # fmt: skip


def record_case() -> Case:
    def make(s: Setting) -> Args:
        route = torch.full((s.n, 3), -1, device=s.device)
        counts = {name: s.choice(4).clone() for name in ("steps", "last", "macs")}
        costs = torch.tensor([1, 10, 100], device=s.device)
        return {"action": s.choice(3), "costs": costs, "column": route[:, 1], **counts}

    def books(args: Args, out: None) -> Tensor:
        return torch.stack([args[name] for name in ("column", "steps", "last", "macs")])

    return Case("record", "", record, record_ref, make, layouts=("contiguous",), dtypes=(torch.float32,), defined=books)


CASES = [
    running_case(False),
    running_case(True),
    crops_case(1),
    crops_case(2),
    pooled_case(),
    record_case(),
    decide_case("two layers", 70, 64, 3),
    decide_case("one layer", 21, None, 4),
    *(partition_case(*of) for of in ((torch.int64, 2), (torch.int32, 1), (torch.int64, 5))),
    *GATED_RESIDUAL,
    *ROUTED_LINEAR,
    *ROUTED_EXPERTS,
    *SLICED_LINEAR,
    *SLICED_CONV,
    positions_case("", lambda: Mixing(6), (0, 2, 3, 7), grads=("x", "weight", "block")),
    positions_case("block that spoils its input", Overwriting, (0, 1, 5)),
    padded_positions_case(),
    cells_case("some", 0.5),
    cells_case("all", 2),
    cell_case("", cell),
    cell_case("of a sequence", sequence_cell),
    cell_case("lstm", partial(cell, kind=nn.LSTMCell)),
    cell_case("lstm of a sequence", partial(sequence_cell, kind=nn.LSTMCell)),
    cell_case("in parts", partial_cell, layouts=("contiguous", "sliced")),
    cell_case(
        "lstm in parts", partial(partial_cell, kind=nn.LSTMCell, widths=(3, 9)), layouts=("contiguous", "sliced")
    ),
]
