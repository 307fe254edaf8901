"""`dynrl bench known` measures how soon the default agent finds the best routes, where these are known.

The data set has two inputs. The target of one is the network's output on its full route; the target of the other is its
output on the cheapest route. So one input needs compute, and the other is harmed by it. Networks are so small that all
routes can be walked. So for each price, the best return is known, and also that of uniformly random choices.
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

from dynrl.backbones import Backbone
from dynrl.data import DATASETS, Augmentation, Dataset, Split, load_dataset
from dynrl.envs import DECISIONS
from dynrl.evaluation import cheapest_choices, score_routes
from dynrl.tasks import Regression

# The shapes of small inputs, by their number of dimensions (images; sequences or places; texts): all routes are walked.
SMALL = {3: (1, 12, 12), 2: (8, 12), 1: (6,)}
# Settings that a network gets if it has them: a policy that does not see the input must compute to know which it is.
SETTINGS = {"sees": "state+input"}
MOST_ROUTES = 50_000
SECONDS, ENOUGH, CHECKS = 20.0, 0.95, 100
PRICES = 9  # the number of prices, evenly spaced in their logarithm


def small_backbone(decision: str) -> Backbone:
    """Make a small untrained network that poses `decision`: the environment's default network, for small inputs."""
    from gymnasium.envs.registration import load_env_creator

    from dynrl.envs import decision as row

    found = row(decision)
    shape = load_dataset(found.data).input_shape
    maker: Any = load_env_creator(found.vector_entry_point)
    backbone: Backbone = maker.seeded_backbone(SMALL.get(len(shape), shape))
    if changed := {name: value for name, value in SETTINGS.items() if name in backbone.config}:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            backbone = type(backbone)(**backbone.config | changed)
    return backbone.eval()


def two_kinds(backbone: Backbone) -> Dataset:
    """Make the data set of two inputs for a network."""
    shape = backbone.input_shape
    inputs = backbone.random_inputs(2, torch.Generator().manual_seed(0))
    if inputs.is_floating_point():
        inputs += torch.tensor([1.0, -1.0]).view(2, *[1] * len(shape))  # a bright one and a dark one
    with torch.no_grad():
        targets = backbone(inputs, torch.stack([backbone.dense_actions(1)[0], cheapest_choices(backbone)]))
    targets = targets.repeat(64, 1)
    split = Split(inputs.repeat(64, *[1] * len(shape)), targets, Regression.of(targets))
    return Dataset("two kinds", targets.shape[1], split, split, split, Augmentation())


@torch.no_grad()
def every_route(backbone: Backbone, inputs: Tensor, most: int = MOST_ROUTES) -> tuple[Tensor, Tensor]:
    """List all routes that the input of `inputs` [1, ...] can take, told apart by the columns that it reaches.

    Returns:
        the actions [m, columns], and how likely each route is under uniformly random choices, [m].

    Raises:
        ValueError: there are more than `most` routes.
    """
    counts = (backbone.thrift >= 0).sum(1)
    routes = torch.zeros(1, backbone.columns, dtype=torch.int64)
    likely, settled = torch.ones(1), torch.zeros_like(routes, dtype=torch.bool)
    while True:
        each = zip(routes.split(1024), settled.split(1024), strict=True)
        ran = [(backbone.run_route(inputs.expand(len(r), *inputs.shape[1:]), r).route >= 0) & ~s for r, s in each]
        reached = torch.cat(ran)
        if not reached.any():
            return routes, likely
        column = reached.int().argmax(1)  # the first column that the row reaches and that is not settled yet
        open_rows, parts = reached.any(1), [(routes, likely, settled, ~reached.any(1))]
        for choice in range(backbone.num_choices):
            changed, sure = routes.clone(), settled.clone()
            changed.scatter_(1, column.unsqueeze(1), choice)
            sure.scatter_(1, column.unsqueeze(1), True)
            parts.append((changed, likely / counts[column], sure, open_rows & (choice < counts[column])))
        routes, likely, settled = (torch.cat([part[i][part[3]] for part in parts]) for i in range(3))
        if len(routes) > most:
            raise ValueError(
                f"{type(backbone).__name__} has more than {most} routes for inputs of shape {backbone.input_shape}, "
                "too many to walk them all; leave its decision out (--only), or give it a smaller `default_backbone`"
            )


def known_returns(backbone: Backbone, split: Split, prices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best mean return over both inputs, and that of uniformly random choices: [prices] each."""
    best, random = torch.zeros(2, len(prices))
    for row in range(2):
        routes, likely = every_route(backbone, split.inputs[row : row + 1])
        inputs, targets = (t[row].expand(len(routes), *t.shape[1:]) for t in (split.inputs, split.targets))
        walked = score_routes(backbone, routes, Split(inputs, targets, split.task))
        returns = walked.likely.unsqueeze(1) - prices * walked.macs.unsqueeze(1)  # [routes, prices]
        best, random = best + returns.max(0).values / 2, random + (likely.unsqueeze(1) * returns).sum(0) / 2
    return best, random


def policy_returns(model: Any, split: Split, prices: Tensor) -> Tensor:
    """Return a model's mean returns [prices], without the router's own MACs, which no environment charges."""
    found = []
    for price in prices.tolist():
        model.set_price(price)
        walk = model.walk(split.inputs[:2])
        likely = split.task.log_likelihood(walk.outputs, split.targets[:2])
        found.append(float((likely - price * walk.macs / model.backbone.dense_macs).mean()))
    return torch.tensor(found)


def bench_known(decisions: Iterable[str], seeds: int) -> list[dict[str, Any]]:
    """Return rows {"decision", "seed", "seconds_to_enough", "share" at the end, ...}; no decisions means all."""
    rows = []
    for decision, seed in itertools.product(tuple(decisions) or tuple(DECISIONS), range(seeds)):
        backbone = small_backbone(decision)
        name = f"two kinds for {decision}"
        DATASETS[name] = partial(two_kinds, backbone)  # environments of this process find it by name
        try:
            with tempfile.TemporaryDirectory() as folder:
                found = learn_known(decision, name, backbone, seed, Path(folder))
        finally:
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
    """Learn for `SECONDS`, or for the default number of steps if that ends sooner.

    Returns:
        "best" and "random", which are mean returns, and the "curve" [(seconds, steps, share of the gap between them
        that the policy has closed)].
    """
    from dynrl.agents.base import open_agent
    from dynrl.deploy import RoutedModel
    from dynrl.envs import decision as row_of
    from dynrl.recipes import defaults
    from dynrl.settings import Problem, Settings

    row = defaults(decision, row_of(decision).data)
    backbone.save(folder / "backbone.safetensors")
    learning = replace(row.learning, reward="log_likelihood", price_range=(0.002, 2.0))
    (low, high), steps = learning.prices, learning.steps
    prices = torch.tensor([low * (high / low) ** (i / (PRICES - 1)) for i in range(PRICES)]).clamp(low, high)
    split = load_dataset(data).train
    best, random = (returns.mean() for returns in known_returns(backbone.for_inference(), split, prices))
    seconds, curve = 0.0, []
    settings = Settings(Problem(decision, data, seed=seed), learning)
    with open_agent(settings, folder / "backbone.safetensors", folder, steps) as agent:
        agent.checkpoint_every = 10**9
        while seconds < SECONDS and agent.steps < steps:
            start = time.perf_counter()
            agent.learn(agent.steps + steps // CHECKS)
            seconds += time.perf_counter() - start
            got = policy_returns(RoutedModel(backbone, agent.router()), split, prices).mean()
            curve.append((seconds, agent.steps, float((got - random) / (best - random))))
    return {"best": float(best), "random": float(random), "curve": curve}
