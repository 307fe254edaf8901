"""`COSTS` estimates times on a CPU, and so tells when it pays to compute some rows only.

All thresholds of the ops are here. They held on the machines that were measured; `docs/speed.md` has the figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path


def _last_cache() -> int:
    """Return the size of the last-level cache in bytes, or 32 MB if the system does not tell it."""
    try:
        return int(Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return 32 << 20


@dataclass
class Costs:
    """This is the cost model of the CPU paths. There is one, `COSTS`; `assuming` changes it for a while.

    Attributes:
        product: microseconds to start a product.
        megabyte: microseconds to read a megabyte of weights.
        megamac: microseconds for a million multiply-adds.
        moving: microseconds to sort rows, gather them and put them back.
        moving_vectors: the same for rows that are short vectors, which takes fewer steps.
        few: rows are not worth leaving out if they are at most one in `few`.
        always: whether rows are compacted whatever it costs, as in tests.
        piece: bytes of rows that are computed at a time. A larger piece falls out of the cache between the layers of a
            block; a smaller one pays for starting the layers too often.
        piece_weights: the least size of a piece in sizes of the block's weights, which each piece reads anew.
        restart: the cost of starting a block once more, in bytes of rows that could be moved in that time.
        hidden: bytes of an expert's hidden units that are made at a time, so that they stay in the cache between two
            products.
        small_map: images of fewer numbers are convolved faster by torch's own convolution than by oneDNN's fused one.
        words: from this many numbers on, it pays to put rows back as words of 16 bytes.
    """

    product: float = 40.0
    megabyte: float = 40.0
    megamac: float = 13.0
    moving: float = 78.0
    moving_vectors: float = 5.0
    few: int = 20
    always: bool = False
    piece: int = field(default_factory=lambda: min(max(_last_cache() // 6, 2 << 20), 8 << 20))
    piece_weights: int = 4
    restart: float = 600 << 10
    hidden: int = 1 << 19
    small_map: int = 1 << 14
    words: int = 1 << 14

    @contextmanager
    def assuming(self, **changes: float) -> Iterator[None]:
        """Inside this context, these values hold for all threads."""
        unknown = set(changes) - {of.name for of in fields(self)}
        assert not unknown, unknown
        before = {name: getattr(self, name) for name in changes}
        try:
            vars(self).update(changes)
            yield
        finally:
            vars(self).update(before)

    def mac_time(self, macs: float) -> float:
        """Return the microseconds for `macs` multiply-adds."""
        return 1e-6 * macs * self.megamac

    def product_time(self, rows: int, weights: int) -> float:
        """Return the microseconds for `rows` rows times a matrix of `weights` numbers, at least those to read it."""
        return self.product + max(4e-6 * weights * self.megabyte, self.mac_time(rows * weights))

    def rows_time(self, rows: int, weights: int) -> float:
        """Return the microseconds that a product saves without its `rows` rows, though its weights are still read."""
        return 1e-6 * weights * (rows * self.megamac - 4 * self.megabyte)

    def worth_compacting(self, saved: float, moving: float, share: float = 1.0) -> bool:
        """Tell whether it pays to leave out rows and to move those that are computed.

        Args:
            saved: microseconds that leaving them out saves.
            moving: microseconds that moving rows takes: `COSTS.moving` or `COSTS.moving_vectors`.
            share: the share of the rows that is left out. If it is small, it is better to compute all rows and to
                restore these.
        """
        return self.always or (share * self.few > 1 and saved > moving)

    def piece_rows(self, rows: int, row_bytes: int, weight_bytes: int) -> int:
        """Return how many of `rows` rows to compute at a time, in pieces of equal, even size."""
        count = -(-rows * row_bytes // max(self.piece, self.piece_weights * weight_bytes, 2 * row_bytes))
        return 2 * math.ceil(rows / (2 * count)) if count > 1 else rows

    def stays(self, row_bytes: int, weight_bytes: int) -> bool:
        """Tell whether rows are better computed where they lie, by one start of the block for each run of neighbours.

        Moving a row there and back then takes longer than starting the block, which reads its weights anew. Weights
        are read twice as fast as rows are moved, as they stay in the cache.
        """
        return 2 * row_bytes > self.restart + weight_bytes // 2


COSTS = Costs()
