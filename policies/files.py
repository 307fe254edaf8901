"""Files of learned policies: weights, what rebuilds the network, and what it was trained for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynrl.files import load_tensors, save_tensors
from dynrl.policies.base import LearnedPolicy
from dynrl.policies.router import Router
from dynrl.policies.upfront import UpfrontRouter

# Kinds of learned policies by the names that files and `dynrl train --policy` have for them. Your own is a row more.
POLICIES: dict[str, type[LearnedPolicy]] = {"sequential": Router, "upfront": UpfrontRouter}


@dataclass(frozen=True)
class PolicySpec:
    """What rebuilds a policy, untrained.

    Attributes:
        kind: a name in `POLICIES`.
        config: JSON-able, `LearnedPolicy.config`.
    """

    kind: str
    config: dict[str, Any]

    @classmethod
    def of(cls, kind: str, backbone: Any, price_range: tuple[float, float], hidden: int) -> PolicySpec:
        """That of a policy of `kind` for `backbone`, which favours its full route at the start.

        Raises:
            ValueError: an unknown kind, or one that cannot see such inputs.
        """
        sight = check_kind(kind).sight_class.of(backbone)
        start = sight.start(backbone.full_route)
        config = {"sight": sight.config(), "price_range": list(price_range), "hidden": hidden, "start": start}
        return cls(kind, config)

    def build(self) -> LearnedPolicy:
        """The policy, or a ValueError."""
        policy = check_kind(self.kind)
        try:
            return policy(**{**self.config, "sight": policy.sight_class(**self.config["sight"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"these are no settings of a policy of kind {self.kind!r}: {error}") from None


def check_kind(kind: str) -> type[LearnedPolicy]:
    """The class of that kind of policy, or a ValueError that lists the kinds."""
    if not isinstance(kind, str) or kind not in POLICIES:
        raise ValueError(f"unknown kind of policy {kind!r}; expected one of {sorted(POLICIES)}")
    return POLICIES[kind]


def save_policy(path: str | Path, policy: LearnedPolicy, metadata: dict[str, Any]) -> None:
    """Write a policy with what it was trained for: `decision`, `backbone` (fingerprint), `curve`, all JSON-able."""
    kind = next(name for name, row in POLICIES.items() if row is type(policy))
    save_tensors(path, "policy", policy.state_dict(), {**metadata, "kind": kind, "config": policy.config})


def load_policy(path: str | Path) -> tuple[LearnedPolicy, dict[str, Any]]:
    """Read a policy file: the policy in eval mode, and its metadata.

    Raises:
        ValueError: the file is missing, cut short, altered, or no policy file.
    """
    tensors, metadata = load_tensors(path, "policy")
    policy = PolicySpec(metadata["kind"], metadata["config"]).build()
    policy.load_state_dict(tensors)
    return policy.eval(), metadata
