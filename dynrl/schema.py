"""What comes from outside is checked against a schema: the fields of a dataclass, or the arguments of a function."""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, Literal

MOST_THREADS, MOST_ROWS = 1_000, 100_000  # what no machine of today has or holds
Dtype = Literal["float32", "bfloat16", "float16"]  # the number types that networks run in


def parse(kind: Any, values: Any, prefix: str = "") -> Any:
    """Make an instance of a dataclass from JSON values, which have lists in place of tuples.

    Raises:
        ValueError: a field is unknown or missing, or a value has the wrong type.
    """
    hints, fields = typing.get_type_hints(kind), [each.name for each in dataclasses.fields(kind)]
    _same_names(prefix, values, fields, fields)
    return kind(**_typed(prefix, values, hints))


def arguments(function: Callable[..., Any], values: Any, prefix: str = "") -> dict[str, Any]:
    """Return JSON values as keyword arguments of a function or class, whose annotations say their types.

    A class that hands arguments on to its bases takes theirs, too. A function that takes any keyword gets the
    values as they are.

    Raises:
        ValueError: an argument is unknown or missing, or a value has the wrong type.
    """
    known = _parameters(function)
    if known is None and isinstance(values, Mapping):
        return dict(values)
    hints, needed = known or ({}, set())
    _same_names(prefix, values, list(hints), needed)
    return _typed(prefix, values, hints)


def accepted(function: Callable[..., Any]) -> list[str] | None:
    """Return the names of the keyword arguments of a function or class; None if it takes any."""
    known = _parameters(function)
    return None if known is None else list(known[0])


def _parameters(function: Callable[..., Any]) -> tuple[dict[str, Any], set[str]] | None:
    """Return the types of the keyword arguments, and which are needed; None for a function that takes any."""
    hints: dict[str, Any] = {}
    needed = set[str]()
    classes = function.__mro__ if isinstance(function, type) else ()
    for each in [vars(base)["__init__"] for base in classes if "__init__" in vars(base)] or [function]:
        known, listed = _hints(each), inspect.signature(each).parameters.values()
        for at in listed:
            if at.kind in (at.POSITIONAL_OR_KEYWORD, at.KEYWORD_ONLY) and at.name not in (*hints, "self"):
                hints[at.name] = known.get(at.name, Any)
                needed |= {at.name} if at.default is at.empty else set()
        if all(at.kind not in (at.VAR_POSITIONAL, at.VAR_KEYWORD) for at in listed):
            break
    else:
        if not isinstance(function, type):
            return None
    return hints, needed


def _hints(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except NameError:  # a plugin's annotation names what is imported for type checkers only
        return {}


def _typed(prefix: str, values: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: value if hints.get(name, Any) is Any else _tuples(value) for name, value in values.items()}
    for name, value in found.items():
        hint = hints.get(name, Any)
        if not _fits(value, hint):
            said = getattr(hint, "__name__", None) if isinstance(hint, type) else None
            raise ValueError(f"{prefix}{name}: expected {said or hint}, got {_shown(values[name])}")
    return found


def _same_names(prefix: str, values: Any, known: typing.Collection[str], needed: typing.Collection[str]) -> None:
    listed = ", ".join(known)
    if not isinstance(values, Mapping):
        where = f"{prefix.rstrip('.: ')}: " if prefix else ""
        raise ValueError(f"{where}expected an object with {listed}, got {_shown(values)}")
    for what, differ in (
        ("unknown", [n for n in values if n not in known]), ("missing", [n for n in needed if n not in values])
    ):  # fmt: skip
        if differ:
            raise ValueError(f"{prefix}{differ[0]}: {what} setting; expected {listed}, got {_shown(list(values))}")


def _shown(value: Any) -> str:
    """Return a value as a message shows it, in one line that ends."""
    said = repr(value)
    return said if len(said) <= 200 else f"{said[:200]}..."


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _fits(value: Any, hint: Any) -> bool:
    """Tell whether a value has the type of an annotation; True and False are no numbers."""
    origin, given = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return isinstance(value, str) and value in given
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in given)
    if origin in (tuple, list):
        if not isinstance(value, tuple):
            return False
        each = given[:1] * len(value) if origin is list or given[1:] == (...,) else given
        return len(value) == len(each) and all(map(_fits, value, each))
    if origin is dict:
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, float) or (_fits(value, int) and abs(value) < 2**63)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def check_one_of(what: str, name: Any, known: typing.Collection[str], also: str = "") -> None:
    """Refuse, with a ValueError, a name that is not among the known ones; `also` is the end of the message."""
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"unknown {what} {name!r}; expected one of {', '.join(known)}{also}")


def check_known(what: str, name: Any, registry: typing.Collection[str], also: str = "") -> None:
    """Refuse, with a ValueError, a name that no row of a registry has, to which plugins may add rows.

    `also` says in words what else may be named.
    """
    own = "; one of your own comes by a plugin: dynrl --plugin FILE.py VERB ..."
    check_one_of(what, name, sorted(registry), also + own)


# Bounds -----------------------------------------------------------------------------------------------------------


def check_count(name: str, value: int, least: int, limit: int = 2**31) -> None:
    """Refuse, with a ValueError, what is no whole number, or is below `least`, or `limit` or more."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"expected {name} as a whole number, got {value!r}")
    if not least <= value < limit:
        below = "and below 2^31" if limit == 2**31 else f"and below {limit:,}" if value >= limit else ""
        raise ValueError(f"expected {' '.join([name, 'of at least', str(least), below]).rstrip()}, got {value}")


def check_counts(name: str, values: typing.Sequence[int], least: int = 1, limit: int = MOST_ROWS) -> None:
    """Refuse, with a ValueError, an empty list, or an element that `check_count` refuses."""
    if not values:
        raise ValueError(f"expected at least one number in {name}, got none")
    for value in values:
        check_count(f"each number in {name}", value, least, limit)


def is_number(value: Any) -> bool:
    """Tell whether a value is a real number; truth values are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_price_range(prices: typing.Sequence[float]) -> tuple[float, float]:
    """Return `(low, high)`, or raise a ValueError if this is no range of positive prices.

    Prices beyond twelve orders of magnitude have no use, and their products and quotients overflow.
    """
    if len(prices) != 2 or not all(map(is_number, prices)) or not 0 < prices[0] <= prices[1] < math.inf:
        raise ValueError(f"expected a price range (low, high) with 0 < low <= high, got {tuple(prices)}")
    if not 1e-12 <= prices[0] <= prices[1] <= 1e12:
        raise ValueError(f"expected a price range (low, high) within 1e-12 and 1e12, got {tuple(prices)}")
    return float(prices[0]), float(prices[1])
