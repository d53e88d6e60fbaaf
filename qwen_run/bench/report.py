"""What a benchmark found, as a table, as JSON and as a plot: one :class:`Result` a side and setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from qwen_engine.json_output import rounded, to_json
from qwen_run.bench.figures import DEFINITIONS, Figures, Percentiles
from qwen_run.reports.plots import line_plot
from qwen_run.reports.tables import Table

SCHEMA_VERSION = 1

# figure -> head of its column, in the order of the table
COLUMNS = {
    "output_tokens_per_s": "output tok/s",
    "ttft_ms": "TTFT ms",
    "tpot_ms": "TPOT ms",
    "gap_ms": "gap ms",
    "latency_ms": "answer ms",
    "decode_tokens_per_s": "decode tok/s",
    "decode_bytes_per_s": "reads GB/s",
    "bandwidth_share": "of bandwidth",
}


@dataclass(frozen=True)
class Result:
    """One side at one setting: so many requests at once (``batch``) or a second (``rate``)."""

    side: str
    batch: int | None
    rate: float | None
    figures: Figures
    bandwidth_share: float | None


@dataclass(frozen=True)
class Bench:
    """A whole run of ``qwen-bench``, as ``--json`` prints it.

    Attributes:
        read_bytes_per_s: what the threads get when they only read memory of the size of a step's weights, in the
            faster of two ways.
    """

    schema_version: int
    benchmark: str
    command: str
    created: str
    engine: Mapping[str, str]
    processor: str
    threads: int
    versions: Mapping[str, str]
    read_bytes_per_s: float
    results: tuple[Result, ...]

    def to_json(self) -> str:
        record = {name: getattr(self, name) for name in ("schema_version", "command", "created", "engine")}
        return to_json(record | rounded(asdict(self)) | {"definitions": DEFINITIONS}, indent=1)


def result_table(bench: Bench) -> Table:
    """One row a result, one column a figure that any of them has."""
    shown = _shown(bench)
    setting = "requests/s" if bench.benchmark == "serve-trace" else "requests"
    rows = [
        (result.side, _setting(result), *(_cell(name, _value(result, name)) for name in shown))
        for result in bench.results
    ]
    return Table(("", setting, *(COLUMNS[name] for name in shown)), tuple(rows))


def definition_lines(bench: Bench) -> list[str]:
    """What the table's rows mean, and under which conditions they were measured."""
    lines = [f"{COLUMNS[name]}: {DEFINITIONS[name]}" for name in _shown(bench)]
    first = bench.results[0].figures
    runs = f"{first.runs} runs" if first.runs > 1 else "one run"
    versions = ", ".join(f"{name} {version}" for name, version in bench.versions.items())
    return [
        *lines,
        f"Two figures are the 50th and the 99th percentile over all requests of {runs}; rates are medians over runs.",
        f"{first.requests} requests with {first.input_tokens} input and {first.output_tokens} output tokens in the "
        "first row; greedy, past any end of sequence; prompts are random.",
        f"{bench.processor}, {bench.threads} threads, fastest read {bench.read_bytes_per_s / 1e9:.1f} GB/s; {versions}",
    ]


def throughput_plot(bench: Bench) -> str:
    """Output tokens a second against the number of requests at once, a line a side: standalone SVG."""
    return line_plot(
        "Output tokens a second against requests at once",
        "requests at once",
        "output tokens/s",
        _series(bench, lambda result: (result.batch, result.figures.output_tokens_per_s)),
        _conditions(bench),
    )


def latency_plot(bench: Bench) -> str:
    """Half and 99 of 100 answers' latency against requests a second, two lines a side: standalone SVG."""
    middle = _series(bench, lambda result: (result.rate, result.figures.latency_ms.p50 / 1e3))
    high = _series(bench, lambda result: (result.rate, result.figures.latency_ms.p99 / 1e3))
    series = {
        f"{side} {name}": line for name, lines in (("p50", middle), ("p99", high)) for side, line in lines.items()
    }
    return line_plot(
        "Latency of an answer against requests a second", "requests/s", "whole answer, s", series, _conditions(bench)
    )


def _conditions(bench: Bench) -> list[str]:
    """On which machine a plot was measured, and when."""
    versions = ", ".join(f"{name} {version}" for name, version in bench.versions.items())
    return [f"{bench.processor}, {bench.threads} threads, {bench.created[:10]}; {versions}"]


# benchmark -> what --plot draws
PLOTS = {"throughput": throughput_plot, "serve-trace": latency_plot}


def _series(
    bench: Bench, point: Callable[[Result], tuple[float | None, float]]
) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = {}
    for result in bench.results:
        x, y = point(result)
        if x is not None:
            series.setdefault(result.side, []).append((x, y))
    return {side: sorted(points) for side, points in series.items()}


def _shown(bench: Bench) -> list[str]:
    """The figures that any result has."""
    return [name for name in COLUMNS if any(_value(result, name) is not None for result in bench.results)]


def _setting(result: Result) -> str:
    if result.batch is not None:
        return str(result.batch)
    return "at once" if result.rate is None else f"{result.rate:.3g}"


def _value(result: Result, name: str) -> Any:
    if name in {field.name for field in fields(Result)}:
        return getattr(result, name)
    return getattr(result.figures, name)


def _cell(name: str, value: float | Percentiles | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, Percentiles):
        return f"{_digits(value.p50)} / {_digits(value.p99)}"
    if name == "decode_bytes_per_s":
        return _digits(value / 1e9)
    return f"{value:.0%}" if name == "bandwidth_share" else _digits(value)


def _digits(value: float) -> str:
    """Three digits, more where they stand before the point.

    >>> _digits(0.01234), _digits(12.34), _digits(1234.5)
    ('0.0123', '12.3', '1234')
    """
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
