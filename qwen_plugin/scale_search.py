"""Scales and zero points of a weight's groups that make the error of rounding it small: the library's search."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np

import qwen_plugin
from qwen_engine.errors import EngineError
from qwen_plugin.layout import (
    BLOCK_BITS,
    BLOCK_COLUMNS,
    GROUP_SIZES,
    LARGEST_UNIT,
    LEAST_SCALE,
    MOST_UNITS_AT,
    UNIT_BITS,
    Bytes,
    Floats,
)


class _Task(ctypes.Structure):
    """``Task`` of ``csrc/rounding/scale_search.h``."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("importance", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("group_size", ctypes.c_int32),
        ("most", ctypes.c_int32),
        ("symmetric", ctypes.c_int32),
        ("together", ctypes.c_int32),
        ("flatness", ctypes.c_float),
        ("most_units", ctypes.c_void_p),
        ("unit_bits", ctypes.c_int32),
        ("least_unit", ctypes.c_float),
        ("largest_unit", ctypes.c_float),
        ("scales", ctypes.c_void_p),
        ("zero_points", ctypes.c_void_p),
    )


class Search(NamedTuple):
    """Which grids are tried, and what the error of one is.

    The error of a group is the sum of importance * (w - rounded)²; with a finite ``flatness``, that of importance *
    (abs(w) + flatness * rms) * (w - rounded)², with the root mean square of the group's weights. Zero is always on the
    grid.

    Attributes:
        bits: of an integer.
        group_size: 32, 64 or 128.
        symmetric: whether all zero points are 2**(bits - 1).
        blocks: whether the scales go together as :func:`qwen_plugin.layout.round_block_scales` has them; otherwise
            they are as they come out, and 1e-30 at least.
    """

    bits: int
    group_size: int
    symmetric: bool
    blocks: bool = False
    flatness: float = math.inf


def search_scales(weight: Floats, importance: Floats, search: Search) -> tuple[Floats, Bytes]:
    """The scales and zero points, (N, G), of those tried with which rounding ``weight`` leaves the least error.

    The same numbers on every processor.

    Args:
        weight: (N, G * group_size), finite.
        importance: (G * group_size), not negative.

    Raises:
        EngineError: the library is not compiled or older than this, or ``QWEN_PLUGIN_ISA`` is none of its sets.
    """
    bits, group_size, symmetric, blocks, flatness = search
    weight, importance = (np.ascontiguousarray(array, np.float32) for array in (weight, importance))
    outputs, columns = weight.shape
    groups = columns // group_size
    assert importance.shape == (groups * group_size,) == (columns,)
    assert group_size in GROUP_SIZES
    assert bits in BLOCK_BITS or not blocks
    scales, zero_points = np.empty((outputs, groups), np.float32), np.empty((outputs, groups), np.uint8)
    most_units = MOST_UNITS_AT[bits if blocks else 4]
    task = _Task(
        weight.ctypes.data, importance.ctypes.data, outputs, groups, group_size, 2**bits - 1, symmetric,
        BLOCK_COLUMNS // group_size if blocks else 1, flatness, most_units.ctypes.data, UNIT_BITS, LEAST_SCALE,
        LARGEST_UNIT[bits if blocks else 4], scales.ctypes.data, zero_points.ctypes.data,
    )  # fmt: skip
    if _library()(ctypes.byref(task)):
        raise EngineError("QWEN_PLUGIN_ISA names no instruction set of this machine; unset it")
    return scales, zero_points


@cache
def _library() -> Any:
    path = qwen_plugin.library_path()
    try:
        search = ctypes.CDLL(str(path)).QwenSearchScales  # runs without the interpreter's lock
    except AttributeError:
        raise EngineError(f"{path} is older than this package; compile it: python -m qwen_plugin.compile") from None
    search.argtypes = [ctypes.c_void_p]
    search.restype = ctypes.c_int
    return search
