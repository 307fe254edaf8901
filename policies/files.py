"""The file of a learned policy holds its weights, what rebuilds the network, and what it was trained for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from dynrl.files import filled, load_tensors, reading, save_tensors
from dynrl.ops.backend import float32
from dynrl.policies.base import LearnedPolicy
from dynrl.policies.router import Router
from dynrl.policies.sight import Sight
from dynrl.policies.upfront import UpfrontRouter
from dynrl.schema import accepted, arguments, check_known, parse

# The kinds of learned policies, by their names in files and in `dynrl train --policy`. A plugin adds a row.
POLICIES: dict[str, type[LearnedPolicy]] = {"sequential": Router, "upfront": UpfrontRouter}


@dataclass(frozen=True)
class PolicySpec:
    """A specification rebuilds a policy, untrained.

    Attributes:
        kind: a name in `POLICIES`.
        config: the policy's `LearnedPolicy.config`, as JSON can hold it.
    """

    kind: str
    config: dict[str, Any]

    @classmethod
    def of(
        cls,
        kind: str,
        backbone: Any,
        price_range: tuple[float, float],
        hidden: int,
        units: Sequence[float] | None = None,
    ) -> PolicySpec:
        """Return the specification of a policy for `backbone` that favours the full route at the start.

        A kind that takes no `units` of features (see `Router`) is built without them.

        Raises:
            ValueError: the kind is unknown, or its policies cannot see such inputs.
        """
        sight = check_kind(kind).sight_class.of(backbone)
        start = sight.start(backbone.full_route)
        config = {"sight": sight.config(), "price_range": list(price_range), "hidden": hidden, "start": start}
        if units is not None and "units" in (accepted(POLICIES[kind]) or ()):
            config["units"] = list(units)
        return cls(kind, config)

    def build(self) -> LearnedPolicy:
        """Build the policy, or raise a ValueError if `config` does not fit the kind."""
        policy = check_kind(self.kind)
        sight = parse(policy.sight_class, self.config.get("sight"), "sight.")
        with float32():
            return policy(**arguments(policy, {**self.config, "sight": sight}, "config."))


@dataclass(frozen=True)
class PolicyNotes:
    """The notes of a policy file say how its policy is built, and what it was trained for.

    Attributes:
        kind, config: the policy's `PolicySpec`.
        decision: the decision's name.
        data: the data set's name.
        backbone: the fingerprint of the backbone.
        curve: the price and the share of the dense MACs at each price that budgets were calibrated at.
        finished: whether training came to its end.
    """

    kind: str
    config: dict[str, Any]
    decision: str = ""
    data: str = ""
    backbone: str = ""
    curve: tuple[tuple[float, float], ...] = ()
    finished: bool = False


def check_kind(kind: str) -> type[LearnedPolicy]:
    """Return the class of that kind of policy, or raise a ValueError that lists the kinds, or says what a row lacks."""
    check_known("kind of policy", kind, POLICIES)
    found: Any = POLICIES[kind]
    if not isinstance(found, type) or not issubclass(found, LearnedPolicy):
        raise ValueError(f"POLICIES[{kind!r}]: expected a class of LearnedPolicy, got {found!r}")
    sight = getattr(found, "sight_class", None)
    if not isinstance(sight, type) or not issubclass(sight, Sight):
        raise ValueError(f"{found.__name__}: expected a `sight_class`, StepSight or RouteSight, got {sight!r}")
    if found._scores is LearnedPolicy._scores:
        raise ValueError(f"{found.__name__} has no `_scores`, which maps observations to scores of choices; write it")
    return found


def check_curve(curve: Sequence[tuple[float, float]], price_range: tuple[float, float]) -> None:
    """Refuse, with a ValueError, a curve [(price, cost)] whose prices leave the range or do not rise, or that is free.

    Raises:
        ValueError: see above; or a number is not finite.
    """
    low, high = price_range
    for price, cost in curve:
        if not low <= price <= high or not 0 < cost < math.inf:
            raise ValueError(
                f"curve: expected prices from {low:g} to {high:g}, each with a cost above 0, got {(price, cost)}"
            )
    for (before, _), (after, _) in pairwise(curve):
        if not before < after:
            raise ValueError(f"curve: expected rising prices, got {after} behind {before}")


def save_policy(path: str | Path, policy: LearnedPolicy, metadata: dict[str, Any]) -> None:
    """Write a policy and, as JSON, what it was trained for; `metadata` has fields of `PolicyNotes`."""
    kind = next((name for name, row in POLICIES.items() if row is type(policy)), None)
    if kind is None:
        raise ValueError(
            f"no row of POLICIES holds {type(policy).__name__}, so a file of it could not be read again; add one, "
            f"POLICIES['NAME'] = {type(policy).__name__}, in a plugin"
        )
    notes = asdict(PolicyNotes(**metadata | {"kind": kind, "config": policy.config}))
    check_curve(notes["curve"], policy.price_range)
    save_tensors(path, "policy", policy.state_dict(), notes)


def load_policy(path: str | Path) -> tuple[LearnedPolicy, dict[str, Any]]:
    """Read a policy file and return the policy, in eval mode, and its metadata, the fields of `PolicyNotes`.

    Raises:
        ValueError: the file is missing, is cut short, was altered, or holds something else than a policy.
    """
    tensors, metadata = load_tensors(path, "policy")
    with reading(path, "policy file"):
        notes = parse(PolicyNotes, metadata)
        policy = filled(PolicySpec(notes.kind, notes.config).build, tensors)
        if any(weight.dtype != torch.float32 for weight in policy.parameters()):
            raise ValueError(f"expected weights in float32, as policies have, got {next(policy.parameters()).dtype}")
        check_curve(notes.curve, policy.price_range)
    return policy.eval(), metadata
