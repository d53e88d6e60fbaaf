"""Runs of a benchmark: every side in turns, at every setting, and the bandwidth between them."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from qwen_engine import __version__, json_output
from qwen_engine.errors import OptionsError, RequestError
from qwen_engine.tasks import GENERATE, check_task
from qwen_run.accuracy.reference_sources import find_checkpoint
from qwen_run.bench.bandwidth import Reader
from qwen_run.bench.figures import Figures, Timeline
from qwen_run.bench.report import SCHEMA_VERSION, Bench, Result
from qwen_run.bench.sides import EngineSide, HuggingFaceSide, Side, check_lengths, draw_prompts
from qwen_run.bench.trace import Arrival, at_once
from qwen_run.pipeline.staged_engine import open_engine
from qwen_run.runtime.engine import newest_engine
from qwen_run.runtime.flights import AnyEngine
from qwen_run.runtime.machine import physical_cores

MOST_READ_BYTES = 1 << 30  # memory taken to measure the bandwidth
WARM_UP_TOKENS = 4
PAUSE_S = 0.1  # after which the threads of the side before no longer spin


@dataclass(frozen=True)
class Setting:
    """Requests to answer; ``batch`` or ``rate`` is what tells this setting from the others."""

    arrivals: Sequence[Arrival]
    batch: int | None = None
    rate: float | None = None


@dataclass(frozen=True)
class BenchOptions:
    """What the command line asks of every benchmark; None is its default."""

    engine: Path | None
    compare: str | None
    checkpoint: str | None
    hf_dtype: str | None
    threads: int | None
    max_batch_tokens: int
    max_seq_len: int | None
    cache_bytes: int | None
    pipeline_parallel_size: int | None
    seed: int


def measure(
    benchmark: str, settings: Sequence[Setting], repeat: int, max_batch_size: int, options: BenchOptions, command: str
) -> Bench:
    """Answer the requests of every setting ``repeat`` times on every side.

    Raises:
        QwenError: the engine or the checkpoint cannot be loaded, or a request is longer than the engine takes.
    """
    if not options.compare and (options.checkpoint or options.hf_dtype):
        raise OptionsError("--checkpoint and --hf-dtype say how transformers runs; give them with --compare hf")
    directory = options.engine or newest_engine()
    threads = options.threads or physical_cores()
    engine = open_engine(
        directory,
        options.threads,
        max_seq_len=options.max_seq_len,
        cache_bytes=options.cache_bytes,
        pipeline_parallel_size=options.pipeline_parallel_size,
    )
    check_task(engine.manifest.task, GENERATE)
    for setting in settings:
        check_lengths(setting.arrivals, engine.manifest.limits.max_seq_len)
    sides: list[Side] = [EngineSide(engine, max_batch_size, options.max_batch_tokens)]
    if options.compare:
        sides.append(_transformers(engine, options, threads, max_batch_size))
    reader = Reader(min(sides[0].reads.weight_bytes, MOST_READ_BYTES), threads)
    reads: list[float] = []
    results = []
    for number, setting in enumerate(settings, start=1):
        _say(f"setting {number} of {len(settings)}: {len(setting.arrivals)} requests, {repeat} runs")
        runs, bandwidths = _run(setting, repeat, sides, reader, engine.manifest.model.vocab_size, options.seed, number)
        reads += bandwidths
        for side in sides:
            figures = Figures.of(runs[side.name], side.reads)
            bytes_per_s = figures.decode_bytes_per_s
            share = None if bytes_per_s is None else bytes_per_s / statistics.median(bandwidths)
            results.append(Result(side.name, setting.batch, setting.rate, figures, share))
    packages = ["onnxruntime", *(["torch", "transformers"] if options.compare else [])]
    return Bench(
        schema_version=SCHEMA_VERSION,
        benchmark=benchmark,
        command=command,
        created=json_output.now(),
        engine=json_output.engine_of(directory),
        processor=processor_name(),
        threads=threads,
        versions={"qwen-engine": __version__} | {package: metadata.version(package) for package in packages},
        read_bytes_per_s=statistics.median(reads),
        results=tuple(results),
    )


def processor_name() -> str:
    """The processor as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _run(
    setting: Setting, repeat: int, sides: Sequence[Side], reader: Reader, vocab_size: int, *seed: int
) -> tuple[dict[str, list[list[Timeline]]], list[float]]:
    """The runs of each side, and the bandwidth measured beside each."""
    first = setting.arrivals[0]
    warm_up = at_once(min(len(setting.arrivals), 2), first.input_tokens, min(first.output_tokens, WARM_UP_TOKENS))
    for side in sides:
        side.serve(warm_up, draw_prompts(warm_up, vocab_size, *seed, 0))
    runs: dict[str, list[list[Timeline]]] = {side.name: [] for side in sides}
    bandwidths = []
    for round_number in range(1, repeat + 1):
        prompts = draw_prompts(setting.arrivals, vocab_size, *seed, round_number)
        for side in sides:
            time.sleep(PAUSE_S)
            runs[side.name].append(side.serve(setting.arrivals, prompts))
        time.sleep(PAUSE_S)
        bandwidths.append(reader.bytes_per_s())
    return runs, bandwidths


def _transformers(engine: AnyEngine, options: BenchOptions, threads: int, max_batch_size: int) -> HuggingFaceSide:
    quantised = any(linear.quantization.group_size for linear in engine.manifest.linears)
    dtype = options.hf_dtype or ("bfloat16" if quantised else "float32")
    checkpoint = find_checkpoint(engine.manifest, options.checkpoint)
    try:
        return HuggingFaceSide(engine.manifest, checkpoint, threads, dtype, max_batch_size)
    except RequestError as error:
        raise RequestError(f"{error}, or leave out --compare hf") from error


def _say(words: str) -> None:
    print(words, file=sys.stderr)
