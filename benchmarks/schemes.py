"""What each way to store the weights costs: size, distance from the float model, perplexity, summaries, speed.

    python -m benchmarks.schemes                                  the demo, all groups of schemes
    python -m benchmarks.schemes --checkpoint DIR int4 auto       two groups of another checkpoint
    python -m benchmarks.schemes choice --ending choice           those that the README's table has
    python -m benchmarks.schemes --windows 2 --summaries 0 int8   a quick look
    python -m benchmarks.schemes --window 8192 --windows 4 --summaries 0 float cache   caches over long contexts

The reference is our own float32 engine, whose logits `tests/whole/test_parity.py` compares with transformers': with the
demo the KL between them is 1e-11. Both sides read the same ids. The text is articles of WikiText-2 that neither
calibration nor `--quant auto` ever reads, and the built-in papers of the evaluation half.

What is finished stays in `--work`, the engines and a JSON line a scheme: the same command goes on where it was
interrupted, and only builds and compares what is new to it. An empty `--work` does everything again, after the builder
has changed for instance. Speeds come last and are measured anew, engines in turn, round by round: a busy or slow minute
of the machine then counts against all of them. While it compares, the reference's logits take 4 bytes times vocabulary
and tokens of disk there, 4 GB with the demo.

More than 400 lines: the table of schemes stands beside what builds and compares them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command import run, say
from benchmarks.scheme_report import write_report
from benchmarks.texts import HELD_OUT
from qwen_build.checkpoint.locate import resolve_checkpoint
from qwen_engine.errors import QwenError
from qwen_engine.manifest import Manifest
from qwen_run.accuracy.both_sides import answer_text, engine_logits, following_tokens, greedy, make_prompt, one_sequence
from qwen_run.accuracy.checkpoint_weights import CheckpointWeights
from qwen_run.accuracy.datasets import Document, built_in_documents, load_dataset
from qwen_run.accuracy.journal import Journal
from qwen_run.accuracy.logits import FullLogits, Positions, compare
from qwen_run.accuracy.metrics import Metric, rouge, summarise_positions
from qwen_run.api.llm import LLM
from qwen_run.bench.measure import processor_name
from qwen_run.engine_files.weights import EngineWeights
from qwen_run.inspection.linears import linear_rows, totals
from qwen_run.runtime.engine import Engine
from qwen_run.text.text_model import TextModel
from qwen_run.text.tokenizer import Tokenizer

RESULTS = Path(__file__).parent / "results"
WINDOW = 1024
SUMMARY_TOKENS = 64
PROMPT, ANSWER = 512, 64  # tokens of a timed run

GROUP_SIZES = (32, 64, 128)
W8A8 = "--weight-scales channel --activation-scales token"

# group -> scheme -> the options of qwen-build that make it
GROUPS: dict[str, dict[str, str]] = {
    # those that the README lets a user choose from, with its options alone
    "choice": {
        "float32": "--quant none",
        "int4": "--quant int4",
        "int4 gptq": "--quant int4 --int4-method gptq",
        "int4 auto": "--quant int4 --int4-method auto",
        **{f"int{bits}": f"--quant int{bits}" for bits in (5, 6, 8)},
        "smoothquant": "--quant smoothquant",
    },
    "mixes": {"int4": "--quant int4", "int4-mixed": "--quant int4-mixed"},
    "float": {"float32": "--quant none"},
    "int8": {
        **{f"int8 g{size}": f"--quant int8 --group-size {size}" for size in GROUP_SIZES},
        "int8 g32 asymmetric": "--quant int8 --asymmetric",
        "int8 channel/token": f"--quant int8 {W8A8}",
    },
    "smoothquant": {
        **{f"smoothquant {alpha}": f"--quant smoothquant --alpha {alpha}" for alpha in (0.3, 0.5, 0.8, "auto")},
        **{
            f"smoothquant {alpha} channel/token": f"--quant smoothquant --alpha {alpha} {W8A8}"
            for alpha in (0.5, "auto")
        },
        "smoothquant auto channel/static": "--quant smoothquant --alpha auto --weight-scales channel "
        "--activation-scales static",
    },
    "int4": {
        f"int4 g{size} {grid} {method}": f"--quant int4 --group-size {size} --{grid} --int4-method {method}"
        for method in ("rtn", "awq", "gptq", "auto")
        for grid in ("symmetric", "asymmetric")
        for size in GROUP_SIZES
    },
    # as large as a uniform scheme: {scheme} is the size of its engine
    "auto": {
        f"auto, size of {scheme}": f"--quant auto --max-size {{{scheme}}}"
        for scheme in ("int4 g64 asymmetric gptq", "int4 g32 asymmetric gptq", "int8 g64")
    },
    "auto-kl": {f"auto, KL {kl}": f"--quant auto --max-kl {kl}" for kl in (0.2, 0.05, 0.01)},
    "activations": {
        **{
            f"{quant} g32, {activations} activations": f"--quant {quant} --activations {activations}"
            for quant in ("int8", "int4")
            for activations in ("int8x2", "float32")
        },
        # where the default is a scale for a block
        **{
            f"int4 g32 asymmetric {method}, group activations": "--quant int4 --group-size 32 --asymmetric "
            f"--int4-method {method} --activation-scales group"
            for method in ("rtn", "gptq")
        },
    },
    "cache": {
        **{f"float32, {dtype} cache": f"--quant none --kv-cache-dtype {dtype}" for dtype in ("float16", "int8")},
        "int4 g32, int8 cache": "--quant int4 --kv-cache-dtype int8",
    },
    "embedding": {
        **{f"float32, {quant} embedding": f"--quant none --embedding-quant {quant}" for quant in ("int8", "int4")},
        "int4 g32, int4 embedding": "--quant int4 --embedding-quant int4",
    },
    "stock": {f"{quant} g32, stock kernels": f"--quant {quant} --kernels stock" for quant in ("int8", "int4")},
}
DEFAULT_GROUPS = ("float", "int8", "smoothquant", "int4", "auto")


class Engines:
    """The checkpoint's engines, each kept in a directory that its options name."""

    def __init__(self, checkpoint: str | None, directory: Path) -> None:
        self.checkpoint, self.directory = checkpoint, directory

    def path(self, options: str) -> Path:
        return self.directory / re.sub(r"[^\w.]+", "-", options).strip("-")

    def build(self, options: str) -> dict[str, Any]:
        """Run ``qwen-build`` in a process of its own; what it says with ``--json``.

        Raises:
            QwenError: it failed; its message.
        """
        checkpoint = [self.checkpoint] if self.checkpoint else []
        command = [sys.executable, "-P", "-m", "qwen_build.cli", *checkpoint, *shlex.split(options)]
        command += ["--output", str(self.path(options)), "--force", "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise QwenError((done.stderr.strip().splitlines() or ["it said nothing"])[-1].removeprefix("Error: "))
        summary: dict[str, Any] = json.loads(done.stdout)
        return summary

    def ready(self, options: str) -> Path:
        """The engine's directory, built if it is not there."""
        if not self.path(options).exists():
            self.build(options)
        return self.path(options)


def held_out_windows(tokenizer: Tokenizer, count: int, length: int) -> np.ndarray:
    """Token ids (count, length): windows of the held-out articles one after the other, evenly spread over them."""
    token_ids = [token for one in load_dataset(str(HELD_OUT)).documents for token in tokenizer.encode(one.document)]
    windows = np.array(token_ids[: len(token_ids) // length * length]).reshape(-1, length)
    if not 1 <= count <= len(windows):
        sys.exit(f"Error: the held-out text has {len(windows)} windows of {length} tokens, not {count}")
    return windows[np.linspace(0, len(windows) - 1, count).astype(int)]


class Comparison:
    """One engine after the other beside the float engine.

    Attributes:
        windows: token ids (W, L) that both sides read.
        papers: documents to be summarised.
    """

    def __init__(
        self, float_engine: Path, windows: np.ndarray, papers: Sequence[Document], threads: int, logits: Path
    ) -> None:
        """``logits``: a directory for those of the float engine."""
        self.reference = Engine.load(float_engine, threads)
        self.model = TextModel.of(self.reference) if papers else None
        self.windows, self.papers, self.threads = windows, papers, threads
        self._logits = logits
        self._pool = ThreadPoolExecutor(threads)

    def expected(self, token_ids: Sequence[int]) -> np.ndarray:
        """The float engine's logits, float32 (T, vocab_size), computed once."""
        path = self._logits / f"{hashlib.sha256(repr(token_ids).encode()).hexdigest()[:16]}.npy"
        if not path.exists():
            self._logits.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".unfinished.npy")
            np.save(unfinished, np.concatenate(list(engine_logits(self.reference, token_ids))))
            unfinished.rename(path)
        logits: np.ndarray = np.load(path, mmap_mode="r")
        return logits

    def positions(self, engine: Engine, token_ids: Sequence[int]) -> Positions:
        """Both sides on one sequence, a chunk at a time."""
        following, expected, start = following_tokens(token_ids), self.expected(token_ids), 0
        pieces: list[Positions] = []
        for found in engine_logits(engine, token_ids):
            shares = [rows for rows in np.array_split(np.arange(len(found)), self.threads) if len(rows)]
            pieces += self._pool.map(
                lambda rows, found=found, start=start: compare(
                    FullLogits(expected[start + rows]), found[rows], following[start + rows]
                ),
                shares,
            )
            start += len(found)
        return Positions.concatenate(pieces)

    def continuation(self, paper: Document) -> list[int]:
        """The float engine's greedy summary of ``paper``."""
        assert self.model is not None
        return greedy(LLM(self.model), make_prompt(self.model, paper, SUMMARY_TOKENS).token_ids, SUMMARY_TOKENS)

    def measure(self, directory: Path, continuations: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The figures of the engine in ``directory``: metrics by name as (value, low, high), and plain numbers."""
        engine = Engine.load(directory, self.threads)
        metrics = summarise_positions("original", [self.positions(engine, window) for window in self.windows.tolist()])
        if self.model is not None:
            metrics += self._summaries(engine, continuations)
        manifest = engine.manifest
        return {
            "metrics": {metric.name: (metric.value, metric.low, metric.high) for metric in metrics},
            "bytes": sum(part.size_bytes for part in manifest.parts.values()),
            "bits": totals(manifest, linear_rows(manifest)).bits_per_weight,
        }

    def _summaries(self, engine: Engine, continuations: Sequence[Sequence[int]]) -> list[Metric]:
        model = TextModel.of(engine)
        llm = LLM(model)
        found, answers = [], []
        for paper, continuation in zip(self.papers, continuations, strict=True):
            prompt = make_prompt(model, paper, SUMMARY_TOKENS).token_ids
            found.append(self.positions(engine, [*prompt, *continuation]))
            answers.append(answer_text(model, greedy(llm, prompt, SUMMARY_TOKENS)))
        kl = next(metric for metric in summarise_positions("original", found) if metric.name == "original.kl_mean")
        scores = rouge(answers, [paper.summary or "" for paper in self.papers], "summaries")
        return [Metric("summaries.kl_mean", kl.value, kl.low, kl.high), *scores]


def speeds(
    engines: Mapping[str, Path], token_ids: np.ndarray, threads: int, rounds: int
) -> dict[str, tuple[float, ...]]:
    """Prefill and decode tokens a second of each of ``engines``: medians of ``rounds``, in which all of them run."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, directory in engines.items():
            engine = Engine.load(directory, threads)
            _speed(engine, token_ids)  # warms up
            found[name].append(_speed(engine, token_ids))
    return {name: tuple(map(statistics.median, zip(*pairs, strict=True))) for name, pairs in found.items()}


def _speed(engine: Engine, token_ids: np.ndarray) -> tuple[float, float]:
    """``PROMPT`` tokens at once, then ``ANSWER`` one by one: tokens a second."""
    blocks = engine.cache.allocate(engine.cache.blocks_for(PROMPT + ANSWER))
    assert blocks is not None
    started = time.perf_counter()
    engine.run(one_sequence(token_ids[:PROMPT], 0, blocks, first_logits=PROMPT - 1))
    middle = time.perf_counter()
    for past in range(PROMPT, PROMPT + ANSWER):
        engine.run(one_sequence(token_ids[past : past + 1], past, blocks))
    ended = time.perf_counter()
    engine.cache.free(blocks)
    return PROMPT / (middle - started), ANSWER / (ended - middle)


def weight_error(engine: Path, checkpoint: Path) -> float | None:
    """Relative rms of the layers' stored weights; None where columns were scaled along with their inputs."""
    found = EngineWeights(engine)
    if any(linear.quantization.method in ("awq", "smoothquant", "folded") for linear in found.manifest.linears):
        return None
    error = norm = 0.0
    expected = CheckpointWeights(checkpoint)
    for name in found.parts:
        if not name.startswith("model.layers."):
            continue
        for rows, values in found.pieces(name):
            weight = expected.rows(name, rows)
            error += float(np.square(values - weight).sum())
            norm += float(np.square(weight).sum())
    return float(np.sqrt(error / norm))


class Table:
    """The schemes measured so far, and the report of them, written anew after each.

    Attributes:
        results: scheme -> its figures, in the order of the table.
        failed: scheme -> why it could not be built.
        engines: scheme -> its engine.
    """

    def __init__(self, engines: Engines, comparison: Comparison, journal: Journal, located: Path) -> None:
        """``located``: the checkpoint's directory."""
        self._engines, self._comparison, self._journal, self._located = engines, comparison, journal, located
        self.results: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}
        self.engines: dict[str, Path] = {}

    def add(self, name: str, options: str) -> bool:
        """Measure a scheme, or take from the journal what is known of it.

        Args:
            name: of the row.
            options: of ``qwen-build``; ``{NAME}`` in them is the size of the engine of row NAME.

        Returns:
            Whether it had to be measured.
        """
        try:
            options = options.format_map({other: f"{one['bytes'] / 1e6:.2f}MB" for other, one in self.results.items()})
            known = self._journal.has("scheme", options)
            self.results[name] = dict(self._journal.do("scheme", options, lambda: self._measure(options)))
            self.engines[name] = self._engines.ready(options)
            return not known
        except KeyError as error:
            self.failed[name] = f"it is to be as large as {error}, which is not among the groups"
        except QwenError as error:
            self.failed[name] = str(error)
        return False

    def _measure(self, options: str) -> dict[str, Any]:
        summary = self._engines.build(options)
        engine = self._engines.path(options)
        continuations = [
            self._journal.do("continuation", paper.id, lambda paper=paper: self._comparison.continuation(paper))
            for paper in self._comparison.papers
        ]
        return {
            **self._comparison.measure(engine, continuations),
            "weight_error": weight_error(engine, self._located),
            "build_s": summary["seconds"],
            "build_memory_bytes": summary["peak_memory_bytes"],
        }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"some of: {', '.join(GROUPS)}")
    parser.add_argument("--checkpoint", help="directory or Hub id; the demo if left out")
    parser.add_argument("--windows", type=int, default=20, help="of held-out text")
    parser.add_argument("--window", type=int, default=WINDOW, metavar="TOKENS", help="of each")
    parser.add_argument("--summaries", type=int, default=8, help="papers; 0 for a model that follows no requests")
    parser.add_argument("--rounds", type=int, default=3, help="of speed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/schemes"), metavar="DIR")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--ending", help="of the report's name, for some of the groups")
    arguments = parser.parse_args()
    if unknown := set(arguments.groups) - set(GROUPS):
        parser.error(f"no group {', '.join(sorted(unknown))}; choose from {', '.join(GROUPS)}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    located = resolve_checkpoint(arguments.checkpoint)
    work = arguments.work / located.name
    engines = Engines(arguments.checkpoint, work / "engines")
    reference = engines.ready(GROUPS["float"]["float32"])
    windows = held_out_windows(Tokenizer.load(located.path), arguments.windows, arguments.window)
    papers = [paper for paper in built_in_documents("scitldr") if paper.summary][: arguments.summaries]
    settings = {
        "checkpoint": Manifest.read(reference).origin.digests,
        "windows": hashlib.sha256(windows.tobytes()).hexdigest(),
        "papers": [paper.id for paper in papers],
    }
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    logits = work / f"logits-{digest}"
    comparison = Comparison(reference, windows, papers, arguments.threads, logits)
    title = located.name if arguments.window == WINDOW else f"{located.name}-{arguments.window}"
    report = arguments.output / f"schemes-{'-'.join(filter(None, (title, arguments.ending)))}.md"
    head = (
        f"{located.name}, {arguments.windows} x {arguments.window} held-out tokens of WikiText-2, "
        f"{len(papers)} papers; {processor_name()}, {arguments.threads} threads, onnxruntime {version('onnxruntime')}"
    )
    schemes = {name: options for group in arguments.groups or DEFAULT_GROUPS for name, options in GROUPS[group].items()}
    spent: list[float] = []
    with Journal(work / f"results-{digest}.jsonl", settings, resume=True) as journal:
        table = Table(engines, comparison, journal, located.path)
        for number, (name, options) in enumerate(schemes.items(), start=1):
            started = time.perf_counter()
            if table.add(name, options):
                spent.append(time.perf_counter() - started)
                left = statistics.mean(spent) * (len(schemes) - number) / 60
                kl = table.results[name]["metrics"]["original.kl_mean"][0]
                say(f"{name}: KL {kl:.3e}; {spent[-1]:.0f} s, at most {left:.0f} minutes left")
            elif name in table.failed:
                say(f"{name}: {table.failed[name]}")
            write_report(report, head, table.results, table.failed)
    shutil.rmtree(logits, ignore_errors=True)
    if not table.results:
        sys.exit("Error: no scheme could be built")
    say("speeds")
    for name, pair in speeds(table.engines, windows[0], arguments.threads, arguments.rounds).items():
        table.results[name]["speeds"] = pair
    write_report(report, head, table.results, table.failed)
    print(report.read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    run(main)
