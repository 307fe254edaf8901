"""Deployment: a backbone with a policy plugged in."""

from dynrl.deploy.routed import (
    EXPORTED,
    LATENCY,
    SHIPPED,
    CapturedModel,
    Route,
    RoutedModel,
    check_match,
    load,
    plug,
    policy_fingerprint,
    shipped,
)

__all__ = [
    "EXPORTED", "LATENCY", "SHIPPED", "CapturedModel", "Route", "RoutedModel", "check_match", "load", "plug",
    "policy_fingerprint", "shipped",
]  # fmt: skip
