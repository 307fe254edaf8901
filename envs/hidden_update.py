"""Hidden-update skipping: `dynrl/HiddenUpdate-v0`."""

from __future__ import annotations

import torch

from dynrl.backbones import Backbone, SkipGRU
from dynrl.envs.core import RoutingEnv, RoutingVectorEnv


class HiddenUpdateVectorEnv(RoutingVectorEnv):
    """At each step of a sequence: update the hidden state of a recurrent network, or copy it?

    ## Observation
    A float32 vector, laid out as `dynrl.observation.Layout` says: the hidden state, the time (hat functions on the
    backbone's `knots`), the share of the sequence since the last update, with a backbone that `sees` "state+input" the
    numbers of this step, then the last choice, the share of the dense network's MACs spent, the price, and the mask of
    open choices (both, always). Without the input the decision is taken before it is seen: a step that is copied need
    not even be read.

    ## Action
    `Discrete(2)`: 1 updates the hidden state by the cell, 0 copies it.

    ## Reward
    At each step minus price x (MACs of this step / MACs of the dense network); at the last step also the accuracy
    term: "distillation" (default: log-likelihood of the target minus the divergence from what the dense network
    says), "log_likelihood" (for numbers, minus the squared error over the targets' variance), or "correct" (classes
    only: 1 if the true one is the likeliest).

    ## Episode
    One sequence. It ends after its last step: every episode has as many steps as the sequences.

    ## Backbones
    `SkipGRU`: a GRU with a linear head on its last state.

    ## Data
    `sequential-digits` by default. `adding` is a regression, and needs a network that is trained together with its
    policy: almost every random route misses one of the two numbers.

    ## Source
    Skip RNN: Learning to Skip State Updates in Recurrent Neural Networks, Campos et al., ICLR 2018. There the gate
    accumulates a probability of updating, which grows with the steps since the last one; here those are observed.

    ## Version history
    v0: first.
    """

    decision = "hidden-update"

    @classmethod
    def default_backbone(cls, input_shape: tuple[int, ...]) -> Backbone:
        """A small untrained GRU, always the same."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return SkipGRU(input_shape, hidden=32)  # type: ignore[arg-type]


class HiddenUpdateEnv(RoutingEnv):
    """One sequence at a time; its page is `HiddenUpdateVectorEnv`'s."""

    vector_env = HiddenUpdateVectorEnv
