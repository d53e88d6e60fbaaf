"""The files in which calibration leaves a layer, and the reading of them in place of the checkpoint.

A layer's directory has an array for everything that is not as in the checkpoint, by Hugging Face's names: rounded
weights as their parts of :class:`Rounded`, all else as float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qwen_build.checkpoint.stored import Shape
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.graph.architecture import LAYER
from qwen_build.graph.weight_map import row_ranges
from qwen_build.quantization.grid import Rounded, joined
from qwen_build.writing.weights_file import Layout, reserve
from qwen_run.engine_files.stored_rows import pack, unpack

# endings of the files of a rounded weight: q two to a byte where 4 bits are enough, else as it is
_HALVED, _WHOLE, _SCALES, _ZERO_POINTS = ".q4.npy", ".q8.npy", ".scales.npy", ".zero_points.npy"


def save_rounded(directory: Path, name: str, rounded: Rounded, bits: int) -> None:
    """Save the weight ``name``, q of ``bits`` bits."""
    np.save(directory / (name + (_HALVED if bits <= 4 else _WHOLE)), pack(rounded.q, 4 if bits <= 4 else 8))
    np.save(directory / (name + _SCALES), np.ascontiguousarray(rounded.scales))
    if rounded.zero_points is not None:
        np.save(directory / (name + _ZERO_POINTS), rounded.zero_points)


def save_array(directory: Path, name: str, array: np.ndarray) -> None:
    """Save the float32 weight or vector ``name``."""
    np.save(directory / f"{name}.npy", array)


def new_array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array in a new file; a full disk shows here, not as a signal when the array's pages are written."""
    array = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    with path.open("r+b") as file:
        reserve(file.fileno(), path.stat().st_size)
    return array


def layer_directory(directory: Path, layer: int) -> Path:
    """Where in ``directory`` a layer lies."""
    return directory / f"layer.{layer}"


@dataclass(frozen=True)
class CalibratedSource:
    """A graph weight of which some or all is in ``directory``, see :class:`qwen_build.graph.weight_map.Source`."""

    directory: Path
    shapes: tuple[tuple[str, Shape], ...]

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> np.ndarray | Rounded:
        """Rows [start, stop): rounded where the calibrated weight is, else float32."""
        pieces = [self._read_one(checkpoint, *rows) for rows in row_ranges(self.shapes, start, stop)]
        return joined(pieces, np.concatenate)

    def _read_one(self, checkpoint: Checkpoint, name: str, start: int, stop: int) -> np.ndarray | Rounded:
        def rows(ending: str) -> np.ndarray | None:
            path = self.directory / (name + ending)
            return np.array(np.load(path, mmap_mode="r")[start:stop]) if path.exists() else None

        if (scales := rows(_SCALES)) is None:
            array = rows(".npy")
            return checkpoint.read(name, start, stop) if array is None else array
        halved, whole = rows(_HALVED), rows(_WHOLE)
        q = whole if halved is None else unpack(halved, 4)
        assert q is not None
        return Rounded(q, scales, rows(_ZERO_POINTS))


def calibrated_layout(layout: Layout, directory: Path) -> Layout:
    """``layout`` with every weight of a decoder layer from ``directory``, as far as it has it."""

    def calibrated(name: str) -> Path | None:
        layer = LAYER.match(name)
        own = layer_directory(directory, int(layer[1])) if layer else directory
        return own if any((own / f"{name}{ending}").exists() for ending in (_SCALES, ".npy")) else None

    weights = []
    for weight in layout.weights:
        found = [path for name, _ in weight.source.shapes if (path := calibrated(name))]
        weights.append(replace(weight, source=CalibratedSource(found[0], weight.source.shapes)) if found else weight)
    return replace(layout, weights=tuple(weights))
