"""Cases found in the registry: a new decision is tested without a new test."""

from __future__ import annotations

from gymnasium.envs.registration import load_env_creator

import dynrl  # noqa: F401 (registers the environments)
from dynrl.backbones import Backbone
from dynrl.envs import DECISIONS
from tests.toys import Branching, Exiting, Looping

REGISTERED = sorted(DECISIONS)
TOYS = {"exiting": Exiting, "looping": Looping, "branching": Branching}
BACKBONES = [*REGISTERED, *TOYS]


def vector_env(name: str):
    return load_env_creator(DECISIONS[name].vector_entry_point)


def make_backbone(name: str) -> Backbone:
    if name in TOYS:
        return TOYS[name]().eval()
    return vector_env(name).default_backbone((1, 24, 24)).eval()
