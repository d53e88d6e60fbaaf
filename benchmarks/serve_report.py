"""The table of ``serve``: medians and percentiles of what was measured, beside what was hoped for."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.serve_parts import HUGE, Found, rate_of
from benchmarks.serve_sides import LLAMA, OURS
from qwen_run.bench.figures import Percentiles
from qwen_run.bench.load import LoadFigures

TIMES = {"itl": "time between tokens, ms", "ttft": "time to the first token, ms"}
GOALS = {"1 at once": 1.4, "16 at once": 2.0}  # output tokens a second, ours over the other's


def report(found: Found) -> str:
    """Everything that was measured, in Markdown."""
    parts = []
    if found.loads:
        parts += ["## Streams", _streams(found.loads)]
    if rows := list(_shares(found.values)):
        header = ["| | found | goal |", "|---|---|---|"]
        parts += ["## The server by itself", "\n".join([*header, *rows])]
    return "\n\n".join(parts)


def _streams(loads: Mapping[str, Mapping[str, Sequence[LoadFigures]]]) -> str:
    """A row for each load and figure: both sides, and ours over the other's."""
    sides = [side for side in (OURS, LLAMA) if any(side in found for found in loads.values())]
    lines = [f"| | {' | '.join(sides)} | ratio | goal |", "|---" * (len(sides) + 3) + "|"]
    for load, found in loads.items():
        rates = {side: statistics.median(map(rate_of, found[side])) for side in sides if side in found}
        goal = f"{GOALS[load]:g} × or more" if load in GOALS else ""
        lines.append(_row(f"{load}: output tok/s", rates, sides, goal))
        for name, shown in TIMES.items():
            summaries = {side: Percentiles.of(pooled(found[side], name)) for side in rates}
            for level, wanted in (("p50", ""), ("p99", "below 1 ×")):
                values = {side: getattr(each, level) for side, each in summaries.items() if each is not None}
                lines.append(_row(f"{load}: {shown}, {level}", values, sides, wanted))
    return "\n".join(lines)


def pooled(rounds: Sequence[LoadFigures], name: str) -> list[float]:
    """The values of all rounds."""
    return [value for figures in rounds for value in figures.values[name]]


def _row(title: str, values: Mapping[str, float], sides: Sequence[str], goal: str) -> str:
    cells = [_shown(values[side]) if side in values else "" for side in sides]
    ratio = f"{values[OURS] / values[LLAMA]:.2f} ×" if {OURS, LLAMA} <= values.keys() else ""
    return f"| {title} | {' | '.join(cells)} | {ratio} | {goal if ratio else ''} |"


def _shares(values: Mapping[str, Sequence[float]]) -> Iterator[str]:
    """A row for each figure of ours alone."""
    medians = {name: statistics.median(found) for name, found in values.items()}
    if "http, tok/s" in medians:
        yield _share("output through HTTP over `LLM.generate`'s", medians, "http, tok/s", "python, tok/s", "tok/s")
    if (first := "http, ms to the first token") in medians:
        python = medians["python, ms to the first token"]
        more = f"{medians[first] - python:.2f} ms ({_shown(medians[first])} and {_shown(python)} ms)"
        yield f"| more to the first token of one request than through Python | {more} | 3 ms or less |"
    if (cost := "main thread, µs a chunk") in medians:
        yield f"| processor time of the server's main thread a chunk | {medians[cost]:.0f} µs | 60 µs or less |"
        yield f"| the same of the client, on the same cores | {medians['client, µs a chunk']:.0f} µs | |"
    for name in medians:
        if name.startswith("schema, "):
            free = name.replace("schema", "free", 1)
            of = name.partition(" of ")[2]
            yield _share(f"decode with a JSON schema over free decode, {of}", medians, name, free, "tok/s")
    for how in HUGE:
        if (name := f"longest gap {how}, ms") in medians:
            more = medians[name] - medians["longest gap alone, ms"]
            title = f"longest gap of others beside a prompt of a megabyte that is {how}, more than alone"
            yield f"| {title} | {more:.0f} ms ({_shown(medians[name])} ms) | 50 ms or less |"
    if (start := "start to the first answer, s") in medians:
        yield f"| from the start to the first chat answer, demo | {medians[start]:.2f} s | 1.5 s or less |"


def _share(title: str, medians: Mapping[str, float], over: str, under: str, unit: str) -> str:
    share = medians[over] / medians[under]
    return f"| {title} | {share:.1%} ({_shown(medians[over])} and {_shown(medians[under])} {unit}) | 95 % or more |"


def _shown(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
