"""The options of a command are made from the settings classes, so help says what their docstrings say."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

BY_DATA = {  # the settings whose default is no fixed value
    "data": "the decision's", "steps": "the data set's; for gates half as many", "hidden": "the data set's",
    "num_envs": "the data set's", "price_range": "measured", "learning_rate": "the agent's own",
    "entropy": "the agent's own",
}  # fmt: skip


def optional(*kinds: type) -> Any:
    """Return a dataclass of the fields of settings classes, all optional; `given` tells which were given."""
    made: list[tuple[str, Any, Any]] = []
    for kind in kinds:
        hints, about = typing.get_type_hints(kind), texts(kind)
        for each in dataclasses.fields(kind):
            usual = BY_DATA.get(each.name, each.default)
            positional = each.default is dataclasses.MISSING and each.name not in BY_DATA
            help = tyro.conf.arg(
                help=about[each.name], help_behavior_hint=f"(default: {usual})",
                metavar=each.name.upper() if positional else metavar(hints[each.name]),
            )  # fmt: skip
            if positional:
                made.append((each.name, Annotated[hints[each.name], tyro.conf.Positional, help], dataclasses.field()))
            elif hints[each.name] is bool:
                made.append((each.name, Annotated[tyro.conf.FlagCreatePairsOff[bool], help], each.default))
            else:
                made.append((each.name, Annotated[hints[each.name] | None, help], None))
    return dataclasses.make_dataclass("Given", made)


def given(settings: Any) -> dict[str, Any]:
    """Return what was given of the settings that `optional` made."""
    return {
        each.name: value
        for each in dataclasses.fields(settings)
        if (value := getattr(settings, each.name)) != each.default
    }


def metavar(hint: Any) -> str | None:
    """What help shows for a value of that type; without it, each of these would offer None, too."""
    words = typing.get_args(hint)
    if type(None) in words:
        return metavar(words[0])
    if typing.get_origin(hint) is Literal:
        return "{" + ",".join(words) + "}"
    if words:
        return " ".join("..." if word is Ellipsis else word.__name__.upper() for word in words)
    return None if hint is bool else hint.__name__.upper()


def texts(kind: type) -> dict[str, str]:
    """Return what a settings class says about each of its fields under `Attributes:`."""
    _, _, listed = (kind.__doc__ or "").partition("Attributes:")
    found = re.findall(r"^        (\w+): (.*?)(?=^        \w+: |\Z)", listed, re.DOTALL | re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def parse_words(verb: str, module: Any, words: Sequence[str]) -> Any:
    """Return a verb's settings; a ValueError of one line says what is wrong with `words`."""
    if any(not word or (word.startswith("--") and word.endswith("=")) for word in words):
        raise ValueError(f"expected no empty words, got {list(words)}")
    said, shown = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown):
            return tyro.cli(module.Args, args=words, prog=f"dynrl {verb}", description=module.__doc__)
    except SystemExit as left:
        if not left.code:  # --help
            print(shown.getvalue(), end="")
            raise
        # The message is a box: a title, a line, what is wrong, and after another line the help of options like it.
        plain = re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue()).replace("|", " ").replace("\u2502", " ")
        _, *parts = re.split(r"[-\u2500-\u257f]{5,}", plain)
        told = " ".join(next((part for part in parts if part.strip()), plain).split())
        told = re.sub(r"no type matching .*? from (\[.*?\])\..*", r"got \1", told)
        near = re.findall(r"^ *(--[a-z][\w-]*(?: [A-Z{].*?)?) *$", plain, re.MULTILINE)
        advice = f"; there is {', '.join(dict.fromkeys(near))}" if near else ""
        raise ValueError(f"{told}{advice} (see dynrl {verb} --help)") from None
