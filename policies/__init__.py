"""Policies decide on a walk; a sight says what a policy sees of the walk (`dynrl.policies.sight`)."""

from dynrl.policies.base import LearnedPolicy, Policy, RoutePolicy
from dynrl.policies.files import POLICIES, PolicySpec, load_policy, save_policy
from dynrl.policies.fixed import RandomPolicy, StaticPolicy
from dynrl.policies.foreign import ForeignPolicy
from dynrl.policies.linear import LinearPolicy
from dynrl.policies.router import Router
from dynrl.policies.sight import SIGHTS, RouteSight, Sight, StepSight
from dynrl.policies.threshold import ThresholdPolicy
from dynrl.policies.upfront import UpfrontRouter

__all__ = [
    "POLICIES", "SIGHTS", "ForeignPolicy", "LearnedPolicy", "LinearPolicy", "Policy", "PolicySpec", "RandomPolicy",
    "RoutePolicy", "RouteSight", "Router", "Sight", "StaticPolicy", "StepSight", "ThresholdPolicy", "UpfrontRouter",
    "load_policy", "save_policy",
]  # fmt: skip
