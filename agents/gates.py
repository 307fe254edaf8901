"""This agent trains gates by gradient, which reinforcement learning is compared with. It needs torch, but no ray."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from dynrl.agents.base import Agent, walks
from dynrl.agents.metrics import episode_scalars
from dynrl.backbones import Backbone, load_backbone
from dynrl.backbones.gated import straight_through
from dynrl.checkpoints import MOST_STEPS, Checkpoint
from dynrl.envs.core import DenseOutputs
from dynrl.envs.rewards import REWARDS
from dynrl.finetuning import ATTACK_STEPS
from dynrl.inputs import training_format
from dynrl.perturb import Ball, spending
from dynrl.policies import LearnedPolicy
from dynrl.routes import draw_prices
from dynrl.settings import Settings

LEARNING_RATE = 2e-3
GRADIENT_NORM = 0.5


class Gates(Agent):
    """This agent trains the same router as PPO, but by gradient through the gated walk of the frozen backbone.

    It maximises the same return as PPO: the accuracy term less price x MACs / dense MACs. Each row's is divided by its
    price plus the middle of the range, so that neither few MACs nor right answers are most of what is learned. Each
    input takes all branches, forwards and backwards, weighted by its gates. A decision therefore takes more time than
    in PPO, and tells more.
    """

    cannot = {
        **Agent.cannot, "device": "gates are trained on the CPU", "dtype": "gates are trained in float32",
        "cost": "a gated walk counts MACs",
    }  # fmt: skip
    steps_share = 0.5
    attacks = True

    @classmethod
    def refuse(cls, settings: Settings, backbone: Backbone) -> None:
        """Also refuse backbones that no gates can be trained on, and rewards without a gradient."""
        super().refuse(settings, backbone)
        if not backbone.gates:
            raise ValueError(
                f"{type(backbone).__name__} has no gates: a mixture of its choices makes no sense; choose another agent"
            )
        if not REWARDS[settings.learning.reward].has_gradient:
            raise ValueError(
                f"the reward {settings.learning.reward!r} has no gradient for gates; choose another reward or agent"
            )

    def start(self) -> None:
        """Build the router and its optimiser."""
        problem, learning = self.settings.problem, self.settings.learning
        self._reward = REWARDS[learning.reward]
        self._generator = torch.Generator().manual_seed(problem.seed)
        self.reload()
        if learning.attacked:
            self._ball = Ball.of(self.data_on(self._backbone))
        with torch.random.fork_rng():
            torch.manual_seed(problem.seed)
            self._router = self.ground_on(self._backbone).spec.build()
        self._rate = learning.learning_rate or LEARNING_RATE
        self._optimizer = torch.optim.Adam(self._router.parameters(), self._rate)
        parts = {"router": self._router, "optimizer": self._optimizer, "generator": self._generator}
        self._kept = Checkpoint(self.checkpoints / "gate.safetensors", parts)
        self.steps = self._kept.restore(MOST_STEPS)

    def reload(self) -> None:
        """Read the backbone without folding its layers, because folded layers are for inference only."""
        self._backbone = load_backbone(self.backbone_file)[0].requires_grad_(False)
        self._backbone.to(memory_format=training_format(self._backbone))  # type: ignore[call-overload]
        self._split = self.split_on(self._backbone)
        self._dense = DenseOutputs(self._backbone.for_inference(), self._split)

    def iterate(self) -> dict[str, float]:
        """Take one gradient step on each of several batches."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * self.left
        parts = [self._descend() for _ in range(walks(self._backbone))]
        self.steps += len(parts) * self.settings.learning.num_envs * self._backbone.max_steps
        over = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return episode_scalars(over, self._backbone.points)

    def _descend(self) -> dict[str, Tensor]:
        """Take one gradient step on one batch and return what its rows did."""
        learning, backbone, task = self.settings.learning, self._backbone, self._split.task
        rows = torch.randint(len(self._split), (learning.num_envs,), generator=self._generator)
        inputs, targets = self._split.inputs[rows], self._split.targets[rows]
        prices = draw_prices(learning.prices, len(rows), self._generator)
        if count := round(learning.attacked * len(rows)):  # against the present policy: it forgets earlier attacks
            goal = spending(backbone, self._router, prices[-count:])
            inputs = torch.cat([inputs[:-count], self._ball.climb(inputs[-count:], goal, ATTACK_STEPS)])
        entropies: list[Tensor] = []

        logits_at = self._router.logits_on(backbone, prices)

        def choose(state: Any) -> Tensor:
            logits = logits_at(state)
            log_probs = logits.detach().log_softmax(1)
            entropies.append(-(log_probs.exp() * log_probs).sum(1)[state.walk.present])
            return straight_through(logits, self._generator)

        walk = backbone.gated(inputs, choose)
        assert walk.outputs is not None
        output = walk.outputs.float()
        macs = walk.expected_macs / backbone.dense_macs
        earned, paid = self._reward.terms(task, output, targets, lambda: self._dense(rows), prices, macs)
        if not earned.requires_grad:  # gates would only learn what compute costs
            raise ValueError(
                f"the reward {learning.reward!r} has no gradient for gates, though it does not say has_gradient=False; "
                "choose another reward or agent"
            )
        reward = earned + paid
        self._optimizer.zero_grad()
        # Undivided, rows of high prices would make up most of the gradient, which is then clipped.
        middle = math.sqrt(math.prod(learning.prices))
        (-reward / (middle + prices)).mean().backward()
        torch.nn.utils.clip_grad_norm_(self._router.parameters(), GRADIENT_NORM)
        self._optimizer.step()
        return {
            "return": reward.detach(), task.metric: task.score(output.detach(), targets),
            "macs_fraction": macs.detach(), "price": prices, "entropy": torch.cat(entropies), "route": walk.route,
            "target": targets,
        }  # fmt: skip

    def router(self) -> LearnedPolicy:
        """Return a copy of the present router."""
        return copy.deepcopy(self._router).eval()

    def save(self) -> None:
        """Write the router, the optimiser and the generator to one file."""
        self._kept.save(self.steps)
