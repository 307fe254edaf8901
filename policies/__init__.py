"""Policies: from one observation to one action (`act`), or from inputs to whole routes (`route`)."""

from dynrl.policies.base import LearnedPolicy, RoutePolicy, StepPolicy
from dynrl.policies.files import KINDS, build_policy, load_policy, save_policy
from dynrl.policies.fixed import RandomPolicy, StaticPolicy
from dynrl.policies.router import Router
from dynrl.policies.threshold import ThresholdPolicy
from dynrl.policies.upfront import UpfrontRouter

__all__ = [
    "KINDS", "LearnedPolicy", "RandomPolicy", "RoutePolicy", "Router", "StaticPolicy", "StepPolicy",
    "ThresholdPolicy", "UpfrontRouter", "build_policy", "load_policy", "save_policy",
]  # fmt: skip
