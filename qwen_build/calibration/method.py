"""What a way to calibrate decides of the linears that read one input: factors to divide it by, and rounded weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from qwen_build.calibration.folding import shared
from qwen_build.calibration.input_statistics import InputStatistics
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.graph.architecture import InputSpec
from qwen_build.quantization.grid import Rounded
from qwen_build.quantization.schemes import IntScheme


@dataclass(frozen=True, eq=False)
class InputReaders:
    """The linears of a layer that read one input and become integers here; never one that the checkpoint has packed.

    Attributes:
        read: the input.
        statistics: of the input.
        weights: by the linears' names inside the layer, float32 (N, K).
        schemes: likewise.
    """

    config: ModelConfig
    read: InputSpec
    statistics: InputStatistics
    weights: Mapping[str, np.ndarray]
    schemes: Mapping[str, IntScheme]

    @property
    def bits(self) -> set[int]:
        return {scheme.grid.bits for scheme in self.schemes.values()}

    def shared(self, values: np.ndarray, reduce: Callable[..., np.ndarray] = np.max) -> np.ndarray:
        """``values`` (K) as the input can be divided by them, see :func:`qwen_build.calibration.folding.shared`."""
        return shared(self.config, self.read, values, reduce)


@dataclass(frozen=True)
class Method:
    """Nothing is divided, and each weight becomes the nearest value: other methods change one of the two, or both."""

    needs_second_moment, needs_held_out = False, False

    def factors(self, readers: InputReaders) -> np.ndarray | None:
        """What the input is divided by, float32 (K), see :mod:`qwen_build.calibration.folding`; None: nothing."""
        return None

    def round(self, readers: InputReaders) -> dict[str, Rounded]:
        """Each weight on the grid of its scheme; may overwrite ``readers.statistics.second_moment``.

        Raises:
            OverflowError: a weight is larger than its scheme can store.
        """
        return {name: readers.schemes[name].round(weight) for name, weight in readers.weights.items()}
