"""Each op against its definition, on every path. The cases stand in `ops_cases.CASES`."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dynrl.ops
from dynrl.ops import backend, move
from dynrl.ops.convolution import FoldedConv2d
from dynrl.ops.costs import COSTS, Costs
from dynrl.ops.exit_scores import exit_scores
from dynrl.ops.gated_cell import gated_cell, gated_cell_macs, gated_cell_ref
from dynrl.ops.gated_residual import ResidualBlock, gated_residual, gated_residual_ref
from dynrl.ops.partition import Partition, partition_ref
from dynrl.ops.pooled import pooled_keeping, pooled_ref
from dynrl.ops.routed_experts import routed_experts, routed_experts_macs
from dynrl.ops.routed_linear import routed_linear, routed_linear_macs, routed_linear_ref
from dynrl.ops.sliced_conv import SlicedBlock
from dynrl.ops.sliced_linear import SlicedLinear, sliced_linear, sliced_linear_macs
from tests.devices import NoHostSync
from tests.ops_cases import (
    CASES,
    COMPACT,
    KINDS,
    MOVES,
    NAN,
    Args,
    Case,
    Overwriting,
    Rowwise,
    Setting,
    assert_close,
    cast,
)

pytestmark = pytest.mark.usefixtures("full_precision")

MODULES = [importlib.import_module(f"dynrl.ops.{m.name}") for m in pkgutil.iter_modules(dynrl.ops.__path__)]
PATHS = ["cpu", "triton", *(["cuda"] if torch.cuda.is_available() else [])]
FLOATS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
MANY, FEW = ["none", "one", "some", "all", "nearly"], ["none", "some"]
GATED = next(case for case in CASES if case.op == "gated_residual")
NEW = {torch: ("empty", "empty_like", "empty_strided"), Tensor: ("new_empty", "new_empty_strided")}


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN in every test here, so that what is read before it is written shows."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(NAN if tensor.is_floating_point() else -1) if tensor.device.type != "meta" else tensor

        return made

    for owner, names in NEW.items():
        for name in names:
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def take(request: pytest.FixtureRequest) -> Iterator[Callable[[Case, str], str]]:
    """Makes an op take a path, and gives the device for it."""
    with ExitStack() as stack:

        def to(case: Case, path: str) -> str:
            stack.enter_context(backend.ops_mode("triton" if path == "triton" else "auto"))
            stack.enter_context(COSTS.assuming(**case.also.get(path, {})))
            torch.set_num_threads(1)  # the tensors are tiny
            return request.getfixturevalue("kernel_case") if path == "triton" else "cuda" if path == "cuda" else "cpu"

        yield to


def interpreted(path: str) -> bool:
    return path == "triton" and not torch.cuda.is_available()


def listed(result: Any) -> list[Tensor]:
    if isinstance(result, Partition):
        return [result.order, result.offsets, *(torch.tensor(of) for of in (result.ends, result.sizes))]
    return [result]


def check(case: Case, setting: Setting, path: str) -> None:
    try:
        got, plain, exact = (
            listed(case.defined(args, f(**args)))
            for f, args in (
                (case.f, case.args(setting)),
                (case.f_ref, case.args(setting)),
                (case.f_ref, cast(case.args(setting), torch.float64)),
            )
        )
        for of in zip(got, exact, plain, strict=True):
            assert_close(*of, interpreted=interpreted(path))
    except Exception as error:
        error.add_note(f"{case} on {path}, {setting}")
        raise


def paths(case: Case) -> list[str]:
    return ["cpu", *case.also, *(["triton"] if case.kernels else []), *(["cuda"] if torch.cuda.is_available() else [])]


def cases(**only: bool | str) -> list[Any]:
    chosen = [
        case
        for case in CASES
        if all(value in (getattr(case, name), bool(getattr(case, name))) for name, value in only.items())
    ]
    return [pytest.param(case, id=str(case)) for case in chosen]


def cases_on_paths(kinds: list[str], few: list[str], **only: bool | str) -> list[Any]:
    """Parameters (case, path, kind). Kernels run `few` kinds: they know no costs and are slow interpreted."""
    return [
        pytest.param(case, path, kind, id=f"{path} {case}-{kind}")
        for (case,) in (param.values for param in cases(**only))
        for path in paths(case)
        for kind in (few if path == "triton" else kinds)
    ]


def usual(case: Case) -> str:
    """The layout that a network would use."""
    return "channels_last" if "channels_last" in case.layouts else "contiguous"


# The table


def test_every_op_has_cases_and_a_definition_of_the_same_form() -> None:
    found = {}
    for module in MODULES:
        for name, of in vars(module).items():
            f = getattr(module, name.removesuffix("_ref"), None)
            if f is not None and f is not of and of.__module__ == module.__name__:
                assert inspect.signature(f) == inspect.signature(of), name
                found[name.removesuffix("_ref")] = {f, of}
    assert set(found) == {case.op for case in CASES}
    for op, functions in found.items():
        assert any({case.f, case.f_ref} == functions for case in CASES if case.op == op), op


# f = f_ref


@pytest.mark.parametrize(("case", "path", "layout", "dtype"), [
    pytest.param(case, path, layout, dtype, id=f"{path} {case} {layout} {FLOATS[dtype]}")
    for case in CASES for path in paths(case) if path != "triton"
    for layout in case.layouts for dtype in case.dtypes if path not in MOVES or dtype == torch.float32
])  # fmt: skip
@torch.no_grad()
def test_op_is_its_definition(
    case: Case, path: str, layout: str, dtype: torch.dtype, take: Callable[[Case, str], str]
) -> None:
    device = take(case, path)
    for kind in MANY if path in case.also else KINDS:
        check(case, Setting(kind, layout, dtype, device), path)


@pytest.mark.parametrize("kind", ["no rows", "last", "none", "some"])
@pytest.mark.parametrize("case", cases(kernels=True))
@torch.no_grad()
def test_kernels_are_the_definition(case: Case, kind: str, take: Callable[[Case, str], str]) -> None:
    check(case, Setting(kind, usual(case), device=take(case, "triton")), "triton")


@pytest.mark.parametrize(("case", "layout", "dtype"), [
    pytest.param(case, layout, dtype, id=f"{case} {layout} {FLOATS[dtype]}")
    for case in CASES if case.kernels for layout in case.layouts for dtype in case.dtypes
    if (layout == usual(case)) == (dtype == torch.bfloat16)
])  # fmt: skip
@torch.no_grad()
def test_kernels_are_the_definition_in_every_layout(
    case: Case, layout: str, dtype: torch.dtype, take: Callable[[Case, str], str]
) -> None:
    check(case, Setting("one", layout, dtype, take(case, "triton")), "triton")


@pytest.mark.parametrize("dtype", FLOATS, ids=FLOATS.get)
@pytest.mark.parametrize("case", cases(op="sliced_conv"))
@torch.no_grad()
def test_slices_at_full_width_are_the_definition(
    case: Case, dtype: torch.dtype, kernel_case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All choices are mixed, and there is one convolution of the vendor's for each layer, whatever the choices."""
    run, layers = [], []
    convolve = torch.nn.functional.conv2d
    monkeypatch.setattr("dynrl.ops.sliced_conv.F.conv2d", lambda *args, **kw: run.append(1) or convolve(*args, **kw))

    def at_full_width(**args: Any) -> Tensor:
        layers.append(args["block"].count)
        run.clear()
        with backend.device_counts(select=True), NoHostSync():
            case.f(**args)  # in place
        assert len(run) == layers[-1]
        return args["x"]

    for kind in ("no rows", "none", "one", "some", "all"):
        for layout in case.layouts if kind == "some" else [usual(case)]:
            check(replace(case, f=at_full_width), Setting(kind, layout, dtype, kernel_case), "triton")


@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf])
@torch.no_grad()
def test_channels_that_a_row_does_not_have_do_not_spoil_it_at_full_width(spoiled: float, kernel_case: str) -> None:
    case = next(case for case in CASES if case.op == "sliced_conv")
    args = case.args(Setting("some", "channels_last", device=kernel_case))
    args["choice"] = args["choice"] * 0 + torch.tensor([0, 1, 2, 1, 0], device=kernel_case)
    for channel in (7, 15, 16, 19):  # the widths are 7, 16 and 20
        args["block"].weight0[channel] = spoiled
    expected = case.f_ref(**args)
    with backend.device_counts(select=True):
        found = case.f(**args)
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert found[[0, 4]].isfinite().all() and not found[[1, 2, 3]].isfinite().all()
    whole = expected.isfinite()
    torch.testing.assert_close(found[whole], expected[whole], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_rows_at_an_odd_place_in_memory_and_blocks_of_another_dtype() -> None:
    run, block = torch.tensor([1, 0, 1, 0]), Rowwise(nn.Linear(8, 8))
    odd = torch.randn(33)[1:].view(4, 8)
    torch.testing.assert_close(gated_residual(odd.clone(), run, block), gated_residual(odd, run, block))
    x = torch.randn(4, 8)
    low = gated_residual(x.clone(), run, lambda rows: rows.bfloat16())
    torch.testing.assert_close(low[0], x[0].bfloat16().float())


@pytest.mark.parametrize(
    ("case", "path", "kind"), cases_on_paths(["none", "one", "some", "nearly"], ["one"], overwrites=True)
)
@torch.no_grad()
def test_op_overwrites_and_returns_its_argument(
    case: Case, path: str, kind: str, take: Callable[[Case, str], str]
) -> None:
    args = case.args(Setting(kind, usual(case), device=take(case, path)))
    out = case.f(**args)
    assert out.data_ptr() == args[case.overwrites].data_ptr()
    torch.testing.assert_close(args[case.overwrites], out, rtol=0, atol=0, equal_nan=True)


# Half a million elements: enough for `put_rows` to move words.
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@torch.no_grad()
def test_large_rows(layout: str) -> None:
    n, width = 1200, 512
    torch.manual_seed(0)
    gru, update = nn.GRUCell(8, width), torch.arange(n) % 8 != 3
    x, whole = torch.randn(n, 8), torch.randn(n, width + 4)
    h = whole[:, :width] if layout == "sliced" else whole[:, :width].contiguous()
    expected = gated_cell_ref(x, h, update, *gru.parameters())
    torch.testing.assert_close(gated_cell(x, h, update, *gru.parameters()), expected)
    wide = torch.randn(n, 12)
    x, parts = wide[:, :8] if layout == "sliced" else wide, partition_ref(torch.arange(n) * 5 % 3, 3)
    weight = torch.randn(3, width, x.shape[1])
    torch.testing.assert_close(routed_linear(x, weight, parts), routed_linear_ref(x, weight, parts))


@torch.no_grad()
def test_a_sliced_block_that_loads_other_weights_uses_them() -> None:
    case = next(case for case in CASES if case.op == "sliced_conv")
    args, other = case.args(Setting()), case.args(Setting())["block"]
    case.f(**{**args, "x": args["x"].clone()})  # so that narrow blocks are made
    for value in other.buffers():
        if value.is_floating_point():
            value.mul_(1.5)
    args["block"].load_state_dict(other.state_dict())
    expected = case.f_ref(**args)
    torch.testing.assert_close(case.f(**args), expected)


# Sums beside maps


@pytest.mark.parametrize("kind", ["none", "some", "all"])
@pytest.mark.parametrize(("case", "select"), [
    pytest.param(case, select, id=f"{case}{' at full width' * select}")
    for case in CASES if case.op in ("gated_residual", "sliced_conv") and case.kernels
    for select in ([False, True] if case.op == "sliced_conv" else [False])
])  # fmt: skip
@torch.no_grad()
def test_sums_of_maps_come_along(case: Case, select: bool, kind: str, take: Callable[[Case, str], str]) -> None:
    """They are those of the result; rows left out keep theirs to the bit; once another path has run, none are known."""
    device = take(case, "triton")
    dtype = torch.bfloat16 if kind == "some" else torch.float32
    args = case.args(Setting(kind, "channels_last", dtype, device))
    _, sums = pooled_keeping(args["x"], None)
    before = sums.of(args["x"]).clone()
    with backend.device_counts(select):
        out = case.f(**args, sums=sums)
    after = sums.of(out)
    if case.kept is not None:
        left = ~case.kept(args)
        assert torch.equal(after[left], before[left])
    torch.testing.assert_close(after.sum(1), out.sum((2, 3), dtype=torch.float32), atol=1e-4, rtol=1e-5)
    means, same = pooled_keeping(out, sums)
    assert same is sums and sums.of(out) is after  # the maps were not read again
    assert sums.of(out.clone()) is None  # these are other maps, as far as anyone knows
    torch.testing.assert_close(means, pooled_ref(out.float()), atol=1e-5, rtol=1e-5)
    with backend.ops_mode("auto"), COSTS.assuming(**COMPACT):
        changed = case.f(**args | {"x": out}, sums=sums)
    assert changed is out
    torch.testing.assert_close(pooled_keeping(out, sums)[0], pooled_ref(out.float()), atol=1e-5, rtol=1e-5)


# Rows left out


@pytest.mark.parametrize(("case", "path", "kind"), cases_on_paths(MANY, FEW, passes=True))
@torch.no_grad()
def test_rows_left_out_keep_their_bits(case: Case, path: str, kind: str, take: Callable[[Case, str], str]) -> None:
    setting = Setting(kind, usual(case), device=take(case, path))
    args, before = case.args(setting), case.args(setting)
    left = ~case.kept(args)
    args[case.passes][left] *= -0.0
    before[case.passes][left] *= -0.0
    out = case.f(**args)
    got, expected = (t[left].contiguous().view(torch.int32) for t in (out, before[case.passes]))
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("case", "path", "kind"), cases_on_paths(MANY, ["some"], hide=True))
@torch.no_grad()
def test_nan_that_is_not_to_be_read_does_not_spread(
    case: Case, path: str, kind: str, take: Callable[[Case, str], str]
) -> None:
    setting = Setting(kind, usual(case), device=take(case, path))
    args, hidden = case.args(setting), case.args(setting)
    kept = case.kept(args) if case.kept else slice(None)
    case.hide(hidden)
    out = case.defined(args, case.f(**args))[kept]
    assert out.isfinite().all()
    torch.testing.assert_close(case.defined(hidden, case.f(**hidden))[kept], out, rtol=0, atol=0)


@pytest.mark.parametrize(("case", "path", "kind"), cases_on_paths(MANY, [], op="gated_residual"))
@torch.no_grad()
def test_rows_left_out_are_never_computed(case: Case, path: str, kind: str, take: Callable[[Case, str], str]) -> None:
    take(case, path)
    args, sizes = case.args(Setting(kind)), []
    block, kept = args.pop("block"), int(args["run"].sum())
    gated_residual(**args, block=lambda x: sizes.append(len(x)) or block(x))
    if path in case.also:
        assert sum(sizes) == kept
        assert path not in MOVES or kept == KINDS[kind] or max(sizes, default=0) <= 2  # in pieces of two rows
    else:
        assert sum(sizes) in (kept, KINDS[kind])


def rows_computed(n: int, kept: int, channels: int, side: int) -> int:
    """How many rows of a residual block are computed of `n`, the first `kept` of which run."""
    counted_rows = []

    class Counting(ResidualBlock):
        def forward(self, x: Tensor) -> Tensor:
            counted_rows.append(len(x))
            return super().forward(x)

    layers = [FoldedConv2d.of(nn.Conv2d(channels, channels, 3, padding=1)) for _ in range(2)]
    x = torch.randn(n, channels, side, side).contiguous(memory_format=torch.channels_last)
    gated_residual(x, torch.arange(n) < kept, Counting(layers))
    return sum(counted_rows)


@torch.no_grad()
def test_rows_are_left_out_where_that_pays() -> None:
    with COSTS.assuming(**vars(Costs())):
        assert rows_computed(40, 20, channels=16, side=16) == 20  # half of the work is saved
        assert rows_computed(40, 39, channels=16, side=16) == 40  # nearly all rows would have to be moved
        assert rows_computed(8, 7, channels=2, side=3) == 8  # nothing much is saved
        assert rows_computed(40, 0, channels=16, side=16) == 0
    with COSTS.assuming(always=True):
        assert rows_computed(40, 39, channels=16, side=16) == 39


def test_costs_are_assumed_for_a_while_and_known_by_name() -> None:
    before = vars(COSTS).copy()
    with pytest.raises(RuntimeError, match="inside"), COSTS.assuming(piece=1, always=True):
        assert (COSTS.piece, COSTS.always) == (1, True)
        raise RuntimeError("inside")
    assert vars(COSTS) == before
    with pytest.raises(AssertionError, match="peace"), COSTS.assuming(peace=1):
        pass


@torch.no_grad()
def test_keep_rows() -> None:
    x, rows = torch.randn(4, 2, 3, 3).contiguous(memory_format=torch.channels_last), torch.arange(4)
    some = torch.tensor([False, True, False, True])
    kept = move.keep_rows(some, rows, x)
    assert kept is not None and torch.equal(kept[0], rows[some]) and torch.equal(kept[1], x[some])
    assert kept[1].is_contiguous(memory_format=torch.channels_last)
    everything = move.keep_rows(rows >= 0, rows, x)
    assert everything is not None and everything[0] is rows and everything[1] is x
    assert move.keep_rows(rows < 0, rows, x) is None
    assert move.keep_rows(some[:0], rows[:0]) is not None
    with pytest.raises(ValueError, match="CUDA graph"), backend.device_counts():
        move.keep_rows(some, x)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("index", [[], [1, 3], [0, 1, 2, 3]])
def test_add_rows(index: list[int], form: torch.memory_format) -> None:
    x, rows = (
        torch.randn(4, 2, 3, 3).contiguous(memory_format=form),
        torch.randn(len(index), 2, 3, 3, requires_grad=True),
    )
    expected = x.clone()
    expected[index] += rows.detach()
    where = torch.tensor(index, dtype=torch.int64)
    added = move.add_rows(x, where, rows)
    added.square().sum().backward()
    torch.testing.assert_close(added, expected)
    torch.testing.assert_close(rows.grad, 2 * expected[index])
    with torch.no_grad():
        assert move.add_rows(x, where, rows) is x
    torch.testing.assert_close(x, expected)
    assert x.is_contiguous(memory_format=form)


@torch.no_grad()
def test_apart() -> None:
    x = torch.randn(3, 4)
    view = x.t()
    assert move.apart(view, x).data_ptr() != x.data_ptr() and torch.equal(move.apart(view, x), view)
    own = x.clone()
    assert move.apart(own, x) is own


# Gradients


def gradients(case: Case, f: Callable[..., Any], args: Args, names: tuple[str, ...]) -> list[Tensor]:
    """The gradients by each leaf, checked to be the same when taken twice."""
    leaves = []
    for name in names:
        if isinstance(args[name], nn.Module):
            leaves += list(args[name].parameters())
        else:
            args[name] = args[name].detach().requires_grad_()
            leaves.append(args[name])
    out = case.defined(args, f(**args))
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    total = (out * weights).sum() + 0 * sum(leaf.sum() for leaf in leaves)
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(total, leaves), strict=True):
        assert torch.equal(a, b)
    return list(first)


@pytest.mark.parametrize(("case", "path", "kind"), cases_on_paths(MANY, FEW, grads=True))
def test_gradients_are_those_of_the_definition(
    case: Case, path: str, kind: str, take: Callable[[Case, str], str]
) -> None:
    device = take(case, path)
    for layout in case.layouts if kind == "some" else [usual(case)]:
        setting = Setting(kind, layout, device=device)
        alone = kind == "some" and layout == usual(case) and len(case.grads) > 1
        for names in [case.grads, *((name,) for name in case.grads[:2] if alone)]:
            args, before = case.args(setting), case.args(setting)
            got = gradients(case, case.f, args, names)
            for name, value in before.items():
                if isinstance(value, Tensor):
                    assert torch.equal(value, args[name]), f"{name} was overwritten"
            plain = gradients(case, case.f_ref, case.args(setting), names)
            exact = gradients(case, case.f_ref, cast(case.args(setting), torch.float64), names)
            for of in zip(got, exact, plain, strict=True):
                assert_close(*of, interpreted=interpreted(path))


@pytest.mark.parametrize("case", cases(grads=True))
def test_gradcheck_of_the_definition(case: Case) -> None:
    args = cast(case.args(Setting()), torch.float64)
    names = [name for name in case.grads if isinstance(args[name], Tensor)]
    # ReLU has no derivative at 0: a step must not cross it.
    leaves = tuple(args[name].detach().requires_grad_() for name in names)

    def f(*values: Tensor) -> Tensor:
        return case.defined(args, case.f_ref(**{**args, **dict(zip(names, values, strict=True))}))

    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)


# MACs


def counted(call: Callable[[], Any]) -> float:
    def in_place(into: Any, a: Any, b: Any, **_: Any) -> int:  # of shapes; torch's own counter does not know this form
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        call()
    return counter.get_total_flops() / 2


def test_every_formula_of_macs_has_a_case() -> None:
    formulas = {name.removesuffix("_macs") for module in MODULES for name in vars(module) if name.endswith("_macs")}
    assert formulas == {case.op for case in CASES if case.macs}


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("case", cases(macs=True))
@torch.no_grad()
def test_macs_are_those_that_the_flop_counter_sees(case: Case, rows: int) -> None:
    results = []
    for f in (case.f, case.f_ref):
        args, macs = case.macs(rows)
        results.append(counted(lambda f=f, args=args: f(**args)))
    assert results == [macs, macs] and macs > 0


@torch.no_grad()
def test_ops_pay_for_each_row_at_its_choice_only(take: Callable[[Case, str], str]) -> None:
    def args(op: str) -> Args:
        case = next(case for case in CASES if case.op == op)
        take(case, "compacted")
        return case.args(Setting())

    routed, sliced, gated = (args(op) for op in ("routed_linear", "sliced_linear", "gated_cell"))
    experts = args("routed_experts")
    sizes = partition_ref(Setting().choice(3), 3).sizes
    _, m, k = routed["weight"].shape
    assert counted(lambda: routed_linear(**routed)) == routed_linear_macs(sum(sizes), k, m)
    expected = sum(routed_experts_macs(n, k, width) for n, width in zip(sizes, experts["splits"], strict=True))
    assert counted(lambda: routed_experts(**experts)) == expected
    layer = sliced["layer"]
    inputs, outputs, widths = layer.w1.shape[1], len(layer.w2), layer.widths
    expected = sum(sliced_linear_macs(n, inputs, width, outputs) for n, width in zip(sizes, widths, strict=True))
    assert counted(lambda: sliced_linear(**sliced)) == expected
    updates, hidden = int(gated["update"].sum()), gated["h"].shape[1]
    assert counted(lambda: gated_cell(**gated)) == gated_cell_macs(updates, gated["x"].shape[1], hidden)
    parts = next(case for case in CASES if str(case) == "gated_cell in parts").args(Setting())
    expected = sum(gated_cell_macs(1, 6, parts["widths"][choice]) for choice in parts["update"].tolist())
    assert counted(lambda: gated_cell(**parts)) == expected


# No wait for the device


@pytest.mark.parametrize("case", cases(kernels=True, waits=True))
@torch.no_grad()
def test_ops_that_must_know_counts_refuse_a_capture(case: Case, kernel_case: str) -> None:
    with pytest.raises(ValueError, match="how many rows.*no capture"), backend.device_counts():
        case.f(**case.args(Setting("one", device=kernel_case)))


@pytest.mark.parametrize("case", cases(kernels=True, waits=False))
def test_kernels_do_not_wait_for_the_device(case: Case, kernel_case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting("one", usual(case), device=kernel_case)
    differentiable = case.grads and case.op != "sliced_linear"  # whose gradients are the definition's

    def differentiate() -> None:
        args = case.args(setting)
        leaf = args[case.grads[0]] = args[case.grads[0]].detach().requires_grad_()
        with watch, backend.device_counts():
            torch.autograd.grad(case.f(**args).nansum(), leaf)

    def refuse(tensor: Tensor) -> list[Any]:
        raise AssertionError("tolist waits for the device")

    # Small index tensors are made on the device at the first call, and kept.
    watch: Any = nullcontext()
    with torch.no_grad(), backend.device_counts():
        case.f(**case.args(setting))
    if differentiable:
        differentiate()
    args, watch = case.args(setting), NoHostSync()
    monkeypatch.setattr(Tensor, "tolist", refuse)  # no dispatch tells of it on the CPU
    with torch.no_grad(), watch, backend.device_counts():
        case.f(**args)
    if differentiable:
        differentiate()


# Which path is taken


@pytest.mark.parametrize("asked", ["by the mode", "by the context"])
@pytest.mark.parametrize("case", cases(kernels=True))
@torch.no_grad()
def test_triton_that_cannot_run_is_refused(case: Case, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with backend.ops_mode("triton") if asked == "by the mode" else backend.device_counts():
        with pytest.raises(ValueError, match="move them to a CUDA device.*DYNRL_OPS=auto"):
            case.f(**case.args(Setting()))
        monkeypatch.setattr(backend, "installed", lambda: False)
        with pytest.raises(ValueError, match="triton is not installed"):
            case.f(**case.args(Setting()))


@pytest.mark.parametrize("case", cases())
@torch.no_grad()
def test_mode_ref_runs_the_definition(case: Case) -> None:
    args = case.args(Setting())
    if case.op == "gated_residual":
        block, seen = args["block"], []
        args["block"] = lambda x: seen.append(len(x)) or block(x)
    with backend.ops_mode("ref"):
        got = case.defined(args, case.f(**args))
    module = sys.modules[f"dynrl.ops.{case.op}"]
    if case.f is getattr(module, case.op):
        again = case.args(Setting())
        expected = case.defined(again, getattr(module, f"{case.op}_ref")(**again))
        for a, b in zip(listed(got), listed(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    if case.op == "gated_residual":
        assert seen == [len(args["x"])]


def test_the_environment_names_the_mode() -> None:
    program = """
import importlib, os
os.environ["DYNRL_OPS"] = "ref"
from dynrl.ops import backend
import torch
assert backend.path(torch.zeros(1)) is backend.Path.REF
os.environ["DYNRL_OPS"] = "Triton"
importlib.reload(backend)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "ValueError: expected DYNRL_OPS to be one of auto, ref, triton, got 'Triton'" in done.stderr, done.stderr


def test_what_is_uninitialised_is_nan_here() -> None:
    assert torch.empty(2).isnan().all() and torch.zeros(2).new_empty(2).isnan().all()
    assert (torch.empty_like(torch.zeros(2, dtype=torch.int64)) == -1).all()


# Wrong input


@pytest.mark.parametrize("widths", [(4, 3), (3, 3), (-1, 3), (3, 6)])
def test_wrong_widths_of_a_sliced_layer_are_named(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"rising widths in 0\.\.5.*got"):
        SlicedLinear(nn.Linear(4, 5), nn.Linear(5, 3), widths)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3, 2)])
def test_logits_of_wrong_shape_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"logits of shape \[n, classes\].*got \(4,"):
        exit_scores(torch.randn(shape))


@pytest.mark.parametrize("widths", [(0, 4), (2, 5), (-1,)])
def test_wrong_widths_of_a_sliced_block_are_named(widths: tuple[int, ...]) -> None:
    convolutions = [nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)]
    with pytest.raises(ValueError, match=r"widths in 1\.\.4.*got"):
        SlicedBlock(convolutions, [[nn.Identity()] * len(widths)] * 2, widths)


# exit_scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "classes"), [(0, 3), (1, 2), (5, 10), (3, 1000)])
def test_exit_scores(n: int, classes: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(n, 2 * classes) * 3).to(dtype)[:, ::2]
    scores = exit_scores(logits)
    assert scores.shape == (n, 3) and scores.dtype == torch.float32
    for row, got in zip(logits.double(), scores, strict=True):
        p = sorted(torch.softmax(row, 0).tolist(), reverse=True)
        expected = [p[0], p[0] - p[1], -sum(q * math.log(q) for q in p) / math.log(classes)]
        torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_exit_scores_at_their_ends() -> None:
    sure = exit_scores(torch.tensor([[0.0, 1e4, 0.0], [-math.inf, 0.0, -math.inf]]))
    torch.testing.assert_close(sure, torch.tensor([[1.0, 1.0, 0.0]] * 2))
    unsure = exit_scores(torch.zeros(1, 7))
    torch.testing.assert_close(unsure, torch.tensor([[1 / 7, 0.0, 1.0]]))
    assert torch.autograd.gradcheck(
        lambda t: exit_scores(t).double(), torch.randn(3, 5).double().requires_grad_(), eps=1e-2, atol=1e-3
    )


# Threads and nesting


@pytest.mark.parametrize("path", ["cpu", *MOVES])
def test_two_threads_at_once(path: str, take: Callable[[Case, str], str]) -> None:
    take(GATED, path)
    together, results = threading.Barrier(2, timeout=30), {}

    def block(x: Tensor) -> Tensor:
        together.wait()  # both threads hold rows now
        y = 2 * x + 1
        together.wait()
        return y

    def work(number: int) -> None:
        with torch.no_grad():  # holds for one thread only
            for repeat in range(10):
                x = torch.full((6, 8), float(10 * repeat + number))
                results[number, repeat] = gated_residual(x, torch.tensor([1, 0, 1, 1, 0, 1]), block)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    for (number, repeat), out in results.items():
        before = torch.full((6, 8), float(10 * repeat + number))
        expected = gated_residual_ref(before, torch.tensor([1, 0, 1, 1, 0, 1]), lambda x: 2 * x + 1)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("path", ["cpu", *MOVES])
@torch.no_grad()
def test_a_block_that_calls_the_op_itself(path: str, layout: str, take: Callable[[Case, str], str]) -> None:
    take(GATED, path)
    outer, inner = torch.tensor([1, 1, 0, 1, 1, 0, 1]), Overwriting()

    def nested(of: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        # The first value of a row decides, so that each row's result depends on that row only.
        return lambda x: of(x, x.flatten(1)[:, 0] > 0, lambda y: of(y, y.flatten(1)[:, 1] > 0, inner) + 1) * 2

    for _ in range(2):  # the second time with the memory that the first left behind
        x = Setting(layout=layout).maps(7, 4, 3, 3)
        expected = gated_residual_ref(x.clone(), outer, nested(gated_residual_ref))
        torch.testing.assert_close(gated_residual(x, outer, nested(gated_residual)), expected)


@torch.no_grad()
def test_a_block_that_fails_leaves_the_op_usable() -> None:
    run = torch.tensor([1, 0, 1])

    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("no")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            gated_residual(torch.randn(3, 4), run, fail)
    x = torch.randn(3, 4)
    torch.testing.assert_close(
        gated_residual(x.clone(), run, lambda t: 2 * t), gated_residual_ref(x, run, lambda t: 2 * t)
    )


@pytest.mark.parametrize(
    "block",
    [lambda y: (y.transpose(1, 2) * 2).transpose(1, 2), lambda y: torch.cat([y * 2, y], 2)[:, :, : y.shape[2]]],
)
@torch.no_grad()
def test_results_may_lie_in_memory_as_they_like(block: Callable[[Tensor], Tensor]) -> None:
    """Rows are moved here as they are on CUDA, on whatever device there is."""
    x, index = torch.randn(7, 3, 5), torch.tensor([0, 2, 5])
    expected = x.clone()
    expected[index] *= 2
    got = move.compute_copies(x.clone(), index, ((block, 0, 1), (block, 1, 3)))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(move.compute_rows(x, index, block), expected)


@pytest.mark.parametrize("splits", [None, (2, 5, 3)])
def test_training_in_half_precision_after_inference(splits: tuple[int, ...] | None, kernel_case: str) -> None:
    """Under autocast rows come in half precision and weights do not; what inference has made, training may use."""
    x = torch.randn(9, 4, device=kernel_case, dtype=torch.bfloat16)
    size = (3, 5, 4) if splits is None else (10, 4)
    weight, bias = (torch.randn(size[:end], device=kernel_case).requires_grad_() for end in (None, -1))
    parts = partition_ref(torch.tensor([0, 2, 1, 1, 0, 2, 2, 0, 1], device=kernel_case), 3)
    how: Any = {"splits": splits, "sorted_out": splits is not None}
    results = []
    for mode in ("ref", "triton"):
        with backend.ops_mode(mode):
            with torch.inference_mode():
                routed_linear(x, weight.bfloat16(), parts, bias.bfloat16(), **how)
            given = (x, weight.bfloat16(), parts, bias.bfloat16()) if mode == "ref" else (x, weight, parts, bias)
            out = routed_linear(*given, **how)
            assert out.dtype == torch.bfloat16
            results.append((out.float(), *torch.autograd.grad(out.float().square().sum(), (weight, bias))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.3, rtol=0.05)


def test_precision_follows_torchs_switches(kernel_case: str) -> None:
    """Either of torch's two interfaces may set it; they must not be mixed."""
    from dynrl.ops.kernels.conv import _precision
    from dynrl.ops.kernels.linear import dot_precision

    x, owners = torch.ones(1), (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [owner.fp32_precision for owner in owners]
    try:
        for precision in ("tf32", "ieee"):
            for owner in owners:
                owner.fp32_precision = precision
            assert dot_precision(x) == _precision(x) == precision
            assert dot_precision(x.half()) == _precision(x.half()) == "ieee"
        torch.backends.cuda.matmul.allow_tf32 = True
        assert dot_precision(x) == "tf32"
    finally:
        for owner, precision in zip(owners, before, strict=True):
            owner.fp32_precision = precision
