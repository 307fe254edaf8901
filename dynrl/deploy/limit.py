"""A limit bounds what one input may spend, whatever its policy would do: it closes the choices that would exceed it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dynrl.backbones import Backbone, State
from dynrl.backbones.base import nearest_open
from dynrl.policies import Policy


class Limited:
    """This function returns a policy's choices, or the nearest ones with which a row can still end within a limit.

    The cheapest way to an end always stays open. A row that would have stayed within the limit is not changed.

    Args:
        choose: the policy's own function from a state to choices.
        backbone: the backbone that is walked; it stays on its device.
        policy: the policy, which says how often it looks.
        look_macs: the MACs of one look.
        share: the most that a row may spend, looks included, as a share of the dense MACs.

    Raises:
        ValueError: the share is less than the cheapest walk costs.
    """

    @torch.inference_mode(False)  # a table made in inference mode could not be part of an exported program
    def __init__(
        self, choose: Callable[[State], Tensor], backbone: Backbone, policy: Policy, look_macs: int, share: float
    ) -> None:
        # A policy that looks once pays at the beginning. Of one that looks now and then, each decision is assumed to
        # pay, which is never too little.
        once = policy.sight is not None and policy.sight.looks(backbone.max_steps) == 1
        self._look = 0 if once else look_macs
        least, dense = backbone.least_macs(self._look), backbone.dense_macs
        start = look_macs if once else 0
        cheapest = start + backbone.start_macs + int(least[0].min())
        if not cheapest / dense <= share < math.inf:
            raise ValueError(
                f"expected a limit of at least {math.ceil(1e4 * cheapest / dense) / 1e4} of the dense MACs, which the "
                f"cheapest walk and the router's looks cost, got {share}"
            )
        # The most MACs whose share of the dense ones, as `Route.macs_fraction` computes it, is no more than `share`.
        most = math.floor(share * dense) + 1
        while most / dense > share:
            most -= 1
        self._choose, self._backbone, self._most = choose, backbone, most - start
        self._least = least.to(backbone.costs.device)

    def __call__(self, state: State) -> Tensor:
        """Return the choices [n] int64 of the rows of `state`."""
        walk, count = state.walk, self._backbone.points[state.point].n
        left = self._most - state.get(walk.macs)
        if self._look:
            left = left - self._look * state.get(walk.steps)
        least, waiting = self._least[state.column][..., :count], self._backbone.waiting(state)
        if self._look and waiting is not None:
            least = least + self._look * waiting
        mask = least <= left.unsqueeze(1)
        others = self._backbone.open_choices(state)
        if others is not None:
            mask = mask & others
        return nearest_open(mask, self._choose(state).unsqueeze(1)).squeeze(1)
