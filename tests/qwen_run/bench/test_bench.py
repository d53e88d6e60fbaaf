"""qwen-bench: the arithmetic of its figures, traces, what it serves and prints; never how long anything took."""

from __future__ import annotations

import doctest
import itertools
import json
import statistics
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from onnxruntime.capi import onnxruntime_pybind11_state

from qwen_engine.errors import EngineError, RequestError
from qwen_run.bench import bandwidth as bench_bandwidth
from qwen_run.bench import figures as bench_stats
from qwen_run.bench import measure as bench_measure
from qwen_run.bench import report as bench_report
from qwen_run.bench import sides as bench_sides
from qwen_run.bench.bandwidth import Reader
from qwen_run.bench.figures import Figures, Percentiles, Reads, Timeline, decode_window
from qwen_run.bench.measure import BenchOptions, Setting, measure
from qwen_run.bench.sides import check_lengths, dense_reads, draw_prompts, engine_reads
from qwen_run.bench.trace import SAMPLE_TRACE, Arrival, at_once, at_rate, mean_rate, read_trace
from qwen_run.commands import bench
from qwen_run.runtime.engine import Engine

# Two requests: their prompts are done at 1 s and 2 s, the first ends at 4 s, the second at 5 s. Tokens that come at the
# same time came of the same step.
EARLY = Timeline(0.0, 10, [1.0, 2.0, 3.0, 4.0])
LATE = Timeline(0.5, 20, [2.0, 3.0, 4.0, 5.0])


@pytest.mark.parametrize("module", [bench_stats, bench_report])
def test_examples_in_docstrings(module: Any) -> None:
    assert doctest.testmod(module).attempted > 0
    assert doctest.testmod(module).failed == 0


def test_times_of_a_request() -> None:
    assert (LATE.ttft_ms, LATE.latency_ms, LATE.gaps_ms, LATE.tpot_ms) == (1500, 4500, [1000, 1000, 1000], 1000)
    assert Timeline(0.0, 1, [3.0]).tpot_ms is None


def test_decode_window_is_where_every_request_decodes() -> None:
    window = decode_window([EARLY, LATE])
    assert window is not None
    # From 2 s, when the last prompt is done, to 4 s, when the first request ends: the steps at 3 s and 4 s.
    assert (window.seconds, window.tokens, window.steps) == (2.0, 4, 2)
    # EARLY's third and fourth token read 10 + 2 and 10 + 3 tokens of context, LATE's next two 20 + 1 and 20 + 2.
    assert window.context_tokens == 12 + 13 + 21 + 22
    assert Reads(1000, 10).of_window(window) == 2 * 1000 + 68 * 10


def test_no_decode_window_where_requests_do_not_overlap() -> None:
    assert decode_window([Timeline(0.0, 1, [1.0, 2.0]), Timeline(0.0, 1, [2.0, 3.0])]) is None
    assert decode_window([Timeline(0.0, 1, [1.0])]) is None


def test_figures_of_one_run() -> None:
    figures = Figures.of([[EARLY, LATE]], Reads(1000, 10))
    assert (figures.runs, figures.requests, figures.input_tokens, figures.output_tokens) == (1, 2, 30, 8)
    assert figures.seconds == 5.0  # from the first arrival to the last token
    assert figures.output_tokens_per_s == 8 / 5
    assert figures.decode_tokens_per_s == 4 / 2
    assert figures.decode_bytes_per_s == 2680 / 2
    assert figures.ttft_ms == Percentiles(1250, 1495)
    assert figures.gap_ms == Percentiles(1000, 1000)


def test_rates_are_medians_over_runs_and_latencies_of_all_requests() -> None:
    runs = [[Timeline(0.0, 1, [1.0, 1.0 + 2 * slowness])] for slowness in (1, 2, 10)]
    figures = Figures.of(runs, Reads(0, 0))
    assert figures.decode_tokens_per_s == 1 / 4
    assert figures.output_tokens_per_s == 2 / 5
    assert figures.tpot_ms is not None
    assert (figures.tpot_ms.p50, figures.requests) == (4000, 1)
    assert figures.tpot_ms.p99 == pytest.approx(np.percentile([2000, 4000, 20000], 99))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_trace_in_any_order_of_lines_and_columns(tmp_path: Path) -> None:
    text = "output_tokens,who,arrival_s,input_tokens\n7,b,12.5,20\n3,a,10,1\n"
    assert read_trace(write(tmp_path / "t.csv", text)) == [Arrival(0.0, 1, 3), Arrival(2.5, 20, 7)]


def test_trace_with_dates(tmp_path: Path) -> None:
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.5000000,4,5\n2023-11-16 18:16:48.2500000,6,7\n"
    assert read_trace(write(tmp_path / "t.csv", text)) == [Arrival(0.0, 4, 5), Arrival(61.75, 6, 7)]


def test_first_requests_of_a_trace(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "arrival_s,input_tokens,output_tokens\n0,1,1\n1,2,2\n2,x,3\n")
    assert read_trace(path, most=2) == [Arrival(0.0, 1, 1), Arrival(1.0, 2, 2)]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "has columns '', expected arrival_s,input_tokens,output_tokens or TIMESTAMP"),
        ("arrival_s,input_tokens\n0,1\n", "has columns 'arrival_s,input_tokens'"),
        ("arrival_s,input_tokens,output_tokens\n", "has no requests"),
        ("arrival_s,input_tokens,output_tokens\n0,1,2\n1,0,2\n", "t.csv:3 is '1', '0', '2'; expected"),
        ("arrival_s,input_tokens,output_tokens\nnan,1,2\n", "t.csv:2 is 'nan'"),
        ("arrival_s,input_tokens,output_tokens\n0,1\n", "t.csv:2 is '0', '1', ''"),
        ("arrival_s,input_tokens,output_tokens\nyesterday,1,2\n", "t.csv:2 is 'yesterday'"),
    ],
)
def test_trace_that_is_none(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(RequestError, match=r"t\.csv") as error:
        read_trace(write(tmp_path / "t.csv", text))
    assert complaint in str(error.value)


def test_trace_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read"):
        read_trace(tmp_path / "t.csv")


def test_rate_stretches_the_pauses() -> None:
    arrivals = [Arrival(0.0, 1, 1), Arrival(3.0, 2, 2), Arrival(4.0, 3, 3)]
    assert mean_rate(arrivals) == 0.5
    faster = at_rate(arrivals, 2.0)
    assert [arrival.arrived_s for arrival in faster] == [0.0, 0.75, 1.0]
    assert [arrival.input_tokens for arrival in faster] == [1, 2, 3]
    assert mean_rate(faster) == 2.0
    with pytest.raises(RequestError, match="at once"):
        at_rate(at_once(3, 1, 1), 2.0)


def test_sample_trace_is_what_the_help_says() -> None:
    arrivals = read_trace(SAMPLE_TRACE)
    assert len(arrivals) == 64
    assert round(mean_rate(arrivals) or 0) == 2
    assert max(arrival.input_tokens + arrival.output_tokens for arrival in arrivals) < 1024


def test_prompts_are_the_same_for_a_seed_and_begin_unlike() -> None:
    arrivals = at_once(2, 50, 1)
    first, second = draw_prompts(arrivals, 131, 7, 1)
    assert draw_prompts(arrivals, 131, 7, 1) == [first, second]
    others = draw_prompts(arrivals, 131, 7, 2) + draw_prompts(arrivals, 131, 8, 1)
    assert all(a[:32] != b[:32] for a, b in itertools.combinations([first, second, *others], 2))
    assert {0 <= token < 131 for token in first} == {True}


def test_a_request_too_long_is_refused_by_number() -> None:
    check_lengths(at_once(3, 60, 4), 64)
    with pytest.raises(RequestError, match="request 2 has 61 input and 4 output tokens, the engine takes 64"):
        check_lengths([Arrival(0.0, 60, 4), Arrival(0.0, 61, 4)], 64)


def test_bandwidth_reads_every_line_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    data, reads = np.ones(64 * 1001 + 5, np.uint8), []
    reader = Reader(data, threads=3, pass_bytes=64 * 2002)
    call = reader._read
    monkeypatch.setattr(reader, "_read", lambda *args: reads.append(args) or call(*args))
    assert reader.bytes_per_s(passes=1) > 0
    for in_turn in (False, True):  # all lines, by three threads, twice as pass_bytes says
        parts = sorted((first, lines) for first, lines, repeats, how in reads if how == in_turn and repeats == 2)
        assert len(parts) == 3
        ends = [first + 64 * lines for first, lines in parts]
        assert [data.ctypes.data, *ends] == [*(first for first, _ in parts), data.ctypes.data + 64 * 1001]
    assert Reader(1, threads=2).data.nbytes >= 2 * 64


def test_a_library_from_before_the_reading_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_bandwidth.qwen_plugin, "library_path", lambda: onnxruntime_pybind11_state.__file__)
    with pytest.raises(EngineError, match=r"is older than this package; compile it: python -m qwen_plugin.compile"):
        Reader(1, threads=1)


@pytest.fixture(scope="module")
def engine_directory(tiny_checkpoint: Any, build_engine: Any) -> Path:
    directory: Path = build_engine(tiny_checkpoint("qwen2-tied").path, quant="none", max_seq_len=96)
    return directory


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time is measured here, so none needs to be long."""
    monkeypatch.setattr(bench_measure, "PAUSE_S", 0.0)
    monkeypatch.setattr(bench_measure, "Reader", lambda size_bytes, threads: SimpleNamespace(bytes_per_s=lambda: 1e9))


def options(engine: Path, **changed: Any) -> BenchOptions:
    absent = ("compare", "checkpoint", "hf_dtype", "max_seq_len", "cache_bytes", "pipeline_parallel_size")
    plain: dict[str, Any] = dict.fromkeys(absent)
    return BenchOptions(**plain | {"engine": engine, "threads": 1, "max_batch_tokens": 64, "seed": 0} | changed)


ARRIVALS = [Arrival(0.0, 40, 5), Arrival(0.01, 33, 1), Arrival(0.02, 70, 9)]


def test_the_engine_answers_every_request_to_its_last_token(engine_directory: Path) -> None:
    side = bench_sides.EngineSide(Engine.load(engine_directory, 1), max_batch_size=2, max_batch_tokens=32)
    timelines = side.serve(ARRIVALS, draw_prompts(ARRIVALS, 131, 0))
    assert [len(timeline.token_s) for timeline in timelines] == [5, 1, 9]
    assert all(timeline.token_s[0] > timeline.arrived_s for timeline in timelines)
    assert all(timeline.token_s == sorted(timeline.token_s) for timeline in timelines)


def test_a_request_waits_until_it_arrives(engine_directory: Path) -> None:
    side = bench_sides.EngineSide(Engine.load(engine_directory, 1), max_batch_size=2, max_batch_tokens=32)
    arrivals = [Arrival(0.0, 4, 2), Arrival(0.3, 4, 2)]
    first, second = side.serve(arrivals, draw_prompts(arrivals, 131, 0))
    assert first.token_s[-1] < 0.3 < second.token_s[0]


def test_what_a_step_reads(engine_directory: Path) -> None:
    manifest = Engine.load(engine_directory, 1).manifest
    # qkv 80 x 12 heads of 8 each ... summed by hand: three layers, and the tied head once
    layer = 80 * (10 + 2 + 2) * 8 + 80 * 80 + 80 * 2 * 112 + 112 * 80
    elements = 3 * layer + 131 * 80
    assert engine_reads(manifest) == Reads(4 * elements, 2 * 3 * 2 * 8 * 4)
    assert dense_reads(manifest, 2) == Reads(2 * elements, 2 * 3 * 2 * 8 * 2)


def test_transformers_answers_a_padded_batch_as_each_alone(tiny_checkpoint: Any) -> None:
    from qwen_run.accuracy.reference import HuggingFace

    model = HuggingFace(tiny_checkpoint("qwen2").path, 1)
    prompts = draw_prompts([Arrival(0, 7, 6), Arrival(0, 19, 6), Arrival(0, 12, 6)], 131, 3)
    together = list(zip(*model.stream_batch(prompts, 6), strict=True))
    assert [list(answer) for answer in together] == [model.continuation(prompt, 6, frozenset()) for prompt in prompts]


def test_transformers_beside_the_engine(engine_directory: Path, tiny_checkpoint: Any) -> None:
    checkpoint = str(tiny_checkpoint("qwen2-tied").path)
    settings = [Setting(at_once(3, 20, 4), batch=3), Setting(ARRIVALS, rate=2.0)]
    found = measure("throughput", settings, 2, 3, options(engine_directory, compare="hf", checkpoint=checkpoint), "x")
    assert [(result.side, result.batch, result.rate) for result in found.results] == [
        (engine_directory.name, 3, None),
        ("transformers float32", 3, None),
        (engine_directory.name, None, 2.0),
        ("transformers float32", None, 2.0),
    ]
    assert {result.figures.output_tokens for result in found.results} == {12, 15}
    assert {result.figures.runs for result in found.results} == {2}
    for result in found.results[:1]:
        assert result.figures.decode_bytes_per_s is not None
        assert result.bandwidth_share == result.figures.decode_bytes_per_s / 1e9


def test_sides_get_the_same_prompts_and_every_run_new_ones(
    engine_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: dict[str, list[Any]] = {"a": [], "b": []}

    class Recorder:
        reads = Reads(8, 0)

        def __init__(self, name: str) -> None:
            self.name = name

        def serve(self, arrivals: Any, prompts: Any) -> list[Timeline]:
            served[self.name] += prompts
            return [Timeline(0.0, 1, [1.0, 2.0]) for _ in prompts]

    monkeypatch.setattr(bench_measure, "EngineSide", lambda *_: Recorder("a"))
    monkeypatch.setattr(bench_measure, "_transformers", lambda *_: Recorder("b"))
    settings = [Setting(at_once(2, 40, 2), batch=2)] * 2
    measure("throughput", settings, 2, 2, options(engine_directory, compare="hf"), "x")
    assert served["a"] == served["b"]
    assert len({tuple(prompt) for prompt in served["a"]}) == len(served["a"]) == 2 * (2 + 2 * 2)


def run_bench(*arguments: object) -> Result:
    return CliRunner().invoke(bench.main, [str(argument) for argument in arguments], catch_exceptions=False)


SHORT = ("--input-length", 20, "--output-length", 4, "--threads", 1)


def test_latency_table(engine_directory: Path) -> None:
    result = run_bench("latency", "--engine", engine_directory, "--repeat", 2, *SHORT)
    assert result.exit_code == 0, result.stderr
    head, row, empty, *definitions = result.stdout.splitlines()
    assert head.split()[:5] == ["requests", "output", "tok/s", "TTFT", "ms"]
    assert row.split()[:2] == [engine_directory.name, "1"]
    assert empty == ""
    assert any(line.startswith("TTFT ms: time to first token") for line in definitions)
    assert "1 requests with 20 input and 4 output tokens" in result.stdout
    assert "over all requests of 2 runs" in result.stdout


def test_throughput_as_json_and_plot(engine_directory: Path, tmp_path: Path) -> None:
    plot = tmp_path / "grows.svg"
    command = ("throughput", "--engine", engine_directory, "--batch", "1,3", "--repeat", 1, "--plot", plot, "--json")
    result = run_bench(*command, *SHORT)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [(each["batch"], each["figures"]["output_tokens"]) for each in found["results"]] == [(1, 4), (3, 12)]
    assert found["definitions"].keys() >= {"ttft_ms", "decode_bytes_per_s", "bandwidth_share"}
    drawing = ET.parse(plot).getroot()
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    assert len([path for path in drawing.iter() if path.get("class") == "line s0"]) == 1
    assert engine_directory.name in [text.text for text in drawing.iter() if text.get("class") == "key s0"]


def test_trace_at_two_rates(engine_directory: Path, tmp_path: Path) -> None:
    trace = write(tmp_path / "t.csv", "arrival_s,input_tokens,output_tokens\n0,5,3\n1,6,2\n2,7,4\n")
    plot = tmp_path / "load.svg"
    command = ("serve-trace", "--engine", engine_directory, "--trace", trace, "--rate", "20,50.5", "--threads", 1)
    result = run_bench(*command, "--requests", 2, "--plot", plot, "--json")
    assert result.exit_code == 0, result.stderr
    results = json.loads(result.stdout)["results"]
    assert [(each["rate"], each["figures"]["requests"]) for each in results] == [(20.0, 2), (50.5, 2)]
    assert results[0]["figures"]["input_tokens"] == 11
    names = [each.text for each in ET.parse(plot).getroot().iter() if str(each.get("class")).startswith("key")]
    assert names == [f"{engine_directory.name} p50", f"{engine_directory.name} p99"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("latency", "--input-length", 90, "--output-length", 7), "request 1 has 90 input and 7 output tokens"),
        (("throughput", "--plot", "nowhere/p.svg"), "nowhere/p.svg cannot be written"),
        (("serve-trace", "--trace", "nowhere.csv"), "nowhere.csv cannot be read"),
    ],
)
def test_mistakes_are_told_in_one_line(engine_directory: Path, arguments: tuple[object, ...], message: str) -> None:
    result = run_bench(*arguments, "--engine", engine_directory)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: ")


def test_options_that_need_another_are_a_wrong_command_line(engine_directory: Path) -> None:
    result = run_bench("latency", "--hf-dtype", "float32", "--engine", engine_directory)
    assert result.exit_code == 2
    assert "give them with --compare hf" in result.stderr


@pytest.mark.parametrize("batch", ["", "0", "1,", "two", "4,-1"])
def test_batches_that_are_none(batch: str) -> None:
    result = run_bench("throughput", "--batch", batch)
    assert result.exit_code == 2
    assert "is not numbers above 0" in result.stderr


def test_help_names_every_benchmark() -> None:
    assert all(name in run_bench("--help").stdout for name in ("latency", "throughput", "serve-trace"))
    assert "medians over runs" not in run_bench("latency", "-h").stdout


def test_a_quantised_engine_is_compared_in_bfloat16(engine_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(bench_measure, "find_checkpoint", lambda manifest, named: Path("x"))
    monkeypatch.setattr(
        bench_measure, "HuggingFaceSide", lambda manifest, path, threads, dtype, most: made.append(dtype)
    )
    for group_size, given in ((32, None), (0, None), (32, "float32")):
        linear = SimpleNamespace(quantization=SimpleNamespace(group_size=group_size))
        engine: Any = SimpleNamespace(manifest=SimpleNamespace(linears=[linear]))
        bench_measure._transformers(engine, options(engine_directory, hf_dtype=given), 1, 1)
    assert made == ["bfloat16", "float32", "float32"]


def test_median_is_of_values() -> None:
    assert bench_stats.median([]) is None
    assert bench_stats.median([3.0, 1.0, 2.0]) == statistics.median([1, 2, 3])
