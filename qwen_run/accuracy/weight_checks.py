"""Whether an engine holds the weights of its checkpoint: every norm, bias, row and block of columns.

An engine whose weights are wrong computes with them without a fault, so that the reference which has the same weights
agrees with it. What catches it is this comparison, before anything runs. It shares nothing with the builder where
``checkpoint_weights.py`` reads the checkpoint, and nothing is rounded here. Whatever grid the builder chose, a value
that was rounded to the nearest lies within half a step; see ``weight_errors.py`` for what else healthy rounding leaves.

Calibration may divide what a linear reads by a factor for each column and multiply the linear's columns with it
(SmoothQuant, AWQ). The division goes into the norm or linear before, see :data:`PRODUCERS`, and is known from there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qwen_engine.manifest import Quantization
from qwen_engine.sizes import ModelSizes
from qwen_run.accuracy.builder_weights import BuilderWeights, open_weights
from qwen_run.accuracy.checkpoint_weights import CheckpointWeights
from qwen_run.accuracy.gguf_weights import GgufWeights
from qwen_run.accuracy.report import Check
from qwen_run.accuracy.weight_errors import (
    BLOCK_COLUMNS,
    GridValues,
    Sums,
    WeightErrors,
    count_misses,
    known_errors,
    part_sums,
    weight_errors,
)
from qwen_run.engine_files.weights import EngineWeights, WeightPart

# linear of a decoder layer -> what takes a factor of the columns it reads
PRODUCERS = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "self_attn.o_proj": "self_attn.v_proj",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.up_proj",
    "mlp.shared_expert.down_proj": "mlp.shared_expert.up_proj",
}
# linears whose columns never have factors: what experts read, the router reads too
_UNDIVIDED = re.compile(r"mlp\.(experts\.\d+\..+|shared_expert\.(gate|up)_proj)")
_LAYER = re.compile(r"(model\.layers\.\d+\.)(.+)")

# Methods that may fold factors into a linear or what computes its input.
FOLDING = ("awq", "smoothquant", "folded")

# method of rounding -> how many times the error of rounding to the nearest a weight may have; its rows and blocks by
# chance a little more. Measured of healthy engines of 1M to 135M weights: 0.7 to 1.1, and 1.1 to 1.5 with gptq, which
# moves errors between columns.
MOST_EXCESS = {"rtn": 1.5, "awq": 1.5, "smoothquant": 1.5, "gptq": 2.5, "auto": 2.5}
# methods whose values need not be the nearest
FEEDING_BACK = ("gptq", "auto")
_BY_CHANCE = 9.0
# Share of the values of a weight, of a block of columns and of a row that may be further off than the steps of a grid
# explain. Measured 0.03, 0.05 and 0.04; of one row with gptq 0.6, where other rows have 0.75.
_FAR_WHOLE, _FAR_BLOCK, _FAR_ROW, _FAR_ROW_GPTQ = 0.1, 0.25, 0.25, 0.7

# Deviations that are no chance: so many times what independent errors of the known size make of a mean. Measured up to
# 10.5, of a model whose weights were on a coarse grid already; else up to 5.
_CHANCE = 20.0
# A grid that clips shortens what it rounds, by about the squared relative error; measured up to 2.5 times that.
_SHORTENED = 3.5
# Whatever chance and clipping explain, no part becomes so much longer or shorter.
_MOST = 0.5
# The mean difference of a whole weight, in steps; measured up to 0.02. Of a row, chance adds to it.
_OFFSET, _ROW_OFFSET = 0.1, 0.29 * _CHANCE

# Where a factor is known only as well as the length of a row, some values miss the nearest: so many times the relative
# error of the factor in steps; measured up to 0.6 times. And a few more.
_BLURRED, _FEW = 1.2, 0.005

# The relative error of factors that are fitted to the columns themselves.
_FITTED = 0.05

# What folding in float32 may leave of a difference, of a weight's or vector's size.
_FLOAT = 1e-4

# differing weights that a message names
_SHOWN = 4


@dataclass
class _Comparison:
    """Both sides, and what was found so far.

    Attributes:
        complaints: by the name of a linear or vector.
        lengths: how many times the checkpoint's each row of a producer is, and the relative error of that.
        excess: the largest of a weight, by method.
    """

    found: EngineWeights
    expected: CheckpointWeights | GgufWeights | BuilderWeights
    complaints: dict[str, str] = field(default_factory=dict)
    lengths: dict[str, tuple[np.ndarray, float]] = field(default_factory=dict)
    excess: dict[str, float] = field(default_factory=dict)

    def stored(self, name: str) -> Quantization | None:
        """How the linear that Hugging Face calls ``name`` is stored."""
        part = self.found.parts.get(name)
        return self.found.linears[part.owner].record.quantization if part else None

    def folds(self, name: str) -> bool:
        """Whether ``name`` may have factors of its columns."""
        stored = self.stored(name)
        return stored is not None and stored.method in FOLDING

    def readers(self, producer: str) -> list[str]:
        """The linears of the same layer whose columns' factors go into ``producer``."""
        if (match := _LAYER.fullmatch(producer)) is None:
            return []
        return [match[1] + name for name, own in PRODUCERS.items() if own == match[2]]


def compare_weights(engine: Path, checkpoint: Path) -> Check:
    """Whether the engine has the weights of the checkpoint, rounded as the manifest says.

    Raises:
        EngineError, CheckpointError: one of them cannot be read.
    """
    found = EngineWeights(engine)
    both = _Comparison(found, open_weights(checkpoint, found.manifest.origin.adapters))
    for name, part in both.found.parts.items():  # producers come before what reads their outputs
        if complaint := _compare_linear(both, name, part):
            both.complaints[name] = complaint
    for name in both.found.vectors:
        if complaint := _compare_vector(both, name):
            both.complaints[name] = complaint
    if both.complaints:
        shown = [f"{name} ({words})" for name, words in list(both.complaints.items())[:_SHOWN]]
        more = len(both.complaints) - _SHOWN
        names = ", ".join(shown) + (f" and {more} more" if more > 0 else "")
        return Check("weights", False, f"the engine's are not the checkpoint's: {names}")
    errors = [f"{method} {excess:.2f}" for method, excess in sorted(both.excess.items())]
    besides = f"; largest error over that of rounding to the nearest: {', '.join(errors)}" if errors else ""
    count = f"{len(both.found.parts)} linears and {len(both.found.vectors)} vectors"
    return Check("weights", True, f"{count} are the checkpoint's{besides}")


def _compare_linear(both: _Comparison, name: str, part: WeightPart) -> str | None:
    """What is wrong with a linear, if something is."""
    stored = both.stored(name)
    assert stored is not None
    if both.expected.is_packed(name) or (not stored.group_size and stored.method != "folded"):
        equal = all(np.array_equal(values, both.expected.rows(name, rows)) for rows, values in both.found.pieces(name))
        return None if equal else "not equal to the bit"
    factors, noise = _column_factors(both, name)
    is_producer = any(map(both.folds, both.readers(name)))
    pieces, lengths, misses = [], [], 0
    for values, expected, grid in _pieces(both, name, part):
        expected = expected * factors
        if is_producer:  # its rows have factors too, which its own lengths tell
            lengths.append(_lengths(values, expected))
            expected *= lengths[-1][:, None]
        if grid is None:
            pieces.append(part_sums(values, expected, np.zeros_like(values), np.zeros_like(values)))
        else:
            pieces.append(part_sums(values, expected, grid[1], known_errors(expected, grid[1], stored)))
            misses += count_misses(expected, grid, stored.bits)
    errors = weight_errors(pieces, misses)
    blur = noise
    if is_producer:
        both.lengths[name] = np.concatenate(lengths), _noise(errors)
        blur += _noise(errors)
    if not stored.group_size:
        worst = max(float(parts.relative_error[parts.judged].max(initial=0)) for parts in (errors.rows, errors.blocks))
        return None if worst <= _FLOAT + _CHANCE * noise else f"off by {worst:.2g} of its size"
    both.excess[stored.method] = max(both.excess.get(stored.method, 0.0), float(errors.whole.excess[0]))
    return _judge(errors, stored, noise, blur)


def _pieces(
    both: _Comparison, name: str, part: WeightPart
) -> Iterator[tuple[np.ndarray, np.ndarray, GridValues | None]]:
    """Values of the engine, the checkpoint's, and the engine's grid, some rows of a linear at a time."""
    linear = both.found.linears[part.owner]
    for rows, values in both.found.pieces(name):
        grid: GridValues | None = None
        if linear.record.quantization.group_size:
            grid = linear.integers(part.start + rows.start, part.start + rows.stop)
            values = (grid[0].astype(np.float32) - grid[2]) * grid[1]
        yield values, both.expected.rows(name, rows), grid


def _lengths(values: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """How many times ``expected`` each row of ``values`` is, by least squares."""
    squares = np.einsum("nk,nk->n", expected, expected)
    products = np.einsum("nk,nk->n", values, expected)
    return np.asarray(np.divide(products, squares, out=np.ones_like(squares), where=squares > 0))


def _column_factors(both: _Comparison, name: str) -> tuple[np.ndarray | np.float32, float]:
    """What the columns of ``name`` are multiplied with, float32 (in_features), and the relative error of that."""
    if not both.folds(name):
        return np.float32(1), 0.0
    match = _LAYER.fullmatch(name)
    layer, short = match.groups() if match else ("", name)
    if _UNDIVIDED.fullmatch(short):
        return np.float32(1), 0.0
    if short not in PRODUCERS:
        return _fitted_columns(both, name), _FITTED
    producer = layer + PRODUCERS[short]
    if producer in both.lengths:
        lengths, noise = both.lengths[producer]
        return (1 / _fed(lengths, short, both.found.manifest.model)).astype(np.float32), noise
    ours, theirs = both.found.vectors[f"{producer}.weight"], both.expected.vector(f"{producer}.weight")
    zero = (ours == 0) & (theirs == 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = np.where(zero, np.float32(1), theirs / ours)
    if not (np.isfinite(factors) & (factors > 0)).all():
        both.complaints[f"{producer}.weight"] = "no positive multiples of the checkpoint's"
        return np.float32(1), 0.0
    return factors, 0.0


def _fed(rows: np.ndarray, reader: str, model: ModelSizes) -> np.ndarray:
    """A number of each output of a producer, for each column of ``reader``: query heads share the outputs of v."""
    if reader != "self_attn.o_proj":
        return rows
    shared = model.num_attention_heads // model.num_key_value_heads
    return rows.reshape(model.num_key_value_heads, 1, -1).repeat(shared, axis=1).reshape(-1)


def _fitted_columns(both: _Comparison, name: str) -> np.ndarray:
    """The factors that fit best, of a linear of which it is not known what computes its input."""
    products: np.ndarray | float = 0.0
    squares: np.ndarray | float = 0.0
    for rows, values in both.found.pieces(name):
        weight = both.expected.rows(name, rows)
        products = products + (values * weight).sum(axis=0, dtype=np.float64)
        squares = squares + np.square(weight).sum(axis=0, dtype=np.float64)
    products, squares = np.asarray(products), np.asarray(squares)
    return np.asarray(np.divide(products, squares, out=np.ones_like(products), where=squares > 0), np.float32)


def _noise(errors: WeightErrors) -> float:
    """Relative error of the length of a row."""
    rows = errors.rows
    return float((rows.relative_error[rows.judged] / np.sqrt(rows.count[rows.judged])).max(initial=0))


def _judge(errors: WeightErrors, stored: Quantization, noise: float, blur: float) -> str | None:
    """What is wrong with a rounded weight, if something is.

    What was rounded to the nearest from values that are known to the last bits is right where every value is the
    nearest, on a grid that is not too coarse. Of all else the means are judged.

    Args:
        noise: relative error of the factors of its columns.
        blur: relative error of what it was rounded from; 0 where that is known to the last bits.
    """
    misses, whole, is_nearest = errors.not_nearest, errors.whole, stored.method not in FEEDING_BACK
    steps = float(np.sqrt(whole.square[0] / max(12 * whole.known[0], 1e-300)))  # of a typical value
    if is_nearest and misses > (_FEW + _BLURRED * blur * steps if blur else 0):
        return f"{misses:.1%} of its values are not the nearest"
    most = MOST_EXCESS.get(stored.method, MOST_EXCESS["gptq"])
    if (excess := float(whole.excess[0])) > most:
        return f"its error is {excess:.3g} times that of rounding"
    exact = is_nearest and not blur
    if not exact and not _is_near_one(whole, noise)[0]:
        return f"{whole.slope[0]:.4g} times the checkpoint's"
    if not exact and abs(offset := float(whole.offset[0])) > _OFFSET:
        return f"off by {offset:.2f} steps"
    if (far := float(whole.far_share[0])) > _FAR_WHOLE:
        return f"{far:.1%} of its values are far from the checkpoint's"
    most_far = _FAR_ROW if is_nearest else _FAR_ROW_GPTQ
    for kind, parts, far_share in (("row", errors.rows, most_far), ("columns", errors.blocks, _FAR_BLOCK)):
        wrong = parts.judged & (parts.excess > most * (1 + _BY_CHANCE / np.sqrt(parts.count)))
        wrong |= parts.far_share > far_share
        if not exact:
            wrong |= parts.judged & ~_is_near_one(parts, noise)
            wrong |= parts.judged & (np.abs(parts.offset) > _OFFSET + _ROW_OFFSET / np.sqrt(parts.count))
        if wrong.any():
            return _describe(kind, parts, int(wrong.argmax()), int(wrong.sum()))
    return None


def _describe(kind: str, parts: Sums, first: int, count: int) -> str:
    """What is wrong with the first of ``count`` rows or blocks of columns."""
    where = f"row {first}" if kind == "row" else f"columns from {first * BLOCK_COLUMNS}"
    words = f"{where} {parts.slope[first]:.3g} times the checkpoint's, {parts.far_share[first]:.0%} far from it"
    return f"{words}, error {parts.excess[first]:.3g} times that of rounding; {count} like it"


def _is_near_one(parts: Sums, noise: float) -> np.ndarray:
    """Whether the values of each part have the checkpoint's size."""
    known = np.sqrt(parts.known / np.maximum(parts.square, 1e-300))
    excess = np.maximum(parts.excess, 1)
    chance = _CHANCE * (known * excess + noise) / np.sqrt(parts.count)
    shortened = _SHORTENED * (known * excess) ** 2
    longer = parts.slope - 1
    return np.asarray((longer <= chance.clip(max=_MOST)) & (longer >= -(chance + shortened).clip(max=_MOST)))


def _compare_vector(both: _Comparison, name: str) -> str | None:
    """What is wrong with a norm or bias, if something is."""
    ours, theirs = both.found.vectors[name], both.expected.vector(name)
    module, _, kind = name.rpartition(".")
    if np.array_equal(ours, theirs):
        return None
    if not any(map(both.folds, both.readers(module))):
        match = _LAYER.fullmatch(module)
        unknown = match and any(both.folds(n) for n in _unknown_readers(both, match[1]))
        return None if unknown and kind == "weight" else f"not equal to the bit, {_times(ours, theirs)}"
    if kind == "weight":  # what it was divided by is compared in the linears that read it
        return both.complaints.get(name)
    lengths, noise = both.lengths[module]
    error = np.linalg.norm(ours - theirs * lengths) / np.linalg.norm(theirs * lengths)
    return None if error <= _FLOAT + _CHANCE * noise else f"off by {error:.2g} of its size"


def _unknown_readers(both: _Comparison, layer: str) -> list[str]:
    """Linears of a layer of which it is not known what computes their inputs."""
    own = (name.removeprefix(layer) for name in both.found.parts if name.startswith(layer))
    return [layer + short for short in own if short not in PRODUCERS and not _UNDIVIDED.fullmatch(short)]


def _times(ours: np.ndarray, theirs: np.ndarray) -> str:
    """How much ``ours`` is off, in a few words."""
    size = float(np.square(theirs, dtype=np.float64).sum())
    slope = float(np.sum(ours * theirs, dtype=np.float64)) / size if size else 0.0
    return f"{slope:.4g} times the checkpoint's"
