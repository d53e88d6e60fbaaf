"""What rounding did to one weight, in numbers that tell rounding from a mistake: pure functions of arrays.

The numbers compare the values an engine has with those they should have been rounded from. Rounding to a grid moves a
value by up to half a step, in no preferred direction: a row or a block of columns keeps its size (slope 1), its mean
(offset 0), and its error is that of steps as wide as the range of each group asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from qwen_engine.manifest import Quantization

Floats = NDArray[np.float64]
GridValues = tuple[np.ndarray, np.ndarray, np.ndarray]  # q, scale and zero point of each value, (R, K) each

# Columns that are judged together: the blocks that have a unit of scales in the native layout.
BLOCK_COLUMNS = 128

# Part of a step by which the nearest value may be missed: float32 arithmetic in another order.
_NEAREST = 0.5 + 2e-3

# Values that are so many steps away are far.
_FAR = 1.5

# Rows and blocks shorter than this part of a weight's typical row are not judged: they may be rounded to nothing.
_SHORT = 1e-3


@dataclass(frozen=True)
class Sums:
    """Sums over some of the values of a weight, each array (how many parts,).

    All but the last two are over values that are near what was expected: one that a grid clips, or that gptq moves far
    to make up for others, would outweigh a row.

    ``product``: found times expected. ``square``: expected squared. ``error``: found less expected, squared.
    ``difference``: found less expected. ``step``: of the grid. ``known``: the squared error that is known, see
    :func:`known_errors`. ``far``: how many are further away. ``count``: how many there are.
    """

    product: Floats
    square: Floats
    error: Floats
    difference: Floats
    step: Floats
    known: Floats
    far: Floats
    count: Floats

    @property
    def slope(self) -> Floats:
        """How many times what was expected the values are, by least squares."""
        return _ratio(self.product, self.square, 1.0)

    @property
    def relative_error(self) -> Floats:
        """Root mean square of the error over that of what was expected."""
        return np.sqrt(_ratio(self.error, self.square, 0.0))

    @property
    def excess(self) -> Floats:
        """The error over that of rounding to the nearest on a grid that reaches as far as each group."""
        return np.sqrt(_ratio(self.error, self.known, 1.0))

    @property
    def offset(self) -> Floats:
        """Mean difference in steps."""
        return _ratio(self.difference, self.step, 0.0)

    @property
    def far_share(self) -> Floats:
        """Which part of the values is far from what was expected."""
        return self.far / self.count

    @property
    def judged(self) -> NDArray[np.bool_]:
        """Which parts are long enough to be judged."""
        lengths = self.square / self.count
        return np.asarray(lengths > _SHORT**2 * lengths.mean())


@dataclass(frozen=True)
class WeightErrors:
    """One weight: sums of each row, of each block of 128 columns, and of all.

    ``not_nearest``: share of values that are not the nearest on their grid.
    """

    rows: Sums
    blocks: Sums
    whole: Sums
    not_nearest: float


def part_sums(values: np.ndarray, expected: np.ndarray, steps: np.ndarray, known: np.ndarray) -> tuple[Sums, Sums]:
    """Sums of each row, and of each block of columns, of some rows of a weight.

    Args:
        values: (R, K) float32, as the engine has them.
        expected: (R, K) float32, what they were rounded from.
        steps: (R, K), of the grid of each value; zeros where nothing is rounded.
        known: (R, K), the squared error that rounding is known to make; zeros where nothing is rounded.
    """
    difference = values - expected
    far = (np.abs(difference) > _FAR * steps) & (steps > 0)
    addends = (values * expected, expected * expected, difference * difference, difference, steps, known)
    addends = (*(np.where(far, np.float32(0), addend) for addend in addends), far)
    starts = np.arange(0, values.shape[1], BLOCK_COLUMNS)
    widths = np.minimum(values.shape[1] - starts, BLOCK_COLUMNS) * float(len(values))
    of_rows = [np.sum(addend, axis=1, dtype=np.float64) for addend in addends]
    of_columns = (np.asarray(np.sum(addend, axis=0, dtype=np.float64)) for addend in addends)
    of_blocks = [np.add.reduceat(columns, starts) for columns in of_columns]
    rows = np.full(len(values), float(values.shape[1]))
    return Sums(*[*map(np.asarray, of_rows), rows]), Sums(*[*of_blocks, widths])


def count_misses(expected: np.ndarray, grid: GridValues, bits: int) -> int:
    """How many of the integers of ``grid`` are not the nearest to ``expected``, or to the end of the grid."""
    q, scales, zero_points = grid
    places = np.clip(expected / scales + zero_points, 0, (1 << bits) - 1)
    return int(np.count_nonzero(np.abs(places - q) > _NEAREST))


def known_errors(expected: np.ndarray, scales: np.ndarray, stored: Quantization) -> np.ndarray:
    """The mean squared error of rounding to a grid that reaches just as far as the group of each value, (R, K).

    Args:
        scales: (R, K), as they are stored: they tell how far a whole weight reaches that has one for all.
    """
    if stored.weight_scales == "tensor":
        return np.asarray(np.square(scales) / 12)
    rows, columns = expected.shape
    groups = np.pad(expected, ((0, 0), (0, -columns % stored.group_size))).reshape(rows, -1, stored.group_size)
    lowest, highest = groups.min(axis=-1), groups.max(axis=-1)
    if stored.symmetric:
        reach = np.maximum(highest, -lowest)
        if stored.weight_scales == "channel":
            reach = np.broadcast_to(reach.max(axis=1, keepdims=True), reach.shape)
        steps = reach / ((1 << stored.bits - 1) - 1)
    else:
        steps = (np.maximum(highest, 0) - np.minimum(lowest, 0)) / ((1 << stored.bits) - 1)
    return np.asarray((np.square(steps) / 12).repeat(stored.group_size, axis=1)[:, :columns])


def weight_errors(pieces: Sequence[tuple[Sums, Sums]], misses: int) -> WeightErrors:
    """All pieces of one weight together, ``misses`` of whose values are not the nearest."""
    names = [field.name for field in fields(Sums)]
    rows = Sums(*(np.concatenate([getattr(piece, name) for piece, _ in pieces]) for name in names))
    blocks = Sums(*(np.sum([getattr(piece, name) for _, piece in pieces], axis=0) for name in names))
    whole = Sums(*(getattr(rows, name).sum(keepdims=True) for name in names))
    return WeightErrors(rows, blocks, whole, misses / float(whole.count[0]))


def _ratio(dividend: Floats, divisor: Floats, nothing: float) -> Floats:
    return np.divide(dividend, divisor, out=np.full_like(dividend, nothing), where=divisor > 0)
