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

from qwen_build.calibration.experts import ExpertRounding, Routed
from qwen_build.calibration.factor_search import input_scale
from qwen_build.calibration.folding import fold_inputs
from qwen_build.calibration.input_statistics import Collector, InputStatistics
from qwen_build.calibration.layer_runner import LayerRun, LayerRunner, LayerWeights, embed, read_layer
from qwen_build.calibration.method import InputReaders, Method
from qwen_build.calibration.results import layer_directory, new_array, save_array, save_rounded
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.files import digest_files
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.graph.architecture import LayerKind, distinct_kinds, layer_kind
from qwen_build.quantization.grid import Rounded
from qwen_build.quantization.schemes import IntScheme
from qwen_build.writing.output import resumable_beside
from qwen_engine import __version__
from qwen_engine.errors import CheckpointError
from qwen_run.runtime.machine import physical_cores

# In a layer's directory: what the layer puts out, and the squared output errors and outputs of its linears.
_OUTPUT, _ERRORS = "output.npy", "errors.json"
# While it is made, what its experts read; and how many of them saw too few tokens.
_ROUTED, _FEW = "routed.npy", "few.json"
_EXPERTS_INPUT = "post_attention_layernorm"

# One sequence in so many is held out, where a method chooses between ways to round.
_HELD_OUT = 4

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
    def held_out(self) -> np.ndarray:
        """bool (S, L), the tokens that choose between ways to round: every fourth sequence where a method asks."""
        apart = np.zeros(self.sequences.shape, bool)
        if any(self.methods[scheme.grid.bits].needs_held_out for scheme in self.schemes.values()):
            apart[_HELD_OUT - 1 :: _HELD_OUT] = True
            apart[-1] |= not apart.any()
        return apart

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

    def method_of(self, scheme: IntScheme) -> Method:
        """What rounds a weight of ``scheme``."""
        return self.methods[scheme.grid.bits]

    def steps(self, config: ModelConfig) -> int:
        """How often a sequence runs through a layer."""
        return config.num_hidden_layers * 2 * len(self.sequences)

    def memory_bytes(self, config: ModelConfig) -> int:
        """Estimate of what :func:`calibrate` has in memory at its peak."""
        kinds = [(list(kind.shapes(config).values()), kind.inputs.values()) for kind in distinct_kinds(config)]
        layer = max(sum(math.prod(shape) for shape in shapes) for shapes, _ in kinds)
        alone = [linear for kind in distinct_kinds(config) for linear in kind.linears if not linear.stack]
        moments = max(sum(read.size(config) ** 2 for read in inputs) for _, inputs in kinds)
        widest = max(kind.widest_input(config) for kind in distinct_kinds(config))
        run = _RUN_ARRAYS * max(_RUN_ELEMENTS, int(self.sequences.shape[1]) * widest)
        rounding = 4 * max(math.prod(linear.shape(config)) for linear in alone)  # larger than what an expert has
        hidden = 2 * math.prod(self.sequences.shape) * config.hidden_size
        return 4 * (layer + (moments if self.needs_second_moment else 0) + max(run, rounding) + hidden)


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
        rounding = _read_rounding(calibration, config, checkpoint, layer, scratch)
        errors: dict[str, tuple[float, float]] = {}
        if rounding.schemes or rounding.stacked:
            statistics, routed = rounding.statistics(runner, hidden, advance)
            errors = rounding.round(statistics)
            if routed is not None:
                errors |= rounding.round_experts(routed)
        else:
            advance(len(sequences))
        (scratch / _ERRORS).write_text(json.dumps(errors))
        if layer + 1 < config.num_hidden_layers:
            output = new_array(scratch / _OUTPUT, hidden.shape)
            for rows, run in rounding.runs(runner, hidden, with_inputs=False):
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


def notes_of(directory: Path, config: ModelConfig) -> tuple[str, ...]:
    """What to say of the experts that :func:`calibrate` rounded."""
    paths = [layer_directory(directory, layer) / _FEW for layer in range(config.num_hidden_layers)]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    if not (few := sum(found)):
        return ()
    every = len(found) * config.mixture.num_experts
    return (
        f"{few} of the {every} experts saw too few tokens of the calibration text and are rounded to the nearest; "
        "a longer --calibration, with more --calibration-tokens, reaches more of them.",
    )


@dataclass(frozen=True, eq=False)
class _LayerRounding:
    """One layer on its way to the weights that the engine computes with.

    Attributes:
        number: of the layer.
        weights: change from the checkpoint's to the engine's.
        schemes: of the linears that are rounded, by their names in the layer, but for those of experts.
        stacked: likewise of the experts.
        packed: the linears that have to stay as they are.
        directory: takes everything that is not as in the checkpoint.
    """

    calibration: Calibration
    config: ModelConfig
    number: int
    weights: LayerWeights
    schemes: Mapping[str, IntScheme]
    stacked: Mapping[str, IntScheme]
    packed: Set[str]
    directory: Path

    @property
    def path(self) -> str:
        """What the names of the layer's weights begin with in the checkpoint."""
        return f"model.layers.{self.number}."

    @property
    def kind(self) -> LayerKind:
        return layer_kind(self.config, self.number)

    def runs(self, runner: LayerRunner, hidden: np.ndarray, with_inputs: bool) -> Iterator[tuple[slice, LayerRun]]:
        """The layer over ``hidden`` (S, L, hidden_size), some sequences at a time: which, and the run."""
        sequences, length, size = hidden.shape
        step = max(1, _RUN_ELEMENTS // (self.kind.widest_input(self.config) * length))
        for start in range(0, sequences, step):
            rows = slice(start, min(start + step, sequences))
            batch = hidden[rows].reshape(-1, size)
            yield rows, runner.run(self.number, self.weights, batch, [length] * (rows.stop - start), with_inputs)

    def statistics(
        self, runner: LayerRunner, hidden: np.ndarray, advance: Callable[[int], object]
    ) -> tuple[dict[str, InputStatistics], Routed | None]:
        """Of every input that a linear of ``schemes`` reads, where the layer runs on ``hidden`` (S, L, hidden_size).

        And what the experts read, where some are rounded.
        """
        held_out, with_second_moment = self.calibration.held_out.reshape(-1), self.calibration.needs_second_moment
        collectors = {
            name: Collector(read.size(self.config), held_out, with_second_moment)
            for name, read in self.kind.inputs.items()
            if not self.schemes.keys().isdisjoint(self.kind.reader_names[name])
        }
        routed = self._routed(hidden, held_out) if self.stacked else None
        for rows, run in self.runs(runner, hidden, with_inputs=True):
            for name, collector in collectors.items():
                collector.add(run.inputs[name])
            if routed is not None and run.chosen is not None:
                tokens = slice(rows.start * hidden.shape[1], rows.stop * hidden.shape[1])
                routed.input[tokens], routed.chosen[tokens] = run.inputs[_EXPERTS_INPUT], run.chosen
            advance(rows.stop - rows.start)
        statistics = {name: collectors.pop(name).finish() for name in list(collectors)}
        for name, own in statistics.items():
            if not np.isfinite(own.mean_square).all():
                raise CheckpointError(
                    f"{self.path}{self.kind.reader_names[name][0]}: what it multiplies is too large for float32 on the "
                    "calibration text; the checkpoint is damaged, download or save it again"
                )
        return statistics, routed

    def _routed(self, hidden: np.ndarray, held_out: np.ndarray) -> Routed:
        """Room for what the experts read, most of it in a file."""
        tokens, chosen = len(held_out), self.config.mixture.num_experts_per_tok
        inputs = new_array(self.directory / _ROUTED, (tokens, hidden.shape[-1]))
        return Routed(inputs, np.empty((tokens, chosen), np.int32), held_out)

    def round_experts(self, routed: Routed) -> dict[str, tuple[float, float]]:
        """Round the experts of the layer; what :func:`output_errors` says of them. ``routed`` is used up."""

        def save(name: str, rounded: Rounded, scheme: IntScheme) -> None:
            save_rounded(self.directory, f"{self.path}{name}.weight", rounded, scheme.grid.bits)

        rounding = ExpertRounding(self.config, self.kind, self.weights, self.stacked, self.calibration.method_of, save)
        try:
            errors, few = rounding.round(routed)
        except OverflowError as error:
            raise CheckpointError(f"{self.path}mlp.experts: {error}; use --exclude '*.mlp.experts.*'") from error
        (self.directory / _FEW).write_text(json.dumps(few))
        (self.directory / _ROUTED).unlink()
        return {self.path + name: pair for name, pair in errors.items()}

    def round(self, statistics: dict[str, InputStatistics]) -> dict[str, tuple[float, float]]:
        """Fold and round the layer; ``statistics`` are used up.

        Returns:
            see :func:`output_errors`.
        """
        factors = {name: s for name, own in statistics.items() if (s := self._factors(name, own)) is not None}
        folded = fold_inputs(self.config, self.kind, self.weights, factors)
        changed = {name for name, weight in folded.items() if weight is not self.weights[name]}
        self.weights.update(folded)
        del folded
        errors: dict[str, tuple[float, float]] = {}
        for name in list(statistics):
            own = statistics.pop(name)
            errors |= self._round_readers(name, own.divided(factors[name]) if name in factors else own)
        for name in changed - {f"{linear}.weight" for linear in self.schemes}:
            save_array(self.directory, self.path + name, self.weights[name])
        return errors

    def _readers(self, name: str, statistics: InputStatistics) -> InputReaders:
        schemes = {linear: self.schemes[linear] for linear in self.kind.reader_names[name] if linear in self.schemes}
        weights = {linear: self.weights[f"{linear}.weight"] for linear in schemes}
        return InputReaders(self.config, self.kind.inputs[name], statistics, weights, schemes)

    def _factors(self, name: str, statistics: InputStatistics) -> np.ndarray | None:
        """What the input ``name`` is divided by; nothing where that cannot be folded."""
        producer = self.kind.inputs[name].producer
        if producer is None or not self.packed.isdisjoint((*self.kind.reader_names[name], producer)):
            return None
        return self.calibration.factors(self._readers(name, statistics))

    def _round_readers(self, name: str, statistics: InputStatistics) -> dict[str, tuple[float, float]]:
        """Round the linears that read the input ``name``."""
        readers = self._readers(name, statistics)
        if any(scheme.record.activation_scales == "static" for scheme in readers.schemes.values()):
            for reader in self._possible_readers(name):
                save_array(self.directory, f"{self.path}{reader}.input_scale", input_scale(statistics.largest))
        try:
            rounded = self.calibration.round(readers)
        except OverflowError as error:
            names = " or ".join(self.path + linear for linear in readers.schemes)
            raise CheckpointError(f"{names}: {error}; use --kernels stock") from error
        errors: dict[str, tuple[float, float]] = {}
        for linear, scheme in readers.schemes.items():
            weight = f"{linear}.weight"
            before = self.weights[weight]
            save_rounded(self.directory, self.path + weight, rounded[linear], scheme.grid.bits)
            values = scheme.grid.values(rounded.pop(linear), before.shape[1])
            errors[self.path + linear] = (
                statistics.output_square(before - values),
                statistics.output_square(before),
            )
            self.weights[weight] = values
        return errors

    def _possible_readers(self, name: str) -> list[str]:
        """The linears that the graph may have for an input: those of the checkpoint, and what they are fused to."""
        fused = [module for module, parts in self.kind.fused.items() if parts[0].reads.name == name]
        return [*self.kind.reader_names[name], *fused]


def _read_rounding(
    calibration: Calibration, config: ModelConfig, checkpoint: Checkpoint, layer: int, directory: Path
) -> _LayerRounding:
    """A layer as the checkpoint has it; ``directory`` takes what calibration makes of it."""
    path, names = f"model.layers.{layer}.", layer_kind(config, layer).shapes(config)
    schemes = {n.removeprefix(path): scheme for n, scheme in calibration.schemes.items() if n.startswith(path)}
    packed = {name for name in names if checkpoint.is_packed(path + name)}
    weights = read_layer(checkpoint, config, layer)
    stacks = layer_kind(config, layer).stacks
    stacked = {name: schemes.pop(name) for name in list(schemes) if name in stacks}
    return _LayerRounding(calibration, config, layer, weights, schemes, stacked, packed, directory)
