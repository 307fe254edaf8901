"""How soon the default agent finds the best routes where they are known: `dynrl bench known`.

A data set of two inputs. The target of one is what the network says on its full route, of the other what it says on its
cheapest: one needs compute, the other is harmed by it. Networks are so small that all routes can be walked, so for each
price the best return is known, and that of uniformly random choices, too.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynrl import evaluation as ev
from dynrl.backbones import Backbone, SkipGRU
from dynrl.data import DATASETS, Augmentation, Dataset, Split, load_dataset
from dynrl.tasks import Regression

IMAGES, SEQUENCES = (1, 12, 12), (8, 2)
SECONDS, ENOUGH, CHECKS = 20.0, 0.95, 100
PRICES = 9  # evenly spaced in their logarithm


def two_kinds(decision: str) -> tuple[Backbone, Dataset]:
    """A small untrained network that poses `decision`, and the data set."""
    from gymnasium.envs.registration import load_env_creator

    from dynrl.envs import decision as row

    shape = SEQUENCES if decision == "hidden-update" else IMAGES
    maker: Any = load_env_creator(row(decision).vector_entry_point)
    backbone: Backbone = maker.default_backbone(shape).eval()
    if isinstance(backbone, SkipGRU):  # who does not see the input must update to know which of the two it is
        with torch.random.fork_rng():
            torch.manual_seed(0)
            backbone = SkipGRU(**backbone.config | {"sees": "state+input"}).eval()
    inputs = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    inputs += torch.tensor([1.0, -1.0]).view(2, *[1] * len(shape))  # a bright one and a dark one
    cheapest = [0] * backbone.max_steps  # in every decision of ours the first choice does least
    with torch.no_grad():
        targets = backbone(inputs, torch.tensor([backbone.full_route, cheapest]))
    targets = targets.repeat(64, 1)
    split = Split(inputs.repeat(64, *[1] * len(shape)), targets, Regression.of(targets))
    return backbone, Dataset("two kinds", targets.shape[1], split, split, split, Augmentation())


def known_returns(backbone: Backbone, split: Split, prices: Tensor) -> tuple[Tensor, Tensor]:
    """[prices] the best mean return over the two inputs, and that of uniformly random choices."""
    counts = [point.n for point in backbone.points] * (backbone.max_steps // len(backbone.points))
    routes = torch.tensor(list(itertools.product(*map(range, counts))))
    best, random = torch.zeros(2, len(prices))
    for row in range(2):
        inputs, targets = (t[row].expand(len(routes), *t.shape[1:]) for t in (split.inputs, split.targets))
        scored = ev.score_routes(backbone, routes, Split(inputs, targets, split.task))
        returns = scored.likely.unsqueeze(1) - prices * scored.macs.unsqueeze(1)  # [routes, prices]
        best, random = best + returns.max(0).values / 2, random + returns.mean(0) / 2
    return best, random


def policy_returns(model: Any, split: Split, prices: Tensor) -> Tensor:
    """[prices], of a plugged policy; the router's own MACs are no part of what an environment charges."""
    found = []
    for price in prices.tolist():
        model.set_price(price)
        walk = model.walk(split.inputs[:2])
        likely = split.task.log_likelihood(walk.outputs, split.targets[:2])
        found.append(float((likely - price * walk.macs / model.backbone.dense_macs).mean()))
    return torch.tensor(found)


def bench_known(decisions: Iterable[str], seeds: int) -> list[dict[str, Any]]:
    """Rows {"decision", "seed", "seconds_to_enough", "share" at the end, "curve", ...} of the default agent."""
    rows = []
    for decision, seed in itertools.product(decisions, range(seeds)):
        backbone, dataset = two_kinds(decision)
        name = f"two kinds for {decision}"
        DATASETS[name] = partial(Dataset, **vars(dataset))  # where an environment finds it, in this process
        with tempfile.TemporaryDirectory() as folder:
            found = learn_known(decision, name, backbone, seed, Path(folder))
        del DATASETS[name]
        reached = [seconds for seconds, _, share in found["curve"] if share >= ENOUGH]
        seconds, steps, share = found["curve"][-1]
        rows.append(
            {
                "decision": decision, "seed": seed, "max_steps": backbone.max_steps, "choices": backbone.num_choices,
                "seconds_to_enough": reached[0] if reached else None, "share": share, "seconds": seconds,
                "steps": steps, **found,
            }
        )  # fmt: skip
        shown = f"{reached[0]:.1f} s" if reached else "not reached"
        print(
            f"{decision} seed {seed}: {ENOUGH:.0%} of the gap: {shown}; {share:.3f} after {seconds:.0f} s", flush=True
        )
    return rows


def learn_known(decision: str, data: str, backbone: Backbone, seed: int, folder: Path) -> dict[str, Any]:
    """Learn for `SECONDS`, or as many steps as the default agent has: best and random mean returns, and the curve
    [(seconds, steps, share of the gap between them that the policy has closed)].
    """
    from dynrl.agents.base import open_agent
    from dynrl.deploy import RoutedModel
    from dynrl.recipes import defaults
    from dynrl.settings import Learning, Problem, Settings

    row = defaults(decision, "sequential-digits" if decision == "hidden-update" else "fashion-mnist")
    backbone.save(folder / "backbone.safetensors")
    learning = replace(row.learning, reward="log_likelihood", price_range=Learning().price_range)
    settings, steps = Settings(Problem(decision, data, seed=seed), learning), learning.steps
    low, high = learning.price_range
    prices = torch.tensor([low * (high / low) ** (i / (PRICES - 1)) for i in range(PRICES)]).clamp(low, high)
    split = load_dataset(data).train
    best, random = (returns.mean() for returns in known_returns(backbone.for_inference(), split, prices))
    seconds, curve = 0.0, []
    with open_agent(settings, folder / "backbone.safetensors", folder, steps) as agent:
        agent.checkpoint_every = 10**9
        while seconds < SECONDS and agent.steps < steps:
            start = time.perf_counter()
            agent.learn(agent.steps + steps // CHECKS)
            seconds += time.perf_counter() - start
            got = policy_returns(RoutedModel(backbone, agent.router()), split, prices).mean()
            curve.append((seconds, agent.steps, float((got - random) / (best - random))))
    return {"best": float(best), "random": float(random), "curve": curve}
