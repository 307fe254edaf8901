"""`dynrl/Look-v0` is the environment of the decision where in an image, or at which frame, to look next."""

from __future__ import annotations

from dynrl.backbones import Backbone, Glimpses
from dynrl.envs.core import RoutingVectorEnv


class LookVectorEnv(RoutingVectorEnv):
    """After each look at a part of an image or a sequence, which part does a network look at next, or does it stop?

    ## Features
    How sure the present answer is (the highest probability, its lead, the entropy) and the hidden state. Of `Glimpses`:
    how much of the peripheral view's attention is left in each window, as a logarithm. Of places looked at, a fifth is
    left. A policy that has learned nothing draws windows by it. Of `Frames`: the numbers of all other frames that are
    known without a look (the backbone's `peek`).

    ## Action
    `Discrete(n)`: 0 stops with the answer so far. Each other action looks through one window: first come the windows
    of the coarsest scale, row by row, then those of the finer ones. Of `Frames`, action i looks at frame i. A part that
    was looked at is closed.

    ## Episode
    One image, which is seen as a whole, strongly reduced, before the first decision; or one sequence of frames, of
    which a few numbers each are known before. An answer stands from then on.
    The episode ends with a stop or after the most looks that the backbone takes.

    ## Agents and policies
    Gates are refused, because the mean of two windows is none. A policy that decides upfront is told the image, 16 x 16
    pixels of it, and names all windows at once; it needs images.

    ## Data
    The default is `digit-scenes`: a digit of random size among random amounts of clutter. `digit-scenes-large` are 128
    pixels wide, so that a look shows a thirtieth of them; `fashion-scenes` show clothes. `clips` are sequences of
    frames, of which a few count.

    ## Source
    Recurrent Models of Visual Attention, Mnih et al., NeurIPS 2014 (RAM): where to look by REINFORCE, a fixed number of
    looks. Glance and Focus, Wang et al., NeurIPS 2020 (GFNet): a reduced image first, each look paid by what it gains,
    and a stop where the answer is sure enough by a threshold. Here, places are windows on a grid instead of numbers,
    and one policy learns both where to look and when to stop. AdaFrame, Wu et al., CVPR 2019: which frame of a video is
    next, by what is cheaply known of all.

    ## Version history
    v0: the first version.
    """

    decision = "look"

    @classmethod
    def default_backbone(cls, input_shape: tuple[int, ...]) -> Backbone:
        """Return a small untrained network with few windows, half of the image wide or all of it."""
        side = min(input_shape[1:]) // 8 * 4
        return Glimpses(input_shape, side=side, looks=2, width=8, hidden=16)  # type: ignore[arg-type]
