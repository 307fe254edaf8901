"""In the task of hops, a network follows the links of a ring as often as its input says."""

from __future__ import annotations

import numpy as np
import torch

from dynrl.data.base import Dataset, Split, drawn

PLACES, MOST_HOPS = 12, 8


def _draw(count: int, seed: int) -> Split:
    rng, every = np.random.default_rng(seed), np.arange(count)
    ring = rng.permuted(np.tile(np.arange(PLACES), (count, 1)), axis=1)  # the places in the order of their links
    start, hops = rng.integers(0, PLACES, count), rng.integers(1, MOST_HOPS + 1, count)
    inputs = np.zeros((count, PLACES, PLACES + MOST_HOPS), np.float32)
    inputs[every[:, None], ring, np.roll(ring, -1, 1)] = 1
    inputs[every, ring[every, start], PLACES + hops - 1] = 1
    reached = ring[every, (start + hops) % PLACES]
    return Split(
        torch.from_numpy(inputs), torch.from_numpy(reached), difficulty={"hops": torch.from_numpy(hops).float()}
    )


def hops() -> Dataset:
    """The places that are reached by 1 to 8 hops along a ring of 12 places; 20,000 / 2,000 / 5,000 rows.

    An input has a row for each place: a 1 where its link leads, then eight numbers, which are zero but at the place
    that the hops start from. There, a 1 says how many hops. The ring is another permutation in each input, so no place
    is met twice, and what is reached cannot be told from fewer hops. The task is k-step lookup, as for pointers in a
    list (Graves et al. 2016, Nature 538, traversal of graphs).
    """
    return drawn("hops", PLACES, (20_000, 2_000, 5_000), [_draw] * 3)
