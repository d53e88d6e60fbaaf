"""Choose an option of every unit, at the least cost within a limit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# Steps that a limit is cut into.
STEPS = 1 << 16


def cheapest(
    costs: Sequence[Sequence[float]], weights: Sequence[Sequence[float]], limit: float
) -> tuple[int, ...] | None:
    """Choose an option of every unit: of the choices whose weights sum to ``limit`` at most, the one that costs least.

    This is the multiple-choice knapsack problem, by dynamic programming (Kellerer, Pferschy and Pisinger, Knapsack
    Problems, 2004, ch. 11.5) over what is used of the limit in 65,536 steps. Weights are rounded up to whole steps: the
    limit holds, and at most a step a unit of it is wasted.

    Args:
        costs: of the options of each unit.
        weights: likewise.

    Returns:
        The index of the option of each unit; None if even the lightest are too heavy.

    >>> cheapest([[9, 5, 2], [9, 3]], weights=[[0, 1, 4], [0, 2]], limit=4)
    (1, 1)
    """
    spare = limit - sum(map(min, weights))
    if spare < 0:
        return None
    least = np.zeros(STEPS + 1)  # the least cost of the units so far, by the steps they may use
    taken: list[tuple[np.ndarray, list[int]]] = []
    for cost, weight in zip(costs, weights, strict=True):
        extra = [one - min(weight) for one in weight]
        steps = [math.ceil(one / spare * STEPS) if 0 < one <= spare else STEPS * (one > 0) for one in extra]
        table = np.full((len(cost), STEPS + 1), np.inf)
        for row, one, used, more in zip(table, cost, steps, extra, strict=True):
            if more <= spare:
                np.add(least[: STEPS + 1 - used], one, out=row[used:])
        taken.append((table.argmin(axis=0), steps))
        least = table.min(axis=0)
    left, chosen = STEPS, []
    for best, steps in reversed(taken):
        chosen.append(int(best[left]))
        left -= steps[chosen[-1]]
    return tuple(reversed(chosen))
