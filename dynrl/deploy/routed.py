"""The routed model: a backbone with a policy plugged in, as one module from tensors to outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynrl.backbones import Backbone, State, Walk
from dynrl.cost import count_macs
from dynrl.deploy.budget import price_at
from dynrl.policies import Policy, load_policy

if TYPE_CHECKING:
    from dynrl.deploy.capture import CapturedModel


@dataclass(frozen=True)
class Route:
    """Who went where, at what cost, in the last call of a routed model.

    Attributes:
        actions: [B, columns] int64, what ran; -1 where a row has not been.
        macs: [B] int64, the backbone's MACs.
        router_macs: [B] int64, the policy's, on top.
        dense_macs: of one row of the dense network.
    """

    actions: Tensor
    macs: Tensor
    router_macs: Tensor
    dense_macs: int

    @property
    def macs_fraction(self) -> Tensor:
        """[B], all MACs, the router's included, over the dense network's."""
        return (self.macs + self.router_macs) / self.dense_macs

    @property
    def router_fraction(self) -> Tensor:
        """[B], the router's MACs over the dense network's."""
        return self.router_macs / self.dense_macs


class RoutedModel(nn.Module):
    """A backbone that a policy walks, row by row; made by `plug` or `load`.

    Attributes:
        input_shape: of one input.
        price_range: lowest and highest price; None for policies that know no price.
        curve: [(price, MACs fraction on validation data)], prices rising.
        latency: [(price, milliseconds a batch)] on this machine, prices rising; of `dynrl calibrate`, else empty.
        last_route: the `Route` of the last call.
    """

    last_route: Route | None
    _chooser: Callable[[State], Tensor] | None = None  # by the policy's weights at the present price
    _made_for: tuple[int, float] | None = None  # which edition of them, and the price

    def __init__(self, backbone: Backbone, policy: Policy, curve: list[tuple[float, float]] | None = None) -> None:
        super().__init__()
        policy.check(backbone)
        self.backbone = backbone.for_inference()
        self.policy = copy.deepcopy(policy).eval().requires_grad_(False).to(next(backbone.parameters()).device)
        self.input_shape = backbone.input_shape
        self.curve = sorted(curve or [])
        self.latency: list[tuple[float, float]] = []
        self.price_range = policy.price_range
        self.last_route = None
        self._price = 0.0
        if self.price_range is not None:
            low, high = self.price_range
            self.set_price(min(max((low * high) ** 0.5, low), high))  # of one price the root may round to another
        self._look_macs = 0 if policy.sight is None else count_macs(policy, (policy.sight.width,))[0]
        self.eval()

    @property
    def price(self) -> float:
        """The price of compute that the policy is told."""
        return self._price

    def set_price(self, price: float) -> None:
        """Tell the policy a price within its range: higher is cheaper to run."""
        if self.price_range is None:
            raise ValueError(f"{type(self.policy).__name__} knows no price")
        if not self.price_range[0] <= price <= self.price_range[1]:
            raise ValueError(f"the price {price} is outside the policy's range {self.price_range}")
        self._price = float(price)

    def set_budget(self, budget: float) -> None:
        """Choose the price whose MACs on validation data were `budget` times the dense network's, on average.

        Raises:
            ValueError: the policy was not calibrated, or `budget` lies outside what it can reach.
        """
        if len(self.curve) < 2:
            raise ValueError(
                "this policy has no calibrated budgets (it was trained at one price, or not by dynrl); use set_price"
            )
        self.set_price(price_at(self.curve, budget, "of the dense MACs"))

    def set_milliseconds(self, budget: float) -> None:
        """Choose the price at which a batch took `budget` milliseconds when `dynrl calibrate` timed it on this machine.

        Raises:
            ValueError: it was not timed on this machine, or `budget` lies outside what the policy can reach.
        """
        if len(self.latency) < 2:
            count = torch.get_num_threads()
            raise ValueError(
                f"no times are known of this machine with {count} threads; run: dynrl calibrate RUN --threads {count}"
            )
        self.set_price(price_at(self.latency, budget, "milliseconds"))

    def _apply(self, fn: Any, recurse: bool = True) -> RoutedModel:
        # The policy follows to another device, and no further: it stays in float32, as what it sees does.
        first = next(self.backbone.parameters())
        before = first.device, first.dtype
        self.backbone._apply(fn, recurse)
        first = next(self.backbone.parameters())
        if (first.device, first.dtype) != before:
            self.latency = []  # of what it was
            self.policy.to(first.device)
        return self

    def train(self, mode: bool = True) -> RoutedModel:
        """Stays in inference mode, as what `plug` gives is frozen: in training, batch norm would change for good."""
        return super().train(False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_chooser", "_made_for")}

    @property
    def chooser(self) -> Callable[[State], Tensor]:
        """The policy at the present price, as `Backbone.run` asks for it."""
        made_for = (self.policy.edition, self._price)
        if self._chooser is None or self._made_for != made_for:
            self._chooser, self._made_for = self.policy.chooser(self.backbone, self._price), made_for
        return self._chooser

    @torch.inference_mode()
    def walk(self, inputs: Tensor) -> Walk:
        """Walk `inputs` to their ends; `forward` with everything the walk knows."""
        with torch.autocast(inputs.device.type, enabled=False):  # a caller's, for other models: this one has one dtype
            return self.backbone.run(inputs, self.chooser)

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, *input_shape] to the backbone's outputs [B, ...]; what it did is in `last_route`.

        Raises:
            ValueError: another shape, an empty batch, NaN or infinity.
        """
        self.backbone.check_inputs(inputs)
        walk = self.walk(inputs)
        assert walk.outputs is not None
        self.last_route = self._route_of(walk)
        return walk.outputs

    def _route_of(self, walk: Walk) -> Route:
        return Route(walk.route, walk.macs, self.policy.looks(walk) * self._look_macs, self.backbone.dense_macs)

    def export(self, path: str | Path) -> None:
        """Write the walk at the present price as a program that needs no dynrl; see `dynrl.deploy.export`."""
        from dynrl.deploy.export import export

        export(self, path)

    def capture(self, batch_size: int) -> CapturedModel:
        """The walk as one CUDA graph for inputs of one batch size at the present price; see `CapturedModel`."""
        from dynrl.deploy.capture import CapturedModel

        return CapturedModel(self, batch_size)


def plug(backbone: Backbone, policy: str | Path | Policy) -> RoutedModel:
    """Plug a policy into a backbone.

    Args:
        backbone: is copied (and its copy made fast for inference), never changed.
        policy: a policy file, or a policy, which is copied, too.

    Raises:
        ValueError: a file that is missing, damaged or altered, or was trained for another backbone or decision;
            weights of the backbone that are NaN or infinite.

    Example:
        model = dynrl.plug(backbone, "runs/skip/policy.safetensors")
        model.set_budget(0.5)
        logits = model(images)
    """
    for name, tensor in backbone.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"the backbone's {name!r} holds NaN or infinity")
    if not isinstance(policy, (str, Path)):
        return RoutedModel(backbone, policy)
    router, metadata = load_policy(policy)
    _check_match(policy, metadata, backbone)
    curve = [(float(price), float(macs)) for price, macs in metadata["curve"]]
    return RoutedModel(backbone, router, curve)


def _check_match(path: str | Path, metadata: dict[str, Any], backbone: Backbone) -> None:
    """Refuse a policy that was trained for another decision or another backbone."""
    if metadata["decision"] != backbone.decision:
        raise ValueError(f"{path} decides {metadata['decision']!r}; this backbone poses {backbone.decision!r}")
    if metadata["backbone"] != backbone.fingerprint():
        raise ValueError(f"{path} was trained for another backbone (fingerprints differ); plug it into its own")
