"""Command lines with changed flags: each ends with exit code 2 and one line, or is heeded as it was said."""

from __future__ import annotations

import contextlib
import io
import random
import shutil
from pathlib import Path
from unittest import mock

from dynrl.deploy import SHIPPED
from dynrl.scripts.cli import main
from dynrl.settings import Settings
from tests.scripts.calls import untuned

ODD = (
    "", " ", "-1", "0", "-0.0", "1e-320", "1e308", "nan", "inf", "-inf", "2147483648", "9" * 30, "x", "None", "true", "[1]",
    "{}", "../..", "/dev/null/x", "0x10", "1_000", "+3", "1e3", "x" * 5000, "--", "-", "\u0663", "3.5", "1,2", "a=b", "\t7", "'", "\\",
)  # fmt: skip
GIVEN = "../given"
EXIT = "../exit-digits"  # a copy: attacks are written beside the run that they are on
LINES = {
    "train": (
        ["skip"],
        {
            "--data": ["digits"], "--backbone": [GIVEN], "--agent": ["gate"], "--steps": ["64"], "--num-envs": ["16"],
            "--hidden": ["8"], "--price-range": ["0.01", "1"], "--seed": ["3"], "--learning-rate": ["0.001"],
            "--policy": ["sequential"], "--reward": ["distillation"], "--cost": ["macs"], "--attacked": ["0.25"],
            "--dtype": ["float32"], "--device": ["cpu"], "--threads": ["1"], "--out": ["out"], "--epochs": ["2"],
            "--num-env-runners": ["0"], "--entropy": ["0.01"], "--baseline": ["value"],
        },
    ),
    "attack": (
        [EXIT],
        {
            "--rows": ["3"], "--steps": ["1"], "--budget": ["0.5"], "--limit": ["0.7"], "--epsilon": ["0.1"], "--out": ["out"],
            "--device": ["cpu"], "--threads": ["1"],
        },
    ),
}  # fmt: skip


def changed(draw, flags, kind):
    """The words of `flags`, one of which is changed."""
    items = [[flag, *values] for flag, values in draw.sample(sorted(flags.items()), draw.randrange(1, 6))]
    spot = draw.choice(items)
    if kind == "odd value":
        spot[draw.randrange(1, len(spot))] = draw.choice(ODD)
    elif kind == "no value":
        del spot[1:]
    elif kind == "another value":
        spot.append(draw.choice(ODD))
    elif kind == "twice":
        items.append([spot[0], *spot[1:]])
    elif kind == "misspelt":
        at = draw.randrange(2, len(spot[0]))
        spot[0] = spot[0][:at] + draw.choice(("x", "-", "=", " ", "")) + spot[0][at + 1 :]
    elif kind == "glued":
        spot[:] = [f"{spot[0]}={draw.choice((*spot[1:], *ODD))}"]
    elif kind == "another flag's value":
        spot[1:] = draw.choice(list(flags.values()))
    return [word for words in items for word in words]


KINDS = ("odd value", "no value", "another value", "twice", "misspelt", "glued", "another flag's value", "nothing")


def heeded(words, settings):
    """Whether numbers that were said are those of the settings."""
    said = {**vars(settings.problem), **vars(settings.learning), **vars(settings.place)}
    for at, word in enumerate(words):
        name, glued, value = word.removeprefix("--").replace("-", "_").partition("=")
        if not word.startswith("--") or not isinstance(said.get(name), int | float):
            continue
        given = value if glued else words[at + 1]
        if given != "None" and float(given) != said[name]:  # None asks for the default
            return False
    return True


def check(count: int, seed: int, folder: Path) -> dict[str, int]:
    """Give `count` changed command lines, and return how many were refused and heeded, by kind."""
    draw, found, asked = random.Random(seed), {}, []
    shutil.copytree(SHIPPED / "exit-digits", folder / "exit-digits")
    untuned(folder / "given")

    def learn(run, planned):
        assert Settings.read(run.config_file, planned.settings.place) == planned.settings
        asked.append(planned.settings)
        raise KeyboardInterrupt("asked; ")

    for number in range(count):
        verb, kind = draw.choice([*LINES, "train"]), draw.choice(KINDS)
        first, flags = LINES[verb]
        words, place = [verb, *first, *changed(draw, flags, kind)], folder / f"{number}"
        place.mkdir()
        asked.clear()
        said, shown = io.StringIO(), io.StringIO()
        told = f"{number}: {kind}: {' '.join(words)[:300]!r}"
        try:
            with (
                contextlib.chdir(place), contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown),
                mock.patch("dynrl.training.learn", learn),
                mock.patch("dynrl.perturb.Ball.climb", lambda ball, inputs, *more: inputs),
            ):  # fmt: skip
                main(words)
            code = 0
        except SystemExit as left:
            code = left.code
        except BaseException as error:
            raise AssertionError(f"{told}: {type(error).__name__}: {error}") from error
        lines = [line for line in said.getvalue().splitlines() if line.strip()]
        if code == 2:
            assert len([line for line in lines if "error: " in line]) == 1, f"{told}: {lines}"
            assert not list(place.iterdir()), f"{told}: left {[*place.iterdir()]}"
        elif asked:
            assert code == 130 and heeded(words[2:], asked[0]), f"{told}: {asked[0]}"
        else:
            assert code == 0 and verb == "attack", f"{told}: {code}, {lines}"
        by_kind = found.setdefault(kind, {"refused": 0, "heeded": 0})
        by_kind["refused" if code == 2 else "heeded"] += 1
        shutil.rmtree(place)
    return found
