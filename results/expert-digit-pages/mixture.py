"""The network of this report is a plugin: a small vision transformer whose blocks have mixtures of eight experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynrl.backbones import FAMILIES, ExpertModule


class Mixture(nn.Module):
    """Each token takes `top_k` of the experts, weighted by the router."""

    def __init__(self, width: int, hidden: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.router, self.top_k = nn.Linear(width, experts), top_k
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, T, d] to [n, T, d]."""
        tokens, out = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(1).topk(self.top_k)
        for i, expert in enumerate(self.experts):
            at, rank = (chosen == i).nonzero(as_tuple=True)
            out = out.index_add(0, at, weights[at, rank, None] * expert(tokens[at]))
        return out.view(x.shape)


class Attention(nn.Module):
    """Attention among the tokens of an image, with its shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, T, d] to [n, T, d]."""
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


class Block(nn.Module):
    """A mixture of experts with its shortcut."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.mixture = nn.LayerNorm(width), Mixture(width, hidden, experts=8, top_k=4)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, T, d] to [n, T, d]."""
        return x + self.mixture(self.norm(x))


class Tokens(nn.Module):
    """Two convolutions of stride 2 make tokens of 4x4 pixels, each with its place."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        first = nn.Conv2d(1, width // 2, 3, 2, 1), nn.BatchNorm2d(width // 2), nn.ReLU()
        second = nn.Conv2d(width // 2, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()
        self.stem = nn.Sequential(*first, *second, nn.Conv2d(width, width, 1))
        self.place = nn.Parameter(0.02 * torch.randn(1, tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map images [n, 1, H, W] to tokens [n, T, d]."""
        return self.stem(x).flatten(2).transpose(1, 2) + self.place


class Mean(nn.Module):
    """The mean over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, T, d] to [n, d]."""
        return x.mean(1)


def network(width: int = 32, depth: int = 3, tokens: int = 64, classes: int = 17) -> nn.Sequential:
    """Return the network, whose parts 2, 4 and 6 have the mixtures."""
    layers = [part for _ in range(depth) for part in (Attention(width, 4), Block(width, 2 * width))]
    return nn.Sequential(Tokens(width, tokens), *layers, nn.LayerNorm(width), Mean(), nn.Linear(width, classes))


FAMILIES["mixture-vit"] = lambda classes, **config: ExpertModule(
    network(classes=classes), family="mixture-vit", **config
)
