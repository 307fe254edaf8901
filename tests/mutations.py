"""Well-formed files with wrong content: what shipped models hold, changed by kind, with a checksum that is right."""

from __future__ import annotations

import copy
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from dynrl.backbones import load_backbone
from dynrl.deploy import SHIPPED, load, shipped
from dynrl.files import load_tensors, save_tensors

ODD = (
    None, True, False, -1, 0, 1, 2, 7, 10**4, 10**7, 10**12, 10**30, -(2**63), 0.5, 1e-320, 1e308, -1.5, "", "x", "\0", "1",
    [], {}, [0], [[]], {"a": 1}, [None], [1, "a"], "../..", "x" * 10_000,
)  # fmt: skip
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64)


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


def places(value, way=()) -> Iterator[tuple]:
    """The way to each value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in list(inner)[:40]:
        yield (*way, key)
        yield from places(each, (*way, key))


def at(value, way):
    for key in way:
        value = value[key]
    return value


def in_metadata(change) -> Callable:
    """A change of the metadata at one place, drawn evenly over the keys at the top and then below."""

    def apply(draw, tensors, metadata):
        ways = list(places(metadata))
        top = draw.choice(list(metadata))
        way = draw.choice([way for way in ways if way[0] == top])
        return tensors, change(draw, metadata, at(metadata, way[:-1]), way[-1]) or metadata

    return apply


def drop(draw, metadata, holder, key):
    del holder[key]


def odd(draw, metadata, holder, key):
    holder[key] = copy.deepcopy(draw.choice(ODD))


def nested(draw, metadata, holder, key):
    holder[key] = deep(draw.choice((3, 200, 900)))


def rescaled(draw, metadata, holder, key):
    value = holder[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        holder[key] = value * draw.choice((-1, 2, 1000, 10**7)) + draw.choice((0, 1))
    elif isinstance(value, list):
        holder[key] = draw.choice((value[::-1], value + value, value[:-1], value[1:], value * 1000))
    else:
        holder[key] = [value]


def as_float(draw, metadata, holder, key):
    holder[key] = float(holder[key]) if isinstance(holder[key], int) else str(holder[key])


def more(draw, metadata, holder, key):
    target = holder if isinstance(holder, dict) else metadata
    target[draw.choice(("new", "", "self", "kind", "hidden", "device"))] = draw.choice(ODD)


def whole(draw, metadata, holder, key):
    return draw.choice(([], [metadata], "x", 3, None, {}))


def curve(draw, tensors, metadata):
    price, cost = draw.choice((
        (0, 1.0), (-1, 0.5), (1e-320, 0.5), (1e300, 0.5), (10**400, 0.5), (0.1, 0), (0.1, -0.2), (0.1, 10**400), (0.1, None),
    ))  # fmt: skip
    if "curve" in metadata:
        spot = draw.randrange(len(metadata["curve"]))
        kept = metadata["curve"]
        metadata["curve"] = draw.choice(
            (
                [*kept[:spot], [price, cost], *kept[spot:]], draw.sample(kept, len(kept)),
                [[p * 1e6, c] for p, c in kept], [[c, p] for p, c in kept], [kept[0]] * 5, [[p] for p, _ in kept],
            )
        )  # fmt: skip
    else:
        metadata["config"]["input_shape"] = draw.choice(
            ([1, 10**5, 10**5], [10**6, 17], [1, 24], [0, 24, 24], [1] * 5, [65, 17], [1, 600, 600])
        )
    return tensors, metadata


def in_tensors(draw, tensors, metadata):
    name = draw.choice(sorted(tensors))
    value = tensors[name]
    kind = draw.randrange(9)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[draw.choice(("new", name + "x", "a.b.c", ""))] = value.clone()
    elif kind == 2:
        tensors[name] = value.to(draw.choice(DTYPES))
    elif kind == 3:
        tensors[name] = value.reshape(-1)[: draw.randrange(value.numel() + 1)]
    elif kind == 4:
        tensors[name] = value.unsqueeze(draw.choice((0, -1)))
    elif kind == 5:
        tensors[name] = value.new_zeros(draw.choice(((0,), (), (3, 5, 7), (0, 10**12))))
    elif kind == 6:
        dtype = draw.choice(DTYPES[:3])
        tensors = {key: each.to(dtype) if each.is_floating_point() else each for key, each in tensors.items()}
    elif kind == 7:
        other = draw.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other], value
    else:
        tensors[name] = value.mT.contiguous() if value.dim() > 1 else value.repeat(2)
    return tensors, metadata


KINDS: dict[str, Callable] = {
    **{change.__name__: in_metadata(change) for change in (drop, odd, nested, rescaled, as_float, more, whole)},
    "curve or input shape": curve, "tensors": in_tensors,
}  # fmt: skip


def check(count: int, seed: int, folder: Path) -> dict[str, int]:
    """Load `count` changed models; each is refused by a ValueError that names the file, or computes what is right.

    Returns:
        the number of refused and accepted models, the most seconds of one load, and the megabytes that all took.
    """
    draw, originals, found = random.Random(seed), {}, {"refused": 0, "accepted": 0, "slowest": 0.0}
    for name in shipped():
        model, (dense, _) = load(SHIPPED / name), load_backbone(SHIPPED / name / "backbone.safetensors")
        files = {kind: load_tensors(SHIPPED / name / f"{kind}.safetensors", kind) for kind in ("policy", "backbone")}
        inputs = model.backbone.random_inputs(6, torch.Generator().manual_seed(0))
        originals[name] = files, dense, inputs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        name, kind = draw.choice(shipped()), draw.choice(list(KINDS))
        files, dense, inputs = originals[name]
        which = draw.choice(("policy", "policy", "backbone"))
        tensors, metadata = KINDS[kind](draw, dict(files[which][0]), copy.deepcopy(files[which][1]))
        run = folder / f"{number}"
        run.mkdir()
        for other in ("policy", "backbone"):
            shutil.copyfile(SHIPPED / name / f"{other}.safetensors", run / f"{other}.safetensors")
        file = run / f"{which}.safetensors"
        save_tensors(file, which, tensors, metadata)
        told, start = f"{number}: {kind} of {name}'s {which}", time.perf_counter()
        try:
            model = load(run)
            if len(model.curve) > 1:
                costs = [cost for _, cost in model.curve]
                model.set_budget((min(costs) + max(costs)) / 2)
        except ValueError as error:
            # A changed backbone is told of where its policy no longer fits it.
            assert str(run) in str(error) and "\n" not in str(error), f"{told}: {error}"
            found["refused"] += 1
            seconds = time.perf_counter() - start
        except BaseException as error:
            raise AssertionError(f"{told}: {type(error).__name__}: {error}") from error
        else:
            found["accepted"] += 1
            seconds = time.perf_counter() - start
            given = inputs.to(next(model.parameters()).dtype) if inputs.is_floating_point() else inputs
            outputs = model(given).float()  # a file of doubles makes a double model
            route = model.last_route.actions.clamp_min(0)
            torch.testing.assert_close(outputs, dense(inputs, route), atol=1e-3, rtol=1e-3, msg=told)
        found["slowest"] = max(found["slowest"], seconds)
        if seconds > 1:
            print(f"slow, {seconds:.2f} s: {told}")
        shutil.rmtree(run)
    found["megabytes"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return found
