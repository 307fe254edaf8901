"""These networks watch a sequence by looks at single frames, chosen by what is cheaply known of all of them."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrl.backbones.looks import Looks
from dynrl.backbones.walk import State
from dynrl.cost import count_macs
from dynrl.schema import MOST_ROWS, check_count, check_counts

GLANCE = 8  # the hidden units of the glance at all frames
MOST_FRAMES = 1000


class Frames(Looks):
    """A network that watches a sequence of feature vectors: choice 0 stops, choice i looks at frame i, in any order.

    The first `peek` numbers of each frame are known at once, as those of a small picture or the loudness would be. A
    small layer makes the first state of them. Policies are told them, for frames that are still to be looked at. A look
    encodes all numbers of one frame by two linear layers.

    The full route looks at the frames in order.

    Args:
        input_shape: (frames, numbers a frame).
        classes: the number of outputs of the head, from 2 on.
        peek: how many numbers of each frame are known without a look.
        looks: the most looks of a walk; 0 stands for as many as there are frames.
        width: the hidden units of a look.
        hidden: the number of hidden units of the state.

    Source: AdaFrame (Wu et al. 2019, CVPR): a memory of all frames' cheap features, a recurrent state, and a policy
    that says which frame is next. There, the number of looks is fixed in training and cut off by a threshold later.
    """

    family = "frames"
    orders: ClassVar = {
        "random places": lambda self, inputs: torch.rand(inputs.shape[:2]).to(inputs.device),
        "liveliest first": lambda self, inputs: inputs[:, :, : self.peek].sum(2),
    }

    def __init__(
        self,
        input_shape: tuple[int, int],
        classes: int = 10,
        peek: int = 1,
        looks: int = 0,
        width: int = 64,
        hidden: int = 48,
    ) -> None:
        super().__init__()
        if len(input_shape) != 2:
            raise ValueError(f"expected inputs of shape (frames, numbers a frame), got {tuple(input_shape)}")
        check_counts("input_shape", input_shape)
        frames, numbers = input_shape
        check_count("the number of frames", frames, 1, MOST_FRAMES)
        check_count("peek", peek, 1, numbers)
        for count, value in (("width", width), ("hidden", hidden)):
            check_count(count, value, 1, MOST_ROWS)
        self.input_shape, self.peek = tuple(input_shape), peek
        self.config = {
            "input_shape": list(input_shape), "classes": classes, "peek": peek, "looks": looks, "width": width,
            "hidden": hidden,
        }  # fmt: skip
        self.glance, self.lead = nn.Linear(peek, GLANCE), nn.Linear(GLANCE, hidden)
        self.encoder = nn.Sequential(nn.Linear(numbers, width), nn.ReLU(), nn.Linear(width, hidden))
        self.register_buffer("scale", torch.ones(frames, dtype=torch.int64), persistent=False)
        self.register_buffer("shares", torch.eye(frames), persistent=False)
        self._pose_looks(
            looks or frames, classes, hidden, list(range(frames)), start=frames * peek * GLANCE + GLANCE * hidden,
            look=count_macs(self.encoder, (numbers,))[0], told=frames * peek,
        )  # fmt: skip

    def _glance(self, inputs: Tensor) -> tuple[Tensor, ...]:
        return (self.lead(F.relu(self.glance(inputs[:, :, : self.peek])).mean(1)).tanh(),)

    def _codes(self, inputs: Tensor, rows: Tensor, part: Tensor) -> Tensor:
        return F.relu(self.encoder(inputs[rows, part]) + self.place(part))

    def _told(self, state: State) -> Tensor:
        """Return what is known of all frames without a look, and zeros for those that were looked at."""
        known = state.get(state.walk.inputs)[:, :, : self.peek].float()
        return (known * self.open_choices(state)[:, 1:].unsqueeze(2)).flatten(1)
