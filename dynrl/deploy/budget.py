"""A budget is met by the price at which a policy spends that much."""

from __future__ import annotations

import warnings
from itertools import pairwise

# A curve jumps where neighbours have almost the same price and costs that differ by more than this share of the dearest
# cost. There, the policy changes its choice for most inputs at once.
JUMP = 0.1


def price_at(curve: list[tuple[float, float]], budget: float, unit: str) -> float:
    """Return the price at which `curve`, [(price, cost)] by rising price, passes `budget`.

    If the curve jumps over the budget, the result is the price behind the jump, which costs less, and a warning is
    given.

    Raises:
        ValueError: the budget is below or above all costs of the curve.
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
            # Interpolate in the logarithm of the price. Rounding must not carry the result out of the range.
            return min(max(low * (high / low) ** share, low), high)
    raise AssertionError("a continuous curve reaches every value between its ends")
