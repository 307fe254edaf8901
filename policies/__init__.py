"""Policies: from one observation to one action (`act`), or from inputs to whole routes (`route`)."""

from dynrl.policies.fixed import RandomPolicy, RoutePolicy, StaticPolicy
from dynrl.policies.router import Router, load_policy, save_policy

__all__ = ["RandomPolicy", "RoutePolicy", "Router", "StaticPolicy", "load_policy", "save_policy"]
