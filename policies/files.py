"""Files of learned policies: weights, what rebuilds the network, and what it was trained for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynrl.files import load_tensors, save_tensors
from dynrl.policies.base import LearnedPolicy
from dynrl.policies.router import Router
from dynrl.policies.upfront import UpfrontRouter

KINDS: dict[str, type[LearnedPolicy]] = {policy.kind: policy for policy in (Router, UpfrontRouter)}


def build_policy(kind: str, config: dict[str, Any]) -> LearnedPolicy:
    """An untrained policy of a kind in `KINDS`, or a ValueError."""
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"unknown kind of policy {kind!r}; expected one of {sorted(KINDS)}")
    try:
        return KINDS[kind](**config)
    except TypeError as error:
        raise ValueError(f"these are no settings of a policy of kind {kind!r}: {error}") from None


def save_policy(path: str | Path, policy: LearnedPolicy, metadata: dict[str, Any]) -> None:
    """Write a policy with what it was trained for: `decision`, `backbone` (fingerprint), `curve`, all JSON-able."""
    save_tensors(path, "policy", policy.state_dict(), {**metadata, "kind": policy.kind, "router": policy.config})


def load_policy(path: str | Path) -> tuple[LearnedPolicy, dict[str, Any]]:
    """Read a policy file: the policy in eval mode, and its metadata.

    Raises:
        ValueError: the file is missing, cut short, altered, or no policy file.
    """
    tensors, metadata = load_tensors(path, "policy")
    policy = build_policy(metadata.get("kind", Router.kind), metadata["router"])  # files once had none
    policy.load_state_dict(tensors)
    return policy.eval(), metadata
