"""A captured model runs a routed model's walk as one CUDA graph, for one batch size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from dynrl.deploy.graphs import Facts, Whole, plain, whole_ways
from dynrl.ops.recorder import recorder_for

if TYPE_CHECKING:
    from dynrl.deploy.routed import RoutedModel


class CapturedModel:
    """A captured model records a routed model's walk, router included, and replays it without Python in between.

    Each replay decides anew. Kernels of ours read from device memory how many rows run; blocks that are other modules
    run on all rows, of which those that chose them are selected. A routed model by itself records what is faster
    (`dynrl.deploy.graphs`). This one never waits for the device, so inputs are not checked for NaN, and outputs lie in
    memory that the next call overwrites.

    Args:
        model: a model on a CUDA device, with a learned policy. Its price and its limit are recorded, too: capture it
            again after `set_price` or `set_limit`, or after it was moved, or other weights were loaded or written.
        batch_size: the batch size of all inputs to come.

    Raises:
        ValueError: the model is not on a CUDA device, its policy does not decide step by step, or rows of its family
            leave or part, of which the host must know.
    """

    def __init__(self, model: RoutedModel, batch_size: int) -> None:
        weights = next(model.backbone.parameters())
        if not weights.is_cuda:
            raise ValueError(f"expected a model on a CUDA device to capture, got one on {weights.device}; call .cuda()")
        ways = whole_ways(model)
        if not ways:
            raise ValueError(
                f"{type(model.policy).__name__} on {type(model.backbone).__name__} cannot be captured: only a learned "
                "policy that decides step by step can, on a family whose rows need no count on the host"
            )
        self.model, self._facts = model, Facts(model)
        with plain(weights.device):
            self._inputs = model.backbone.form.example(batch_size, weights)
            recorder = recorder_for(self._inputs)
            # There are no inputs yet on which ways could be timed.
            self._whole = Whole(model.backbone, self._facts.choose, self._inputs, recorder, ways[:1])

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the outputs for [batch_size, *input_shape]; the next call overwrites them and `last_route`."""
        if inputs.shape != self._inputs.shape or inputs.dtype != self._inputs.dtype:
            raise ValueError(
                f"expected inputs of {self._inputs.dtype} {tuple(self._inputs.shape)} as captured, got {inputs.dtype} "
                f"{tuple(inputs.shape)}; capture the model for this batch size"
            )
        self._facts.check(self.model)
        self._inputs.copy_(inputs)
        self._whole.replay()
        self.model.keep_route(self._whole.walk)
        assert self._whole.walk.outputs is not None
        return self._whole.walk.outputs
