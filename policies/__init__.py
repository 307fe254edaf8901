"""Policies: from one observation to one action (`act`), or from inputs to whole routes (`route`)."""

from dynrl.policies.base import RoutePolicy, StepPolicy
from dynrl.policies.fixed import RandomPolicy, StaticPolicy
from dynrl.policies.router import Router, load_policy, save_policy
from dynrl.policies.threshold import SCORES, ThresholdPolicy

__all__ = [
    "SCORES", "RandomPolicy", "RoutePolicy", "Router", "StaticPolicy", "StepPolicy", "ThresholdPolicy", "load_policy",
    "save_policy",
]  # fmt: skip
