"""Rounding that knows what the linears read: one decoder layer after the other, over a text.

A layer runs on what the rounded layers before it put out. What its linears read there decides, by the method, the
factors that inputs are divided by and how weights are rounded. Only numbers change, never the graph.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qwen_build.calibration.factor_search import input_scale
from qwen_build.calibration.folding import PRODUCERS, fold_inputs
from qwen_build.calibration.input_statistics import Collector, InputStatistics
from qwen_build.calibration.layer_runner import (
    INPUTS,
    LayerRun,
    LayerRunner,
    LayerWeights,
    embed,
    linear_shapes,
    read_layer,
)
from qwen_build.calibration.method import InputReaders, Method
from qwen_build.calibration.results import layer_directory, new_array, save_array, save_rounded
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.packed import is_packed
from qwen_build.checkpoint.safetensors import Checkpoint, digest_files
from qwen_build.graph.weight_map import FUSED
from qwen_build.quantization.grid import Rounded
from qwen_build.quantization.schemes import IntScheme
from qwen_build.writing.output import resumable_beside
from qwen_engine import __version__
from qwen_engine.errors import CheckpointError
from qwen_run.runtime.machine import physical_cores

# In a layer's directory: what the layer puts out, and the squared output errors and outputs of its linears.
_OUTPUT, _ERRORS = "output.npy", "errors.json"

# Elements of the widest activations in memory at a time, and how many arrays of them a run makes at its peak.
_RUN_ELEMENTS, _RUN_ARRAYS = 1 << 23, 8


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a build calibrates with.

    Attributes:
        names: of the methods, by the bits of a weight.
        sequences: token ids, int64 (S, L).
        schemes: of the linears that are rounded here, by their names in the checkpoint.
    """

    names: Mapping[int, str]
    methods: Mapping[int, Method]
    sequences: np.ndarray
    schemes: Mapping[str, IntScheme]

    @property
    def needs_second_moment(self) -> bool:
        return any(self.methods[scheme.grid.bits].needs_second_moment for scheme in self.schemes.values())

    def factors(self, readers: InputReaders) -> np.ndarray | None:
        """What the input is divided by; linears of different methods leave the one that they share alone."""
        method, *others = self._methods(readers)
        return None if others else method.factors(readers)

    def round(self, readers: InputReaders) -> dict[str, Rounded]:
        """What its method makes of each weight; those that have the same go together."""
        rounded: dict[str, Rounded] = {}
        for method in self._methods(readers):
            own = {name: one for name, one in readers.schemes.items() if self.methods[one.grid.bits] == method}
            weights = {name: readers.weights[name] for name in own}
            rounded |= method.round(replace(readers, weights=weights, schemes=own))
        return rounded

    def _methods(self, readers: InputReaders) -> list[Method]:
        return list(dict.fromkeys(self.methods[bits] for bits in sorted(readers.bits)))

    def steps(self, config: ModelConfig) -> int:
        """How often a sequence runs through a layer."""
        return config.num_hidden_layers * 2 * len(self.sequences)

    def memory_bytes(self, config: ModelConfig) -> int:
        """Estimate of what :func:`calibrate` has in memory at its peak."""
        shapes = linear_shapes(config)
        layer = sum(math.prod(shape) for shape in shapes.values())
        inputs = [shapes[names[0]][1] for names in INPUTS.values()]
        moments = sum(size * size for size in inputs) if self.needs_second_moment else 0
        run = _RUN_ARRAYS * max(_RUN_ELEMENTS, int(self.sequences.shape[1]) * config.intermediate_size)
        rounding = max(math.prod(shape) for shape in shapes.values()) * 4
        hidden = 2 * math.prod(self.sequences.shape) * config.hidden_size
        return 4 * (layer + moments + max(run, rounding) + hidden)


def calibrate(
    calibration: Calibration,
    config: ModelConfig,
    checkpoint: Checkpoint,
    directory: Path,
    advance: Callable[[int], object] = lambda _: None,
) -> None:
    """Fill ``directory`` as ``calibrated_layers`` reads it; layers that are there already stay.

    Args:
        advance: called with the number of sequences that ran through a layer, see :meth:`Calibration.steps`.

    Raises:
        CheckpointError: a weight cannot be read, is not finite, or too large for its scheme.
    """
    sequences = calibration.sequences
    runner = LayerRunner(config, sequences.shape[1], physical_cores())
    embedded, scratch = directory / "embedded.npy", directory / "unfinished"
    for layer in range(config.num_hidden_layers):
        place = layer_directory(directory, layer)
        if place.exists():
            advance(2 * len(sequences))
            continue
        entering = layer_directory(directory, layer - 1) / _OUTPUT if layer else embedded
        if not layer:
            np.save(embedded, embed(checkpoint, config, sequences.reshape(-1)).reshape(*sequences.shape, -1))
        hidden = np.load(entering, mmap_mode="r")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        weights = read_layer(checkpoint, config, layer)
        path = f"model.layers.{layer}."
        schemes = {n.removeprefix(path): scheme for n, scheme in calibration.schemes.items() if n.startswith(path)}
        errors: dict[str, tuple[float, float]] = {}
        if schemes:
            statistics = _statistics(runner, weights, hidden, config, schemes, calibration.needs_second_moment, advance)
            for key, own in statistics.items():
                if not np.isfinite(own.mean_square).all():
                    raise CheckpointError(
                        f"{path}{INPUTS[key][0]}: what it multiplies is too large for float32 on the calibration text; "
                        "the checkpoint is damaged, download or save it again"
                    )
            packed = {name for names in INPUTS.values() for name in names if is_packed(checkpoint, path + name)}
            errors = _round_layer(calibration, config, weights, statistics, schemes, packed, scratch, path)
        else:
            advance(len(sequences))
        (scratch / _ERRORS).write_text(json.dumps(errors))
        if layer + 1 < config.num_hidden_layers:
            output = new_array(scratch / _OUTPUT, hidden.shape)
            for rows, run in _runs(runner, weights, hidden, config, with_inputs=False):
                output[rows] = run.output.reshape(-1, *hidden.shape[1:])
                advance(rows.stop - rows.start)
        else:
            advance(len(sequences))
        scratch.rename(place)
        entering.unlink()


@contextmanager
def calibrated(
    calibration: Calibration,
    config: ModelConfig,
    checkpoint: Checkpoint,
    target: Path,
    advance: Callable[[int], object] = lambda _: None,
) -> Iterator[Path]:
    """A directory that :func:`calibrate` filled; where this is interrupted, it stays beside ``target`` for next time.

    Raises:
        BuildError: the directory of ``target`` cannot be written.
        CheckpointError: see :func:`calibrate`.
    """
    decisive = [repr(calibration), repr(config), digest_files(checkpoint.files), __version__]
    key = hashlib.sha256(json.dumps(decisive).encode() + calibration.sequences.tobytes()).hexdigest()[:16]
    with resumable_beside(target, key) as directory:
        calibrate(calibration, config, checkpoint, directory, advance)
        yield directory


def output_errors(directory: Path, config: ModelConfig) -> dict[str, tuple[float, float]]:
    """Squared error and squared size of the outputs of each linear that :func:`calibrate` rounded, on the sample."""
    errors: dict[str, tuple[float, float]] = {}
    for layer in range(config.num_hidden_layers):
        found = json.loads((layer_directory(directory, layer) / _ERRORS).read_text(encoding="utf-8"))
        errors |= {name: tuple(pair) for name, pair in found.items()}
    return errors


def _runs(
    runner: LayerRunner, weights: LayerWeights, hidden: np.ndarray, config: ModelConfig, with_inputs: bool
) -> Iterator[tuple[slice, LayerRun]]:
    """A layer over ``hidden`` (S, L, hidden_size), some sequences at a time: which, and the run."""
    sequences, length, size = hidden.shape
    step = max(1, _RUN_ELEMENTS // (config.intermediate_size * length))
    for start in range(0, sequences, step):
        rows = slice(start, min(start + step, sequences))
        batch = hidden[rows].reshape(-1, size)
        yield rows, runner.run(weights, batch, [length] * (rows.stop - start), with_inputs)


def _statistics(
    runner: LayerRunner,
    weights: LayerWeights,
    hidden: np.ndarray,
    config: ModelConfig,
    schemes: Mapping[str, IntScheme],
    with_second_moment: bool,
    advance: Callable[[int], object],
) -> dict[str, InputStatistics]:
    """Of every input of a layer that a linear of ``schemes`` reads."""
    collectors = {
        key: Collector(weights[f"{names[0]}.weight"].shape[1], math.prod(hidden.shape[:2]), with_second_moment)
        for key, names in INPUTS.items()
        if any(name in schemes for name in names)
    }
    for rows, run in _runs(runner, weights, hidden, config, with_inputs=True):
        for key, collector in collectors.items():
            collector.add(run.inputs[key])
        advance(rows.stop - rows.start)
    return {key: collectors.pop(key).finish() for key in list(collectors)}


def _round_layer(
    calibration: Calibration,
    config: ModelConfig,
    weights: LayerWeights,
    statistics: dict[str, InputStatistics],
    schemes: Mapping[str, IntScheme],
    packed: Set[str],
    directory: Path,
    path: str,
) -> dict[str, tuple[float, float]]:
    """Fold and round one layer: ``weights`` become those that the engine computes with.

    Args:
        statistics: are used up.
        packed: the linears that have to stay as they are.
        directory: takes everything that is not as in the checkpoint, by its name in the layer behind ``path``.

    Returns:
        see :func:`output_errors`.
    """

    def readers_of(key: str, own: InputStatistics) -> InputReaders:
        names = [name for name in INPUTS[key] if name in schemes]
        read = {name: weights[f"{name}.weight"] for name in names}
        return InputReaders(config, key, own, read, {name: schemes[name] for name in names})

    factors: dict[str, np.ndarray] = {}
    for key, own in statistics.items():
        fixed = not packed.isdisjoint((*INPUTS[key], PRODUCERS[key]))
        if not fixed and (s := calibration.factors(readers_of(key, own))) is not None:
            factors[key] = s
    folded = fold_inputs(config, weights, factors)
    changed = {name for name, weight in folded.items() if weight is not weights[name]}
    weights.update(folded)
    del folded
    errors: dict[str, tuple[float, float]] = {}
    for key in list(statistics):
        own = statistics.pop(key)
        if key in factors:
            own = own.divided(factors[key])
        readers = readers_of(key, own)
        if any(scheme.record.activation_scales == "static" for scheme in readers.schemes.values()):
            for reader in _possible_readers(config, key):
                save_array(directory, f"{path}{reader}.input_scale", input_scale(own.largest))
        try:
            rounded = calibration.round(readers)
        except OverflowError as error:
            names = " or ".join(path + name for name in readers.schemes)
            raise CheckpointError(f"{names}: {error}; use --kernels stock") from error
        for name, scheme in readers.schemes.items():
            weight = f"{name}.weight"
            save_rounded(directory, path + weight, rounded[name], scheme.grid.bits)
            values = scheme.grid.values(rounded.pop(name), weights[weight].shape[1])
            errors[path + name] = own.output_square(weights[weight] - values), own.output_square(weights[weight])
            weights[weight] = values
            changed.discard(weight)
    for name in changed:
        save_array(directory, path + name, weights[name])
    return errors


def _possible_readers(config: ModelConfig, key: str) -> list[str]:
    """The linears that the graph may have for an input: those of the checkpoint, and what they are fused to."""
    parent = INPUTS[key][0].rpartition(".")[0]
    fused = [
        name for name, parts in FUSED.items() if INPUTS[key] == tuple(f"{parent}.{part}" for part in parts(config))
    ]
    return [*INPUTS[key], *fused]
