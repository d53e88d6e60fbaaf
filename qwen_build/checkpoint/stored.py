"""What every format of a checkpoint is read as: weights that yield rows of float32, or are on a grid already.

A format is one module of ``formats``. It finds its weights among the tensors of the files, and gives each of them as a
:class:`StoredWeight`, or as a :class:`PackedWeight` where the engine can hold the very numbers. Everything that reads a
checkpoint sees these two alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from qwen_build.checkpoint.safetensors_file import Float32
from qwen_build.quantization.grid import Grid, Rounded
from qwen_plugin.layout import round_scales

Shape = tuple[int, ...]


class StoredWeight(ABC):
    """A weight of a checkpoint, however it is stored.

    Attributes:
        name: in the graph, such as ``model.layers.0.mlp.up_proj.weight``.
        shape: (out_features, in_features) of a matrix.
        dtype: how it is stored, in a word.
    """

    name: str
    shape: Shape
    dtype: str

    @abstractmethod
    def read(self, start: int, stop: int) -> Float32:
        """Rows [start, stop), float32, in a new array.

        Raises:
            CheckpointError: a value is NaN or infinite, or the file became shorter since it was opened.
        """


class PackedWeight(StoredWeight):
    """A matrix whose numbers are integers on a grid of the engine's: it is stored bit for bit.

    Attributes:
        activation_scales: what the checkpoint means inputs to be rounded by; None: it says nothing.
    """

    activation_scales: str | None = None

    @property
    def exact(self) -> bool:
        """Whether its scales are those of the checkpoint to the last bit, as its integers are."""
        return True

    @property
    @abstractmethod
    def grid(self) -> Grid:
        """The grid it is on."""

    @property
    def order(self) -> np.ndarray | None:
        """The inputs as the groups have them, int32 (in_features); None where they lie so."""
        return None

    @abstractmethod
    def rounded(self, start: int, stop: int) -> Rounded:
        """Rows [start, stop) on the grid, the inputs in ``order``."""

    def read(self, start: int, stop: int) -> Float32:
        weight = self.grid.values(self.rounded(start, stop), self.shape[1])
        return weight if self.order is None else np.ascontiguousarray(weight[:, np.argsort(self.order)])


def storable_scales(scales: np.ndarray) -> tuple[np.ndarray, bool]:
    """``scales`` as panels hold them, float16, and whether that changes one; what is too large for them stays."""
    stored = round_scales(scales)
    kept = np.where(np.isfinite(stored), stored, scales)
    return kept, not np.array_equal(kept, scales)


class TensorSource(Protocol):
    """Files whose tensors yield rows of float32."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Float32:
        """Rows [start, stop) of the tensor ``name``."""


@dataclass(frozen=True)
class FloatWeight(StoredWeight):
    """A tensor of floats as it lies in a file. ``dtype`` is the file's."""

    name: str
    shape: Shape
    dtype: str
    files: TensorSource

    def read(self, start: int, stop: int) -> Float32:
        return self.files.read(self.name, start, stop)


class Found(NamedTuple):
    """What a format found among the tensors of a checkpoint.

    Attributes:
        weights: by their names in the graph.
        parts: the tensors that these are made of, which are no weights themselves.
        notes: what is read in another way than it says, a sentence each.
    """

    weights: Mapping[str, StoredWeight]
    parts: frozenset[str]
    notes: tuple[str, ...] = ()
