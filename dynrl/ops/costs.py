"""`COSTS` knows what things take on a CPU, and so when it pays to compute some rows only.

All thresholds of the ops stand here. They held on the machines that were measured; `docs/speed.md` has the figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path


def _last_cache() -> int:
    """The size of the last-level cache in bytes, or 32 MB where the system does not tell."""
    try:
        return int(Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return 32 << 20


@dataclass
class Costs:
    """The model of costs that the CPU paths go by. There is one, `COSTS`, and `assuming` changes it for a while.

    Attributes:
        product: microseconds to start a product.
        megabyte: microseconds to read a megabyte of weights.
        megamac: microseconds for a million multiply-adds.
        moving: microseconds to sort out rows, gather them and put them back.
        moving_vectors: the same for rows that are short vectors, by fewer steps.
        few: rows are not worth leaving out where they are at most one in `few`.
        always: compact whatever it costs, as tests do.
        piece: bytes of rows that are computed at a time. A larger piece falls out of the cache between the layers of a
            block; a smaller one pays for starting the layers too often.
        piece_weights: the least size of a piece in sizes of the block's weights, which each piece reads anew.
        restart: what it costs to start a block once more, in bytes of rows that could be moved meanwhile.
        hidden: bytes of an expert's hidden units that are made at a time: they stay in the cache between two products.
        small_map: numbers in an image below which torch's own convolution is faster than oneDNN's fused one.
        words: numbers to be put back from which it pays to move them as words of 16 bytes.
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
        """Inside this context, these values hold instead, for all threads."""
        unknown = set(changes) - {of.name for of in fields(self)}
        assert not unknown, unknown
        before = {name: getattr(self, name) for name in changes}
        try:
            vars(self).update(changes)
            yield
        finally:
            vars(self).update(before)

    def mac_time(self, macs: float) -> float:
        """Microseconds for `macs` multiply-adds."""
        return 1e-6 * macs * self.megamac

    def product_time(self, rows: int, weights: int) -> float:
        """Microseconds for `rows` rows times a matrix of `weights` numbers: at least those for reading the matrix."""
        return self.product + max(4e-6 * weights * self.megabyte, self.mac_time(rows * weights))

    def rows_time(self, rows: int, weights: int) -> float:
        """Microseconds of a product that having no rows would save: its weights are read however few rows there are."""
        return 1e-6 * weights * (rows * self.megamac - 4 * self.megabyte)

    def worth_compacting(self, saved: float, moving: float, share: float = 1.0) -> bool:
        """Whether it pays to leave out rows, and to move those that are computed.

        Args:
            saved: microseconds that leaving them out saves.
            moving: microseconds that moving rows takes: `COSTS.moving` or `COSTS.moving_vectors`.
            share: the share of the rows that is left out. Where it is small, it is better to compute all rows, and to
                put these back as they were.
        """
        return self.always or (share * self.few > 1 and saved > moving)

    def piece_rows(self, rows: int, row_bytes: int, weight_bytes: int) -> int:
        """How many of `rows` rows to compute at a time: pieces of equal, even size."""
        count = -(-rows * row_bytes // max(self.piece, self.piece_weights * weight_bytes, 2 * row_bytes))
        return 2 * math.ceil(rows / (2 * count)) if count > 1 else rows

    def stays(self, row_bytes: int, weight_bytes: int) -> bool:
        """Whether rows are better computed where they lie, starting the block once for each run of neighbours.

        Moving a row there and back then takes longer than starting the block, which reads its weights anew. Weights
        are read twice as fast as rows are moved, as they stay in the cache.
        """
        return 2 * row_bytes > self.restart + weight_bytes // 2


COSTS = Costs()
