"""What a benchmark found, as a table, as JSON and as a plot: one :class:`Result` a side and setting."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from qwen_run import svg
from qwen_run.bench_stats import DEFINITIONS, Figures, Percentiles
from qwen_run.report_tables import Table

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

# Standalone SVG brings its own colours, for light pages and dark ones.
_STYLE = """
svg { color-scheme: light dark; --text: #1c2128; --soft: #59636e; --edge: #d1d9e0; --page: #ffffff;
  --s0: #0969da; --s1: #bc4c00; --s2: #1a7f37; --s3: #8250df; --s4: #bf3989; --s5: #59636e; background: var(--page); }
@media (prefers-color-scheme: dark) { svg { --text: #e6edf3; --soft: #9198a1; --edge: #3d444d; --page: #0d1117;
  --s0: #58a6ff; --s1: #f0883e; --s2: #3fb950; --s3: #a371f7; --s4: #ff80c8; --s5: #9198a1; } }
text { fill: var(--text); font: 13px system-ui, sans-serif; }
.axis { stroke: var(--soft); } .grid { stroke: var(--edge); stroke-width: .6; }
.s0 { --series: var(--s0); } .s1 { --series: var(--s1); } .s2 { --series: var(--s2); }
.s3 { --series: var(--s3); } .s4 { --series: var(--s4); } .s5 { --series: var(--s5); }
.line { stroke: var(--series); stroke-width: 2; fill: none; }
.dots { stroke: var(--series); stroke-width: 7; stroke-linecap: round; fill: none; } .key { fill: var(--series); }
"""


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
    processor: str
    threads: int
    versions: Mapping[str, str]
    read_bytes_per_s: float
    results: tuple[Result, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"definitions": DEFINITIONS}, indent=1, ensure_ascii=False)


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
    )


def latency_plot(bench: Bench) -> str:
    """Half and 99 of 100 answers' latency against requests a second, two lines a side: standalone SVG."""
    middle = _series(bench, lambda result: (result.rate, result.figures.latency_ms.p50 / 1e3))
    high = _series(bench, lambda result: (result.rate, result.figures.latency_ms.p99 / 1e3))
    series = {
        f"{side} {name}": line for name, lines in (("p50", middle), ("p99", high)) for side, line in lines.items()
    }
    return line_plot("Latency of an answer against requests a second", "requests/s", "whole answer, s", series)


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


def line_plot(description: str, x_label: str, y_label: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """A line a series of (x, y), from 0 on both axes, with a key: standalone SVG."""
    points = [point for line in series.values() for point in line]
    x = svg.x_axis(x_label, 0, max(point[0] for point in points))
    y = svg.y_axis(y_label, 0, 1.15 * max(point[1] for point in points))
    marks = []
    for number, (name, line) in enumerate(series.items()):
        marks += [svg.line(line, x, y, number), svg.dots(line, x, y, number), _key(number, name)]
    return standalone(svg.plot(description, x, y, *marks))


def scatter_plot(
    description: str, x_label: str, y_label: str, series: Mapping[str, Sequence[tuple[float, float]]]
) -> str:
    """The points (x, y) of each series, y positive and on a logarithmic axis, with a key: standalone SVG."""
    points = [point for dots in series.values() for point in dots]
    low, high = min(point[0] for point in points), max(point[0] for point in points)
    margin = 0.05 * (high - low or high)
    x = svg.x_axis(x_label, low - margin, high + margin)
    y = svg.log_y_axis(y_label, [point[1] for point in points], floor=min(point[1] for point in points))
    marks = [
        svg.dots(dots, x, y, number) + _key(number, name, svg.WIDTH // 2)
        for number, (name, dots) in enumerate(series.items())
    ]
    return standalone(svg.plot(description, x, y, *marks))


def _key(number: int, name: str, left: int = svg.LEFT) -> str:
    """The name of a series in its colour, one below the other from the top."""
    x, y = left + 12, svg.TOP + 16 * (number + 1)
    return f'<text class="key s{number}" x="{x}" y="{y}">{html.escape(name)}</text>'


def standalone(plot: str) -> str:
    """A plot of ``svg.py`` as a file of its own."""
    opening, rest = plot.split(">", 1)
    return f'{opening} xmlns="http://www.w3.org/2000/svg"><style>{_STYLE}</style>{rest}\n'


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
