"""The file of a learned policy holds its weights, what rebuilds the network, and what it was trained for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrl.files import load_tensors, save_tensors
from dynrl.ops.backend import float32
from dynrl.policies.base import LearnedPolicy
from dynrl.policies.router import Router
from dynrl.policies.upfront import UpfrontRouter

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
    def of(cls, kind: str, backbone: Any, price_range: tuple[float, float], hidden: int) -> PolicySpec:
        """Return the specification of a policy for `backbone` that favours the full route at the start.

        Raises:
            ValueError: the kind is unknown, or its policies cannot see such inputs.
        """
        sight = check_kind(kind).sight_class.of(backbone)
        start = sight.start(backbone.full_route)
        config = {"sight": sight.config(), "price_range": list(price_range), "hidden": hidden, "start": start}
        return cls(kind, config)

    def build(self) -> LearnedPolicy:
        """Build the policy, or raise a ValueError if `config` does not fit the kind."""
        policy = check_kind(self.kind)
        try:
            with float32():
                return policy(**{**self.config, "sight": policy.sight_class(**self.config["sight"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"these are no settings of a policy of kind {self.kind!r}: {error}") from None


def check_kind(kind: str) -> type[LearnedPolicy]:
    """Return the class of that kind of policy, or raise a ValueError that lists the kinds."""
    if not isinstance(kind, str) or kind not in POLICIES:
        raise ValueError(f"unknown kind of policy {kind!r}; expected one of {sorted(POLICIES)}")
    return POLICIES[kind]


def save_policy(path: str | Path, policy: LearnedPolicy, metadata: dict[str, Any]) -> None:
    """Write a policy and, as JSON, what it was trained for: `decision`, `backbone` (a fingerprint) and `curve`."""
    kind = next(name for name, row in POLICIES.items() if row is type(policy))
    save_tensors(path, "policy", policy.state_dict(), {**metadata, "kind": kind, "config": policy.config})


def load_policy(path: str | Path) -> tuple[LearnedPolicy, dict[str, Any]]:
    """Read a policy file and return the policy, in eval mode, and its metadata.

    Raises:
        ValueError: the file is missing, is cut short, was altered, or is no policy file.
    """
    tensors, metadata = load_tensors(path, "policy")
    policy = PolicySpec(metadata["kind"], metadata["config"]).build()
    policy.load_state_dict(tensors)
    return policy.eval(), metadata
