"""What an engine's manifest says of its linears: a row for each, the totals, and a picture of bits by layer."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from qwen_engine.graph_io import EMBEDDING, HEAD
from qwen_engine.manifest import WEIGHTS_FILE, Manifest, Quantization
from qwen_run.reports.svg import svg_file

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")

# The picture: pixels of a cell, of the names beside the cells, of the margin.
CELL, NAMES, MARGIN = 26, 170, 14
STYLE = "text { font: 12px system-ui, sans-serif; fill: #222; } .light { fill: #fff; }"


@dataclass(frozen=True)
class LinearRow:
    """One linear; ``quantization`` and ``output_error`` as in the manifest, ``scheme`` the former in words.

    One that is shared reads the bytes of the embedding.
    """

    name: str
    out_features: int
    in_features: int
    scheme: str
    quantization: Quantization
    bits_per_weight: float
    stored_bytes: int
    output_error: float | None
    shared: bool


@dataclass(frozen=True)
class Totals:
    """Over all linears, what is shared counted once. ``other_bytes``: norms, biases, rotary tables, alignment."""

    weights: int
    bits_per_weight: float
    stored_bytes: int
    other_bytes: int


def linear_rows(manifest: Manifest) -> list[LinearRow]:
    """Every linear and embedding, in the order of the graph."""
    schemes = {linear.name: linear.quantization for linear in manifest.linears}
    tied = manifest.model.tie_word_embeddings and schemes.get(HEAD) == schemes.get(EMBEDDING)
    return [
        LinearRow(
            name=linear.name,
            out_features=linear.out_features,
            in_features=linear.in_features,
            scheme=linear.quantization.words,
            quantization=linear.quantization,
            bits_per_weight=8 * linear.stored_bytes / (linear.out_features * linear.in_features),
            stored_bytes=linear.stored_bytes,
            output_error=linear.output_error,
            shared=tied and linear.name == HEAD,
        )
        for linear in manifest.linears
    ]


def totals(manifest: Manifest, rows: Sequence[LinearRow]) -> Totals:
    own = [row for row in rows if not row.shared]
    weights, stored = sum(row.out_features * row.in_features for row in own), sum(row.stored_bytes for row in own)
    other = manifest.parts[WEIGHTS_FILE].size_bytes - stored
    return Totals(weights, 8 * stored / weights if weights else 0.0, stored, other)


def draw_bits(title: str, rows: Sequence[LinearRow]) -> str:
    """The bits of a weight as an SVG file: a column for each layer; what belongs to no layer is as wide as all."""
    placed = [(row, LAYER.fullmatch(row.name)) for row in rows]
    names = list(dict.fromkeys(match[2] if match else row.name for row, match in placed))
    blocks = [name.partition(".")[0] for name in names]
    kinds = sorted(names, key=lambda name: blocks.index(name.partition(".")[0]))  # what is in one block stays together
    layers = 1 + max((int(match[1]) for _, match in placed if match), default=0)
    width, height = NAMES + CELL * layers + MARGIN, MARGIN + 24 + CELL * (len(kinds) + 1) + MARGIN
    top = MARGIN + 24
    marks = [_text(MARGIN, MARGIN + 10, title)]
    for row, match in placed:
        y = top + CELL * kinds.index(match[2] if match else row.name)
        x, across = (NAMES + CELL * int(match[1]), CELL) if match else (NAMES, CELL * layers)
        marks.append(_cell(x, y, across, row))
    marks += [_text(MARGIN, top + CELL * i + 17, kind) for i, kind in enumerate(kinds)]
    bottom = top + CELL * len(kinds) + 17
    marks.append(_text(MARGIN, bottom, "layer"))
    marks += [_text(NAMES + CELL * i + CELL / 2, bottom, str(i), "middle") for i in range(layers) if i % 2 == 0]
    return svg_file(width, height, title, STYLE, "".join(marks))


def _cell(x: float, y: float, across: float, row: LinearRow) -> str:
    depth = min(max(math.log2(max(row.bits_per_weight, 1)) / 5, 0), 1)  # white at 1 bit, dark at 32
    colour = f"hsl(215 60% {95 - 65 * depth:.0f}%)"
    error = "" if row.output_error is None else f", output error {row.output_error:.2%}"
    words = html.escape(f"{row.name}: {row.scheme}, {row.bits_per_weight:.2f} bits a weight{error}")
    label = _text(x + across / 2, y + 17, f"{row.bits_per_weight:.3g}", "middle", "light" if depth > 0.6 else "")
    rect = f'<rect x="{x:g}" y="{y:g}" width="{across - 1:g}" height="{CELL - 1}" fill="{colour}"/>'
    return f"<g><title>{words}</title>{rect}{label}</g>"


def _text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{kind}">{html.escape(words)}</text>'
