"""Parts of your own are tried out on a few inputs before anything is trained, which may take hours.

What a backbone states (what choices cost, how much it shows) is in every bill and every observation. Where its walk
does otherwise, nothing fails, and all figures are wrong. Families and policies of dynrl have tests in place of this.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dynrl.agents.base import Agent, Ground, agent_class
from dynrl.backbones import END, Backbone, merge
from dynrl.backbones.chance import drawing
from dynrl.backbones.rows import same
from dynrl.cost import count_macs, executed, macs_of
from dynrl.data import Split
from dynrl.policies import LearnedPolicy
from dynrl.policies.files import check_kind
from dynrl.routes import draw_routes
from dynrl.settings import Learning

ROWS = 3  # so many rows walk side by side, each on a route of its own
OFF = 0.1  # the share by which a bill may be off: some count normalisation and pooling, which are 0 here


def try_out(learning: Learning, backbone: Backbone, split: Split) -> None:
    """Refuse, with a ValueError, a backbone, a policy or an agent of a user's own that is not what it should be.

    Args:
        learning: how the policy is learned.
        backbone: a backbone for the inputs of `split`, with any weights; a copy is walked.
        split: its first inputs are walked, as random ones need not be of the structure that a network expects.
    """
    policy, agent = check_kind(learning.policy), agent_class(learning.agent)
    if learning.finetune and agent.reload is Agent.reload:
        raise ValueError(f"{agent.__name__} has no `reload`, which fine-tuning needs; write it")
    if _is_ours(type(backbone)) and _is_ours(policy):
        return
    network, weight = copy.deepcopy(backbone).eval(), next(backbone.parameters())
    given = split.head(2 * ROWS).to(weight.device, weight.dtype).inputs
    inputs = given[torch.arange(2 * ROWS, device=weight.device) % len(given)]
    with torch.no_grad(), drawing(weight.device):
        if not _is_ours(type(backbone)):
            _check_hooks(network, learning.agent)
            drawn = draw_routes(network.thrift, torch.linspace(1, 0, ROWS), torch.Generator().manual_seed(0))
            routes = drawn.to(weight.device)
            routes[0] = network.dense_actions(1)[0]
            _check_rows(network, inputs, routes)
            _check_bill(network, inputs, routes)
            _check_ideal(network, inputs, routes)
        if not _is_ours(policy):
            _check_policy(policy, learning, network, inputs)


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "dynrl"


# Backbones --------------------------------------------------------------------------------------------------------


def _check_hooks(network: Backbone, agent: str) -> None:
    hooks = ("_start", "_run", "observe", "ideal", *(["_gated_run"] if agent == "gate" else []))
    if missing := [hook for hook in hooks if getattr(type(network), hook) is getattr(Backbone, hook)]:
        raise ValueError(
            f"{type(network).__name__} has no {', '.join(missing)}; write it, as dynrl/backbones/base.py describes it"
        )


def _check_rows(network: Backbone, inputs: Any, routes: Tensor) -> None:
    """Refuse a network that loses rows, shows what it does not state, or answers by the rows beside a row."""
    rows = torch.arange(ROWS, device=routes.device)
    with drawing(routes.device) as drawn:
        expected = _walked(network, inputs[rows], routes)
        found = []
        for row in range(ROWS):
            # In batches of one size, on the same routes, so that rounding is the same, too.
            beside = rows + ROWS
            beside[row] = row
            found.append(_walked(network, inputs[beside], routes)[row])
        if drawn():  # by chance, a row differs from itself
            return
    for mine, theirs in zip(found, expected, strict=True):
        if len(mine) != len(theirs) or not all(map(same, mine, theirs)):
            raise ValueError(
                f"expected what {type(network).__name__} shows of a row, and answers, to depend on that row only, but "
                "it changes with the rows beside it; in batches and environments, any rows may be side by side"
            )


def _walked(network: Backbone, inputs: Any, routes: Tensor) -> list[list[Tensor]]:
    """Walk `inputs` along `routes`; return for each row what is shown of it, point by point, and its output."""
    name, seen, ended = type(network).__name__, [list[Tensor]() for _ in routes], list[int]()
    state = network.begin(inputs)
    walk, pending = state.walk, {state.point: state}
    while pending:
        state = pending.pop(min(pending))
        shown, what = network.observe(state), f"{name}.observe at the point {network.points[state.point].name!r}"
        width = shown.shape[1] if shown.dim() == 2 else -1
        if shown.shape[0] != state.count or not 0 <= width <= network.feature_width or shown.dtype != torch.float32:
            raise ValueError(
                f"expected of {what} at most {network.feature_width} numbers a row (feature_width), "
                f"[{state.count}, f] of torch.float32, got {list(shown.shape)} of {shown.dtype}"
            )
        if not shown.isfinite().all():
            raise ValueError(f"expected finite numbers of {what}, got NaN or infinity; policies learn from them")
        for row, mine in zip(state.rows.tolist(), shown.clone(), strict=True):
            seen[row].append(mine)
        pending = merge([*pending.values(), *network.advance(state, state.along(routes))])
        if END in pending:
            ended += pending.pop(END).rows.tolist()
    if sorted(ended) != list(range(len(routes))):
        raise ValueError(
            f"expected {name}._run to return each row in one state until it has ended, at END, but of rows "
            f"{list(range(len(routes)))}, {sorted(ended)} have"
        )
    said, classes = walk.outputs, network.config["classes"]
    if said is None or said.dim() < 2 or tuple(said.shape[:2]) != (len(routes), classes):
        raise ValueError(
            f"expected of {name} an output [{classes}] of each row before it ends (walk.put_output), got "
            + ("none" if said is None else f"{list(said.shape)} for {len(routes)} rows")
        )
    return [[*mine, output] for mine, output in zip(seen, said, strict=True)]


def _check_bill(network: Backbone, inputs: Any, routes: Tensor) -> None:
    """Refuse a bill that is less than what is computed, and warn of one that is more.

    It may be more for good reasons: what a table or an op of one's own returns is not seen being computed.
    """
    name, more = type(network).__name__, ""
    for row, route in enumerate(routes):
        once, twice = (_macs_along(network, inputs[[row] * count], route.expand(count, -1)) for count in (1, 2))
        if once is None or twice is None:
            return
        # What is computed for a batch as a whole, such as weights that are made of others, is in no row's bill.
        (_, macs), computed = once, twice[0] - once[0]
        if row == 0 and macs > (1 + OFF) * network.dense_macs:
            raise ValueError(
                f"{name} charges {macs:,} MACs on the full route, of which it states {network.dense_macs:,}; say what "
                "it charges there beyond `costs` as `charged_macs`"
            )
        told = f"on the route {route.tolist()}, {name} charges {macs:,} MACs and computes {computed:,}"
        if computed > (1 + OFF) * macs:
            raise ValueError(
                f"{told} for a row, by torch's FLOP counter; state in `costs` and `start_macs` what it computes, and "
                "compute in `_run` only what a row chose"
            )
        if macs > (1 + OFF) * computed:
            more = more or told
    if more:
        warnings.warn(
            f"{more} for a row, as far as torch's FLOP counter sees; if it sees all, correct `costs` and `start_macs`",
            stacklevel=2,
        )


def _check_ideal(network: Backbone, inputs: Any, routes: Tensor) -> None:
    inputs = inputs[torch.arange(ROWS, device=routes.device)]
    run = network.ideal(inputs, network.run_route(inputs, routes).route)
    if not callable(run):
        raise ValueError(
            f"expected {type(network).__name__}.ideal to return a function, which is timed, got a {type(run).__name__}"
        )
    run()


def _macs_along(network: Backbone, inputs: Any, routes: Tensor) -> tuple[int, int] | None:
    """Return the MACs that all rows compute, and those that the first is charged; None if an op cannot be counted."""
    ops, walk = executed(lambda: network.run_route(inputs, routes))
    try:
        return macs_of(ops), int(walk.macs[0])
    except ValueError:
        return None


# Policies ---------------------------------------------------------------------------------------------------------


def _check_policy(kind: type[LearnedPolicy], learning: Learning, network: Backbone, inputs: Any) -> None:
    """Refuse a policy whose answers do not fit, or that could not be loaded or billed once it is trained."""
    name, spec = kind.__name__, Ground.of(learning, network).spec
    policy = spec.build().eval()
    if kinds := {str(p.dtype) for p in policy.parameters() if p.dtype != torch.float32}:
        raise ValueError(f"expected a policy with weights of torch.float32, got {', '.join(sorted(kinds))} in {name}")
    seen = policy.sight.see(network, network.begin(inputs), policy.price_range[0])
    answers: dict[str, Callable[[Tensor], Tensor]] = {"_scores": policy._scores, "forward": policy}
    for what, answer in answers.items():
        found, expected = answer(seen), [len(seen), policy.sight.decisions * policy.sight.choices]
        if list(found.shape) != expected or found.dtype != torch.float32 or not found.isfinite().all():
            broken = "" if found.isfinite().all() else ", with NaN or infinity"
            raise ValueError(
                f"expected of {name}.{what} finite scores {expected} of torch.float32 (a row for each observation, a "
                f"score for each choice of each decision), got {list(found.shape)} of {found.dtype}{broken}"
            )
    try:
        count_macs(policy, (policy.sight.width,))
    except ValueError as error:
        raise ValueError(f"the compute of {name} cannot be counted: {error} (dynrl.cost)") from error
