"""Compile every kernel for sm_90 without a GPU and print what each needs, one JSON line a case.

Run as `python tests/aot.py [--all]`, with TRITON_INTERPRET unset. By default each kernel is compiled with its largest
tile; `--all` takes every tile that the autotuner may choose. A line holds kernel, dtype, constants, registers (a
thread), spills (bytes of local memory a thread) and shared (bytes a block).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dynrl.ops.kernels import conv, conv_tiles, decide, gru, linear, partition, positions, slices

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class _Pointer:
    """A stand-in for a tensor, or a tensor's descriptor, where the autotuner's pruning asks for a dtype."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.base = dtype, self


Cases = Iterator[tuple[Any, dict[str, Any], dict[str, Any]]]
SIZE, CHANNELS = 256, 128
ROWS = {
    "in_rows_ptr": "*i64", "out_rows_ptr": "*i64", "x_rows_ptr": "*i64", "h_rows_ptr": "*i64", "offsets_ptr": "*i32",
    "starts_ptr": "*i64", "dy_rows_ptr": "*i64", "bias_starts_ptr": "*i64", "in_widths_ptr": "*i32",
    "out_widths_ptr": "*i32",
}  # fmt: skip
WHOLE = {"in_widths_ptr": None, "out_widths_ptr": None}
GROUPS, SINGLE = {"NUM_GROUPS": 4, "BLOCK_GROUPS": 4}, {"NUM_GROUPS": 1, "BLOCK_GROUPS": 1}


def _cases(dtype: torch.dtype) -> Cases:
    """(kernel, arguments, constants) with a type string for each pointer; what is not named is a pointer of `dtype`.

    A value that depends on the tile is a function of the tile's constants.
    """
    for precision in ("ieee", "tf32") if dtype == torch.float32 else ("ieee",):
        yield from _convolutions(dtype, precision)
        yield from _products(precision)
    moved = {"offsets_ptr": "*i32", "rows_ptr": "*i64", "size": SIZE, "stride_src": SIZE, "stride_dst": SIZE}
    yield gru._scatter_rows_kernel, moved, {"BLOCK_M": 16, "BLOCK_N": 128}
    tokens = {"rows_ptr": "*i64", "order_ptr": "*i64", "items": 4096, "count": 98, "size": SIZE, "stride_order": 197}
    tokens |= {"stride_row": 197 * SIZE, "stride_place": SIZE, "stride_weight": 197}
    for kernel in (positions._take_positions_kernel, positions._put_positions_kernel):
        yield kernel, tokens, {"BLOCK_M": 16, "BLOCK_N": 128}
    pooled = {"out_ptr": "*fp32", "sums_ptr": "*fp32", "places": 784, "pixels": 784, "channels": CHANNELS, "parts": 16}
    pooled |= {"stride_n": 784 * CHANNELS, "stride_p": CHANNELS, "groups": 1}
    some, every = {"offsets_ptr": "*i32", "rows_ptr": "*i64"}, {"offsets_ptr": None, "rows_ptr": None}
    yield decide._pool_kernel, pooled | every, {"BLOCK_P": 32, "BLOCK_C": 64}
    yield decide._pool_kernel, pooled | some | {"out_ptr": None}, {"BLOCK_P": 32, "BLOCK_C": 64}
    finished = {"choice_ptr": "*i64", "sums_ptr": None, "pixels": 784, "channels": CHANNELS, "blocks": 13, "parts": 0}
    finished |= {"widths_ptr": "*i32", "residual_ptr": None, "stride_choice": 1}
    yield slices._finish_slices_kernel, finished, {"BLOCK_P": 64, "BLOCK_C": 64, "ROUNDS": 0}
    last = {"widths_ptr": None, "residual_ptr": f"*{TYPES[dtype]}", "sums_ptr": "*fp32", "parts": 16}
    yield slices._finish_slices_kernel, finished | last, {"BLOCK_P": 64, "BLOCK_C": 64, "ROUNDS": 2}
    if dtype == torch.float32:
        yield from _books()


def _convolutions(dtype: torch.dtype, precision: str) -> Cases:
    images = ROWS | {
        "scale_ptr": "*fp32", "shift_ptr": "*fp32", "size_c": CHANNELS, "size_k": CHANNELS, "H": 28, "W": 28, "P": 28,
        "Q": 28, "stride_wk": 9 * CHANNELS, "stride_wc": 1, "stride_wr": 3 * CHANNELS, "stride_ws": CHANNELS,
        "size_class": 8,
    }  # fmt: skip
    images |= {f"stride_{t}n": 784 * CHANNELS for t in "xor"} | {f"stride_{t}h": 28 * CHANNELS for t in "xor"}
    images |= {f"stride_{t}w": CHANNELS for t in "xor"}
    taps = {"R": 3, "S": 3, "STRIDE": 1, "PADDING": 1, "RELU": True, "PRECISION": precision}
    yield conv._conv_rows_kernel, images | WHOLE, taps | SINGLE
    yield conv._conv_rows_kernel, images, taps | GROUPS

    def maps(tile: dict[str, int], channels: str) -> str:
        width = tile_width(tile)
        return f"tensordesc<{TYPES[dtype]}[1, {tile['BLOCK_M'] // width}, {width}, {tile[channels]}]>"

    def tile_width(tile: dict[str, int]) -> int:
        return conv_tiles.tile_width(28, 28, tile["BLOCK_M"])

    images |= {
        "x_desc": lambda tile: maps(tile, "BLOCK_K"), "out_desc": lambda tile: maps(tile, "BLOCK_N"),
        "residual_desc": lambda tile: maps(tile, "BLOCK_N"), "granule": CHANNELS, "element_bytes": dtype.itemsize,
        "w_desc": lambda tile: f"tensordesc<{TYPES[dtype]}[{tile['BLOCK_N']}, 1, {tile['BLOCK_K']}]>",
        "sums": None, "parts": 0,
    }  # fmt: skip
    tiled = {name: value for name, value in taps.items() if name != "STRIDE"} | {"TILE_W": tile_width, "ROUNDS": 0}
    yield conv_tiles._conv_tiles_kernel, images, tiled | GROUPS
    yield conv_tiles._conv_tiles_kernel, images | WHOLE, tiled | SINGLE
    parts = conv_tiles.map_parts(28, 28)
    summed = images | WHOLE | {"shift_ptr": f"*{TYPES[dtype]}", "sums": "i64", "parts": parts}
    rounds = {"ROUNDS": lambda tile: -(-parts // conv_tiles.tile_count(28, 28, tile["BLOCK_M"]))}
    yield conv_tiles._conv_tiles_kernel, summed, tiled | SINGLE | rounds


def _products(precision: str) -> Cases:
    how = {"PRECISION": precision}
    matrix = ROWS | {
        "size_in": SIZE, "size_out": SIZE, "stride_x": SIZE, "stride_wm": SIZE, "stride_wk": 1, "size_class": 6,
    }  # fmt: skip
    yield linear._linear_rows_kernel, matrix | {"stride_out": SIZE}, {"RELU": True} | GROUPS | how
    transposed = matrix | WHOLE | {"stride_out": SIZE, "stride_wm": 1, "stride_wk": SIZE}
    yield linear._linear_rows_kernel, transposed, {"RELU": False} | GROUPS | how
    yield linear._grad_weight_rows_kernel, matrix | {"stride_dy": SIZE}, {"NUM_GROUPS": 4} | how
    sizes = dict.fromkeys(("size_in", "size_hidden", "width", "stride_x", "stride_h", "stride_out"), SIZE)
    yield gru._gru_rows_kernel, ROWS | sizes | {"size_class": 6}, how


def _books() -> Cases:
    books = {f"{name}_ptr": "*i64" for name in ("action", "costs", "column", "steps", "last", "macs")}
    yield decide._record_kernel, books | {"n": SIZE, "stride": 9}, {"BLOCK": 256}
    router = books | {"n": SIZE, "size_in": SIZE, "hidden": 64, "choices": 2, "dense_macs": "fp32"}
    for rows in (4, 16):
        blocks = {"LINEAR": False, "BLOCK_M": rows, "BLOCK_K": 64, "BLOCK_H": 64, "BLOCK_C": 16}
        yield decide._decide_kernel, router, blocks
    chosen = {"choice_ptr": "*i64", "order_ptr": "*i64", "offsets_ptr": "*i32", "n": 4096, "stride_choice": 1}
    yield partition._partition_kernel, chosen, {"BLOCK": 4096, "num_warps": 8}
    listed = {f"{name}_ptr": "*i64" for name in ("action", "rows", "index", "count", "arrived")}
    yield partition._running_kernel, listed | {"n": 4096, "size": 4096}, {"BLOCK": 4096, "num_warps": 8}


def _configs(
    kernel: Any, arguments: dict[str, Any], constants: dict[str, Any], dtype: torch.dtype, every: bool
) -> list:
    """The autotuner's choices for these arguments."""
    if not isinstance(kernel, triton.runtime.Autotuner):
        return [triton.Config({}, num_warps=constants.get("num_warps", 4))]
    pointer = _Pointer(dtype)
    configs = kernel.early_config_prune(kernel.configs, arguments | {"x_ptr": pointer, "x_desc": pointer}, **constants)
    return configs if every else configs[-1:]


def compile_case(
    kernel: Any, arguments: dict[str, Any], constants: dict[str, Any], config: Any, dtype: torch.dtype
) -> dict:
    """Compile one kernel with one tile as a launch with these arguments would, and read off what it needs."""
    function = kernel
    while not isinstance(function, triton.JITFunction):  # below autotuner and heuristics
        function = function.fn
    meta = {name: value for name, value in constants.items() if name != "num_warps"} | config.kwargs
    meta = {name: value(config.kwargs) if callable(value) else value for name, value in meta.items()}
    signature, fixed, attributes = {}, {}, {}
    for place, name in enumerate(function.arg_names):
        value = meta[name] if name in meta else arguments.get(name, "*" + TYPES[dtype])
        value = value(config.kwargs) if callable(value) else value
        # A launch treats None and 1 as constants too, and notes what is a multiple of 16.
        if name in meta or value is None or value == 1:
            signature[name], fixed[(place,)] = "constexpr", value
            continue
        signature[name] = value if isinstance(value, str) else "i32"
        if value[0] == "*" if isinstance(value, str) else value % 16 == 0:
            attributes[(place,)] = [["tt.divisibility", 16]]
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(ASTSource(function, signature, fixed, attributes), target=TARGET, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "kernel": function.__name__,
        "dtype": str(dtype).removeprefix("torch."),
        "constants": meta | options | {"absent": [name for name, value in arguments.items() if value is None]},
        "registers": numbers["REG"],
        "spills": numbers["STACK"] + numbers["LOCAL"],
        "shared": compiled.metadata.shared,
    }


def main() -> None:
    for dtype in TYPES:
        for kernel, arguments, constants in _cases(dtype):
            for config in _configs(kernel, arguments, constants, dtype, "--all" in sys.argv):
                print(json.dumps(compile_case(kernel, arguments, constants, config, dtype)), flush=True)


if __name__ == "__main__":
    main()
