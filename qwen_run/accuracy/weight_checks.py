"""The weights a checkpoint stands for, and whether an engine holds them: the reading of the builder's own modules.

An engine whose weights are wrong computes with them without a fault, so that the reference which has the same weights
agrees with it. What catches it is this comparison, before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qwen_engine.graph_io import EMBEDDING, HEAD
from qwen_run.accuracy.report import Check
from qwen_run.engine_files.weights import EngineWeights, StoredLinear

# differing weights that a message names
_SHOWN = 4

# A calibrated row correlates so much with the checkpoint's or more: 4 bits leave above 0.9, another row has about 0.
_RELATED = 0.5
# Rows that are shorter than this share of a weight's root mean square are not judged: they may be rounded to nothing.
_SHORT = 1e-3


class CheckpointWeights:
    """Weights of a checkpoint, float32 and by Hugging Face's names, whether they are stored packed or not.

    Args:
        directory: of the checkpoint.

    Raises:
        CheckpointError, UnsupportedModel: it cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        from qwen_build.checkpoint.config import ModelConfig
        from qwen_build.checkpoint.safetensors import Checkpoint

        self.checkpoint = Checkpoint.open(directory)
        self.config = ModelConfig.from_hf(directory).as_stored(self.checkpoint)

    def __enter__(self) -> CheckpointWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self.checkpoint.close()

    def is_packed(self, linear: str) -> bool:
        """Whether the checkpoint stores ``linear`` as small integers."""
        from qwen_build.checkpoint.packed import is_packed

        return is_packed(self.checkpoint, linear)

    def vector(self, name: str) -> np.ndarray:
        """A norm's weight or a bias."""
        return self.checkpoint.read(name)

    def rows(self, linear: str, shape: tuple[int, int], rows: slice) -> np.ndarray:
        """Some rows of the weight of ``linear``, which has ``shape`` (out_features, in_features)."""
        from qwen_build.checkpoint.packed import read_linear

        if linear == HEAD and self.config.tie_word_embeddings:
            linear = EMBEDDING
        return read_linear(self.checkpoint, self.config.packed, linear, shape, rows.start, rows.stop)


def compare_weights(engine: Path, checkpoint: Path) -> Check:
    """Whether the engine has the weights of the checkpoint, rounded as the manifest says, to the last bit.

    Calibrated linears are not rounded to the nearest, and have factors of rows and columns in them that nobody keeps:
    each row has to correlate with the checkpoint's. Norms are not compared then, they have such factors too.

    Raises:
        EngineError, CheckpointError: one of them cannot be read.
    """
    found = EngineWeights(engine)
    records = (linear.record for linear in found.linears.values())
    calibrated = {one.name for one in records if one.output_error is not None or one.quantization.method == "folded"}
    with CheckpointWeights(checkpoint) as expected:
        vectors = [] if calibrated else list(found.vectors)  # calibration may scale norms
        differing = [name for name in vectors if not np.array_equal(found.vectors[name], expected.vector(name))]
        linears = [name for name, part in found.parts.items() if part.owner not in calibrated]
        differing += [name for name in linears if not all(_equal(name, found, expected))]
        related = {n: _relation(n, found, expected) for n, part in found.parts.items() if part.owner in calibrated}
        differing += [name for name, correlation in related.items() if not correlation >= _RELATED]
    if differing:
        shown = ", ".join(differing[:_SHOWN]) + (f" and {len(differing) - _SHOWN} more" if differing[_SHOWN:] else "")
        return Check("weights", False, f"the engine's differ from the checkpoint's, rounded as it is built: {shown}")
    besides = ""
    if related:
        besides = f"; rows of {len(related)} calibrated ones correlate with it by {min(related.values()):.3f} or more"
    return Check("weights", True, f"{len(linears)} linears equal the checkpoint's, rounded as it is built{besides}")


def _relation(name: str, found: EngineWeights, expected: CheckpointWeights) -> float:
    """The least correlation of a row with the checkpoint's, whose columns have the factors that fit best."""
    part = found.parts[name]
    shape = (part.stop - part.start, found.linears[part.owner].record.in_features)

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return ((values, expected.rows(name, shape, rows)) for rows, values in found.pieces(name))

    products, squares = np.zeros(shape[1]), np.zeros(shape[1])
    for values, weight in pairs():
        products += (values * weight).sum(axis=0, dtype=np.float64)
        squares += np.square(weight).sum(axis=0, dtype=np.float64)
    factors = np.divide(products, squares, out=np.zeros_like(products), where=squares > 0)
    sums = []
    for values, weight in pairs():
        scaled = weight * factors.astype(np.float32)
        products_of = ((values, scaled), (values, values), (scaled, scaled), (weight, weight))
        sums.append([np.einsum("nk,nk->n", a, b, dtype=np.float64) for a, b in products_of])
    dots, own, others, lengths = np.concatenate(sums, axis=1)
    sizes = np.sqrt(own * others)
    correlations = np.divide(dots, sizes, out=np.zeros_like(dots), where=sizes > 0)
    return float(correlations[lengths > _SHORT**2 * lengths.mean()].min(initial=1))


def _equal(name: str, found: EngineWeights, expected: CheckpointWeights) -> Iterator[bool]:
    part = found.parts[name]
    linear = found.linears[part.owner]
    shape = (part.stop - part.start, linear.record.in_features)
    for rows, values in found.pieces(name):
        weight = expected.rows(name, shape, rows)
        yield np.array_equal(values, weight if expected.is_packed(name) else _rounded(weight, linear))


def _rounded(weight: np.ndarray, linear: StoredLinear) -> np.ndarray:
    from qwen_build.quantization.scheme_table import make_scheme
    from qwen_build.quantization.schemes import dequantize

    stored, shape = linear.record.quantization, (weight.shape[0], weight.shape[1])
    scheme = make_scheme(
        stored.scheme,
        stored.group_size or 32,
        stored.symmetric,
        stored.activations,
        stored.kernels,
        stored.weight_scales,
        stored.activation_scales,
    )
    return dequantize(scheme, scheme.quantize(weight), shape)
