"""This engine beside its peers on equal work: llama.cpp, OpenVINO GenAI and onnxruntime-genai, in one run.

    python -m benchmarks.peers --install build/peers-venv              once: a virtual environment with all peers
    python -m benchmarks.peers --venv build/peers-venv                 the 0.5B shape, random weights
    python -m benchmarks.peers --venv A --venv B --checkpoint qwen2.5-1.5b --rounds 7
    python -m benchmarks.peers --venv A --checkpoint demo --rows decode-512,prefill-512 --rounds 3

A checkpoint is a shape of ``benchmarks.random_checkpoint``, ``demo``, or a directory. What the programs read is made
of it in --work: our engines, anew each time; GGUF for llama.cpp and OpenVINO and the graph of onnxruntime-genai's
builder, once.
A peer that no environment has is left out. Each program is a process of its own (``peer_worker.py``) that is told
over a pipe what to do; within a row they take turns, after one round that is not counted. Figures are medians.
The table and a plot go to --output, with the machine, the date and all versions.

The weights are int4 everywhere, groups of 32: Q4_0 and the builder's graph symmetric, ours as the default has them.
llama.cpp runs with flash attention, OpenVINO with continuous batching.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.int8_peak import int8_peak
from benchmarks.random_checkpoint import SHAPES, write_checkpoint
from benchmarks.write_gguf import write_gguf
from qwen_build.build import plan_build, write_engine
from qwen_build.checkpoint import Checkpoint
from qwen_build.locate import resolve_checkpoint
from qwen_build.options import BuildOptions
from qwen_engine import __version__
from qwen_engine.manifest import ITEM_BYTES, Manifest
from qwen_run import svg
from qwen_run.bench_bandwidth import Reader
from qwen_run.bench_measure import processor_name
from qwen_run.bench_report import standalone
from qwen_run.bench_sides import EMBEDDING, engine_reads
from qwen_run.tokenizer import TOKENIZER_FILE, Tokenizer

ROOT = Path(__file__).parent.parent
WORKER = Path(__file__).with_name("peer_worker.py")
PAUSE_S = 0.2  # until the threads of the program before no longer spin
QUESTION = "Water boils at a temperature of"
ANSWER_TOKENS = 12

# program -> the package that has it
PACKAGES = {
    "llama.cpp": "llama-cpp-python",
    "OpenVINO": "openvino-genai",
    "onnxruntime-genai": "onnxruntime-genai",
}
# _tile_loadconfig of GCC 12 names only the first of the bytes it reads, and the compiler drops the stores to the
# others: llama.cpp then ends with a fault at its first prompt on a processor with AMX.
LLAMA_CPP_BUILD = {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CXXFLAGS": "-fno-tree-dse -fno-dse"}
BUILDER_PACKAGES = ("onnx", "onnx-ir", "torch", "transformers")  # what onnxruntime-genai's model builder needs


@dataclass(frozen=True)
class Contender:
    """A program and how it runs: ``model`` is a key of :data:`MODELS`, ``options`` go to its worker."""

    program: str
    model: str
    options: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        command: what the workers are told.
        amount: what is done in the seconds they answer, in ``unit`` without its "/s"; None: the answer itself is shown.
        contenders: keys of :data:`CONTENDERS`; ours first.
        against: the program whose figure ours is divided by.
        limit: ``memory`` (bytes that must be read, over a plain read of the weights' size) or ``compute`` (operations
            of the matrices, over the peak of int8 products): what our share is a share of.
    """

    title: str
    command: Mapping[str, Any]
    amount: int | None
    unit: str
    contenders: Sequence[str]
    against: str | None = None
    goal: str = ""
    limit: str | None = None


CONTENDERS = {
    "engine": Contender("engine", "engine"),
    "engine, 4-bit head": Contender("engine", "engine-head4"),
    "engine, int8 cache": Contender("engine", "engine-cache8"),
    "llama.cpp": Contender("llama.cpp", "gguf"),
    "llama.cpp, 4-bit head": Contender("llama.cpp", "gguf-head4", note="4-bit head"),
    "llama.cpp, q8_0 cache": Contender("llama.cpp", "gguf", {"cache": "q8_0"}),
    "OpenVINO": Contender("OpenVINO", "gguf", note="default cache"),
    "OpenVINO, u8 cache": Contender("OpenVINO", "gguf", {"cache": "u8"}, note="u8 cache"),
    "onnxruntime-genai": Contender("onnxruntime-genai", "genai"),
}
OPENVINO = ("OpenVINO", "OpenVINO, u8 cache")
ALL = ("engine", "llama.cpp", *OPENVINO, "onnxruntime-genai")

ROWS = {
    # first, while each process holds nothing else yet
    "load": Row("load to first token, s", {"do": "load", "longest": 1024}, None, "s", ALL, goal="0.5 s, stretch 0.2 s"),
    "memory": Row("peak memory beyond weights, cache and imports", {"do": "memory"}, None, "MB", ALL,
                  goal="120 MB, stretch 60 MB"),
    "decode-512": Row("decode at 512 past tokens, head at 8 bits", {"do": "decode", "past": 512, "count": 64}, 64,
                      "tok/s", ALL, "llama.cpp", "1.4 ×, stretch 1.8 ×", "memory"),
    "decode-512-head4": Row("decode at 512 past tokens, our head at 4 bits", {"do": "decode", "past": 512, "count": 64},
                            64, "tok/s", ("engine, 4-bit head", "llama.cpp", "llama.cpp, 4-bit head"), "llama.cpp",
                            "1.6 ×, stretch 2.2 ×", "memory"),
    "prefill-512": Row("prefill of 512 tokens", {"do": "prefill", "length": 512}, 512, "tok/s", ALL, "OpenVINO",
                       "1.15 ×, stretch 1.4 ×", "compute"),
    "batch-16": Row("16 requests at once, prompt 128, 64 new", {"do": "batch", "requests": 16, "prompt_length": 128,
                    "new": 64}, 16 * 64, "output tok/s", ALL, "OpenVINO", "1.5 ×, stretch 2 ×", "compute"),
    "decode-4k": Row("decode at 4,096 past tokens, int8 cache", {"do": "decode", "past": 4096, "count": 32}, 32,
                     "tok/s", ("engine, int8 cache", "llama.cpp, q8_0 cache", *OPENVINO), "llama.cpp",
                     "2.5 ×, stretch 3.5 ×", "memory"),
    "overhead": Row("share of a decode step at 512 that is not its matrices", {"do": "overhead", "past": 512,
                    "count": 64}, None, "", ("engine",), goal="0.25, stretch 0.12"),
    "decode-16k": Row("decode at 16,384 past tokens, int8 cache", {"do": "decode", "past": 16384, "count": 16}, 16,
                      "tok/s", ("engine, int8 cache", "llama.cpp, q8_0 cache", *OPENVINO), "llama.cpp",
                      "4 ×, stretch 7 ×", "memory"),
}  # fmt: skip

ENGINE_OPTIONS: dict[str, dict[str, Any]] = {
    "engine": {},
    "engine-head4": {"embedding_quant": "int4"},
    "engine-cache8": {"kv_cache_dtype": "int8"},
}


class Models:
    """What the programs read, made of one checkpoint when it is first asked for.

    What peers read is kept in the directory; our engines are built anew by every run, with the builder as it is now.
    """

    def __init__(self, checkpoint: Path, directory: Path, activations: str, genai: Path | None) -> None:
        self._checkpoint, self._directory, self._activations, self._genai = checkpoint, directory, activations, genai
        self._built: set[Path] = set()
        directory.mkdir(parents=True, exist_ok=True)

    def path(self, model: str) -> Path:
        """Where ``model`` lies: a key of :data:`ENGINE_OPTIONS`, ``gguf``, ``gguf-head4`` or ``genai``."""
        if model in ENGINE_OPTIONS:
            target = self._directory / f"{model}-{self._activations}"
        else:
            target = self._directory / (f"{model}.gguf" if model.startswith("gguf") else model)
        if model in ENGINE_OPTIONS and target not in self._built:
            shutil.rmtree(target, ignore_errors=True)
            self._built.add(target)
        if not target.exists():
            _say(f"making {target}")
            if model in ENGINE_OPTIONS:
                self._build_engine(model, target)
            elif model == "genai":
                self._build_genai(target)
            else:
                self._write_gguf(model, target)
            read_again(target)
        return target

    def _build_engine(self, model: str, target: Path) -> None:
        options = BuildOptions(**ENGINE_OPTIONS[model], activations=self._activations)
        with Checkpoint.open(self._checkpoint) as weights:
            write_engine(plan_build(weights, resolve_checkpoint(str(self._checkpoint)), options), weights, target)

    def _write_gguf(self, model: str, target: Path) -> None:
        unfinished = target.with_suffix(".part")
        write_gguf(self._checkpoint, unfinished, head="Q4_0" if model == "gguf-head4" else "Q8_0")
        unfinished.rename(target)

    def _build_genai(self, target: Path) -> None:
        assert self._genai is not None
        unfinished = target.with_suffix(".part")
        command: list[str | Path] = [
            self._genai,
            "-m",
            "onnxruntime_genai.models.builder",
            "-i",
            self._checkpoint,
            "-o",
            unfinished,
        ]
        extra = ["-p", "int4", "-e", "cpu", "--extra_options", "int4_accuracy_level=4", "int4_block_size=32"]
        subprocess.run([*command, *extra], check=True, stdout=sys.stderr)
        unfinished.rename(target)


class Worker:
    """A process of ``peer_worker.py``."""

    def __init__(self, python: Path, contender: Contender, model: Path, threads: int, vocab_size: int) -> None:
        options = {"model": str(model), "threads": threads, **contender.options}
        environment = os.environ | {"PYTHONPATH": str(ROOT)} if contender.program == "engine" else dict(os.environ)
        self._process = subprocess.Popen(
            [python, "-P", WORKER, contender.program, json.dumps(options), str(vocab_size)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def ask(self, **command: Any) -> Any:
        """What the worker answers.

        Raises:
            RuntimeError: it has ended; what it said stands on standard error.
        """
        assert self._process.stdin and self._process.stdout  # noqa: PT018 - for the type checker
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"it ended with {self._process.wait()} when told to {command['do']}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


@dataclass
class Measured:
    """What was found: row -> contender -> its values; row -> bandwidth and peak of int8 products beside each round."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    bandwidths: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, list[float]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)


class Match:
    """All programs side by side on one checkpoint."""

    def __init__(self, pythons: Mapping[str, Path], models: Models, threads: int, rounds: int) -> None:
        self.pythons, self.models, self.threads, self.rounds = pythons, models, threads, rounds
        self.found = Measured()
        self._workers: dict[str, Worker] = {}
        self._failed: set[str] = set()

    @cached_property
    def manifest(self) -> Manifest:
        return Manifest.read(self.models.path("engine"))

    def play(self, rows: Mapping[str, Row]) -> Measured:
        """Measure ``rows``, and ask everyone a question where there is a tokenizer."""
        reader = Reader(engine_reads(self.manifest).weight_bytes, self.threads)
        try:
            for name, row in rows.items():
                if row.command["do"] in ("load", "memory"):
                    self._fresh(name, row)
                else:
                    self._rounds(name, row, reader)
            self._ask_question()
        finally:
            for worker in self._workers.values():
                worker.close()
        return self.found

    def _rounds(self, name: str, row: Row, reader: Reader) -> None:
        """Everyone in turns; the first round warms up, and for ``decode`` fills the cache."""
        for round_number in range(self.rounds + 1):
            for contender in self._present(row):
                time.sleep(PAUSE_S)
                seconds = self._ask(contender, **row.command)
                if round_number and seconds is not None:
                    self._note(name, contender, row.amount / seconds if row.amount else seconds)
            time.sleep(PAUSE_S)
            self.found.bandwidths.setdefault(name, []).append(reader.bytes_per_s())
            if peak := int8_peak(self.threads):
                self.found.peaks.setdefault(name, []).append(peak[1])

    def _fresh(self, name: str, row: Row) -> None:
        """A new process each round, which has done nothing else but, for ``memory``, a prompt of 512 and 64 tokens."""
        for _ in range(self.rounds if name == "load" else 1):
            for contender in self._present(row):
                self._close(contender)
                seconds = self._ask(contender, do="load", longest=1024, started=True)
                if name == "load" and seconds is not None:
                    self._note(name, contender, seconds)
                elif seconds is not None:
                    self._ask(contender, do="decode", past=512, count=64)
                    memory = self._ask(contender, do="memory")
                    if memory is not None:
                        beyond = memory["peak"] - memory["before"] - self._held_bytes(contender, 512 + 64)
                        self._note(name, contender, beyond / 1e6)

    def _held_bytes(self, contender: str, tokens: int) -> int:
        """Weights, and keys and values of so many tokens in float16."""
        model, path = self.manifest.model, self.models.path(CONTENDERS[contender].model)
        elements = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim
        files = path.rglob("*") if path.is_dir() else [path]
        weights = sum(file.stat().st_size for file in files if file.is_file() and file.suffix not in (".json", ".onnx"))
        return weights + tokens * elements * ITEM_BYTES["float16"]

    def _ask_question(self) -> None:
        directory = self.models.path("engine")
        if not (directory / TOKENIZER_FILE).is_file():
            return
        tokenizer = Tokenizer.load(directory)
        ids = tokenizer.encode(QUESTION)
        for contender in list(self._workers):
            if (answer := self._ask(contender, do="answer", ids=ids, count=ANSWER_TOKENS)) is not None:
                self.found.answers[contender] = tokenizer.decode(answer, False)

    def _present(self, row: Row) -> list[str]:
        return [
            name for name in row.contenders if CONTENDERS[name].program in self.pythons and name not in self._failed
        ]

    def _ask(self, name: str, started: bool = False, **command: Any) -> Any:
        """The answer of the worker ``name``, started and loaded if need be; None from now on once it fails."""
        try:
            if name not in self._workers:
                contender = CONTENDERS[name]
                model, vocab_size = self.models.path(contender.model), self.manifest.model.vocab_size
                worker = Worker(self.pythons[contender.program], contender, model, self.threads, vocab_size)
                self._workers[name] = worker
                self.found.versions[contender.program] = worker.ask(do="version")
                if not started:
                    worker.ask(do="load", longest=1024)
            answer = self._workers[name].ask(**command)
        except RuntimeError as error:
            _say(f"{name} is left out from here on: {error}")
            self._failed.add(name)
            self._workers.pop(name, None)
            return None
        _say(f"{name}: {command['do']} {answer if command['do'] != 'answer' else ''}")
        return answer

    def _close(self, name: str) -> None:
        if worker := self._workers.pop(name, None):
            worker.close()

    def _note(self, row: str, contender: str, value: float) -> None:
        self.found.values.setdefault(row, {}).setdefault(contender, []).append(value)


def best_of(program: str, row: Row, values: Mapping[str, Sequence[float]]) -> tuple[str, float] | None:
    """The contender of ``program`` with the best median in a row, and that median; None where none was measured."""
    better: Callable[..., tuple[str, float]] = max if row.amount else min
    medians = {name: statistics.median(found) for name, found in values.items() if CONTENDERS[name].program == program}
    return better(medians.items(), key=lambda item: item[1]) if medians else None


def markdown_table(rows: Mapping[str, Row], found: Measured, shares: Mapping[str, float]) -> str:
    """One line a row: everyone's median, ours over the peer's that is named in the goal, the share of the limit."""
    programs = ["engine", *(program for program in PACKAGES if program in found.versions)]
    lines = [
        f"| | {' | '.join(programs)} | engine over | goal | share of the limit |",
        "|---" * (len(programs) + 4) + "|",
    ]
    for name, values in found.values.items():
        row = rows[name]
        best = {program: best_of(program, row, values) for program in programs}
        cells = [_cell(item, len([n for n in values if CONTENDERS[n].program == p]) > 1) for p, item in best.items()]
        ours, theirs = best["engine"], best.get(row.against or "")
        ratio = f"{row.against} {ours[1] / theirs[1]:.2f} ×" if ours and theirs else ""
        share = f"{shares[name]:.0%}" if name in shares else ""
        title = f"{row.title}, {row.unit}" if row.amount else row.title
        lines.append(f"| {title} | {' | '.join(cells)} | {ratio} | {row.goal} | {share} |")
    return "\n".join(lines)


def _cell(best: tuple[str, float] | None, several: bool) -> str:
    if best is None:
        return ""
    name, value = best
    note = f" ({CONTENDERS[name].note})" if several and CONTENDERS[name].note else ""
    return f"{value:.3g}{note}" if value < 100 else f"{value:.0f}{note}"


def shares_of_limit(rows: Mapping[str, Row], found: Measured, models: Models) -> dict[str, float]:
    """Row -> what our engine must read or multiply a second, over what the machine can in the same rounds."""
    shares = {}
    for name, values in found.values.items():
        row = rows[name]
        ours = best_of("engine", row, values)
        if ours is None or row.amount is None:
            continue
        manifest = Manifest.read(models.path(CONTENDERS[ours[0]].model))
        if row.limit == "memory":
            work, limits = bytes_read(manifest, row.command), found.bandwidths
        else:
            work, limits = operations(manifest, row.command), found.peaks
        if name in limits:
            shares[name] = ours[1] / row.amount * work / statistics.median(limits[name])
    return shares


def bytes_read(manifest: Manifest, command: Mapping[str, Any]) -> float:
    """By a whole ``decode`` command, from memory."""
    reads = engine_reads(manifest)
    context = command["past"] + (command["count"] + 1) / 2
    return float(command["count"] * (reads.weight_bytes + context * reads.cache_bytes_per_token))


def operations(manifest: Manifest, command: Mapping[str, Any]) -> float:
    """Products and sums of a whole ``prefill`` or ``batch`` command, without attention."""
    if command["do"] == "prefill":
        tokens, logits = command["length"], 1
    else:
        tokens = command["requests"] * (command["prompt_length"] + command["new"] - 1)
        logits = command["requests"] * command["new"]
    elements = {linear.name: linear.in_features * linear.out_features for linear in manifest.linears}
    head = elements.pop("lm_head")
    del elements[EMBEDDING]
    return float(2 * (tokens * sum(elements.values()) + logits * head))


def plot(rows: Mapping[str, Row], found: Measured) -> str:
    """Bars of every row of rates, one drawing below the other; the longest of each is the best."""
    drawings = []
    for name, values in found.values.items():
        row = rows[name]
        if row.amount:
            medians = {contender: statistics.median(each) for contender, each in values.items()}
            bars = [
                (contender, median / max(medians.values()), f"{median:.0f}") for contender, median in medians.items()
            ]
            drawings.append(svg.bars(row.title, bars, f"{row.title}, {row.unit}: % of the best"))
    return standalone(stack(drawings))


def stack(drawings: Sequence[str]) -> str:
    """Drawings of ``svg.py``, one below the other."""
    parts, top = [], 0
    for drawing in drawings:
        height = int(drawing.split('viewBox="', 1)[1].split('"', 1)[0].split()[3])
        parts.append(drawing.replace("<svg ", f'<svg y="{top}" width="{svg.WIDTH}" height="{height}" ', 1))
        top += height
    return f'<svg viewBox="0 0 {svg.WIDTH} {top}" role="img" aria-label="Engine and peers">{"".join(parts)}</svg>'


def read_again(model: Path) -> None:
    """Have the operating system forget what it keeps of files that were just written, and read them from the disk.

    How a file was written decides how its pages lie in memory, and that how fast they are read.
    """
    for path in [model] if model.is_file() else [path for path in model.rglob("*") if path.is_file()]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while file.read(16 << 20):
                pass


def find_pythons(environments: Sequence[Path]) -> dict[str, Path]:
    """The interpreter of each program: ours, and of every peer the first environment that has its package."""
    pythons = {"engine": Path(sys.executable)}
    for environment in environments:
        python = environment / "bin" / "python"
        if not python.is_file():
            raise SystemExit(f"{environment} is no virtual environment; make one with --install {environment}")
        script = "import importlib.metadata as m; print(*(d.metadata['Name'].lower() for d in m.distributions()))"
        done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
        installed = {name.replace("_", "-") for name in done.stdout.split()}
        for program, package in PACKAGES.items():
            if package in installed:
                pythons.setdefault(program, python)
    return pythons


def install(environment: Path) -> None:
    """A virtual environment with all peers; llama.cpp is compiled for this machine, which takes many minutes."""
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    pip: list[str | Path] = [environment / "bin" / "python", "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "openvino-genai", "onnxruntime-genai", *BUILDER_PACKAGES], check=True)
    llama_cpp = [*pip, "--no-binary", "llama-cpp-python", "llama-cpp-python"]
    subprocess.run(llama_cpp, check=True, env=os.environ | LLAMA_CPP_BUILD)


def find_checkpoint(name: str, work: Path) -> Path:
    """A directory, the demo, or a random checkpoint of a published shape, written to ``work`` the first time."""
    if name == "demo":
        return resolve_checkpoint(None).path
    if name not in SHAPES:
        return resolve_checkpoint(name).path
    directory = work / "checkpoint"
    if not (directory / "config.json").exists():
        _say(f"making {directory}")
        write_checkpoint(name, directory)
    return directory


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def common_arguments(description: str) -> argparse.ArgumentParser:
    """What every comparison with peers takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, action="append", default=[], help="where peers are; may be given again")
    parser.add_argument("--checkpoint", default="qwen2.5-0.5b")
    parser.add_argument("--activations", default="int8", choices=("int8", "int8x2"), help="of our engine")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "peers", help="where models are kept")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="where the table goes")
    return parser


def set_up(arguments: argparse.Namespace) -> Match:
    """Checkpoint, models and programs as the command line has them."""
    work = arguments.work / Path(arguments.checkpoint).name
    pythons = find_pythons(arguments.venv)
    checkpoint = find_checkpoint(arguments.checkpoint, work)
    models = Models(checkpoint, work, arguments.activations, pythons.get("onnxruntime-genai"))
    return Match(pythons, models, arguments.threads, arguments.rounds)


def report(arguments: argparse.Namespace, match: Match, rows: Mapping[str, Row], drawing: str, stem: str) -> None:
    """Print the table with its conditions, and write both to ``--output``."""
    found, label = match.found, Path(arguments.checkpoint).name
    versions = {"qwen-engine": __version__, "onnxruntime": metadata.version("onnxruntime")}
    versions |= {program: version for program, version in found.versions.items() if program != "engine"}
    limits = [f"plain read {median_of(found.bandwidths) / 1e9:.1f} GB/s"] if found.bandwidths else []
    if found.peaks and (peak := int8_peak(arguments.threads)):
        limits.append(f"int8 peak {median_of(found.peaks) / 1e12:.2f} TOPS ({peak[0]})")
    conditions = [
        label, f"{datetime.now(UTC):%Y-%m-%d}", processor_name(), f"{arguments.threads} threads",
        f"{arguments.activations} activations", f"median of {arguments.rounds} rounds", *limits,
    ]  # fmt: skip
    parts = [
        ", ".join(conditions),
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Share of the limit: of a plain read for decode, of the peak of int8 products for prefill and many requests.",
        markdown_table(rows, found, shares_of_limit(rows, found, match.models)),
    ]
    if found.answers:
        answers = [f"- {name}: {answer!r}" for name, answer in found.answers.items()]
        parts.append("\n".join([f"{QUESTION!r} is continued by", *answers]))
    text = "\n\n".join(parts) + "\n"
    name = f"{stem}-{label}{'' if arguments.activations == 'int8' else f'-{arguments.activations}'}"
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / f"{name}.md").write_text(text, encoding="utf-8")
    (arguments.output / f"{name}.svg").write_text(drawing, encoding="utf-8")
    print(text)


def median_of(rounds: Mapping[str, Sequence[float]]) -> float:
    """Over the rounds of all rows."""
    return statistics.median(value for values in rounds.values() for value in values)


def main() -> None:
    parser = common_arguments(__doc__ or "")
    parser.add_argument("--install", type=Path, metavar="DIR", help="make an environment with all peers, and end")
    parser.add_argument("--rows", default=",".join(ROWS), help="which lines of the table, with commas (default: all)")
    arguments = parser.parse_args()
    if arguments.install:
        install(arguments.install)
        return
    names = arguments.rows.split(",")
    if unknown := sorted(set(names) - ROWS.keys()):
        parser.error(f"no rows {', '.join(unknown)}; there are {', '.join(ROWS)}")
    match = set_up(arguments)
    longest = match.manifest.limits.max_seq_len
    rows = {
        name: row for name, row in ROWS.items() if name in names and row.command.get("past", 0) + 64 < longest
    }  # a checkpoint for short texts has no long ones
    match.play(rows)
    report(arguments, match, rows, plot(rows, match.found), "peers")


if __name__ == "__main__":
    main()
