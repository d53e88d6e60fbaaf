"""qwen-serve beside llama.cpp's llama-server, both over HTTP to one client, in one run; and what the server costs.

    python -m benchmarks.serve --llama-server PATH       everything, 0.5B shape, random weights
    python -m benchmarks.serve                           without llama-server: what there is
    python -m benchmarks.serve --quick --parts streams   a few short requests, to see that it works

llama-server is built of the sources that llama-cpp-python carries, in about ten minutes:

    pip download --no-binary :all: --no-deps llama-cpp-python && tar xf llama_cpp_python-*.tar.gz
    cd llama_cpp_python-*/vendor/llama.cpp
    export CFLAGS="-U__AVX512FP16__" CXXFLAGS="-U__AVX512FP16__ -fno-tree-dse -fno-dse"
    cmake -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF \\
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF
    ninja -C build llama-server                          build/bin/llama-server

(``peer_environments`` says why these flags.) The weights are those of ``peers``: int4 in groups of 32, the head at 8
bits. Its random checkpoint has a tokenizer whose every token is a text here, so that each token of an answer is sent. A
prompt is of random letters, a token each, new for every request: no cache of prompts helps. Answers are greedy, go past
any end, and must have as many tokens as were asked for. Neither side guesses ahead, and each has room for all streams
at once. llama-server keeps its own defaults but for a second cache of prompts, which costs time and is of no use here;
--llama-options changes them.

The parts, each with sides in turns; figures are medians of the rounds, times those of all tokens or requests of all:

    streams   1, 4 and 16 streams, each with two requests one after another
    poisson   requests that come independently, with lengths drawn from a trace; one round
    python    16 prompts at once through LLM.generate and through HTTP; the first token of one request
    schema    answers that keep to a JSON schema, and free ones
    huge      the demo: streams beside a prompt of a megabyte, refused for its length or read to its end and cut
    start     the demo: from the start of the process to the first chat answer

The trace is the short one that is shipped, or --trace FILE.csv, such as the one Azure publishes of conversations
(AzureLLMInferenceTrace_conv.csv), whose lengths --divisor 4 makes small enough for two threads. The table goes to
--output, with the machine and the date.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from benchmarks.command import paragraph, run, say
from benchmarks.peer_environments import ROOT
from benchmarks.peer_match import Models
from benchmarks.peers import find_checkpoint, work_name
from benchmarks.serve_parts import (
    QUICK,
    Found,
    Plan,
    asked,
    measure_huge,
    measure_python,
    measure_schema,
    measure_start,
    measure_streams,
    poisson,
)
from benchmarks.serve_report import report
from benchmarks.serve_sides import LLAMA, OURS, Server, Shape, llama_command, our_command, started, with_words
from qwen_engine import __version__
from qwen_engine.manifest import Manifest
from qwen_run.bench.measure import processor_name
from qwen_run.bench.trace import SAMPLE_TRACE

SHAPE = ("streams", "poisson", "python", "schema")  # parts on the random checkpoint
DEMO = ("huge", "start")
PARTS = (*SHAPE, *DEMO)
UNBOUNDED = ("--prompt-tokens-beside", "256")  # prompts beside answers have all of a step, as in LLM.generate


class Benchmark:
    """One run of ``parts``.

    Args:
        arguments: of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        plan = QUICK if arguments.quick else Plan()
        chosen = {name: getattr(arguments, name) for name in ("rounds", "rate", "divisor")}
        self.plan = replace(plan, **{name: value for name, value in chosen.items() if value is not None})
        self.shape = Shape(arguments.threads, max(self.plan.streams), arguments.length)
        self.work = arguments.work / work_name(arguments.checkpoint)
        self.found = Found()

    def run(self) -> Found:
        """Measure everything that was asked for.

        Raises:
            RequestError: a server has ended, or answers with something else than was asked for.
        """
        parts = self.arguments.parts
        if set(parts) & {*SHAPE}:
            self._shape_parts(parts)
        if set(parts) & {*DEMO}:
            self._demo_parts(parts)
        return self.found

    def _shape_parts(self, parts: list[str]) -> None:
        checkpoint = find_checkpoint(self.arguments.checkpoint, self.work)
        models = Models(with_words(checkpoint, self.work / "words"), self.work / "serve", "int8", None)
        engine = models.path("engine")
        with self._servers(models) as servers:
            if "streams" in parts:
                measure_streams(self.found, servers, self.plan)
            if "poisson" in parts:
                arrivals = poisson(self.arguments.trace, self.plan, self.shape.length)
                for server in servers:
                    figures = asked(server, arrivals, None, "poisson")
                    self.found.note(f"{self.plan.rate:g} a second", server.name, figures)
            if "schema" in parts:
                measure_schema(self.found, servers[0], self.plan)
        if "python" in parts:
            command = our_command(engine, self.shape, self._cache_bytes(engine), UNBOUNDED)
            with started(OURS, command, self._log("python")) as server:
                measure_python(self.found, server, engine, self.shape.threads, self.plan)

    def _demo_parts(self, parts: list[str]) -> None:
        models = Models(find_checkpoint("demo", self.work), self.arguments.work / "demo" / "serve", "int8", None)
        engine = models.path("engine")
        if "huge" in parts:
            with started(OURS, our_command(engine, replace(self.shape, length=2048)), self._log("demo")) as server:
                measure_huge(self.found, server, self.plan)
        if "start" in parts:
            # nothing but the engine, as a person starts it
            command = [*our_command(engine, self.shape)[:5], "--threads", str(self.shape.threads)]
            measure_start(self.found, command, self.plan, self._log("start"))

    @contextmanager
    def _servers(self, models: Models) -> Iterator[list[Server]]:
        """Ours, and llama-server where it is; with as much cache."""
        engine = models.path("engine")
        own = self.arguments.options.split()
        commands = {OURS: our_command(engine, self.shape, self._cache_bytes(engine), own)}
        if (program := self.arguments.llama_server) is not None:
            more = self.arguments.llama_options.split()
            commands[LLAMA] = llama_command(program, models.path("gguf"), self.shape, more)
        with ExitStack() as stack:
            yield [stack.enter_context(started(name, command, self._log(name))) for name, command in commands.items()]

    def _cache_bytes(self, engine: Path) -> int:
        """Of a cache that holds every stream at its longest."""
        return self.shape.streams * self.shape.length * Manifest.read(engine).cache.bytes_per_token

    def _log(self, name: str) -> Path:
        return Path(self.arguments.work / f"{name}.log")

    def page(self) -> str:
        """The table with its conditions."""
        plan, arguments = self.plan, self.arguments
        conditions = [
            Path(arguments.checkpoint).name, f"{datetime.now(UTC):%Y-%m-%d}", processor_name(),
            f"{self.shape.threads} threads", f"median of {plan.rounds} rounds",
        ]  # fmt: skip
        versions = [
            f"qwen-engine {__version__} {arguments.options}".strip(),
            f"onnxruntime {metadata.version('onnxruntime')}",
        ]
        if arguments.llama_server is not None:
            versions.append(f"llama-server {llama_version(arguments.llama_server)} {arguments.llama_options}".strip())
        parts = [paragraph(", ".join(words)) for words in (conditions, versions)]
        sizes = (
            f"At once: prompts of {plan.prompt} tokens, answers of {plan.new}, {plan.requests} for each stream. "
            f"{plan.rate:g} a second: {plan.arrivals} requests with lengths of {arguments.trace.name}"
            f"{f' over {plan.divisor}' if plan.divisor > 1 else ''}; their p99 is about the longest."
        )
        return "\n\n".join([*parts, paragraph(sizes), report(self.found)]) + "\n"


def llama_version(program: Path) -> str:
    """What it calls its build."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("version:")]
    return lines[0].removeprefix("version:").strip() if lines else "of unknown version"


def chosen_parts(words: str) -> list[str]:
    """Parts with commas between them."""
    parts = words.split(",")
    if unknown := sorted(set(parts) - {*PARTS}):
        raise argparse.ArgumentTypeError(f"no parts {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", type=Path, metavar="PATH", help="the program; without it our side alone")
    parser.add_argument("--options", default="", help="more options of qwen-serve, in one word")
    parser.add_argument("--llama-options", default="", help="more options of it, in one word")
    parser.add_argument("--checkpoint", default="qwen2.5-0.5b", help="a shape, or a directory")
    parser.add_argument("--parts", type=chosen_parts, default=",".join(PARTS), help="with commas (default: all)")
    parser.add_argument("--quick", action="store_true", help="few and short requests; its figures say little")
    parser.add_argument("--rounds", type=int, help="of everything but poisson (default: 3, with --quick 1)")
    parser.add_argument("--trace", type=Path, default=SAMPLE_TRACE, help="whose lengths are drawn")
    parser.add_argument("--divisor", type=int, help="by which they are divided (default: 1, with --quick 10)")
    parser.add_argument("--rate", type=float, help="requests a second of the part poisson")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--length", type=int, default=4096, help="most tokens of a prompt and its answer")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "peers", help="where models are kept")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="where the table goes")
    arguments = parser.parse_args()
    if isinstance(arguments.parts, str):
        arguments.parts = chosen_parts(arguments.parts)
    arguments.work.mkdir(parents=True, exist_ok=True)
    benchmark = Benchmark(arguments)
    benchmark.run()
    text = benchmark.page()
    arguments.output.mkdir(parents=True, exist_ok=True)
    target = arguments.output / f"serve-{Path(arguments.checkpoint).name}.md"
    target.write_text(text, encoding="utf-8")
    print(text)
    say(f"written to {target}")


if __name__ == "__main__":
    run(main)
