"""Whole plots as SVG files of their own: lines, and points on a logarithmic axis."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from qwen_run.reports import svg

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
