"""Plots as SVG text: numbers in, one ``<svg>`` out, coloured by the classes of the page it stands in.

Classes: ``axis``, ``grid`` and ``guide`` for lines; ``s0``, ``s1``, ``s2`` for series; ``dots``, ``line``, ``bar`` and
``ring`` for how they are drawn.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Small enough that the text can still be read when a phone shrinks the plot to its width.
WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 12, 46
BAR_HEIGHT = 22
CHARACTER_WIDTH = 7.4  # of the widest names in a font of 13 pixels, nearly all are narrower

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """Values from ``low`` to ``high`` laid out from pixel ``start`` to pixel ``end``."""

    label: str
    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """The pixel of ``value``; what lies outside is drawn at the edge."""
        value = min(max(value, self.low), self.high)
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Round values within the axis: at most about seven.

        >>> Axis("share", 0, 1, 0, 100).ticks()
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
        >>> Axis("error", 1e-3, 1, 0, 100, log=True).ticks()
        [0.001, 0.01, 0.1, 1.0]
        >>> Axis("error", 0.1, 1, 0, 100, log=True).ticks()
        [0.1, 0.2, 0.5, 1.0]
        """
        if self.log:
            decades = range(round(math.log10(self.low)), round(math.log10(self.high)) + 1)
            if len(decades) > 3:
                return [10.0**decade for decade in decades[:: math.ceil(len(decades) / 7)]]
            ticks = (float(f"{step}e{decade}") for decade in decades for step in (1, 2, 5))
            return [tick for tick in ticks if tick <= self.high]
        rough = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def x_axis(label: str, low: float, high: float) -> Axis:
    return Axis(label, low, high if high > low else low + 1, LEFT, WIDTH - RIGHT)


def y_axis(label: str, low: float, high: float) -> Axis:
    return Axis(label, low, high if high > low else low + 1, HEIGHT - BOTTOM, TOP)


def log_y_axis(label: str, values: Sequence[float], floor: float) -> Axis:
    """Whole decades around the finite ``values``; none below ``floor``."""
    seen = [max(value, floor) for value in values if math.isfinite(value)] or [floor]
    low, high = math.floor(math.log10(min(seen))), math.ceil(math.log10(max(seen)))
    return Axis(label, 10.0**low, 10.0 ** max(high, low + 1), HEIGHT - BOTTOM, TOP, log=True)


def plot(description: str, x: Axis, y: Axis, *marks: str) -> str:
    """A plot with both axes, their grids, and ``marks`` on it; ``description`` is what a screen reader says."""
    return _svg(description, HEIGHT, "".join([*_x_lines(x, HEIGHT - BOTTOM), *_y_lines(y), *marks]))


def dots(points: Points, x: Axis, y: Axis, series: int = 0) -> str:
    """One small dot a point, all in one path: many points stay a small file."""
    path = "".join(f"M{x.place(a)} {y.place(b)}h0" for a, b in _finite(points))
    return f'<path class="dots s{series}" d="{path}"/>'


def line(points: Points, x: Axis, y: Axis, series: int = 0) -> str:
    """A line from point to point."""
    path = "L".join(f"{x.place(a)} {y.place(b)}" for a, b in _finite(points))
    return f'<path class="line s{series}" d="M{path}"/>' if path else ""


def guide(x: Axis, y: Axis, start: tuple[float, float], end: tuple[float, float]) -> str:
    """A thin straight line to compare with."""
    return (
        f'<line class="guide" x1="{x.place(start[0])}" y1="{y.place(start[1])}" '
        f'x2="{x.place(end[0])}" y2="{y.place(end[1])}"/>'
    )


def ring(x: Axis, y: Axis, point: tuple[float, float], label: str) -> str:
    """A circle around one point, with a few words beside it, on the side where there is room."""
    a, b = x.place(point[0]), y.place(point[1])
    anchor, offset = ("end", -10) if a > (x.start + x.end) / 2 else ("start", 10)
    return f'<circle class="ring" cx="{a}" cy="{b}" r="6"/>' + _text(a + offset, max(b - 8, TOP + 10), label, anchor)


def bars(description: str, rows: Sequence[tuple[str, float, str]], label: str) -> str:
    """Horizontal bars on an axis in per cent: ``rows`` of name, share and the words at the bar's end.

    The drawing is as wide as its longest name needs.
    """
    bottom = TOP + BAR_HEIGHT * len(rows)
    names_width = max([130.0, *(CHARACTER_WIDTH * len(name) + 16 for name, _, _ in rows)])
    width_px = WIDTH - 130 + names_width
    x = Axis(label, 0, 100, names_width, width_px - 60)
    marks = _x_lines(x, bottom)
    for i, (name, share, words) in enumerate(rows):
        top = TOP + BAR_HEIGHT * i
        width = x.place(100 * share) - x.start if math.isfinite(share) else 0
        marks.append(_text(x.start - 8, top + 16, name, "end"))
        marks.append(
            f'<rect class="bar s0" x="{x.start}" y="{top + 3}" width="{width:.1f}" height="{BAR_HEIGHT - 6}"/>'
        )
        marks.append(_text(x.start + width + 6, top + 16, words, "start"))
    return _svg(description, bottom + BOTTOM, "".join(marks), width_px)


def svg_file(width: float, height: float, title: str, style: str, content: str) -> str:
    """A whole SVG file on white."""
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
        f"<title>{html.escape(title)}</title><style>{style}</style>"
        f'<rect width="100%" height="100%" fill="#fff"/>{content}</svg>\n'
    )


def _svg(description: str, height: int, content: str, width: float = WIDTH) -> str:
    label = html.escape(description)
    return f'<svg viewBox="0 0 {width:g} {height}" role="img" aria-label="{label}">{content}</svg>'


def _x_lines(x: Axis, bottom: float) -> list[str]:
    lines = [_rule(x.start, bottom, x.end, bottom, "axis")]
    for tick in x.ticks():
        at = x.place(tick)
        lines += [_rule(at, TOP, at, bottom, "grid"), _text(at, bottom + 18, _tick_text(tick, x), "middle")]
    return [*lines, _text((x.start + x.end) / 2, bottom + 38, x.label, "middle")]


def _y_lines(y: Axis) -> list[str]:
    lines = [_rule(LEFT, y.start, LEFT, y.end, "axis")]
    for tick in y.ticks():
        at = y.place(tick)
        lines += [_rule(LEFT, at, WIDTH - RIGHT, at, "grid"), _text(LEFT - 6, at + 5, _tick_text(tick, y), "end")]
    middle = (y.start + y.end) / 2
    turned = f'<g transform="translate(15 {middle}) rotate(-90)">{_text(0, 0, y.label, "middle")}</g>'
    return [*lines, turned]


def _rule(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _tick_text(value: float, axis: Axis) -> str:
    if axis.log and not 1e-3 <= value <= 1e3:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.6g}" if abs(value) >= 1e4 else f"{value:.6g}"


def _finite(points: Points) -> Iterator[tuple[float, float]]:
    return ((a, b) for a, b in points if math.isfinite(a) and math.isfinite(b))
