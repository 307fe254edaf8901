"""Scores say how good a routed model is on a split, how much it spends, and where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynrl.backbones import Backbone, choice_rates
from dynrl.backbones.base import Parts
from dynrl.data import Split
from dynrl.deploy import Route, RoutedModel
from dynrl.evaluation.difficulty import by_difficulty

BATCH = 256  # how many rows of a split walk at a time


@dataclass(frozen=True)
class Score:
    """A score holds the means of one pass over a split.

    Attributes:
        metric: the task's metric.
        macs_fraction: MACs as a share of the dense network's, the router's included.
        router_fraction: the router's part of `macs_fraction`.
        decisions: how many decisions a row took.
        distinct_routes: how many different routes the rows took.
        rates: how often each choice was taken (see `choice_rates`).
    """

    metric: float
    macs_fraction: float
    router_fraction: float
    decisions: float
    distinct_routes: int
    rates: dict[str, float]

    @classmethod
    def of(cls, backbone: Backbone, metric: float, macs: Tensor, router: Tensor, routes: Tensor) -> Score:
        """Average what each row spent, each [n], and count the choices of `routes` [n, columns]."""
        rates, decisions = choice_rates(backbone.points, routes), float((routes >= 0).sum(1).double().mean())
        spent, looking = float(macs.mean()), float(router.mean())
        return cls(metric, spent, looking, decisions, len(routes.unique(dim=0)), rates)


def score(model: RoutedModel, split: Split, batch_size: int = BATCH) -> Score:
    """Send each row of `split` through the routed model once and return the means."""
    metric, route = score_rows(model, split, batch_size)
    reached = split.task.mean(metric, split.targets)
    return Score.of(model.backbone, reached, route.macs_fraction, route.router_fraction, route.actions)


def score_rows(model: RoutedModel, split: Split, batch_size: int = BATCH) -> tuple[Tensor, Route]:
    """Return the task's metric [n] and the route of each row of a split, both on the CPU."""
    metric, routes = [], []
    for inputs, targets in _batches(batch_size, split.inputs, split.targets):
        metric.append(split.task.score(model(inputs).float(), targets))
        assert model.last_route is not None
        routes.append(model.last_route)
    actions, macs, router = (
        torch.cat([getattr(r, name) for r in routes]).cpu() for name in ("actions", "macs", "router_macs")
    )
    return torch.cat(metric).cpu(), Route(actions, macs, router, routes[0].dense_macs)


class Walked(NamedTuple):
    """These figures say what each row of a split reached along a given route.

    Attributes:
        metric: [n], the task's metric.
        likely: [n], the log-likelihood of the target.
        macs: [n], MACs as shares of the dense network's.
        route: [n, columns], what ran; -1 where a row never was.
    """

    metric: Tensor
    likely: Tensor
    macs: Tensor
    route: Tensor


@torch.inference_mode()
def score_routes(backbone: Backbone, routes: Tensor, split: Split) -> Walked:
    """Walk each input of `split` along its row of `routes` [n, columns]; the result is on the CPU."""
    task, parts = split.task, []
    for inputs, targets, route in _batches(BATCH, split.inputs, split.targets, routes):
        walk = backbone.run_route(inputs, route)
        assert walk.outputs is not None
        outputs = walk.outputs.float()
        scored = (task.score(outputs, targets), task.log_likelihood(outputs, targets))
        parts.append((*scored, walk.macs.float() / backbone.dense_macs, walk.route))
    return Walked(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def mean_metric(networks: Sequence[Backbone], split: Split) -> float:
    """Return the mean metric of networks on their full routes."""
    walked = [score_routes(network, network.dense_actions(len(split)), split) for network in networks]
    return sum(split.task.mean(each.metric, split.targets) for each in walked) / len(networks)


def _batches(size: int, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(column.split(size) for column in columns), strict=True)


@dataclass(frozen=True)
class Usage:
    """Usage tells where a routed model spends its compute on a split, and on which inputs.

    Attributes:
        groups: [{"class", "inputs", the metric (or the task's `rates`), "macs_fraction", "choice_rates"}], one for each
            class. A regression has one group for all inputs, and its class is None.
        columns: the names of the columns of a route: the point's, and from its second visit on the number of the visit.
        by_column: [groups, columns], how dear the choices are at each visit of a point: 0 is the thriftiest choice, 1
            the dearest (`Backbone.thrift`); an input that never comes there counts as 0.
        cheapest, dearest: the rows of the split on which least and most was spent, the extreme first.
        regions: what `Backbone.regions` says of each row of `cheapest`, then of `dearest`.
        words: the words of these rows, where inputs are texts (`Split.words`).
        distinct_routes: how many different routes the inputs take.
        commonest: share of the inputs that take the commonest route.
        difficulty: what `by_difficulty` says.
    """

    groups: list[dict[str, Any]]
    columns: list[str]
    by_column: list[list[float]]
    cheapest: list[int]
    dearest: list[int]
    regions: list[list[Parts]]
    words: list[list[str]]
    distinct_routes: int
    commonest: float
    difficulty: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, model: RoutedModel, split: Split, shown: int = 8) -> Usage:
        """Describe a model at its present price; `cheapest` and `dearest` name `shown` rows each."""
        metric, route = score_rows(model, split)
        macs, actions, classes = route.macs_fraction, route.actions, split.targets.cpu()
        chosen, points = _dearness(model.backbone, actions), model.backbone.points
        columns = [f"{p.name} {visit + 1}" if visit else p.name for p in points for visit in range(p.visits)]
        groups: list[dict[str, Any]] = []
        by_column = []
        for name in classes.unique().tolist() if split.task.by_class else [None]:
            mine = torch.ones(len(macs), dtype=torch.bool) if name is None else classes == name
            rates = split.task.rates(metric[mine], classes[mine])
            reached = rates or {split.task.metric: split.task.mean(metric[mine], classes[mine])}
            groups.append(
                {
                    "class": name, "inputs": int(mine.sum()), **reached,
                    "macs_fraction": float(macs[mine].mean()),
                    "choice_rates": choice_rates(points, actions[mine]),
                }
            )  # fmt: skip
            by_column.append(chosen[mine].mean(0).tolist())
        order = macs.argsort(stable=True).tolist()
        _, counts = actions.unique(dim=0, return_counts=True)
        commonest = float(counts.max() / len(actions))
        hard = by_difficulty(split, metric, macs)
        ends = order[:shown], order[-shown:][::-1]
        drawn = torch.tensor([*ends[0], *ends[1]])
        with torch.inference_mode():
            regions = model.backbone.regions(split.inputs[drawn], actions[drawn].to(split.targets.device))
        words = [split.words(row) for row in drawn.tolist()]
        return cls(groups, columns, by_column, *ends, regions, words, len(counts), commonest, hard)


@torch.inference_mode()
def pictures(model: RoutedModel, split: Split, rows: list[int]) -> dict[str, Tensor]:
    """Return the images at `rows` of a split of pictures by name, [rows, channels, height, width] each.

    They are as they came in, as the model answers at its present price, the answers of the full route, and the targets,
    which are [rows, height, width] if pixels have classes.
    """
    given, wanted = split.inputs[rows], split.targets[rows]
    images = {"input": given, "routed": model(given), "full route": model.backbone(given), "target": wanted}
    return {name: image.float().cpu() if image.is_floating_point() else image.cpu() for name, image in images.items()}


def _dearness(backbone: Backbone, actions: Tensor) -> Tensor:
    """Return where each of `actions` [n, columns] lies between the thriftiest and the dearest choice; -1 gives 0."""
    thrift = backbone.thrift
    low = thrift.masked_fill(thrift < 0, torch.inf).amin(1, keepdim=True)
    span = thrift.amax(1, keepdim=True) - low
    shares = torch.where(span > 0, (thrift - low) / span, 0.0)  # where all choices cost the same, none is dear
    return torch.where(actions >= 0, shares.gather(1, actions.t().clamp_min(0)).t(), 0.0)
