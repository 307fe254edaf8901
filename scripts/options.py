"""The options of a command are made from the settings classes, so help says what their docstrings say."""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Annotated, Any, Literal

import tyro

BY_DATA = {  # the settings whose default is no fixed value
    "data": "the decision's", "steps": "the data set's; for gates half as many", "hidden": "the data set's",
    "num_envs": "the data set's", "price_range": "measured", "learning_rate": "the agent's own",
    "entropy": "the agent's own",
}  # fmt: skip


def optional(*kinds: type) -> Any:
    """Return a dataclass of the fields of settings classes, all optional: None or False stands for not given."""
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
                made.append((each.name, Annotated[tyro.conf.FlagCreatePairsOff[bool], help], False))
            else:
                made.append((each.name, Annotated[hints[each.name] | None, help], None))
    return dataclasses.make_dataclass("Given", made)


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
