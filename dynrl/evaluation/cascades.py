"""Rules of thumb between whole models are fitted on what each model says of validation data, without further walks.

There are cascades by thresholds on a score, a greedily built cascade, and a rule learned by supervision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynrl.backbones import Backbone, State
from dynrl.data import Split
from dynrl.evaluation.routes import Fit, PolicyFor
from dynrl.ops.exit_scores import exit_scores
from dynrl.policies import LinearPolicy, Policy, StepSight, ThresholdPolicy

TRIES = 256  # how many settings of thresholds are tried for a chain of models at first
REFINED = 16  # how many of the best are refined at a time
LEVELS = 256  # how many thresholds are tried then on one model's score, at most
PASSES = 2  # how often each model of a chain has its turn
STRICT = torch.linspace(0.8, 1.1, 61).tolist()  # the accuracy of a stage's answers, as a share of the last model's
FITS = 20  # the iterations of a supervised fit
PRICES = torch.logspace(-2.5, 0.7, 17).tolist()  # of the dense network's compute, in errors: a supervised rule for each

Stage = tuple[int, float]  # a model, and how sure it must be to answer


@dataclass(frozen=True)
class Heard:
    """This is what each of K models says of each of n rows.

    Attributes:
        scores: [K, n, scores], how sure the models are (`exit_scores`).
        error: [K, n], the task's error of each answer.
        costs: [K], each model's share of the dense MACs.
    """

    scores: Tensor
    error: Tensor
    costs: Tensor

    @classmethod
    @torch.inference_mode()
    def of(cls, backbone: Backbone, split: Split) -> Heard:
        """Ask each model alone."""
        scores, error = [], []
        for k in range(backbone.points[0].n):
            said, wrong = [], []
            for inputs, targets in zip(split.inputs.split(256), split.targets.split(256), strict=True):
                route = torch.zeros(len(inputs), backbone.columns, dtype=torch.int64)
                route[:, 0] = k
                outputs = backbone.run_route(inputs, route).outputs
                assert outputs is not None
                said.append(exit_scores(outputs.float()).cpu())
                wrong.append(split.task.error(split.task.score(outputs.float(), targets)).cpu())
            scores.append(torch.cat(said))
            error.append(torch.cat(wrong))
        shares = backbone.costs[0].cpu().double() / backbone.dense_macs
        return cls(torch.stack(scores), torch.stack(error), shares)

    def sure(self, backbone: Backbone, name: str) -> Tensor:
        """Return one score, turned so that higher means surer, and NaN is the least: [K, n]."""
        column, rising = backbone.scores[name]
        scores = self.scores[..., column] * (1 if rising else -1)
        return scores.masked_fill(scores.isnan(), -torch.inf)


Hear = Callable[[Backbone, Split], Heard]


def cascades(backbone: Backbone) -> dict[str, Fit]:
    """Return the rules: a cascade for each score, the greedy cascade on the first score, and the supervised rule."""
    first, *_ = backbone.scores
    known: list[Any] = []

    def hear(backbone: Backbone, split: Split) -> Heard:  # all rules are fitted on the same rows: walk these once
        if not (known and known[0] is backbone and known[1] is split):
            known[:] = [backbone, split, Heard.of(backbone, split)]
        heard: Heard = known[2]
        return heard

    return {
        **{f"threshold {name}": partial(fit_cascade, name=name, hear=hear) for name in backbone.scores},
        "greedy cascade": partial(fit_greedy, name=first, hear=hear),
        "supervised": partial(fit_supervised, hear=hear),
    }


class Tried(NamedTuple):
    """A try is what can be made a policy, with its share of the dense MACs and its error on validation data."""

    what: Any
    cost: float
    error: float


def _best_within(tried: Iterable[Tried], make: Callable[[Any], Policy]) -> PolicyFor:
    """Return a function from a budget to the policy with the least error within it; None if all cost more."""
    front: list[Tried] = []
    for found in sorted(tried, key=lambda of: (of.cost, of.error)):
        if not front or found.error < front[-1].error:
            front.append(found)

    def within(budget: float) -> Policy | None:
        affordable = [found for found in front if found.cost <= budget]
        return make(affordable[-1].what) if affordable else None

    return within


# Cascades ---------------------------------------------------------------------------------------------------------


def fit_cascade(backbone: Backbone, split: Split, name: str, hear: Hear) -> PolicyFor:
    """Fit cascades: models run in turn until one is sure enough (IDK cascades, Wang et al. 2018, UAI).

    All chains of models are tried, each with a grid of thresholds, of which the best are refined. A budget gets the
    chain and the thresholds with the least error within it.
    """
    heard = hear(backbone, split)
    sure, count = heard.sure(backbone, name), len(heard.costs)
    chains = (chain for length in range(1, count + 1) for chain in combinations(range(count), length))
    tried = (found for chain in chains for found in _tried(heard, sure, chain))
    return _best_within(tried, partial(cascade, backbone, name))


def _tried(heard: Heard, sure: Tensor, chain: tuple[int, ...]) -> list[Tried]:
    """Return the stages of a chain under the settings of thresholds that err less than all cheaper ones tried.

    A coarse grid over all thresholds comes first. Then each stage in turn varies its own threshold finely, with the
    others as in some of the best settings so far, from the cheapest to the dearest.
    """
    *asked, last = chain
    levels = int(TRIES ** (1 / max(1, len(asked))))
    grids = [sure[k].quantile(_spaced(levels)).unique() for k in asked]
    settings = torch.cartesian_prod(*grids).view(-1, len(asked)) if asked else torch.empty(1, 0)
    cost, error = (each.mean(1) for each in _walked(heard, chain, _stops(sure, chain, settings)))
    for i in [*range(len(asked))] * PASSES:
        settings, cost, error = _front(settings, cost, error)
        some = torch.linspace(0, len(settings) - 1, REFINED).long().unique()
        more = _varied(heard, sure, chain, settings[some], i)
        settings, cost, error = map(torch.cat, zip((settings, cost, error), more, strict=True))
    found = zip(*(each.tolist() for each in _front(settings, cost, error)), strict=True)
    return [Tried([*zip(asked, at, strict=True), (last, -torch.inf)], macs, wrong) for at, macs, wrong in found]


def _spaced(count: int) -> Tensor:
    """Return shares of rows that go on, from none to all: denser where few do, since what they ask may be dear."""
    return torch.linspace(0, 1, count).square()


def _stops(sure: Tensor, chain: tuple[int, ...], settings: Tensor) -> list[Tensor]:
    """Return where each stage but the last is sure enough under `settings` [s, stages]: [s, n] each."""
    return [sure[k] >= settings[:, i : i + 1] for i, k in enumerate(chain[:-1])]


def _walked(heard: Heard, chain: tuple[int, ...], stops: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return what each row costs, and the error of its answer, where stages stop as in `stops`: [s, n] each."""
    *asked, last = chain
    error = heard.error[last : last + 1].double()
    cost = heard.costs[last].expand_as(error)
    for k, stop in zip(reversed(asked), reversed(stops), strict=True):
        error = torch.where(stop, heard.error[k].double(), error)
        cost = heard.costs[k] + cost * ~stop
    return cost, error


def _varied(
    heard: Heard, sure: Tensor, chain: tuple[int, ...], settings: Tensor, i: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Vary the threshold of stage `i` in each of `settings` [s, stages].

    More and more rows go on, the least sure first, so that sums along them are the costs and errors of all thresholds.

    Returns:
        settings [t, stages], costs [t] and errors [t], where these are below those of fewer rows that go on.
    """
    stops = _stops(sure, chain, settings)
    stopped, gone = (
        _walked(heard, chain, [*stops[:i], torch.full_like(stops[i], stop), *stops[i + 1 :]]) for stop in (True, False)
    )
    value, order = sure[chain[i]].sort()
    places = (_spaced(LEVELS) * (len(value) - 1)).long()
    going = torch.searchsorted(value, value[places]).unique()  # rows of one score go on together
    going = going[going > 0]
    cost, error = (
        before.mean(1, keepdim=True) + (after - before)[:, order].cumsum(1)[:, going - 1] / len(order)
        for before, after in zip(stopped, gone, strict=True)
    )
    lower = _lower(error)
    setting, place = lower.nonzero(as_tuple=True)
    least, most = value[going - 1], value[going]
    between = (least + most) / 2
    varied = settings[setting]
    varied[:, i] = torch.where(between > least, between, most)[place]  # between neighbours there may be no number
    return varied, cost[lower], error[lower]


def _lower(error: Tensor) -> Tensor:
    """Tell which values are below all that come before them in the last dimension."""
    least = error.cummin(-1).values
    return torch.cat([torch.ones_like(least[..., :1], dtype=torch.bool), least[..., 1:] < least[..., :-1]], -1)


def _front(settings: Tensor, cost: Tensor, error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return those settings, by rising cost, that err less than all cheaper ones."""
    order = error.argsort(stable=True)
    order = order[cost[order].argsort(stable=True)]  # of equal costs, the least error comes first
    order = order[_lower(error[order])]
    return settings[order], cost[order], error[order]


def cascade(backbone: Backbone, name: str, stages: list[Stage]) -> ThresholdPolicy:
    """Return the policy that asks the models of `stages` in turn until the score `name` of one is high enough."""
    rising = backbone.scores[name][1]
    sign = 1 if rising else -1
    thresholds = torch.full((backbone.columns,), -torch.inf)  # models out of the cascade would keep any answer
    further = torch.zeros(backbone.columns, dtype=torch.int64)
    thresholds[0], further[0] = torch.inf, stages[0][0]
    for (k, least), (after, _) in pairwise(stages):
        thresholds[k + 1], further[k + 1] = least, after - k
    return ThresholdPolicy(backbone, name, sign * thresholds, further)


def fit_greedy(backbone: Backbone, split: Split, name: str, hear: Hear) -> PolicyFor:
    """Fit greedy cascades (Streeter 2018, ICML): each stage answers the most rows for its cost.

    A model answers the rows that it is surest of, as many as keep the accuracy of its answers at a share of the last
    model's accuracy on the same rows. Each such share (`STRICT`) makes one cascade. Stages get dearer here.
    """
    heard = hear(backbone, split)
    sure = heard.sure(backbone, name)
    return _best_within((_greedy(heard, sure, strict) for strict in STRICT), partial(cascade, backbone, name))


def _greedy(heard: Heard, sure: Tensor, strict: float) -> Tried:
    """Build one cascade, whose stages keep at least the share `strict` of the last model's accuracy."""
    last, right = len(heard.costs) - 1, 1 - heard.error
    left = torch.ones(sure.shape[1], dtype=torch.bool)
    stages: list[Stage] = []
    cost = wrong = 0.0
    while not stages or (stages[-1][0] < last and left.any()):
        rows = left.nonzero().flatten()
        offers = []
        for k in range(stages[-1][0] + 1 if stages else 0, last + 1):
            order = rows[sure[k, rows].argsort(descending=True)]
            keeps = right[k, order].cumsum(0) >= strict * right[last, order].cumsum(0)
            most = len(order) if k == last else int(keeps.nonzero().max()) + 1 if keeps.any() else 0
            least = -torch.inf if k == last else float(sure[k, order[most - 1]]) if most else torch.inf
            offers.append((most / float(heard.costs[k]), k, least))
        _, k, least = max(offers)
        answered = left & (sure[k] >= least)
        stages.append((k, least))
        cost += float(heard.costs[k]) * float(left.float().mean())
        wrong += float(heard.error[k][answered].sum()) / len(left)
        left &= ~answered
    return Tried(stages, cost, wrong)


# Supervision ------------------------------------------------------------------------------------------------------

Place = tuple[int | None, int | None]  # the model before the last one asked, and the last one asked


def fit_supervised(backbone: Backbone, split: Split, hear: Hear) -> PolicyFor:
    """Fit a logistic regression at each point, from what a policy sees there to the choice that is best in hindsight.

    This is the supervision of Bolukbasi et al. (2017): what a choice loses is the error in the end, plus a price times
    the compute from there on. Points are fitted from the last to the first, each for what the fitted rules do behind
    it, and a row weighs as much as its choice matters. Each price makes one rule.
    """
    heard, sight = hear(backbone, split), StepSight.of(backbone)
    seen = dict(_seen(backbone, split, len(heard.costs)))
    tried = []
    for price in PRICES:
        weight = torch.zeros(sight.points, sight.choices, sight.features)
        bias = torch.zeros(sight.points, sight.choices)
        ahead: dict[Place, Tensor] = {}
        for point in reversed(range(sight.points)):
            places, count = [place for place in seen if _point(place) == point], backbone.points[point].n
            inputs = torch.cat([seen[place] for place in places])
            losses = torch.cat([_losses(heard, place, ahead, price) for place in places])
            weight[point, :count], bias[point, :count] = _regress(inputs, losses)
            choice = (inputs @ weight[point, :count].t() + bias[point, :count]).argmax(1, keepdim=True)
            ahead |= zip(places, losses.gather(1, choice).squeeze(1).chunk(len(places)), strict=True)
        tried.append(Tried((weight, bias), *_follow(heard, seen, weight, bias, backbone)))
    return _best_within(tried, lambda found: LinearPolicy(sight, *found))


def _losses(heard: Heard, place: Place, ahead: Mapping[Place, Tensor], price: float) -> Tensor:
    """Return what each choice at a place loses in the end: [n, choices], where `ahead` says it of later places."""
    last, count = place[1], len(heard.costs)
    losses = [] if last is None else [heard.error[last]]
    for k in range(0 if last is None else last + 1, count):
        behind = heard.error[k] if k + 1 == count else ahead[last, k]
        losses.append(behind + price * float(heard.costs[k]))
    return torch.stack(losses, 1)


def _point(place: Place) -> int:
    return 0 if place[1] is None else place[1] + 1


@torch.inference_mode()
def _seen(backbone: Backbone, split: Split, count: int) -> Iterator[tuple[Place, Tensor]]:
    """Yield what all rows look like at each place that some way leads to: [n, features]."""
    places: list[Place] = [(None, None), *((None, k) for k in range(count - 1))]
    places += [(before, k) for k in range(count - 1) for before in range(k)]
    for place in places:
        found: list[Tensor] = []

        def choose(state: State, place: Place = place, found: list[Tensor] = found) -> Tensor:
            before, k = place
            if state.point == _point(place):
                found.append(backbone.observe(state).cpu())
            steps = {0: before if before is not None else k or 0}
            if before is not None and k is not None:
                steps[before + 1] = k - before
            return torch.full_like(state.rows, steps.get(state.point, 0))

        for inputs in split.inputs.split(256):
            backbone.run(inputs, choose)
        yield place, torch.cat(found)


def _regress(inputs: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight [choices, features] and bias [choices] of a multinomial logistic regression.

    Each choice is a label as much as it loses less than the worst one of that row, so that the likeliest choice is the
    one that loses least on average.
    """
    mean, spread = inputs.mean(0), inputs.std(0).clamp_min(1e-3)
    scaled, gains = (inputs - mean) / spread, losses.amax(1, keepdim=True) - losses
    gains = gains / gains.mean().clamp_min(1e-9)
    weight = torch.zeros(losses.shape[1], inputs.shape[1], requires_grad=True)
    bias = torch.zeros(losses.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=FITS, line_search_fn="strong_wolfe")

    def loss() -> Any:
        optimizer.zero_grad()
        value = -(gains * (scaled @ weight.t() + bias).log_softmax(1)).mean() + 1e-4 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weight, bias = weight.detach() / spread, bias.detach()
    return weight, bias - weight @ mean


def _follow(
    heard: Heard, seen: Mapping[Place, Tensor], weight: Tensor, bias: Tensor, backbone: Backbone
) -> tuple[float, float]:
    """Return what a linear rule costs on average on the rows heard, and its mean error."""
    count = len(heard.costs)
    last = torch.full((heard.error.shape[1],), -1)  # the model that has answered; -1 at first
    before, going = last.clone(), torch.ones_like(last, dtype=torch.bool)
    cost = torch.zeros(len(last), dtype=torch.float64)
    for point in range(count):
        choice = torch.zeros_like(last)
        for place, features in seen.items():
            here = torch.tensor([-1 if k is None else k for k in place])
            mine = going & (last == here[1]) & (before == here[0])
            if _point(place) == point and mine.any():
                n = backbone.points[point].n
                choice[mine] = (features[mine] @ weight[point, :n].t() + bias[point, :n]).argmax(1)
        standing = going & (last == point - 1)
        following = max(0, point - 1) + choice
        stops = standing & (following == last)
        moves = standing & ~stops
        cost[moves] += heard.costs[following[moves]]
        before[moves], last[moves] = last[moves], following[moves]
        going &= ~stops & (last < count - 1)
    return float(cost.mean()), float(heard.error[last, torch.arange(len(last))].mean())
