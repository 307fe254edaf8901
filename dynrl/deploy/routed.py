"""A routed model is a backbone with a policy plugged in, as one module from tensors to outputs."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynrl.backbones import Backbone, State, Walk
from dynrl.cost import count_macs
from dynrl.deploy.budget import price_at
from dynrl.deploy.graphs import Graphs
from dynrl.deploy.limit import Limited
from dynrl.files import reading
from dynrl.inputs import Inputs, as_inputs, placed
from dynrl.policies import ForeignPolicy, Policy, load_policy
from dynrl.policies.base import Weights

if TYPE_CHECKING:
    from dynrl.deploy.capture import CapturedModel

UNCOMPILED = (
    "a routed model runs as it is under torch.compile: what it computes depends on its inputs, so there is no graph to "
    "compile. Use model.capture(batch_size) on a CUDA device, or model.export(path) for a program of its own"
)


def _uncompiled(model: RoutedModel, inputs: Any) -> Tensor:
    """Run `model` as it is, and say why, where the compiler has come to it."""
    warnings.warn(UNCOMPILED, stacklevel=2)
    return torch.compiler.disable(model._forward)(inputs)


# This is what `torch.compiler.disable` would set. It is not called before a compiler is at work, because it imports the
# compiler, which takes longer than dynrl itself and needs more packages.
_uncompiled._torchdynamo_disable = True  # type: ignore[attr-defined]
_uncompiled._torchdynamo_disable_msg = UNCOMPILED  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Route:
    """A route says what ran for each row in one call of a routed model, and at what cost.

    Attributes:
        actions: [B, columns] int64, what ran; -1 where a row never was.
        macs: [B] int64, the backbone's MACs.
        router_macs: [B] int64, the policy's MACs, in addition.
        dense_macs: the MACs of one row of the dense network.
    """

    actions: Tensor
    macs: Tensor
    router_macs: Tensor
    dense_macs: int

    @property
    def macs_fraction(self) -> Tensor:
        """All MACs, the router's included, as a share of the dense network's: [B]."""
        # Rounded once, and at the end, so that no share comes out above a limit that it keeps.
        return ((self.macs + self.router_macs).double() / self.dense_macs).float()

    @property
    def router_fraction(self) -> Tensor:
        """The router's MACs as a share of the dense network's: [B]."""
        return self.router_macs.float() / self.dense_macs


class RoutedModel(nn.Module):
    """In a routed model, a policy routes each row through a backbone; `plug` and `load` make one.

    Attributes:
        input_shape: the shape of one input; name -> shape if inputs are several tensors.
        price_range: the lowest and highest price; None for policies that know no price.
        curve: [(price, MACs fraction on validation data)], by rising price.
        latency: [(price, milliseconds a batch)] on this machine, by rising price; empty without `dynrl calibrate`.
        graphs: on a CUDA device, recordings of what calls launch, which repeat it without Python; `graphs.enabled`
            turns them off, and `graphs.report()` says what was recorded.
    """

    # What `chooser` made last, behind the weights, the price and the limit that it is made of. The tuple is read and
    # replaced as a whole, because other threads may call the model or change its price at any time.
    _made: tuple[Weights, float, float | None, Callable[[State], Tensor]] | None = None
    _limit: float | None = None

    def __init__(self, backbone: Backbone, policy: Policy, curve: list[tuple[float, float]] | None = None) -> None:
        super().__init__()
        policy.check(backbone)
        self.backbone = backbone.for_inference()
        self.policy = copy.deepcopy(policy).eval().requires_grad_(False).to(next(backbone.parameters()).device)
        self.input_shape = backbone.input_shape
        self.curve = sorted(curve or [])
        self.latency: list[tuple[float, float]] = []
        self.price_range = policy.price_range
        self._price, self._calls, self.graphs = 0.0, threading.local(), Graphs()
        if self.price_range is not None:
            low, high = self.price_range
            self.set_price(min(max((low * high) ** 0.5, low), high))  # if low == high, the root may round to another
        self._look_macs = 0 if policy.sight is None else count_macs(policy, (policy.sight.width,))[0]
        self.eval()

    @property
    def last_route(self) -> Route | None:
        """The `Route` of this thread's last call; None before the first one."""
        return getattr(self._calls, "route", None)

    @property
    def price(self) -> float:
        """The price of compute that the policy is told."""
        return self._price

    def set_price(self, price: float) -> None:
        """Tell the policy a price within its range; at a higher price, the model spends less.

        Raises:
            ValueError: the policy knows no price, or the price is outside its range.
        """
        if self.price_range is None:
            raise ValueError(f"{type(self.policy).__name__} knows no price; only learned policies do")
        _check_number("a price", price)
        if not self.price_range[0] <= price <= self.price_range[1]:
            raise ValueError(f"the price {price} is outside the policy's range {self.price_range}")
        self._price = float(price)

    def set_budget(self, budget: float) -> None:
        """Choose the price at which the model spent the share `budget` of the dense MACs on average on validation data.

        Raises:
            ValueError: the policy was not calibrated, or `budget` lies outside what it can reach.
        """
        if len(self.curve) < 2:
            raise ValueError(
                "this policy has no calibrated budgets (it was trained at one price, or not by dynrl); use set_price"
            )
        _check_number("a budget", budget)
        self.set_price(price_at(self.curve, budget, "of the dense MACs"))

    def set_milliseconds(self, budget: float) -> None:
        """Choose the price at which a batch took `budget` milliseconds when `dynrl calibrate` timed this machine.

        Raises:
            ValueError: the model was not timed on this machine, or `budget` lies outside what the policy can reach.
        """
        if len(self.latency) < 2:
            count = torch.get_num_threads()
            raise ValueError(
                f"no times are known of this machine with {count} threads; run: dynrl calibrate RUN --threads {count}"
            )
        _check_number("a budget in milliseconds", budget)
        self.set_price(price_at(self.latency, budget, "milliseconds"))

    @property
    def max_steps(self) -> int:
        """The number of decisions of the longest walk; where a network has a loop, it may be raised beyond training.

        Shares of MACs stay those of the dense network as it was trained, and budgets those that were calibrated.

        Raises:
            ValueError: the network has no such loop, or the policy decides as many steps as it was made for.
        """
        return self.backbone.max_steps

    @max_steps.setter
    def max_steps(self, count: int) -> None:
        before = self.backbone.max_steps
        self.backbone.lengthen(count)
        try:
            self.policy.check(self.backbone)
        except ValueError:
            self.backbone.lengthen(before)
            raise
        self.latency, self._made = [], None  # both were for walks of the former length
        self.graphs.clear()

    @property
    def limit(self) -> float | None:
        """The most that one input may spend, as a share of the dense MACs; None without a limit."""
        return self._limit

    def set_limit(self, share: float | None) -> None:
        """Bound what any one input may spend, whatever the policy would do; None takes the bound away.

        A price or a budget sets what inputs spend on average, and an input made for it may spend everything. The limit
        holds for each input: choices after which even the cheapest rest of the walk would exceed it are closed, and the
        nearest open choice is taken instead. Inputs that would have stayed within it are routed as before.

        Args:
            share: the most that an input may spend, the router's looks included, as `Route.macs_fraction` counts it.

        Raises:
            ValueError: `share` is less than the cheapest walk costs; the message says how much that is.
        """
        if share is not None:
            _check_number("a limit", share)
            self._limited(self.chooser, float(share))  # made only to refuse what cannot be kept
        self._limit = None if share is None else float(share)

    def _limited(self, choose: Callable[[State], Tensor], limit: float | None) -> Callable[[State], Tensor]:
        return choose if limit is None else Limited(choose, self.backbone, self.policy, self._look_macs, limit)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the outputs; empty for a regression, or if they are not known."""
        return () if self.backbone.trained_on is None else self.backbone.trained_on.classes

    def preprocess(self, raw: Any) -> Any:
        """Return raw inputs [B, *input_shape] as the model takes them, standardised as its training data were.

        Args:
            raw: inputs as the data set has them; images are uint8, or floating-point numbers from 0 to 1; a list of
                texts, if the model was trained on texts.

        Raises:
            ValueError: the inputs have another shape or type, or it is not known what the backbone was trained on.
        """
        if self.backbone.trained_on is None:
            raise ValueError(
                "it is not known what this backbone was trained on, so standardise inputs yourself; dynrl.train and "
                "dynrl.pretraining.pretrain keep it, or set the backbone's `trained_on` to a "
                "dynrl.provenance.Provenance before you plug a policy in"
            )
        weights = next(self.backbone.parameters())
        raw = as_inputs(raw)
        if isinstance(raw, Inputs):
            raw = placed(raw, weights.device)
        return placed(self.backbone.trained_on.preprocess(raw), weights.device, weights.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> RoutedModel:
        # The policy moves to another device, but keeps its type: it stays in float32, like its observations.
        first = next(self.backbone.parameters())
        before = first.device, first.dtype
        self.backbone._apply(fn, recurse)
        first = next(self.backbone.parameters())
        if (first.device, first.dtype) != before:
            self.latency = []  # the times were those of the old device or type
            self.graphs.clear()
            self.policy.to(first.device)
        return self

    def train(self, mode: bool = True) -> RoutedModel:
        """Stay in inference mode, because in training mode, running batch norm would change the frozen model."""
        return super().train(False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_made", "_calls", "graphs")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._calls, self.graphs = threading.local(), Graphs()

    @property
    def chooser(self) -> Callable[[State], Tensor]:
        """The function that `Backbone.run` asks for choices: the policy at the present price, within the limit."""
        return self.made[3]

    @property
    def made(self) -> tuple[Weights, float, float | None, Callable[[State], Tensor]]:
        """The policy's weights, the price, the limit, and the `chooser` made of them, read at once."""
        policy, price, limit, made = self.policy, self._price, self._limit, self._made
        if made is None or made[1:3] != (price, limit) or not made[0].hold(policy):
            weights = Weights(policy)  # first, so that what another thread edits meanwhile is seen later
            made = self._made = weights, price, limit, self._limited(policy.chooser(self.backbone, price), limit)
        return made

    def walk(self, inputs: Any) -> Walk:
        """Walk `inputs` to their ends, like `forward`, and return the whole walk: `outputs`, `route`, `macs`.

        Price and limit are taken once, at the beginning, so several threads may call one model and change them.

        Raises:
            ValueError: the inputs have another shape, are empty, or hold NaN or infinity.
        """
        inputs = as_inputs(inputs)
        self.backbone.check_inputs(inputs)
        return self.run(inputs).taken()

    @torch.inference_mode()
    def run(self, inputs: Inputs) -> Walk:
        """Do `walk` without its checks, in inference mode, where tensors can neither be written to nor trained on."""
        with torch.autocast(inputs.device.type, enabled=False):  # a caller's autocast would change this model's dtype
            return self.backbone.run(inputs, self.chooser)

    def forward(self, inputs: Any = None, **named: Tensor) -> Tensor:
        """Return the backbone's outputs [B, ...] for inputs [B, *input_shape], and keep the route in `last_route`.

        Inputs of several tensors are a dict, or are given by name.

        The outputs have no graph.

        Raises:
            ValueError: the inputs have another shape, are empty, or hold NaN or infinity.
        """
        if (inputs is None) == (not named):
            got = f"a {type(inputs).__name__} and {sorted(named)} by name" if named else "nothing"
            raise ValueError(f"expected inputs: one tensor, a dict of tensors, or all tensors by name, got {got}")
        given = named if inputs is None else inputs
        return _uncompiled(self, given) if torch.compiler.is_compiling() else self._forward(given)

    def _forward(self, inputs: Any) -> Tensor:
        given = as_inputs(inputs)
        walk = self.graphs.walk(self, given)
        if walk is None:
            walk = self.walk(given)
        self.keep_route(walk)
        assert walk.outputs is not None
        return walk.outputs

    def keep_route(self, walk: Walk) -> None:
        """Make the route of `walk` this thread's `last_route`."""
        router_macs = self.policy.looks(walk) * self._look_macs
        self._calls.route = Route(walk.route, walk.macs, router_macs, self.backbone.dense_macs)

    def export(self, path: str | Path) -> None:
        """Write the walk at this price and limit as a program that needs no dynrl (see `dynrl.deploy.export`)."""
        from dynrl.deploy.export import export

        export(self, path)

    def capture(self, batch_size: int) -> CapturedModel:
        """Capture the walk at this price and limit as one CUDA graph for one batch size (see `CapturedModel`)."""
        from dynrl.deploy.capture import CapturedModel

        return CapturedModel(self, batch_size)


def _check_number(what: str, value: Any) -> None:
    """Refuse, with a ValueError, what is no number; NumPy's and one in a tensor are."""
    if (
        isinstance(value, str | bytes)
        or not hasattr(value, "__float__")
        or getattr(value, "shape", ()) not in ((), (1,))
    ):
        raise ValueError(f"expected {what} as a number, got {value!r}")


def plug(backbone: Backbone, policy: Any) -> RoutedModel:
    """Plug a policy into a backbone and return the routed model.

    Args:
        backbone: the backbone. It is copied, and the copy is made fast for inference; the original is never changed.
        policy: a policy file; or a policy, which is copied, too; or an algorithm of Stable-Baselines3 with its
            `MlpPolicy` that was trained on `dynrl.agents.sb3.RoutingVecEnv`. Only a file holds calibrated budgets; for
            the others, `dynrl.evaluation.calibrate` finds them.

    Raises:
        ValueError: the policy is none of these; the file is missing, damaged or altered, or was trained for another
            backbone or decision; or weights of the backbone are NaN or infinite.

    Example:
        model = dynrl.plug(backbone, "runs/skip/policy.safetensors")
        model.set_budget(0.5)
        logits = model(images)
    """
    if not isinstance(backbone, Backbone):
        raise ValueError(
            f"expected a backbone, got {type(backbone).__name__}; dynrl.backbones makes one of a network, for example "
            "SkipModule(network, input_shape, names of blocks)"
        )
    for name, tensor in backbone.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(
                f"the backbone's {name!r} holds NaN or infinity; train it again with a lower learning rate"
            )
    if not isinstance(policy, (str, Path)):
        return RoutedModel(backbone, policy if hasattr(policy, "chooser") else ForeignPolicy.of(policy))
    router, metadata = load_policy(policy)
    with reading(policy, "policy file"):
        _check_match(metadata, backbone)
        return RoutedModel(backbone, router, [(float(price), float(macs)) for price, macs in metadata["curve"]])


def _check_match(metadata: dict[str, Any], backbone: Backbone) -> None:
    """Refuse, with a ValueError, a policy that was trained for another decision or another backbone."""
    if metadata["decision"] != backbone.decision:
        raise ValueError(f"the policy decides {metadata['decision']!r}; this backbone poses {backbone.decision!r}")
    if metadata["backbone"] == backbone.fingerprint():
        return
    found = next(backbone.parameters()).dtype
    # A wider type holds the same numbers, so they can be brought back and compared.
    if found == torch.float64 and metadata["backbone"] == copy.deepcopy(backbone).float().fingerprint():
        return
    if found != torch.float32:
        raise ValueError(
            f"the policy was trained for a backbone of torch.float32, this one is of {found}: plug the policy into the "
            f"backbone as it was loaded, then convert the model by .to({found})"
        )
    raise ValueError("the policy was trained for another backbone (fingerprints differ); plug it into its own")
