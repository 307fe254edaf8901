"""In deployment, a backbone has a policy plugged in."""

from dynrl.deploy.capture import CapturedModel
from dynrl.deploy.routed import Route, RoutedModel, plug
from dynrl.deploy.shipped import LATENCY, SHIPPED, check_policy, load, policy_fingerprint, shipped

__all__ = [
    "LATENCY", "SHIPPED", "CapturedModel", "Route", "RoutedModel", "check_policy", "load", "plug",
    "policy_fingerprint", "shipped",
]  # fmt: skip
