"""In `TokenViT`, each input chooses which share of its tokens runs a block (mixture of depths, DynamicViT)."""

from __future__ import annotations

from itertools import pairwise
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynrl.backbones.layers import convolution
from dynrl.backbones.positions import SHARES, Positions
from dynrl.backbones.walk import State
from dynrl.cost import count_macs
from dynrl.ops.convolution import FoldedConv2d
from dynrl.ops.gated_positions import Block
from dynrl.schema import MOST_ROWS, check_count, check_counts


class Encoder(nn.Module):
    """A block of a vision transformer: attention and two linear layers, with the norms in front (Dosovitskiy 2021)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def macs(self, tokens: int) -> int:
        """Return the MACs of one row of `tokens` tokens."""
        width, hidden = self.fc2.out_features, self.fc1.out_features
        return tokens * width * (4 * width + 2 * hidden) + 2 * tokens * tokens * width

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, T, d] to [n, T, d]."""
        # On a CPU, autocast would make training several times slower: attention has a slow backward in bfloat16, and
        # products are laid out anew for each number of rows.
        with torch.autocast("cpu", enabled=False):
            return self._forward(x if x.is_cuda else x.to(self.fc2.weight.dtype))

    def _forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        query, key, value = self.qkv(self.norm1(x)).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        seen = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(seen.transpose(1, 2).reshape(n, tokens, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Stem(nn.Module):
    """A stem of convolutions of stride 2 with batch norm and ReLU makes tokens of patches (Xiao et al. 2021)."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        halvings = patch.bit_length() - 1
        widths = [channels, *(width >> (halvings - i) for i in range(1, halvings + 1))]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [convolution(inputs, outputs, 3, stride=2), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        self.last = nn.Conv2d(width, width, 1)

    def fold(self) -> None:
        """Fold the batch norms into the convolutions' weights."""
        for i in range(0, len(self.layers), 3):
            self.layers[i] = FoldedConv2d.of(self.layers[i], self.layers[i + 1])  # type: ignore[arg-type]
            self.layers[i + 1] = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map images [n, C, H, W] to tokens [n, T, d], row by row."""
        return self.last(self.layers(x)).permute(0, 2, 3, 1).flatten(1, 2)


class TokenViT(Positions):
    """A vision transformer in which each input chooses, block by block, which share of its tokens runs the block.

    There is no class token. At the end, each token says how much it counts, and a linear layer maps the mean that is
    weighted so to the outputs (pooling by attention, Lee et al. 2019): tokens that never ran need not count.

    Args:
        input_shape: (channels, height, width) of one image; both sides are multiples of `patch`.
        classes: the number of outputs of the last layer.
        patch: the side in pixels of what a token begins with, a power of 2. The stem has a convolution of stride 2 for
            each factor of 2.
        width: the number of channels of a token.
        depth: the number of blocks.
        heads: the number of heads of attention, a divisor of `width`.
        hidden: the number of hidden units of a block's linear layers.
        shares: the shares of the tokens, one for each choice, rising to 1.
    """

    family = "token_vit"

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int = 10,
        patch: int = 4,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        hidden: int = 128,
        shares: tuple[float, ...] = SHARES,
    ) -> None:
        super().__init__()
        check_counts("input_shape", input_shape)
        for name, count in {
            "classes": classes, "patch": patch, "width": width, "depth": depth, "heads": heads, "hidden": hidden,
        }.items():  # fmt: skip
            check_count(name, count, 1, MOST_ROWS)
        channels, height, across = input_shape
        if patch < 2 or patch & (patch - 1) or height % patch or across % patch or width % patch:
            raise ValueError(
                f"expected a patch that is a power of 2 and divides the sides {height}x{across} and the width {width}, "
                f"got {patch}"
            )
        if width % heads:
            raise ValueError(f"expected heads that divide the width {width}, got {heads}")
        self.input_shape = tuple(input_shape)
        self.config = {
            "input_shape": list(input_shape), "classes": classes, "patch": patch, "width": width, "depth": depth,
            "heads": heads, "hidden": hidden, "shares": list(shares),
        }  # fmt: skip
        self.stem = Stem(channels, width, patch)
        tokens = (height // patch) * (across // patch)
        self.place = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.blocks = nn.ModuleList(Encoder(width, heads, hidden) for _ in range(depth))
        self.norm, self.pool, self.fc = nn.LayerNorm(width), nn.Linear(width, 1), nn.Linear(width, classes)
        self._set_points(
            [f"blocks.{i}" for i in range(depth)],
            tuple(shares),
            tokens,
            [width] * depth,
            lambda point, count: self._encoder(point).macs(count) if count else 0,
            [count_macs(self.stem, self.input_shape)[0], *[0] * (depth - 1), 2 * tokens * width + width * classes],
        )

    def _encoder(self, point: int) -> Encoder:
        return self.blocks[point]  # type: ignore[return-value]

    def _lead(self, inputs: Tensor) -> tuple[Tensor, None]:
        return self.stem(inputs) + self.place, None

    def _block(self, state: State) -> Block:
        return lambda x, rows, places: self.blocks[state.point](x)

    def _follow(self, state: State, x: Tensor) -> tuple[Tensor, None]:
        if state.point + 1 < len(self.points):
            return x, None
        x = self.norm(x)
        return self.fc(torch.bmm(self.pool(x).softmax(1).transpose(1, 2), x).squeeze(1)), None

    def for_inference(self) -> Self:
        """Return a frozen copy with the stem's batch norms folded in."""
        twin = super().for_inference()
        twin.stem.fold()
        return twin.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
