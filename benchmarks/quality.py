"""Distance from the float model against bytes: our schemes beside llama.cpp's types, on equal text.

    python -m benchmarks.quality --checkpoint DIR --venv build/peers
    python -m benchmarks.quality --checkpoint DIR rounded              one group of ours, without llama.cpp
    python -m benchmarks.quality --checkpoint DIR --scheme "mixed: --quant int4 --quant-config rules.json"

``--venv`` is an environment that has llama-cpp-python (``python -m benchmarks.peers --install build/peers`` makes one).
Both sides run as they run for users: activations rounded, a cache in float16. The reference is our float32 engine;
the row F32 of llama.cpp says how near a program can come. Bytes are those of all weights, embedding, head, norms and
biases; tokenizers and rotary tables are left out on both sides.

The importance matrix is what llama.cpp's own tool computes, the mean square of every column that a matrix reads, of the
very tokens that our methods calibrate with. Texts that measure are those of ``TEXTS``; none of them calibrates.

What is finished stays in ``--work``; the same command goes on where it was interrupted. An empty ``--work`` does
everything again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command import run, say
from benchmarks.peer_environments import find_pythons
from benchmarks.quality_report import write_report
from benchmarks.schemes import RESULTS, Comparison, Engines
from benchmarks.texts import HELD_OUT, by_hash, library_documents
from benchmarks.write_gguf import gguf_name, gguf_rows, write_gguf
from qwen_build.calibration.layer_runner import LayerRunner, embed, final_norm, read_layer
from qwen_build.calibration.text import read_sequences
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.files import read_json
from qwen_build.checkpoint.locate import resolve_checkpoint
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.graph.architecture import LAYER, layer_kind
from qwen_engine.errors import QwenError
from qwen_engine.manifest import Manifest
from qwen_run.accuracy.checkpoint_weights import CheckpointWeights
from qwen_run.accuracy.datasets import Document, load_dataset
from qwen_run.accuracy.journal import Journal
from qwen_run.accuracy.logits import FullLogits, Positions, compare, following_tokens
from qwen_run.accuracy.metrics import summarise_positions
from qwen_run.bench.measure import processor_name
from qwen_run.engine_files.weights import EngineWeights
from qwen_run.inspection.linears import linear_rows, totals
from qwen_run.runtime.engine import Engine
from qwen_run.text.tokenizer import Tokenizer

WORKER = Path(__file__).with_name("quality_worker.py")

# scheme -> the options of qwen-build that make it, from few bits to many
LADDER = {
    "int4, int4 head": "--quant int4 --embedding-quant int4",
    "int4 g64, int6 head": "--quant int4 --group-size 64 --embedding-quant int6",
    "int4, int6 head": "--quant int4 --embedding-quant int6",
    "int4-mixed": "--quant int4-mixed",
    "int4": "--quant int4",
    "int5, int6 head": "--quant int5 --embedding-quant int6",
    "int5": "--quant int5",
    "int6, int6 head": "--quant int6 --embedding-quant int6",
    "int6": "--quant int6",
}
# group -> scheme -> the same; {scheme} is the size of the engine of a row before it, all files
OURS: dict[str, dict[str, str]] = {
    "rounded": {
        **LADDER,
        "int4 g64": "--quant int4 --group-size 64",
        "int4 g128": "--quant int4 --group-size 128",
        "int4 symmetric": "--quant int4 --symmetric",
        **{f"int{bits} g64": f"--quant int{bits} --group-size 64" for bits in (5, 6)},
        **{f"int{bits}, scales of groups": f"--quant int{bits} --activation-scales group" for bits in (4, 5, 6)},
        "int8 g128": "--quant int8 --group-size 128",
        "int8": "--quant int8",
        "int8, int8x2": "--quant int8 --activations int8x2",
    },
    "calibrated": {
        **{f"{name}, auto": f"{options} --int4-method auto" for name, options in LADDER.items()},
        **{f"int4, {method}": f"--quant int4 --int4-method {method}" for method in ("gptq", "awq")},
        "smoothquant": "--quant smoothquant",
        **{f"mixed, size of {name}": f"--quant auto --max-size {{{name}}}" for name in ("int4", "int5", "int6")},
    },
}
# llama.cpp's types; those of MATRIX are made with an importance matrix too
TYPES = ("F32", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_XS")
MATRIX = ("Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_XS")

# what measures, by name: articles of WikiText-2, and modules of Python's standard library
TEXTS: dict[str, Callable[[], Iterable[Document]]] = {
    "wikitext2": lambda: load_dataset(str(HELD_OUT)).documents,
    "library": lambda: by_hash(library_documents("evaluation")),
}


@dataclass(frozen=True)
class Side:
    """A file or engine that was measured: how its logits are had, how many bytes it has, its matrices' errors.

    Attributes:
        errors: of each kind of linear, see :func:`errors_by_kind`; None where columns were scaled.
        files_bytes: of all files, tokenizer and graph among them.
    """

    logits: Callable[[str, np.ndarray], list[Positions]]
    size_bytes: int
    errors: dict[str, list[float]] | None
    files_bytes: int


def calibrates(options: str) -> bool:
    """Whether these options of ``qwen-build`` read a text."""
    plain = "--int4-method" not in options or "--int4-method rtn" in options
    return "--quant auto" in options or "--quant smoothquant" in options or not plain


def text_windows(tokenizer: Tokenizer, documents: Iterable[Document], count: int, length: int) -> np.ndarray:
    """Token ids (count, length): windows evenly spread over the first million characters of ``documents``.

    Raises:
        QwenError: they have fewer tokens.
    """
    token_ids: list[int] = []
    characters = 0
    for document in documents:
        if characters > 1_000_000:
            break
        token_ids += tokenizer.encode(document.document)
        characters += len(document.document)
    windows = np.array(token_ids[: len(token_ids) // length * length]).reshape(-1, length)
    if len(windows) < count:
        raise QwenError(f"a text has {len(windows)} windows of {length} tokens, not {count}; take fewer --windows")
    return np.asarray(windows[np.linspace(0, len(windows) - 1, count).astype(int)])


def input_importance(directory: Path, config: ModelConfig, sequences: np.ndarray) -> dict[str, np.ndarray]:
    """GGUF's name of every linear -> the mean square of each column that it reads, float32 (in_features)."""
    importance: dict[str, np.ndarray] = {}
    with Checkpoint.open(directory) as checkpoint:
        runner = LayerRunner(config, sequences.shape[1], threads=2)
        hidden = embed(checkpoint, config, sequences.reshape(-1)).reshape(*sequences.shape, -1)
        for layer in range(config.num_hidden_layers):
            weights, kind = read_layer(checkpoint, config, layer), layer_kind(config, layer)
            sums: dict[str, np.ndarray] = {}
            for sequence in hidden:
                ran = runner.run(layer, weights, sequence, [len(sequence)])
                for name, x in ran.inputs.items():
                    sums[name] = sums.get(name, 0) + np.square(x, dtype=np.float64).sum(axis=0)
                sequence[...] = ran.output
            for name, total in sums.items():
                for linear in kind.reader_names[name]:
                    key = gguf_name(f"model.layers.{layer}.{linear}.weight")
                    importance[key] = (total / sequences.size).astype(np.float32)
        last = final_norm(checkpoint, config, hidden.reshape(-1, config.hidden_size))
        if not config.tie_word_embeddings:
            importance[gguf_name("lm_head.weight")] = np.square(last, dtype=np.float64).mean(0).astype(np.float32)
    return importance


def errors_by_kind(
    checkpoint: Path, stored: Iterable[tuple[str, slice, np.ndarray]], bits: Mapping[str, float]
) -> dict[str, list[float]]:
    """Of each kind of linear of the layers: squared error over squared size of its weights, and bits of a weight.

    Args:
        stored: name of a linear, some of its rows, and their values, float32 (rows, in_features).
        bits: of a weight of each linear, everything counted.
    """
    sums: dict[str, np.ndarray] = {}
    expected = CheckpointWeights(checkpoint)
    for name, rows, values in stored:
        weight = expected.rows(name, rows)
        kind = name.rpartition(".")[2]
        found = [float(np.square(values - weight).sum(dtype=np.float64)), float(np.square(weight).sum())]
        sums[kind] = sums.get(kind, 0) + np.array([*found, bits[name] * weight.size, weight.size])
    return {kind: [error / square, stored_bits / size] for kind, (error, square, stored_bits, size) in sums.items()}


class Quality:
    """One checkpoint: its reference, the texts, and every side that is measured on them."""

    def __init__(self, checkpoint: str | None, arguments: argparse.Namespace) -> None:
        located = resolve_checkpoint(checkpoint)
        self.path, self.name = located.path, located.name
        self.work = arguments.work / located.name
        self.threads, self.tokens = arguments.threads, arguments.calibration_tokens
        self.engines = Engines(checkpoint, self.work / "engines")
        reference = self.engines.ready("--quant none")
        self.config = ModelConfig.from_hf(located.path)
        tokenizer = Tokenizer.load(located.path)
        self.comparisons = {
            name: Comparison(
                reference,
                text_windows(tokenizer, documents(), arguments.windows, arguments.window),
                [],
                arguments.threads,
                self.work / f"logits-{name}",
            )
            for name, documents in TEXTS.items()
        }
        self.settings = {
            "checkpoint": dict(Manifest.read(reference).origin.sha256),
            "texts": {
                name: hashlib.sha256(one.windows.tobytes()).hexdigest() for name, one in self.comparisons.items()
            },
            "calibration_tokens": self.tokens,
        }

    def measure(self, make: Callable[[], Side]) -> dict[str, Any]:
        """The figures of a side: of every text KL and top-1 as (value, low, high)."""
        side = make()
        result: dict[str, Any] = {"bytes": side.size_bytes, "errors": side.errors, "files": side.files_bytes}
        for text, comparison in self.comparisons.items():
            metrics = summarise_positions("original", side.logits(text, comparison.windows))
            found = {metric.name: (metric.value, metric.low, metric.high) for metric in metrics}
            result[text] = {"kl": found["original.kl_mean"], "top1": found["original.top1"]}
        return result

    def ours(self, options: str, before: Mapping[str, Mapping[str, Any]]) -> Side:
        """The engine that these options of ``qwen-build`` make.

        Args:
            before: what was measured of other sides; ``{NAME}`` in ``options`` is the size of all files of NAME.

        Raises:
            QwenError: NAME is none of them, or the build fails.
        """
        try:
            options = options.format_map({name: f"{one['files'] / 1e6:.2f}MB" for name, one in before.items()})
        except KeyError as error:
            raise QwenError(f"it is to be as large as {error}, which was not measured") from None
        options += self._calibration(options)
        self.engines.build(options)
        directory = self.engines.path(options)
        engine = Engine.load(directory, self.threads)
        stored = EngineWeights(directory)
        vectors = sum(vector.nbytes for vector in stored.vectors.values())
        size = totals(stored.manifest, linear_rows(stored.manifest)).stored_bytes + vectors
        scaled = any(one.quantization.method in ("awq", "smoothquant", "folded") for one in stored.manifest.linears)
        return Side(
            lambda text, windows: [self.comparisons[text].positions(engine, ids) for ids in windows.tolist()],
            size,
            None if scaled else errors_by_kind(self.path, *_engine_weights(stored)),
            sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
        )

    def _calibration(self, options: str) -> str:
        return f" --calibration-tokens {self.tokens}" if self.tokens and calibrates(options) else ""

    def theirs(self, python: Path, kind: str, matrix: bool) -> Side:
        """llama.cpp's file of this type."""
        import gguf

        source = self.work / "float.gguf"
        target = source if kind == "F32" else self.work / f"{kind}{'-matrix' * matrix}.gguf"
        if not source.exists():
            write_gguf(self.path, source, "F32", "F32")
        importance: list[Path] = []
        if matrix:
            importance = [self.work / f"importance-{self.tokens}.npz"]
            if not importance[0].exists():
                sequences = read_sequences(self.path, self.config, None, self.tokens)
                importance_of = input_importance(self.path, self.config, sequences)
                np.savez(importance[0], allow_pickle=False, **importance_of)
        if target != source:
            _call(python, "quantize", source, target, kind, *importance)
        tensors = gguf.GGUFReader(target).tensors

        def positions(text: str, windows: np.ndarray) -> list[Positions]:
            with tempfile.TemporaryDirectory(dir=self.work) as folder:
                ids, found = Path(folder, "windows.npy"), Path(folder, "logits.npy")
                np.save(ids, windows)
                _call(python, "logits", target, ids, found, self.threads)
                comparison = self.comparisons[text]
                return [
                    compare(FullLogits(comparison.expected(window)), rows, following_tokens(window))
                    for window, rows in zip(windows.tolist(), np.load(found, mmap_mode="r"), strict=True)
                ]

        size = sum(int(tensor.n_bytes) for tensor in tensors)
        errors = errors_by_kind(self.path, *_gguf_weights(tensors, self.config, read_json(self.path / "config.json")))
        return Side(positions, size, errors, target.stat().st_size)


def _engine_weights(stored: EngineWeights) -> tuple[Iterator[tuple[str, slice, np.ndarray]], dict[str, float]]:
    """Arguments of :func:`errors_by_kind`."""
    bits = {row.name: row.bits_per_weight for row in linear_rows(stored.manifest)}
    own = {name: bits[part.owner] for name, part in stored.parts.items() if LAYER.match(name)}
    return ((name, rows, values) for name in own for rows, values in stored.pieces(name)), own


def _gguf_weights(
    tensors: Sequence[Any], config: ModelConfig, settings: dict[str, Any]
) -> tuple[Iterator[tuple[str, slice, np.ndarray]], dict[str, float]]:
    """Arguments of :func:`errors_by_kind`; ``settings`` are the checkpoint's ``config.json``."""
    import gguf

    by_name = {tensor.name: tensor for tensor in tensors}
    own = {
        (name := f"model.layers.{layer}.{linear.name}"): by_name[gguf_name(f"{name}.weight")]
        for layer in range(config.num_hidden_layers)
        for linear in layer_kind(config, layer).linears
    }
    bits = {name: 8 * int(tensor.n_bytes) / int(tensor.n_elements) for name, tensor in own.items()}

    def stored() -> Iterator[tuple[str, slice, np.ndarray]]:
        for name, tensor in own.items():
            rows = gguf.dequantize(tensor.data, tensor.tensor_type)
            places = np.argsort(gguf_rows(f"{name}.weight", len(rows), settings))
            yield name, slice(0, len(rows)), rows[places]

    return stored(), bits


def _call(python: Path, *words: object) -> None:
    done = subprocess.run([python, "-P", WORKER, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise QwenError((done.stderr.strip().splitlines() or [f"llama.cpp ended with {done.returncode}"])[-1])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "groups", nargs="*", metavar="GROUP", help=f"some of: {', '.join(OURS)}; all if neither any nor --scheme"
    )
    parser.add_argument("--checkpoint", help="directory or Hub id; the demo if left out")
    parser.add_argument("--venv", type=Path, action="append", default=[], help="environment with llama-cpp-python")
    parser.add_argument("--scheme", action="append", default=[], metavar="NAME: OPTIONS", help="one more of ours")
    parser.add_argument("--types", nargs="*", default=TYPES, metavar="TYPE", help=f"of {', '.join(TYPES)}")
    parser.add_argument("--windows", type=int, default=8, help="of each text")
    parser.add_argument("--window", type=int, default=1024, metavar="TOKENS", help="of each")
    parser.add_argument("--calibration-tokens", type=int, metavar="N", help="of ours and of the importance matrix")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/quality"), metavar="DIR")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR")
    arguments = parser.parse_args()
    if unknown := (set(arguments.groups) - set(OURS)) | (set(arguments.types) - set(TYPES)):
        parser.error(f"no group or type {', '.join(sorted(unknown))}; choose from {', '.join((*OURS, *TYPES))}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    pythons = find_pythons(arguments.venv)
    if arguments.venv and "llama.cpp" not in pythons:
        raise QwenError(f"{arguments.venv[0]} has no llama-cpp-python; make one with benchmarks.peers --install")
    quality = Quality(arguments.checkpoint, arguments)
    sides: dict[str, tuple[str, Callable[[], Side]]] = {}
    results: dict[str, dict[str, Any]] = {}
    schemes = {group: OURS[group] for group in arguments.groups or (() if arguments.scheme else OURS)}
    for scheme in arguments.scheme:
        name, _, options = scheme.partition(":")
        group = "calibrated" if calibrates(options) else "rounded"
        schemes[group] = schemes.get(group, {}) | {name.strip(): options.strip()}
    for group, own in schemes.items():
        for name, options in own.items():
            sides[name] = (f"ours {group}", partial(quality.ours, options, results))
    if python := pythons.get("llama.cpp"):
        for kind in arguments.types:
            sides[kind] = ("llama.cpp", partial(quality.theirs, python, kind, matrix=False))
        for kind in [kind for kind in arguments.types if kind in MATRIX]:
            sides[f"{kind}, matrix"] = ("llama.cpp, matrix", partial(quality.theirs, python, kind, matrix=True))
    digest = hashlib.sha256(json.dumps(quality.settings).encode()).hexdigest()[:12]
    report = arguments.output / f"quality-{quality.name}.md"
    head = (
        f"{quality.name}, {arguments.windows} windows of {arguments.window} tokens of each text; {processor_name()}, "
        f"{arguments.threads} threads; {datetime.now(UTC):%Y-%m-%d}"
    )
    with Journal(quality.work / f"results-{digest}.jsonl", quality.settings, resume=True) as journal:
        for name, (family, side) in sides.items():
            try:
                measured = dict(journal.do("side", name, partial(quality.measure, side)))
            except QwenError as error:
                say(f"{name} is left out: {error}")
                continue
            results[name] = {**measured, "family": family}
            say(f"{name}: {measured['bytes'] / 1e6:.2f} MB, KL {measured[next(iter(TEXTS))]['kl'][0]:.3e}")
            write_report(report, head, list(TEXTS), results)
    if not results:
        raise QwenError("nothing was measured")
    print(report.read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    run(main)
