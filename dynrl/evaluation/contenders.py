"""Contenders are the rows of a report: the learned policies and everything that they must beat.

Each contender is one object. `Contender.reach(budget)` returns what each of its seeds does with every input of the
test split. Reports average these results; comparisons pair them input by input.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dynrl.backbones import Backbone
from dynrl.data import Dataset
from dynrl.deploy import RoutedModel
from dynrl.evaluation import routes as ways
from dynrl.evaluation.routes import Fit, PolicyFor
from dynrl.evaluation.rules import rules_of
from dynrl.evaluation.scores import mean_metric, score_routes, score_rows
from dynrl.policies import RandomPolicy, StaticPolicy
from dynrl.runs import RunKind
from dynrl.tasks import Task

BUDGETS = Backbone.budgets  # the shares of the dense MACs at which reports ask of most families
RANDOM_SEEDS = 3
RATED = 256  # on how many rows of the validation split the search for the rate of random routes begins

Tick = Callable[[], Any]


def check_budgets(budgets: Sequence[float]) -> None:
    """Refuse, with a ValueError, budgets that are not some shares of the dense MACs, each once and rising."""
    rising = all(before < after for before, after in pairwise(budgets))
    if not budgets or not rising or not all(0 < budget <= 1 for budget in budgets):
        raise ValueError(
            "expected budgets as shares of the dense MACs, above 0 and at most 1, each once and rising, got "
            f"{list(budgets)}"
        )


class Ground:
    """A ground is one pretrained network with its data; all contenders of a report are measured on it.

    Args:
        backbone: the pretrained network; its `for_inference` copy walks random, static and oracle routes.
        dataset: the data set, which is shown to all networks as the pretrained one sees it; rules are fitted on its
            validation split and judged on its test split.
        device, dtype: where networks and inputs are, and their type; policies stay in float32.
    """

    def __init__(
        self, backbone: Backbone, dataset: Dataset, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.place: tuple[torch.device, torch.dtype] = (torch.device(device), dtype)
        dataset = dataset.seen_by(backbone.known)
        self.dataset, self._seen = dataset, (dataset.mean, dataset.deviation, dataset.names, dataset.vocabulary)
        self.network: Backbone = self.put(backbone)
        self.test, self.validation = (split.to(*self.place) for split in (dataset.test, dataset.validation))
        self.task: Task = dataset.task

    def put(self, network: Backbone) -> Backbone:
        """Copy a network for inference (with batch norm folded, for example) and move it to the ground's device.

        Raises:
            ValueError: the network was trained on inputs that were standardised otherwise, or on other classes.
        """
        known = network.trained_on
        theirs = None if known is None else (known.mean, known.deviation, known.classes, known.vocabulary)
        if theirs not in (None, self._seen):
            raise ValueError(
                f"expected networks that see the data alike, got one with mean, deviation and classes {theirs} beside "
                f"{self._seen}; train it again on the same data"
            )
        return network.for_inference().to(*self.place)

    def wait(self) -> None:
        """Wait until the device has finished all work that it was given."""
        if self.place[0].type == "cuda":
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Reached:
    """This is one seed's answer to a budget: the metric, the cost and the route of each input of the test split.

    Attributes:
        network: the network that walks.
        metric: [n], the task's metric.
        macs: [n], MACs as shares of the dense MACs of `Ground.network`, the router's included.
        router: [n], the router's part of `macs`.
        route: [n, columns], what ran; -1 where a row never was.
        start: a function that takes a batch and returns the function to time, which walks that batch.
        price: the price that the policy was told; None if it knows no price.
    """

    network: Backbone
    metric: Tensor
    macs: Tensor
    router: Tensor
    route: Tensor
    start: Callable[[Tensor], Callable[[], Any]]
    price: float | None = None


class Contender:
    """A contender is one row of a report, or one line of a picture; it may have several seeds.

    Attributes:
        name: the contender's name in reports.
        kind: the kind of run that a learned policy comes from; None for all other contenders.
        preparing: how often `prepare` ticks at most.
        asked: whether the contender heeds budgets; if not, it has one point only.
    """

    name: str
    kind: RunKind | None = None
    preparing: int = 0
    asked: bool = True

    def prepare(self, tick: Tick) -> None:
        """Search or fit on validation data; this is called once, before the first `reach`."""

    def reach(self, budget: float | None) -> list[Reached] | None:
        """Return what each seed does with `budget`, a share of the dense MACs.

        Args:
            budget: a share of the dense MACs. None asks a contender that heeds no budgets for its one point, and
                learned policies for their dearest.

        Returns:
            an answer of each seed, or None if some seed cannot be that cheap. A seed that cannot spend the whole budget
            answers with the most that it can spend.
        """
        raise NotImplementedError

    def spends(self, budget: float) -> bool:
        """Tell whether the contender can spend exactly `budget`, so that a report has a row for it."""
        return True

    def rows(self, budgets: Sequence[float]) -> list[float | None]:
        """List the budgets of the contender's rows in a report; [None] is a single row without a budget."""
        return [budget for budget in budgets if self.spends(budget)] if self.asked else [None]

    def passes(self, budgets: Sequence[float]) -> int:
        """Count how often the contender ticks at most while it prepares and answers: the length of a progress bar."""
        return self.preparing + (len(budgets) if self.asked else 1)


class Learned(Contender):
    """Learned policies of one kind are one contender, which has a model for each seed.

    Args:
        kind: the kind of the runs.
        models: the models, calibrated, of which copies are measured. A model that knows one price only has one point
            and needs no calibration.
        ground: the network and data that the models are measured on.
    """

    kind: RunKind

    def __init__(self, kind: RunKind, models: Sequence[RoutedModel], ground: Ground) -> None:
        self.kind, self.name, self._ground = kind, kind.label, ground
        # Copies: their prices are set here, and a user's own models must answer afterwards as they did before.
        self.models = [copy.deepcopy(model).to(*ground.place) for model in models]
        self.asked = all(len(model.curve) > 1 for model in self.models)
        self._known: list[tuple[float, Reached] | None] = [None] * len(self.models)  # the last price and its answer

    @property
    def reachable(self) -> tuple[float, float]:
        """The least and the most that all seeds can spend on validation data, as shares of the dense MACs."""
        ends = [[macs for _, macs in model.curve] for model in self.models]
        return max(map(min, ends)), min(map(max, ends))

    def spends(self, budget: float) -> bool:
        """Tell whether all seeds reach the budget; otherwise the rows of one front would come from different seeds."""
        low, high = self.reachable
        return low <= budget <= high

    def rows(self, budgets: Sequence[float]) -> list[float | None]:
        """List the budgets that all seeds reach; if there are none, the only row is the one at the lowest price."""
        return super().rows(budgets) or [None]

    def reach(self, budget: float | None) -> list[Reached] | None:
        """Set each seed's price so that it meets the budget on validation data; None sets the lowest price."""
        if budget is not None and any(budget < min(macs for _, macs in model.curve) for model in self.models):
            return None
        return [self._reach(i, budget) for i in range(len(self.models))]

    def _reach(self, i: int, budget: float | None) -> Reached:
        model = self.models[i]
        assert model.price_range is not None, "learned policies know a price"
        if budget is None or not self.asked:
            model.set_price(model.price_range[0])
        else:
            model.set_budget(min(budget, max(macs for _, macs in model.curve)))
        price, known = model.price, self._known[i]
        if known is not None and known[0] == price:
            return known[1]

        def start(batch: Tensor) -> Callable[[], Any]:
            def run() -> Tensor:
                model.set_price(price)
                return model(batch)

            return run

        metric, route = score_rows(model, self._ground.test)
        macs, router = route.macs_fraction, route.router_fraction
        found = Reached(model.backbone, metric, macs, router, route.actions, start, price)
        self._known[i] = (price, found)
        return found


class ByChance(Contender):
    """A learned policy is a contender once more on networks in which chance chooses the parts of an input that run.

    Each input takes the route that the policy chose for it, so as many parts run, but any.

    Args:
        learned: the policies, on networks that choose such parts (`Backbone.by_chance`).
        ground: the data.

    Attributes:
        of: the policies' name.
    """

    def __init__(self, learned: Learned, ground: Ground) -> None:
        self.name, self.asked = f"{learned.name}, parts by chance", learned.asked
        self._learned, self._ground, self.of = learned, ground, learned.name

    def rows(self, budgets: Sequence[float]) -> list[float | None]:
        """List the budgets of the policies' own rows."""
        return self._learned.rows(budgets)

    def reach(self, budget: float | None) -> list[Reached] | None:
        """Walk the policies' routes; what they spent is spent here, too."""
        found = self._learned.reach(budget)
        return None if found is None else [self._again(of) for of in found]

    def _again(self, of: Reached) -> Reached:
        network = of.network.by_chance()
        assert network is not None, "only networks that choose parts of an input are asked"
        with torch.random.fork_rng():
            torch.manual_seed(0)
            walked = _along(self._ground, network, of.route.clamp_min(0))
        return replace(walked, macs=of.macs, router=of.router, price=of.price)


def by_chance(learned: Sequence[Learned], ground: Ground) -> list[ByChance]:
    """List the contenders of `ByChance`; there are none if the network chooses no parts of an input."""
    return [] if ground.network.by_chance() is None else [ByChance(of, ground) for of in learned]


def _along(ground: Ground, network: Backbone, routes: Tensor) -> Reached:
    """Walk the test split along `routes` [n, columns] without asking a policy."""
    walked, none = score_routes(network, routes, ground.test), torch.zeros(len(routes))
    macs = walked.macs * (network.dense_macs / ground.network.dense_macs)

    def start(batch: Tensor) -> Callable[[], Any]:
        route = routes[: len(batch)].to(batch.device)
        return lambda: network.run_route(batch, route)

    return Reached(network, walked.metric, macs, none, walked.route, start)


class Random(Contender):
    """Random routes that cost the budget on average are one contender, which has several seeds.

    Each seed has the rate at which its own routes cost the budget on the test split. They know nothing of the targets.
    At one rate for all seeds, the error of the draw that told it would be in every seed, and no spread would show it.
    """

    name = "random"

    def __init__(self, ground: Ground) -> None:
        self._ground = ground

    def reach(self, budget: float | None) -> list[Reached] | None:
        """Draw routes of independent choices that cost the budget on average, or the dearest; None if all cost more."""
        assert budget is not None
        network, ground = self._ground.network, self._ground
        rate = ways.random_rate(network, ground.validation.inputs[:RATED], budget)
        if rate is None:
            return None

        def walk(rate: float, seed: int) -> tuple[float, Reached]:
            routes = RandomPolicy(network.thrift, rate, seed).route(ground.test.inputs)
            reached = _along(ground, network, routes)
            return float(reached.macs.double().mean()), reached

        if rate == 1.0:
            return [walk(rate, seed)[1] for seed in range(RANDOM_SEEDS)]
        steering = ways.Steering(rate)
        return [steering.meet(budget, partial(walk, seed=seed)) for seed in range(RANDOM_SEEDS)]


class Static(Contender):
    """This contender takes one route for all inputs: the best route within the budget that a search found.

    Attributes:
        found: the routes of `static_routes` and those of `Backbone.constant_routes`.
    """

    name = "static"
    found: list[ways.Found]

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._constant = [route for _, route in ground.network.constant_routes()]
        self.preparing = ways.static_tries(ground.network) + len(self._constant)

    def prepare(self, tick: Tick) -> None:
        """Search for static routes."""
        network, split = self._ground.network, self._ground.validation
        self.found = ways.static_routes(network, split, tick)
        self.found += ways.measured_routes(network, split, self._constant, tick)

    def reach(self, budget: float | None) -> list[Reached] | None:
        """Take the route with the least error within the budget."""
        assert budget is not None
        best = ways.affordable(self.found, budget, self._ground.task)
        return None if best is None else [_fixed_route(self._ground, best)]


def _fixed_route(ground: Ground, route: tuple[int, ...]) -> Reached:
    return _along(ground, ground.network, StaticPolicy(route).route(ground.test.inputs))


class Constant(Contender):
    """One route of `Backbone.constant_routes` is a contender of one point, such as the same choice everywhere."""

    asked = False

    def __init__(self, name: str, route: tuple[int, ...], ground: Ground) -> None:
        self.name, self._route, self._ground = name, route, ground

    def reach(self, budget: float | None) -> list[Reached] | None:
        """Take the route, whatever the budget."""
        return [_fixed_route(self._ground, self._route)]


class Ruled(Contender):
    """A rule of thumb is a contender once it is fitted (see `dynrl.evaluation.rules`), on each of some networks.

    Args:
        name: the contender's name.
        fit: the rule.
        networks: the networks that walk by the rule, each fitted for itself: the pretrained one, or tuned ones.
        ground: the data.
    """

    _policies_for: list[PolicyFor]

    def __init__(self, name: str, fit: Fit, networks: Sequence[Backbone], ground: Ground) -> None:
        self.name, self._fit, self._networks, self._ground = name, fit, networks, ground
        self.preparing = len(networks)

    def prepare(self, tick: Tick) -> None:
        """Fit the rule; raise a ValueError if that gives no function from budgets to policies."""
        self._policies_for = []
        for network in self._networks:
            policy_for = self._fit(network, self._ground.validation)
            if hasattr(policy_for, "chooser") or not callable(policy_for):
                raise ValueError(
                    f"expected the rule {self.name!r} to return a function from a budget to a policy (or None), got a "
                    f"{type(policy_for).__name__}"
                )
            self._policies_for.append(policy_for)
            tick()

    def reach(self, budget: float | None) -> list[Reached] | None:
        """Take the fitted rules that meet the budget on validation data; return None if one of them does not."""
        assert budget is not None
        found = []
        for network, policy_for in zip(self._networks, self._policies_for, strict=True):
            policy = policy_for(budget)
            if policy is None:
                return None
            if not hasattr(policy, "chooser"):
                raise ValueError(
                    f"expected the rule {self.name!r} to return a policy for the budget {budget:g}, or None, got a "
                    f"{type(policy).__name__}; StaticPolicy makes one of a route"
                )
            found.append(self._follow(RoutedModel(network, policy)))
        return found

    def _follow(self, model: RoutedModel) -> Reached:
        metric, route = score_rows(model, self._ground.test)

        def start(batch: Tensor) -> Callable[[], Any]:
            return lambda: model(batch)

        return Reached(model.backbone, metric, route.macs_fraction, route.router_fraction, route.actions, start)


class Plain(Contender):
    """A plain network that was trained alone is a contender with one point, at the MACs that its name tells.

    Args:
        networks: of one shape, a network for each seed.
    """

    asked = False

    def __init__(self, networks: Sequence[Backbone], ground: Ground) -> None:
        self.networks, self._ground = [ground.put(network) for network in networks], ground
        self.name = f"plain {networks[0].dense_macs / 1e6:.3g} MMACs"

    def reach(self, budget: float | None) -> list[Reached] | None:
        """Answer the same at every budget."""
        return [_whole(network, self._ground) for network in self.networks]


class Smaller(Contender):
    """The front of plain networks that were trained alone is a contender: the best of them within the budget.

    Args:
        plain: each with as many seeds.
    """

    name = "smaller"

    def __init__(self, plain: Sequence[Plain], ground: Ground) -> None:
        self._plain, self._ground, self.preparing = plain, ground, len(plain)

    def prepare(self, tick: Tick) -> None:
        """Measure each network on validation data."""
        self._known, whole = [], self._ground.network.dense_macs
        for plain in self._plain:
            metric = mean_metric(plain.networks, self._ground.validation)
            self._known.append(ways.Found(plain, plain.networks[0].dense_macs / whole, metric))
            tick()

    def reach(self, budget: float | None) -> list[Reached] | None:
        """Take the best network within the budget."""
        assert budget is not None
        best = ways.affordable(self._known, budget, self._ground.task)
        return None if best is None else best.reach(None)


def _plain_front(networks: Sequence[Backbone], ground: Ground) -> list[Contender]:
    """List the front of plain networks, and each shape of them: those of one shape are seeds of one another."""
    shapes: list[list[Backbone]] = []
    for network in sorted(networks, key=lambda of: -of.dense_macs):
        mine = next((shape for shape in shapes if shape[0].config == network.config), None)
        shapes.append([network]) if mine is None else mine.append(network)
    if len({len(shape) for shape in shapes}) > 1:
        counts = ", ".join(f"{len(shape)} of {shape[0].dense_macs / 1e6:.3g} MMACs" for shape in shapes)
        raise ValueError(f"expected as many seeds of each smaller network, got {counts}")
    plain = [Plain(shape, ground) for shape in shapes]
    for i, of in enumerate(plain):  # rows are told apart by their names
        of.name += f" ({again + 1})" if (again := [before.name for before in plain[:i]].count(of.name)) else ""
    return [Smaller(plain, ground), *plain] if plain else []


def _whole(network: Backbone, ground: Ground) -> Reached:
    """Walk the full route of a network, which is timed as a plain network."""
    found = _along(ground, network, network.dense_actions(len(ground.test)))

    def start(batch: Tensor) -> Callable[[], Any]:
        return network.ideal(batch, network.dense_actions(len(batch), batch.device))

    return Reached(network, found.metric, found.macs, found.router, found.route, start)


class Oracle(Contender):
    """The oracle takes each input's best route in hindsight, among those of the static search and random ones."""

    name, asked = "oracle", False
    preparing = ways.ORACLE_DRAWS
    _reached: Reached

    def __init__(self, static: Static, ground: Ground) -> None:
        self._static, self._ground = static, ground
        self.preparing += static.preparing  # an upper bound: the search finds fewer routes than it tries

    def prepare(self, tick: Tick) -> None:
        """Try each candidate on the test split; the oracle sees the targets."""
        network, test = self._ground.network, self._ground.test
        known = ways.oracle_candidates(network, self._static.found)
        self._reached = _along(self._ground, network, ways.oracle_routes(network, test, known, tick))

    def reach(self, budget: float | None) -> list[Reached] | None:
        """Return the same at every budget."""
        return [self._reached]


@dataclass
class Dense(Contender):
    """The dense network is the best of all networks on their full routes, by validation data.

    Args:
        ground: the pretrained network and the data.
        plain: the same network trained on its full route only; None if there is none.
        learned: the learned policies; fine-tuned backbones among theirs compete, too, one network a seed.

    Attributes:
        networks: the networks that compete, by name; between equals, the first one wins.
        best: the name of the best.
    """

    ground: Ground
    plain: Backbone | None
    learned: Sequence[Learned] = ()
    networks: dict[str, list[Backbone]] = field(default_factory=dict)
    best: str = "pretrained"
    name, asked = "dense", False

    def __post_init__(self) -> None:
        tuned = {of.name: [m.backbone for m in of.models] for of in self.learned if of.kind.tuned}
        self.networks = {**tuned, "pretrained": [self.ground.network]}
        if self.plain is not None:
            self.networks["plain"] = [self.ground.put(self.plain)]
        self.preparing = len(self.networks)

    def prepare(self, tick: Tick) -> None:
        """Choose by the mean over each name's networks, on all validation data."""
        errors = {}
        for name, mine in self.networks.items():
            errors[name] = self.ground.task.error(mean_metric(mine, self.ground.validation))
            tick()
        self.best = min(errors, key=lambda name: errors[name])

    def reach(self, budget: float | None) -> list[Reached] | None:
        """Return the same at every budget."""
        return [_whole(network, self.ground) for network in self.networks[self.best]]


def check_rules(contenders: Sequence[Contender]) -> None:
    """Refuse, with a ValueError, a rule that bears another contender's name, as rows are told apart by names."""
    others = [contender.name for contender in contenders if not isinstance(contender, Ruled)]
    for rule in contenders:
        if isinstance(rule, Ruled) and rule.name in others:
            raise ValueError(
                f"a rule of thumb is named {rule.name!r}, as another row of the report is; expected another name than "
                f"{', '.join(dict.fromkeys(others))}: rename it in dynrl.evaluation.RULES"
            )


def rivals(ground: Ground, smaller: Sequence[Backbone] = (), learned: Sequence[Learned] = ()) -> list[Contender]:
    """List all that learned policies stand beside, in a report's order.

    Args:
        ground: with the pretrained network.
        smaller: plain networks of fewer MACs, trained alone; those of one shape are seeds of one another.
        learned: the learned policies; rules stand beside tuned ones on their networks, too, which are better ones.

    Raises:
        ValueError: one shape of plain networks has more seeds than another.
    """
    static = Static(ground)
    networks = {"": [ground.network]}
    for of in learned:
        if of.kind.tuned:  # policies that share a tuned network are one network
            networks[f" on {of.name}"] = list({m.backbone.fingerprint(): m.backbone for m in of.models}.values())
    found: list[Contender] = [Random(ground)]
    found += [
        Ruled(name + where, fit, mine, ground)
        for where, mine in networks.items()
        for name, fit in rules_of(mine[0]).items()
    ]
    found += [static, *(Constant(name, route, ground) for name, route in ground.network.constant_routes())]
    return [*found, *_plain_front(smaller, ground), Oracle(static, ground)]
