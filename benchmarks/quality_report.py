"""The tables and the plot of ``benchmarks.quality``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.command import paragraph
from qwen_run.reports.plots import scatter_plot

DEFINITIONS = """\
KL: mean over positions of KL(float || side), natural logarithm, in float64, with its 95 % interval, bootstrapped over
windows; top-1: share of positions where both put the same token first, on the first text. ours / it: our least KL
without calibration, and with it, at the bytes of that row, over its KL on the first text; ours at these bytes lies on
the line from one point of our front to the next, bytes against the logarithm of KL; no number where none of ours is as
small or as large. matrix: with an importance matrix. MB: weights, embedding, head, norms and biases."""
ERRORS = """\
Squared error of the weights of each kind of linear over their squared size, and the bits of a weight, scales and all
else counted."""

# Families of a row: ours are the first two.
ROUNDED, CALIBRATED = "ours rounded", "ours calibrated"
# What is as near as sums of another order are is no point of the plot.
FLOAT_KL = 1e-7


def front_at(points: Sequence[tuple[float, float]], size: float) -> float | None:
    """The KL at ``size`` on the front of ``points`` (bytes, KL): from each to the next that is larger and nearer.

    >>> front_at([(1, 0.1), (3, 0.001), (2, 0.5)], 2)
    0.01
    >>> front_at([(1, 0.1)], 2)
    """
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    for (low, before), (high, after) in itertools.pairwise(front):
        if low <= size <= high:
            part = (size - low) / (high - low)
            return round(math.exp((1 - part) * math.log(before) + part * math.log(after)), 12)
    return None


def table_lines(texts: Sequence[str], results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The lines of a Markdown table, a row a side."""
    head = ["side", "MB", *(f"KL, {text}" for text in texts), "top-1", "rounded / it", "calibrated / it"]
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for name, result in results.items():
        cells = [name, f"{result['bytes'] / 1e6:.2f}"]
        for text in texts:
            value, low, high = result[text]["kl"]
            cells.append(f"{value:.2e}" + (f" ({low:.2e} to {high:.2e})" if low is not None else ""))
        cells.append(f"{result[texts[0]]['top1'][0]:.2%}")
        cells += [_against(texts[0], results, result, family) for family in (ROUNDED, CALIBRATED)]
        yield f"| {' | '.join(cells)} |"


def _against(text: str, results: Mapping[str, Mapping[str, Any]], result: Mapping[str, Any], family: str) -> str:
    points = [(one["bytes"], one[text]["kl"][0]) for one in results.values() if one["family"] == family]
    ours = None if result["family"].startswith("ours") else front_at(points, result["bytes"])
    return "" if ours is None else f"{ours / result[text]['kl'][0]:.2f}"


def error_lines(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The lines of a Markdown table of weight errors, a row a side, a column a kind of linear."""
    kinds = next((list(result["errors"]) for result in results.values() if result["errors"]), [])
    yield f"| side | {' | '.join(kinds)} |"
    yield f"|{'---|' * (1 + len(kinds))}"
    for name, result in results.items():
        if result["errors"]:
            cells = [f"{error:.2e} at {bits:.2f}" for error, bits in map(result["errors"].get, kinds)]
            yield f"| {name} | {' | '.join(cells)} |"


def plot(text: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """KL against size of all that rounds: SVG."""
    series: dict[str, list[tuple[float, float]]] = {}
    for result in results.values():
        if (kl := result[text]["kl"][0]) > FLOAT_KL:
            series.setdefault(result["family"], []).append((result["bytes"] / 1e6, kl))
    note = f"{text}; {datetime.now(UTC):%Y-%m-%d}"
    return scatter_plot("KL to the float model against size", "MB", "KL, nats", series, [note])


def write_report(path: Path, head: str, texts: Sequence[str], results: Mapping[str, Mapping[str, Any]]) -> None:
    """Both tables and what they mean to ``path``, and the plot beside it."""
    tables = [*table_lines(texts, results), "", DEFINITIONS, "", *error_lines(results), "", ERRORS]
    lines = [paragraph(head), "", *tables]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if any(result[texts[0]]["kl"][0] > FLOAT_KL for result in results.values()):
        path.with_suffix(".svg").write_text(plot(texts[0], results), encoding="utf-8")
