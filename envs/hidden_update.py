"""Hidden-update skipping: `dynrl/HiddenUpdate-v0`."""

from __future__ import annotations

from dynrl.backbones import Backbone, SkipGRU
from dynrl.envs.core import RoutingVectorEnv


class HiddenUpdateVectorEnv(RoutingVectorEnv):
    """At each step of a sequence: update the hidden state of a recurrent network, or copy it?

    ## Features
    The hidden state; the time (hat functions on the backbone's `knots`); the share of the sequence since the last
    update; with a backbone that `sees` "state+input" also the numbers of this step. Without them the decision is taken
    before the input is seen: a step that is copied need not even be read.

    ## Action
    `Discrete(2)`: 1 updates the hidden state by the cell, 0 copies it.

    ## Episode
    One sequence. It ends after its last step: every episode has as many steps as the sequences.

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
        """A small untrained GRU."""
        return SkipGRU(input_shape, hidden=32)  # type: ignore[arg-type]
