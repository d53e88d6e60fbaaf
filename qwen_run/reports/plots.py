"""Whole plots as SVG files of their own: a title, lines or points, and below what they were measured on.

They are read by browsers, editors, office programs and converters, many of which know no CSS variables and no media
queries: every colour is written out, on white.
"""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qwen_run.reports import svg

TITLE_HEIGHT, NOTE_HEIGHT, NOTE_CHARACTERS = 30, 16, 78
COLOURS = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#59636e")  # of the series, in turn

_STYLE = (
    "text { fill: #1c2128; font: 13px sans-serif; } .title { font-size: 15px; font-weight: bold; } "
    ".note { fill: #59636e; font-size: 11px; } .axis { stroke: #59636e; } "
    ".grid { stroke: #d1d9e0; stroke-width: 0.6; } "
    ".guide { stroke: #59636e; stroke-dasharray: 5 4; } .ring { stroke: #cf222e; stroke-width: 2; fill: none; } "
    ".line { stroke-width: 2; fill: none; } .dots { stroke-width: 7; stroke-linecap: round; fill: none; } "
    + " ".join(
        f".line.s{number}, .dots.s{number} {{ stroke: {colour}; }} .key.s{number}, .bar.s{number} {{ fill: {colour}; }}"
        for number, colour in enumerate(COLOURS)
    )
)


def line_plot(
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    notes: Sequence[str] = (),
) -> str:
    """A line a series of (x, y), from 0 on both axes, with a key: standalone SVG.

    Args:
        notes: sentences below the plot: on which machine, when.
    """
    points = [point for line in series.values() for point in line]
    x = svg.x_axis(x_label, 0, max(point[0] for point in points))
    y = svg.y_axis(y_label, 0, 1.15 * max(point[1] for point in points))
    marks = []
    for number, (name, line) in enumerate(series.items()):
        marks += [svg.line(line, x, y, number), svg.dots(line, x, y, number), _key(number, name)]
    return standalone(svg.plot(title, x, y, *marks), title, notes)


def scatter_plot(
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    notes: Sequence[str] = (),
) -> str:
    """The points (x, y) of each series, y positive and on a logarithmic axis, with a key: standalone SVG.

    Args:
        notes: as for :func:`line_plot`.
    """
    points = [point for dots in series.values() for point in dots]
    low, high = min(point[0] for point in points), max(point[0] for point in points)
    margin = 0.05 * (high - low or high)
    x = svg.x_axis(x_label, low - margin, high + margin)
    y = svg.log_y_axis(y_label, [point[1] for point in points], floor=min(point[1] for point in points))
    marks = [
        svg.dots(dots, x, y, number) + _key(number, name, at_right=True)
        for number, (name, dots) in enumerate(series.items())
    ]
    return standalone(svg.plot(title, x, y, *marks), title, notes)


def _key(number: int, name: str, at_right: bool = False) -> str:
    """The name of a series in its colour, one below the other from the top."""
    x, anchor = (svg.WIDTH - svg.RIGHT - 4, "end") if at_right else (svg.LEFT + 12, "start")
    y = svg.TOP + 16 * (number + 1)
    return f'<text class="key s{number}" x="{x}" y="{y}" text-anchor="{anchor}">{html.escape(name)}</text>'


class _Drawing(NamedTuple):
    """What stands in an ``<svg>`` of ``svg.py``, and its size in pixels."""

    content: str
    width: float
    height: float


def standalone(plot: str, title: str, notes: Sequence[str] = ()) -> str:
    """A plot of ``svg.py`` as a file of its own, ``title`` above and ``notes`` below it."""
    return stacked([plot], title, notes)


def stacked(plots: Sequence[str], title: str, notes: Sequence[str] = ()) -> str:
    """Plots of ``svg.py``, one below the other, as one file."""
    drawings = [_read(plot) for plot in plots]
    parts, top = [f'<text class="title" x="12" y="20">{html.escape(title)}</text>'], float(TITLE_HEIGHT)
    for drawing in drawings:
        parts.append(f'<g transform="translate(0 {top:g})">{drawing.content}</g>')
        top += drawing.height
    for line in [line for note in notes for line in textwrap.wrap(note, NOTE_CHARACTERS)]:
        parts.append(f'<text class="note" x="12" y="{top + 10:g}">{html.escape(line)}</text>')
        top += NOTE_HEIGHT
    return svg.svg_file(max(drawing.width for drawing in drawings), top + 4, title, _STYLE, "".join(parts))


def _read(plot: str) -> _Drawing:
    found = re.fullmatch(r'<svg viewBox="0 0 (\S+) (\S+)"[^>]*>(.*)</svg>', plot, re.DOTALL)
    assert found is not None, "a plot of svg.py"
    return _Drawing(found[3], float(found[1]), float(found[2]))
