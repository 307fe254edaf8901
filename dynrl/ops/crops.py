"""`crops` takes windows from images: one from each row, each at a place and a scale of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dynrl.ops.backend import Path, path


def crops_ref(images: Tensor, rows: Tensor, top: Tensor, left: Tensor, scale: Tensor, side: int) -> Tensor:
    """Compute the definition of `crops`, window by window.

    Args:
        images: [B, C, H, W].
        rows: [n] int64, the image that each window is taken from.
        top, left: [n] int64, the pixel at each window's upper left corner.
        scale: [n] int64, from 1 on. A window is `scale` times `side` pixels wide and high, and lies inside its image.
        side: the width and height of what comes out.

    Returns:
        [n, C, side, side], each pixel the mean of `scale` x `scale` pixels of the image.

    Source: the glimpse sensor of Recurrent Models of Visual Attention (Mnih et al. 2014, NeurIPS, section 3.1).
    """
    taken = [
        F.avg_pool2d(images[row, :, y : y + side * size, x : x + side * size], size)
        for row, y, x, size in zip(rows.tolist(), top.tolist(), left.tolist(), scale.tolist(), strict=True)
    ]
    return torch.stack(taken) if taken else images.new_empty(0, images.shape[1], side, side)


def crops(images: Tensor, rows: Tensor, top: Tensor, left: Tensor, scale: Tensor, side: int) -> Tensor:
    """Do `crops_ref` without a copy of any image: the windows' pixels are all that is read. Differentiable.

    The op is plain torch on every device, one gather for each scale. It takes 0 MACs.
    """
    if path(images, vendor=True) is Path.REF:
        return crops_ref(images, rows, top, left, scale, side)
    if len(sizes := scale.unique().tolist()) == 1:
        return _of_scale(images, rows, top, left, sizes[0], side)
    taken = images.new_empty(len(rows), images.shape[1], side, side)
    for size in sizes:
        mine = (scale == size).nonzero().squeeze(1)
        taken[mine] = _of_scale(images, rows[mine], top[mine], left[mine], size, side)
    return taken


def _of_scale(images: Tensor, rows: Tensor, top: Tensor, left: Tensor, size: int, side: int) -> Tensor:
    span = size * side
    every = images.unfold(2, span, 1).unfold(3, span, 1)  # a view: [B, C, tops, lefts, span, span]
    windows = every[rows, :, top, left]
    return windows if size == 1 else F.avg_pool2d(windows, size)
