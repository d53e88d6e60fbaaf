"""What rounding costs that an engine does as it runs: of what its products read, and of keys and values in the cache.

    python -m benchmarks.activations                        the demo, with int4 and with int8 weights
    python -m benchmarks.activations --checkpoint DIR int4

The reference is transformers in float32 with the very weights that the engines hold, so that rounding these does not
count, and with a cache in float32. Each engine reads the same held-out windows of WikiText-2 with the activations it
was built for, those for int8x2 once more told to compute in float32.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks.command import run
from benchmarks.schemes import RESULTS, Engines, held_out_windows
from qwen_build.checkpoint.locate import resolve_checkpoint
from qwen_engine.manifest import WEIGHTS_FILE, Manifest
from qwen_run.accuracy.both_sides import engine_logits, following_tokens
from qwen_run.accuracy.logits import FullLogits, compare
from qwen_run.accuracy.recipe import Recipe
from qwen_run.accuracy.reference import HuggingFace
from qwen_run.bench.measure import processor_name
from qwen_run.runtime.engine import Engine
from qwen_run.text.tokenizer import Tokenizer

WEIGHTS = ("int4", "int8")
CACHES = ("float16", "int8", "float32")
ROUNDED = ("int8", "int8x2")
ACTIVATIONS = (*ROUNDED, "float32")

DEFINITIONS = """\
Distance: Euclidean norm of the difference of the logits of all positions over that of the reference's, the mean of each
position taken off both, which no probability depends on. KL: mean over positions of KL(reference || engine), natural
logarithm, in float64; sums in another order make 1e-11 of it. The last column: distance with int8x2 over distance with
float32 activations."""


@dataclass(frozen=True)
class Distance:
    """How far logits are from the reference's: see :data:`DEFINITIONS`."""

    distance: float
    kl: float


def distance(pairs: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Distance:
    """The distance over all of ``pairs``.

    Args:
        pairs: the reference's logits, the engine's, both (T, vocab_size) float32, and the tokens that follow, (T,).
    """
    error = norm = kl = 0.0
    positions = 0
    for expected, found, following in pairs:
        centred = expected - expected.mean(-1, keepdims=True, dtype=np.float64)
        error += float(np.square(found - found.mean(-1, keepdims=True, dtype=np.float64) - centred).sum())
        norm += float(np.square(centred).sum())
        kl += float(compare(FullLogits(expected), found, following).kl.sum())
        positions += len(found)
    return Distance(math.sqrt(error / norm), kl / positions)


class Reference:
    """The logits of transformers with an engine's weights, nothing else rounded, on ``windows`` (W, L)."""

    def __init__(self, checkpoint: Path, engine: Path, windows: np.ndarray, threads: int) -> None:
        recipe = replace(Recipe.read(engine).with_float_activations(), cache_dtype="float32")
        model = HuggingFace(checkpoint, threads, recipe)
        self._windows: list[list[int]] = windows.tolist()
        self._weights = Manifest.read(engine).parts[WEIGHTS_FILE].sha256
        self._logits = [[chunk.values for chunk in model.logits(window)] for window in self._windows]

    def distance(self, directory: Path, threads: int, float_activations: bool = False) -> Distance:
        """How far the engine in ``directory`` is, which has to have the same weights."""
        engine = Engine.load(directory, threads, float_activations=float_activations)
        assert engine.manifest.parts[WEIGHTS_FILE].sha256 == self._weights
        return distance(self._pairs(engine))

    def _pairs(self, engine: Engine) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for window, chunks in zip(self._windows, self._logits, strict=True):
            following, start = following_tokens(window), 0
            for expected, found in zip(chunks, engine_logits(engine, window), strict=True):
                yield expected, found, following[start : start + len(found)]
                start += len(found)


def measure(
    checkpoint: Path, engines: Engines, weights: str, windows: np.ndarray, threads: int
) -> Iterator[tuple[str, dict[str, Distance]]]:
    """For every dtype of the cache the distances by activations; the engines are built anew."""
    built: dict[tuple[str, str], Path] = {}
    for cache in CACHES:
        for activations in ROUNDED:
            options = f"--quant {weights} --activations {activations} --kv-cache-dtype {cache}"
            engines.build(options)
            built[cache, activations] = engines.path(options)
    reference = Reference(checkpoint, next(iter(built.values())), windows, threads)
    for cache in CACHES:
        found = {activations: reference.distance(built[cache, activations], threads) for activations in ROUNDED}
        found["float32"] = reference.distance(built[cache, "int8x2"], threads, float_activations=True)
        yield cache, found


def table_lines(results: Mapping[str, Mapping[str, Mapping[str, Distance]]]) -> Iterator[str]:
    """The lines of a Markdown table of weights -> cache -> activations -> distance."""
    head = ["weights", "cache", *ACTIVATIONS, *(f"KL {activations}" for activations in ACTIVATIONS), "int8x2, float32"]
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for weights, caches in results.items():
        for cache, found in caches.items():
            distances = [f"{found[activations].distance:.2e}" for activations in ACTIVATIONS]
            divergences = [f"{found[activations].kl:.2e}" for activations in ACTIVATIONS]
            ratio = found["int8x2"].distance / found["float32"].distance
            yield f"| {' | '.join([weights, cache, *distances, *divergences, f'{ratio:.3g} ×'])} |"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="*", metavar="QUANT", help=f"some of: {', '.join(WEIGHTS)}")
    parser.add_argument("--checkpoint", help="directory or Hub id; the demo if left out")
    parser.add_argument("--windows", type=int, default=4, help="of held-out text")
    parser.add_argument("--window", type=int, default=512, metavar="TOKENS", help="of each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR")
    parsed = parser.parse_args(arguments)
    if unknown := set(parsed.weights) - set(WEIGHTS):
        parser.error(f"no weights {', '.join(sorted(unknown))}; choose from {', '.join(WEIGHTS)}")
    return parsed


def main() -> None:
    arguments = parse_arguments()
    located = resolve_checkpoint(arguments.checkpoint)
    windows = held_out_windows(Tokenizer.load(located.path), arguments.windows, arguments.window)
    results: dict[str, dict[str, dict[str, Distance]]] = {}
    for weights in arguments.weights or WEIGHTS:
        with tempfile.TemporaryDirectory() as work:
            engines = Engines(arguments.checkpoint, Path(work))
            results[weights] = {}
            for cache, found in measure(located.path, engines, weights, windows, arguments.threads):
                results[weights][cache] = found
                print(f"{weights}, {cache} cache: {found}", file=sys.stderr, flush=True)
    head = (
        f"{located.name}, {arguments.windows} x {arguments.window} held-out tokens of WikiText-2; {processor_name()}, "
        f"onnxruntime {version('onnxruntime')}, torch {version('torch')}, transformers {version('transformers')}"
    )
    lines = [head, "", *table_lines(results), "", DEFINITIONS]
    arguments.output.mkdir(parents=True, exist_ok=True)
    report = arguments.output / f"activations-{located.name}.md"
    report.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(report.read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    run(main)
