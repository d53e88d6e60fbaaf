"""Programs that run one model and take turns: what each reads, how it is started, told what to do and timed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.command import say
from benchmarks.int8_peak import int8_peak
from benchmarks.peer_environments import ROOT
from benchmarks.write_gguf import write_gguf
from qwen_build.checkpoint.locate import resolve_checkpoint
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.engine_build import plan_build, write_engine
from qwen_build.plan.options import BuildOptions
from qwen_engine.manifest import ITEM_BYTES, Manifest
from qwen_run.bench.bandwidth import Reader
from qwen_run.bench.sides import engine_reads
from qwen_run.text.tokenizer import TOKENIZER_FILE, Tokenizer

WORKER = Path("benchmarks", "peer_worker.py")  # in a checkout of the project
PAUSE_S = 0.2  # until the threads of the program before no longer spin
QUESTION = "Water boils at a temperature of"
ANSWER_TOKENS = 12

BEFORE = "before"  # the program that is another checkout of this project
# qwen-build of the checkout that is the first argument, whatever other one is installed.
BUILD_BEFORE = """
import sys
from pathlib import Path
before = sys.argv.pop(1)
sys.path = [path for path in sys.path if path == before or not Path(path, "qwen_build").is_dir()]
from qwen_build.cli import main
main()
"""


@dataclass(frozen=True)
class Contender:
    """A program and how it runs: ``model`` as :meth:`Models.path` has it, ``options`` go to its worker."""

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
        against: contenders that the goal names, the best of which counts.
        limit: ``memory`` (bytes that must be read, over the fastest read of the weights' size) or ``compute``
            (operations of the matrices, over the peak of int8 products): what our share is a share of.
    """

    title: str
    command: Mapping[str, Any]
    amount: int | None
    unit: str
    contenders: Sequence[str]
    against: Sequence[str] = ()
    goal: str = ""
    limit: str | None = None


NO_FLASH = {"flash_attention": "no"}

CONTENDERS = {
    "engine": Contender("engine", "engine"),
    "engine, 4-bit head": Contender("engine", "engine-head4"),
    "engine, int8 cache": Contender("engine", "engine-cache8"),
    BEFORE: Contender(BEFORE, f"{BEFORE}-engine"),
    f"{BEFORE}, 4-bit head": Contender(BEFORE, f"{BEFORE}-engine-head4"),
    f"{BEFORE}, int8 cache": Contender(BEFORE, f"{BEFORE}-engine-cache8"),
    "llama.cpp": Contender("llama.cpp", "gguf", note="flash attention"),
    "llama.cpp, no flash attention": Contender("llama.cpp", "gguf", NO_FLASH, "no flash attention"),
    "llama.cpp, q8_0 cache": Contender("llama.cpp", "gguf", {"cache": "q8_0"}, "q8_0 cache"),
    "llama.cpp, 4-bit head": Contender("llama.cpp", "gguf-head4", note="4-bit head"),
    "llama.cpp, 4-bit head, no flash attention": Contender(
        "llama.cpp", "gguf-head4", NO_FLASH, "4-bit head, no flash attention"
    ),
    "OpenVINO": Contender("OpenVINO", "gguf", note="default cache"),
    "OpenVINO, u8 cache": Contender("OpenVINO", "gguf", {"cache": "u8"}, note="u8 cache"),
    "onnxruntime-genai": Contender("onnxruntime-genai", "genai"),
}

ENGINE_OPTIONS: dict[str, dict[str, Any]] = {
    "engine": {},
    "engine-head4": {"embedding_quant": "int4"},
    "engine-cache8": {"kv_cache_dtype": "int8"},
}
ENGINES = (*ENGINE_OPTIONS, *(f"{BEFORE}-{model}" for model in ENGINE_OPTIONS))


class Models:
    """What the programs read, made of one checkpoint when it is first asked for.

    What peers read is kept in the directory; our engines are built anew by every run, with the builder as it is.

    Args:
        genai: the interpreter that has onnxruntime-genai's model builder.
        before: another checkout of this project, which builds the engines of :data:`BEFORE`.
    """

    def __init__(
        self, checkpoint: Path, directory: Path, activations: str, genai: Path | None, before: Path | None = None
    ) -> None:
        self._checkpoint, self._directory, self._activations, self._genai = checkpoint, directory, activations, genai
        self.before = before.resolve() if before else None
        self._built: set[Path] = set()
        directory.mkdir(parents=True, exist_ok=True)

    def path(self, model: str) -> Path:
        """Where ``model`` lies: one of :data:`ENGINES`, ``gguf``, ``gguf-head4`` or ``genai``."""
        if model in ENGINES:
            target = self._directory / f"{model}-{self._activations}"
        else:
            target = self._directory / (f"{model}.gguf" if model.startswith("gguf") else model)
        if model in ENGINES and target not in self._built:
            shutil.rmtree(target, ignore_errors=True)
            self._built.add(target)
        if not target.exists():
            say(f"making {target}")
            if model in ENGINE_OPTIONS:
                self._build_engine(model, target)
            elif model in ENGINES:
                self._build_before(model.removeprefix(f"{BEFORE}-"), target)
            elif model == "genai":
                self._build_genai(target)
            else:
                self._write_gguf(model, target)
            forget(target)
            if model not in ENGINES:
                read(target)
        return target

    def _build_engine(self, model: str, target: Path) -> None:
        options = BuildOptions(**ENGINE_OPTIONS[model], activations=self._activations)
        with Checkpoint.open(self._checkpoint) as weights:
            write_engine(plan_build(weights, resolve_checkpoint(str(self._checkpoint)), options), weights, target)

    def _build_before(self, model: str, target: Path) -> None:
        """By the command of the other checkout: its options have the same names, whatever its modules have."""
        assert self.before is not None
        options = ENGINE_OPTIONS[model] | {"activations": self._activations, "output": target}
        chosen = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        command = [sys.executable, "-P", "-c", BUILD_BEFORE, str(self.before), str(self._checkpoint), *chosen]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(self.before)}, stdout=sys.stderr)
        if done.returncode:
            raise RuntimeError(f"qwen-build of {self.before} ended with {done.returncode}")

    def _write_gguf(self, model: str, target: Path) -> None:
        unfinished = target.with_suffix(".part")
        try:
            write_gguf(self._checkpoint, unfinished, head="Q4_0" if model == "gguf-head4" else "Q8_0")
        except ValueError as error:
            raise RuntimeError(f"{target.name} could not be written: {error}") from error
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
        try:
            subprocess.run([*command, *extra], check=True, stdout=sys.stderr)
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"the model builder of onnxruntime-genai ended with {error.returncode}") from error
        unfinished.rename(target)


class Worker:
    """A process of ``peer_worker.py``.

    Args:
        project: the checkout whose engine it runs; None: it runs a peer.
    """

    def __init__(
        self, python: Path, contender: Contender, model: Path, threads: int, vocab_size: int, project: Path | None
    ) -> None:
        options = {"model": str(model), "threads": threads, **contender.options}
        program = "engine" if project else contender.program
        script = (project or ROOT) / WORKER
        self._process = subprocess.Popen(
            [python, "-P", script, program, json.dumps(options), str(vocab_size)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env=os.environ | ({"PYTHONPATH": str(project)} if project else {}),
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
        """A new process each round, which has done nothing else but, for ``memory``, a prompt of 512 and 64 tokens.

        The first round of ``load`` is not counted: it reads the files into memory.
        """
        for round_number in range(self.rounds + 1 if name == "load" else 1):
            for contender in self._present(row):
                self._close(contender)
                seconds = self._ask(contender, do="load", longest=1024, started=True)
                if seconds is None or (name == "load" and not round_number):
                    continue
                if name == "load":
                    self._note(name, contender, seconds)
                else:
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
                project = {"engine": ROOT, BEFORE: self.models.before}.get(contender.program)
                python = self.pythons[contender.program]
                worker = Worker(python, contender, model, self.threads, vocab_size, project)
                self._workers[name] = worker
                self.found.versions[contender.program] = worker.ask(do="version")
                if not started:
                    worker.ask(do="load", longest=1024)
            answer = self._workers[name].ask(**command)
        except RuntimeError as error:
            say(f"{name} is left out from here on: {error}")
            self._failed.add(name)
            self._workers.pop(name, None)
            return None
        say(f"{name}: {command['do']} {answer if command['do'] != 'answer' else ''}")
        return answer

    def _close(self, name: str) -> None:
        if worker := self._workers.pop(name, None):
            worker.close()

    def _note(self, row: str, contender: str, value: float) -> None:
        self.found.values.setdefault(row, {}).setdefault(contender, []).append(value)


def forget(model: Path) -> None:
    """Have the operating system forget what it keeps of files that were just written.

    How a file was written decides how its pages lie in memory, and that how fast they are read. An engine reads its
    files itself when it is loaded; those of others, which map them, are to be read first.
    """
    for path in _files(model):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(model: Path) -> None:
    """Have the operating system keep the files of ``model`` in memory, read in order."""
    for path in _files(model):
        with path.open("rb") as file:
            while file.read(16 << 20):
                pass


def _files(model: Path) -> list[Path]:
    return [model] if model.is_file() else [path for path in model.rglob("*") if path.is_file()]
