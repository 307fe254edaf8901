"""`dynrl/Positions-v0` is the environment of the decision which share of an input's tokens or cells runs a block."""

from __future__ import annotations

from dynrl.backbones import Backbone, TokenViT
from dynrl.envs.core import RoutingVectorEnv


class PositionsVectorEnv(RoutingVectorEnv):
    """At each block, which share of the input's tokens, or of the cells of its map, runs the block?

    ## Features
    The mean of each channel over all tokens before the block. Then, for each action but 0, the mean weight (from 0 to
    1, made of the network's own scores) of the tokens that this action adds to those of the action below it. Of a map
    with cells, these weights come first.

    ## Action
    `Discrete(n)`, where n is the number of the backbone's `shares` (4: none, a quarter, a half, all). A higher action
    runs more tokens. Which ones is no decision: those with the highest scores run, which a small layer in front of the
    block gives, trained with the network. Attention is among the tokens that run; the others pass the block by. The
    same is true of the cells of a residual network's map. Convolutions see all of the map around a cell that runs, but
    of what the block itself makes, only what is in such cells.

    ## Episode
    One input. The episode ends after the last block, so it has as many steps as the network has blocks.

    ## Data
    The default is `digit-scenes`: a digit of random size among random amounts of clutter, on a background that needs no
    compute. `digits` fill their images. On `digit-pages`, the even ones among 1 to 16 digits are counted: all of them
    must be read, so inputs need unequally many tokens.

    ## Source
    Mixture of Depths, Raposo et al., arXiv 2024 (the tokens with the highest scores run a block, and the scores weigh
    its output; there, the share is the same for all inputs). DynamicViT, Rao et al., NeurIPS 2021, and A-ViT, Yin et
    al., CVPR 2022 (which tokens a vision transformer keeps). DynConv, Verelst and Tuytelaars, CVPR 2020 (which pixels
    of its map a residual block computes).

    ## Version history
    v0: the first version.
    """

    decision = "positions"

    @classmethod
    def default_backbone(cls, input_shape: tuple[int, ...]) -> Backbone:
        """Return a small untrained vision transformer."""
        return TokenViT(input_shape, width=16, depth=3, heads=2, hidden=32)  # type: ignore[arg-type]
