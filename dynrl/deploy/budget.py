"""Budgets: the price at which a policy spends what it may."""

from __future__ import annotations

import warnings
from itertools import pairwise

# Neighbours on a curve whose prices are all but the same, and which differ by more than this share of the dearest cost:
# there the policy changes its mind for most inputs at once.
JUMP = 0.1


def price_at(curve: list[tuple[float, float]], budget: float, unit: str) -> float:
    """The price at which `curve` [(price, what it costs)], prices rising, passes `budget`.

    Where the curve jumps over it, because a policy changes its mind for most inputs at one price: the price behind the
    jump, which costs less, and a warning.
    """
    dearest, cheapest = max(cost for _, cost in curve), min(cost for _, cost in curve)
    if not cheapest <= budget <= dearest:
        raise ValueError(
            f"the budget {budget} is out of reach; this policy reaches {cheapest:.3f} to {dearest:.3f} {unit}"
        )
    for (low, above), (high, below) in pairwise(curve):
        if min(above, below) <= budget <= max(above, below):
            if above - below > JUMP * dearest and high < 1.001 * low and above > budget:
                warnings.warn(
                    f"no price leads to {budget:.3g} {unit}: from {low:.4g} to {high:.4g} this policy jumps from "
                    f"{above:.3f} to {below:.3f}, and {below:.3f} is taken",
                    stacklevel=3,
                )
                return high
            share = 0.5 if above == below else (above - budget) / (above - below)
            # Prices were drawn evenly in their logarithm. Rounding must not carry the result out of the range.
            return min(max(low * (high / low) ** share, low), high)
    raise AssertionError("a continuous curve reaches every value between its ends")
