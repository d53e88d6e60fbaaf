"""The search for scales in NumPy: the same operations in the same order, so the same numbers to the bit.

Tests hold ``csrc/rounding`` against it; it is slow.
"""

from __future__ import annotations

import numpy as np

from qwen_plugin.layout import BLOCK_COLUMNS, LARGEST_UNIT, LEAST_SCALE, MOST_UNITS_AT, UNIT_BITS, Bytes, Floats
from qwen_plugin.scale_search import Search

# As in csrc/rounding/scale_search_kernel.h.
_PARTS = np.array([1, 1.05, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5], np.float32)
_UNITS = np.array([0.91, 0.94, 0.97, 1.0, 1.03, 1.06], np.float32)
_LEAST = np.float32(1e-30)


class Groups:
    """The groups of a weight (N, G, group_size) float32, and how their errors count.

    Attributes:
        low, high: (N, G), the range, with 0 inside.
    """

    def __init__(self, x: Floats, importance: Floats, most: int, flatness: float) -> None:
        """``importance``: (G, group_size); ``most``: the largest integer; ``flatness``: see the library's search."""
        self.x, self.most, self.bits = x, np.float32(most), most.bit_length()
        self.low, self.high = x.min(axis=2).clip(max=0), x.max(axis=2).clip(min=0)
        self.weight = np.broadcast_to(importance, x.shape)
        if np.isfinite(flatness):
            squares = np.zeros(x.shape[:2], np.float32)
            for k in range(x.shape[2]):
                squares += x[:, :, k] * x[:, :, k]
            root = np.sqrt(squares / np.float32(x.shape[2]))
            self.weight = importance * (np.abs(x) + (np.float32(flatness) * root)[..., None])

    def error(self, scale: Floats, zero: Floats | np.float32) -> Floats:
        """(N, G), what rounding to a grid leaves."""
        zero = np.broadcast_to(zero, self.low.shape)
        inverse = np.float32(1) / scale
        q = np.rint(self.x * inverse[..., None]).clip(-zero[..., None], (self.most - zero)[..., None])
        error = q * scale[..., None] - self.x
        error = error * error * self.weight
        even, odd = np.zeros_like(self.low), np.zeros_like(self.low)
        for k in range(0, self.x.shape[2], 2):
            even += error[:, :, k]
            odd += error[:, :, k + 1]
        return np.asarray(even + odd)

    def fitted(self, scale: Floats, zero: Floats) -> Floats:
        """The scales with which the integers that these grids make leave the least error."""
        inverse = np.float32(1) / scale
        q = np.rint(self.x * inverse[..., None]).clip(-zero[..., None], (self.most - zero)[..., None])
        products, squares = np.zeros_like(self.low), np.zeros_like(self.low)
        for k in range(self.x.shape[2]):
            weighed = q[:, :, k] * self.weight[:, :, k]
            products += weighed * self.x[:, :, k]
            squares += weighed * q[:, :, k]
        with np.errstate(divide="ignore", invalid="ignore"):
            found = products / squares
        return np.asarray(np.where((products > 0) & (found < np.inf), found, scale))

    def middle(self, scale: Floats) -> Floats:
        """The zero point, not rounded, at which a grid exceeds the range by as much on either side."""
        return np.asarray((self.most - (self.low + self.high) / scale) * np.float32(0.5))


class _Best:
    """The best grid of each group so far."""

    def __init__(self, shape: tuple[int, ...], zero: Floats | np.float32) -> None:
        self.error = np.full(shape, np.inf, np.float32)
        self.scale, self.zero = np.broadcast_to(zero, shape).copy(), np.broadcast_to(zero, shape).copy()

    def take(self, error: Floats, scale: Floats, zero: Floats | np.float32) -> None:
        better = error < self.error
        self.error = np.where(better, error, self.error)
        self.scale, self.zero = np.where(better, scale, self.scale), np.where(better, zero, self.zero)


def search_scales(weight: Floats, importance: Floats, search: Search) -> tuple[Floats, Bytes]:
    """As :func:`qwen_plugin.scale_search.search_scales`."""
    bits, group_size, symmetric, blocks, flatness = search
    groups = Groups(
        weight.reshape(len(weight), -1, group_size), importance.reshape(-1, group_size), 2**bits - 1, flatness
    )
    best = _search_groups(groups, symmetric, np.float32(2 ** (bits - 1)))
    scale, zero = best.scale, best.zero
    if blocks and group_size < BLOCK_COLUMNS:
        scale, zero = _search_blocks(groups, best, symmetric, BLOCK_COLUMNS // group_size)
    return scale, zero.astype(np.uint8)


def _search_groups(groups: Groups, symmetric: bool, middle: np.float32) -> _Best:
    best = _Best(groups.low.shape, middle)
    side = np.maximum(groups.high / (middle - 1), -groups.low / middle)
    larger = np.maximum(groups.high, -groups.low) / (middle - 1)
    both = (groups.high - groups.low) / groups.most
    for part in _PARTS:
        if symmetric:
            for reach in (side, larger):
                scale = np.maximum(reach * part, _LEAST)
                best.take(groups.error(scale, middle), scale, middle)
            continue
        scale = np.maximum(both * part, _LEAST)
        wanted = groups.middle(scale)
        nearest = np.rint(wanted)
        for candidate in (nearest, nearest + np.where(wanted < nearest, np.float32(-1), np.float32(1))):
            zero = candidate.clip(0, groups.most)
            best.take(groups.error(scale, zero), scale, zero)
    fitted = groups.fitted(best.scale, best.zero)
    best.take(groups.error(fitted, best.zero), fitted, best.zero)
    return best


def _search_blocks(groups: Groups, alone: _Best, symmetric: bool, together: int) -> tuple[Floats, Floats]:
    """The scales and zero points of groups that go together in blocks."""
    count = alone.scale.shape[1]
    limits = MOST_UNITS_AT[groups.bits][alone.zero.astype(int)]
    needed = alone.scale / limits

    def of_block(values: Floats, reduce: np.ufunc) -> Floats:
        """(N, G), the same for all groups of a block; sums in the order of its groups."""
        starts = np.arange(0, count, together)
        if reduce is np.maximum:
            found = reduce.reduceat(values, starts, axis=1)
        else:
            found = np.zeros((len(values), len(starts)), np.float32)
            for g in range(together):
                own = values[:, g::together]
                found[:, : own.shape[1]] += own
        return np.asarray(found.repeat(together, axis=1)[:, :count])

    largest = of_block(needed, np.maximum)
    pivot, none = np.zeros(needed.shape, bool), np.ones(needed.shape, bool)
    for g in range(together):  # the first of its block that is the largest
        pivot[:, g::together] = (needed == largest)[:, g::together] & none[:, g::together]
        for other in range(together):
            width = min(none[:, other::together].shape[1], pivot[:, g::together].shape[1])
            none[:, other::together][:, :width] &= ~pivot[:, g::together][:, :width]
    least = np.full(needed.shape, np.inf, np.float32)
    scales, zeros = np.zeros_like(least), np.zeros_like(least)
    for part in _UNITS:
        unit = _round_unit(largest * part, LARGEST_UNIT[groups.bits])
        tried = _Best(needed.shape, alone.zero)
        lower = np.floor(alone.scale / unit)
        for step in (0, 1):
            multiple = np.where(pivot, limits, np.minimum(np.maximum(lower + np.float32(step), np.float32(1)), limits))
            scale = multiple * unit
            moved = np.rint(groups.middle(scale)).clip(0, groups.most)
            limit = MOST_UNITS_AT[groups.bits][moved.astype(int)]
            fits = np.where(pivot, limit == multiple, limit >= multiple) & (not symmetric)
            zero = np.where(fits, moved, alone.zero)
            tried.take(groups.error(scale, zero), scale, zero)
        total = of_block(tried.error, np.add)
        better = total < least
        least = np.where(better, total, least)
        scales, zeros = np.where(better, tried.scale, scales), np.where(better, tried.zero, zeros)
    return scales, zeros


def _round_unit(unit: Floats, most: float) -> Floats:
    unit = unit.clip(np.float32(LEAST_SCALE), np.float32(most))
    _, exponent = np.frexp(unit)
    step = np.ldexp(np.float32(1), exponent - UNIT_BITS).clip(min=np.float32(LEAST_SCALE))
    return np.asarray((np.rint(unit / step).clip(min=1) * step).clip(max=np.float32(most)), np.float32)
