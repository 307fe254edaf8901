"""Small changes of inputs, found by gradient, on which a routed model spends more: attacks on what it saves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from dynrl.backbones import Backbone, State
from dynrl.backbones.gated import hardened
from dynrl.data import Dataset
from dynrl.data.stored import PIECE
from dynrl.ops.move import beside
from dynrl.policies import LearnedPolicy
from dynrl.provenance import Numbers, along
from dynrl.tasks import Task

SMALL = 8 / 255  # how far an input may be changed by default, as a share of the range of raw inputs
STEPS = 40  # the gradient steps of an attack
FIRST = 2.0  # the length of the first step, in radii of the ball; steps get shorter evenly


@dataclass(frozen=True)
class Ball:
    """A ball holds the inputs that an attack may try: those near a given one, within the range of the data.

    Attributes:
        radius: the most that any number of an input may change, in raw units.
        low, high: the range of an input's numbers, in raw units.
        mean, deviation: how inputs are standardised for the network.
    """

    radius: float
    low: float
    high: float
    mean: Numbers = 0.0
    deviation: Numbers = 1.0

    @classmethod
    def of(cls, dataset: Dataset, epsilon: float | None = None) -> Self:
        """Return the ball of a radius in raw units around inputs of `dataset`, as the network sees them.

        Args:
            dataset: the data, standardised for the network.
            epsilon: the most that any number may change, in units of the raw inputs: of pixels in 0 to 1, or of what
                other data hold. None takes `SMALL` of their range. That is 0 to 1 for pixels, and from the least to the
                greatest number of the training inputs for other data.

        Raises:
            ValueError: inputs are several tensors; raw inputs are whole numbers, which cannot change by little; or the
                radius is not positive.
        """
        if not isinstance(dataset.dtype, str):
            raise ValueError(
                f"the inputs of {dataset.name} are several tensors ({', '.join(dataset.dtype)}); attacks take inputs "
                "of one tensor"
            )
        pixels = dataset.dtype == "uint8"
        if not pixels and not getattr(torch, dataset.dtype).is_floating_point:
            raise ValueError(
                f"the inputs of {dataset.name} are whole numbers ({dataset.dtype}), which cannot change by little; "
                "attacks are for images and floating-point inputs"
            )
        ends = [0.0, 1.0]
        if not pixels:
            found = [
                (float(raw.min()), float(raw.max()))
                for x in dataset.train.inputs.split(PIECE)
                for raw in [dataset.raw(x)]
            ]
            ends = [min(low for low, _ in found), max(high for _, high in found)]
        radius = SMALL * (ends[1] - ends[0]) if epsilon is None else epsilon
        if not 0 < radius < float("inf"):
            raise ValueError(f"expected an epsilon above 0, got {epsilon}")
        return cls(radius, ends[0], ends[1], dataset.mean, dataset.deviation)

    def reach(self, inputs: Tensor) -> Any:
        """Return the radius in the network's units, where `inputs` are: one number, or one for each channel."""
        return self.radius / along(self.deviation, inputs)

    def clamp(self, inputs: Tensor, centre: Tensor) -> Tensor:
        """Return the points of the ball around `centre` nearest to `inputs`, both [B, ...].

        A number of the centre that lies beyond `low` or `high` itself may move back towards them.
        """
        radius, mean, deviation = self.reach(inputs), along(self.mean, inputs), along(self.deviation, inputs)
        near = torch.minimum(torch.maximum(inputs, centre - radius), centre + radius)
        least, most = (torch.as_tensor((end - mean) / deviation).to(inputs) for end in (self.low, self.high))
        return near.clamp(torch.minimum(least, centre), torch.maximum(most, centre))

    def noise(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return `inputs` [B, ...] with each number moved by the radius, up or down at random."""
        up = torch.randint(0, 2, inputs.shape, generator=generator).to(inputs)
        return self.clamp(inputs + self.reach(inputs) * (2 * up - 1), inputs)

    def climb(
        self,
        inputs: Tensor,
        goal: Callable[[Tensor], tuple[Tensor, Tensor]],
        steps: int,
        starts: Sequence[Tensor] = (),
    ) -> Tensor:
        """Climb `goal` around `inputs` [B, ...] by projected gradient steps, and return the best points that were met.

        Args:
            inputs: [B, ...], the centre of the ball, where the climb begins.
            starts: other points of the ball, [B, ...] each, from which to climb as well.
            goal: a function from points [B, ...] to what is climbed, [B] and differentiable, and to what a point is
                worth, [B]. Of points worth the same, the later one is kept.
            steps: the number of steps, each of one length in every number of an input. The first one goes to a corner
                of the ball, and they get shorter, as in Auto-PGD (Croce & Hein 2020, ICML, section 3).

        Source: projected gradient descent in the maximum norm (Madry et al. 2018, ICLR, section 2.1).
        """
        best, most = inputs, None
        for start in (inputs, *starts):
            at = start
            for step in range(steps + 1):
                at = at.detach().requires_grad_()
                with torch.enable_grad():
                    climbed, worth = goal(at.clone())  # networks write in place
                better = torch.ones_like(worth, dtype=torch.bool) if most is None else worth >= most
                most = worth if most is None else torch.maximum(worth, most)
                best = torch.where(beside(better, inputs), at.detach(), best)
                if step < steps:
                    (slope,) = torch.autograd.grad(climbed.sum(), at)
                    length = FIRST * self.reach(inputs) * (1 - step / steps)
                    at = self.clamp(at.detach() + length * slope.sign(), inputs)
        return best


def check_attackable(backbone: Backbone) -> None:
    """Refuse, with a ValueError, a backbone whose walk has no gradient."""
    if not backbone.gates:
        raise ValueError(
            f"{type(backbone).__name__} has no differentiable walk (its class fact `gates` is False), so no attack on "
            "it can be found by gradient"
        )


def spending(
    backbone: Backbone, policy: LearnedPolicy, price: Tensor | float
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return a goal for `Ball.climb`: the MACs that each input is routed to spend, and the same as its worth.

    The walk takes the policy's likeliest choices, as the plugged model does, and has the gradient of a softmax
    (`hardened`). The policy's scores have no cap here, because a score that
    is far beyond the cap would have no gradient.

    Args:
        backbone: the backbone, not folded for inference, in eval mode.
        policy: the policy.
        price: the price that the policy is told: one number, or [B].
    """
    shape = (policy.sight.decisions, policy.sight.choices)

    def goal(inputs: Tensor) -> tuple[Tensor, Tensor]:
        scores_at = policy.sight.follow(backbone, lambda seen: policy.scores(seen).unflatten(1, shape), price)

        def choose(state: State) -> Tensor:
            return hardened(scores_at(state).softmax(1))

        walk = backbone.gated(inputs, choose)
        return walk.expected_macs / backbone.dense_macs, walk.macs

    return goal


def uncertainty(backbone: Backbone, task: Task) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """Return DeepSloth's goal for `Ball.climb`: that a network is unsure wherever it says something before its end.

    It is the sum, over all points on the full route, of how near what is said there (`Backbone.output`, or
    `Backbone.auxiliary`) is to an output that knows nothing. It knows no policy. None if nothing is said anywhere.

    Source: Hong et al. 2021 (ICLR), section 4.
    """

    def heard(inputs: Tensor) -> list[Tensor]:
        full, sure = backbone.dense_actions(len(inputs), inputs.device), list[Tensor]()

        def listen(state: State) -> Tensor:
            said = backbone.output(state) if backbone.speaks else backbone.auxiliary(state)
            if said is not None:
                sure.append(task.divergence(said.float(), torch.zeros_like(said, dtype=torch.float32)))
            return F.one_hot(state.along(full), backbone.num_choices).float()

        backbone.gated(inputs, listen)
        return sure

    def goal(inputs: Tensor) -> tuple[Tensor, Tensor]:
        unsure = -torch.stack(heard(inputs)).sum(0)
        return unsure, unsure.detach()

    with torch.no_grad():
        example: Any = next(backbone.parameters()).new_zeros(1, *backbone.input_shape)
        return goal if heard(example) else None
