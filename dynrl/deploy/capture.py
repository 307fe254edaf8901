"""A captured model runs a routed model's walk as one CUDA graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynrl.ops.backend import device_counts

if TYPE_CHECKING:
    from dynrl.deploy.routed import RoutedModel


@dataclass(frozen=True)
class Recorded:
    """A recording fixes these facts of a model; if they change, a replay would give another model's outputs.

    Attributes:
        price: the price that the policy is told.
        limit: the most that one input may spend, as a share of the dense MACs; None without a limit.
        edition: the edition of the policy's weights; moving the model or loading weights makes a new one.
    """

    price: float
    limit: float | None
    edition: int

    @classmethod
    def of(cls, model: RoutedModel) -> Recorded:
        """Return the present facts of `model`."""
        return cls(model.price, model.limit, model.policy.edition)

    def check(self, model: RoutedModel) -> None:
        """Refuse, with a ValueError, a model that has changed."""
        for name in ("price", "limit"):
            then, now = getattr(self, name), getattr(model, name)
            if then != now:
                raise ValueError(f"captured at the {name} {then}, the model is now at {now}; capture it again")
        if model.policy.edition != self.edition:
            raise ValueError(
                "the model was moved, or other weights were loaded, since it was captured; capture it again"
            )


class CapturedModel:
    """A captured model records a routed model's walk, router included, and replays it without Python in between.

    Each replay decides anew: our kernels read from device memory how many rows run. Inputs are not checked for NaN,
    because that would wait for the device.

    Args:
        model: a model on a CUDA device, with a learned policy. Its price and its limit are recorded, too:
            capture it again after `set_price` or `set_limit`, or after it was moved or other weights were loaded.
        batch_size: the batch size of all inputs to come.

    Raises:
        ValueError: the model is not on a CUDA device, its policy does not decide step by step, or its family's ops
            cannot be captured.
    """

    def __init__(self, model: RoutedModel, batch_size: int) -> None:
        weights = next(model.backbone.parameters())
        if not weights.is_cuda:
            raise ValueError(f"expected a model on a CUDA device to capture, got one on {weights.device}; call .cuda()")
        sight = model.policy.sight
        if not model.backbone.captures or model.price_range is None or sight is None or sight.span > 1:
            raise ValueError(
                f"{type(model.policy).__name__} on {type(model.backbone).__name__} cannot be captured: only a learned "
                "policy that decides step by step can, on a family whose ops read counts on the device"
            )
        self.model, self._state = model, Recorded.of(model)
        # The graph reads the policy's tables at their addresses during the recording, so `set_price` must not free
        # them.
        self._chooser = model.chooser
        size = (batch_size, *model.input_shape)
        self._inputs = torch.zeros(size, dtype=weights.dtype, device=weights.device)
        # Outputs that a replay overwrites are normal tensors, too: they may be written to and be trained on.
        with torch.inference_mode(False), torch.no_grad(), device_counts():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # the kernels choose their tiles here, because a capture forbids timing
                # The first walk has all rows at work: on few or no rows, all tiles would take the same time.
                model.backbone.run_route(self._inputs, model.backbone.dense_actions(batch_size, weights.device))
                for _ in range(2):
                    model.run(self._inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._walk = model.run(self._inputs)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the outputs for [batch_size, *input_shape]; the next call overwrites them and `last_route`."""
        if inputs.shape != self._inputs.shape or inputs.dtype != self._inputs.dtype:
            raise ValueError(
                f"expected inputs of {self._inputs.dtype} {tuple(self._inputs.shape)} as captured, got {inputs.dtype} "
                f"{tuple(inputs.shape)}; capture the model for this batch size"
            )
        self._state.check(self.model)
        self._inputs.copy_(inputs)
        self._graph.replay()
        self.model.keep_route(self._walk)
        assert self._walk.outputs is not None
        return self._walk.outputs
