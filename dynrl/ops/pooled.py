"""`pooled` is each channel's mean over its map, the cheap summary that most routers see.

Maps that few rows change need not be read again to pool them: `MapSums` keeps what is needed beside them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynrl.ops.backend import Path, path


class MapSums:
    """These are sums over parts of maps, from which the kernels pool the maps without reading them again.

    They belong to one tensor of maps as it is now. Who is about to write to it takes them off, by `take`, and puts them
    back, by `keep`, if it has written the sums, too. If there are none, the maps are pooled anew, and leave sums.
    """

    _maps: Tensor | None = None
    _sums: Tensor | None = None

    def of(self, maps: Tensor) -> Tensor | None:
        """Return the sums of this very tensor, [n, T, C] float32, where each channel's T add up; None if not known."""
        return self._sums if self._maps is maps else None

    def take(self, maps: Tensor) -> Tensor | None:
        """Return the sums of this very tensor, which is about to be written to, and forget them."""
        sums = self.of(maps)
        self._maps = self._sums = None
        return sums

    def keep(self, maps: Tensor, sums: Tensor | None) -> None:
        """Say what the sums of `maps` are now; None if they are not known."""
        self._maps, self._sums = maps, sums


def pooled_ref(x: Tensor) -> Tensor:
    """Compute the definition of `pooled`.

    Args:
        x: [n, C, H, W].

    Returns:
        [n, C] float32.
    """
    return x.mean((2, 3)).float()


def pooled(x: Tensor) -> Tensor:
    """Do `pooled_ref`, in one kernel that adds in float32 if kernels are asked for. Differentiable."""
    return _on_triton(x, None) if _runs_kernels(x) else pooled_ref(x)


def pooled_keeping(x: Tensor, sums: MapSums | None) -> tuple[Tensor, MapSums | None]:
    """Do `pooled` by the sums of `x` if they are known, and return sums to keep beside `x`; None without kernels."""
    if not _runs_kernels(x):
        return pooled_ref(x), None
    sums = sums or MapSums()
    return _on_triton(x, sums), sums


def _runs_kernels(x: Tensor) -> bool:
    return path(x, vendor=True) is Path.TRITON and not (torch.is_grad_enabled() and x.requires_grad)


def _on_triton(x: Tensor, kept: MapSums | None) -> Tensor:
    from dynrl.ops.kernels.conv_tiles import map_parts
    from dynrl.ops.kernels.decide import pool, pool_sums

    n, channels, height, width = x.shape
    out, sums = torch.empty(n, channels, dtype=torch.float32, device=x.device), None
    if kept is not None:
        if (sums := kept.of(x)) is not None:
            return pool_sums(sums, height * width, out)
        sums = torch.empty(n, map_parts(height, width), channels, dtype=torch.float32, device=x.device)
        kept.keep(x, sums)
    return pool(x.contiguous(memory_format=torch.channels_last), out, sums)


def summary(x: Tensor, channels_last: bool = False) -> Tensor:
    """Summarise features of any kind, for routers to see: each channel's mean over all places.

    Args:
        x: vectors [n, C]; maps [n, C, ...] of any number of dimensions; or, with `channels_last`, tokens [n, T, C] and
            maps [n, ..., C].
        channels_last: whether the channels are the last dimension. The shape alone does not tell.

    Returns:
        a new tensor [n, C] float32.
    """
    if x.dim() == 2:
        return x.to(torch.float32, copy=True)
    if channels_last:
        return x.flatten(1, -2).mean(1, dtype=torch.float32)
    return pooled(x) if x.dim() == 4 else x.flatten(2).mean(2, dtype=torch.float32)
