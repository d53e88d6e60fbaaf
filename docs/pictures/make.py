"""Draws the pictures of the documentation: ``python docs/pictures/make.py`` writes the SVG files beside this one.

Colours are fixed and stand on a background of their own, so that a picture looks the same on a light page, on a dark
page and outside a browser. Sizes that the code knows are taken from it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from qwen_build.plan.options import BuildOptions  # noqa: E402
from qwen_engine.graph_io import KEY_TILE  # noqa: E402
from qwen_plugin.layout import BLOCK_COLUMNS, PANEL, panel_bytes  # noqa: E402
from qwen_run.runtime.chunk import fair_shares  # noqa: E402
from qwen_run.runtime.core_options import STEP_TOKENS  # noqa: E402

SANS = "DejaVu Sans, Verdana, Arial, sans-serif"
MONO = "DejaVu Sans Mono, Menlo, Consolas, monospace"
INK, MUTED, LINE, RULE, PAPER, SHADE = "#1f2328", "#57606a", "#8c959f", "#d0d7de", "#ffffff", "#f3f5f7"
# colour -> (border, fill)
BLUE, GREEN = ("#0969da", "#dbeeff"), ("#1a7f37", "#d8f5de")
ORANGE, PURPLE = ("#bc4c00", "#ffe9d6"), ("#8250df", "#efe3ff")
GREY = ("#8c959f", "#eceff2")
Colour = tuple[str, str]

GROUP = 32  # columns of a group, as int4 has them by default


class Picture:
    """An SVG of a fixed size that grows shape by shape."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._shapes = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" font-family="{SANS}" font-size="13" fill="{INK}">',
            f"<title>{escape(title)}</title>",
            f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="10" fill="{PAPER}" stroke="{RULE}"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, colour: Colour = GREY, radius: float = 5) -> None:
        border, fill = colour
        self._shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" '
            f'fill="{fill}" stroke="{border}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: float = 13,
        anchor: str = "start",
        colour: str = INK,
        bold: bool = False,
        mono: bool = False,
    ) -> None:
        """``y`` is the middle of the line; ``anchor`` says what of it is at ``x``: start, middle or end."""
        style = ' font-weight="bold"' * bold + f' font-family="{MONO}"' * mono
        self._shapes.append(
            f'<text x="{x:g}" y="{y + size * 0.36:g}" font-size="{size:g}" text-anchor="{anchor}" '
            f'fill="{colour}"{style}>{escape(words)}</text>'
        )

    def label(self, box: Sequence[float], words: str, size: float = 13, colour: str = INK, mono: bool = False) -> None:
        """``words`` in the middle of ``box`` (x, y, width, height)."""
        x, y, width, height = box
        self.text(x + width / 2, y + height / 2, words, size, "middle", colour, mono=mono)

    def cell(
        self, box: Sequence[float], words: str, colour: Colour = GREY, size: float = 12, mono: bool = False
    ) -> None:
        self.box(*box, colour, 3)
        self.label(box, words, size, mono=mono)

    def line(self, *points: tuple[float, float], colour: str = LINE, dashed: bool = False) -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dashes = ' stroke-dasharray="4 3"' * dashed
        self._shapes.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.3"{dashes}/>')

    def arrow(self, *points: tuple[float, float], colour: str = MUTED) -> None:
        """A line with a head at its last point; the last piece is horizontal or vertical."""
        (before_x, before_y), (x, y) = points[-2:]
        along_x, along_y = _sign(x - before_x), _sign(y - before_y)
        base_x, base_y = x - 8 * along_x, y - 8 * along_y
        self.line(*points[:-1], (base_x, base_y), colour=colour)
        side_x, side_y = 4 * along_y, 4 * along_x
        corners = f"{x:g},{y:g} {base_x + side_x:g},{base_y + side_y:g} {base_x - side_x:g},{base_y - side_y:g}"
        self._shapes.append(f'<polygon points="{corners}" fill="{colour}"/>')

    def zoom(self, above: tuple[float, float, float], below: tuple[float, float, float], colour: Colour) -> None:
        """The part (left, right, y) that ``below`` shows in full, as a pale sheet between both."""
        (left, right, y), (wide_left, wide_right, wide_y) = above, below
        corners = f"{left:g},{y:g} {right:g},{y:g} {wide_right:g},{wide_y:g} {wide_left:g},{wide_y:g}"
        self._shapes.append(f'<polygon points="{corners}" fill="{colour[1]}" fill-opacity="0.55"/>')

    def to_svg(self) -> str:
        return "\n".join([*self._shapes, "</svg>\n"])


def _sign(number: float) -> int:
    return (number > 0) - (number < 0)


def _directory(
    picture: Picture, x: float, width: float, name: str, what: str, rows: Sequence[tuple[str, str]], colour: Colour
) -> None:
    """A box with a heading and rows of a name and what it holds."""
    picture.box(x, 24, width, 206, colour, 8)
    picture.text(x + 14, 46, name, 16, bold=True)
    picture.text(x + 14, 66, what, 12, colour=MUTED)
    for index, (file, holds) in enumerate(rows):
        y = 82 + 36 * index
        picture.box(x + 10, y, width - 20, 31, (colour[0], PAPER), 4)
        picture.text(x + 18, y + 10, file, 12, mono=True)
        picture.text(x + 18, y + 23, holds, 10.5, colour=MUTED)


def overview() -> Picture:
    """Checkpoint, engine, tokens."""
    picture = Picture(900, 312, "A checkpoint becomes an engine once; the engine turns prompts into answers")
    files = [
        ("config.json", "sizes of the model"),
        ("model.safetensors", "weights, 16 bits each"),
        ("tokenizer.json", "text to tokens and back"),
    ]
    _directory(picture, 20, 196, "Checkpoint", "from Hugging Face", files, GREY)
    files = [
        ("engine.json", "sizes, schemes, checksums"),
        ("model.onnx", "the graph"),
        ("weights.bin", "weights, 4 or 8 bits each"),
        ("tokenizer.json", "copied"),
    ]
    _directory(picture, 320, 206, "Engine", "a directory, made once", files, BLUE)
    stages = [
        ("tokenizer", "prompts to token ids"),
        ("scheduler, paged cache", "who runs in this step"),
        ("graph, native operators", "logits of the next tokens"),
        ("sampling", "the next tokens"),
    ]
    _directory(picture, 590, 200, "Runtime", "qwen-run, or LLM in Python", stages, GREEN)
    picture.arrow((220, 127), (316, 127))
    picture.text(267, 112, "qwen-build", 13, "middle", mono=True)
    picture.text(267, 142, "once", 12, "middle", MUTED)
    picture.arrow((530, 127), (586, 127))
    picture.text(557, 112, "load", 12, "middle", MUTED)
    picture.text(840, 84, "prompts", 13, "middle")
    picture.arrow((876, 98), (794, 98))
    picture.text(840, 192, "answers", 13, "middle")
    picture.arrow((794, 206), (876, 206))
    picture.line((118, 236), (118, 252), (423, 252), (423, 236), dashed=True)
    picture.text(270, 270, "qwen-summarize", 13, "middle", mono=True)
    picture.text(270, 289, "how far is the engine from the original?", 12, "middle", MUTED)
    picture.line((690, 236), (690, 252), dashed=True)
    picture.text(690, 270, "qwen-bench", 13, "middle", mono=True)
    picture.text(690, 289, "how fast is it?", 12, "middle", MUTED)
    picture.line((480, 236), (480, 252), dashed=True)
    picture.text(505, 270, "qwen-inspect", 13, "middle", mono=True)
    picture.text(505, 289, "what is in it?", 12, "middle", MUTED)
    return picture


def panel() -> Picture:
    """The panel and the block of a weight, as int4 in groups of 32 has them."""
    picture = Picture(900, 640, "A weight is cut into panels of 32 rows, a panel into blocks of 128 columns")
    groups, group_bytes = BLOCK_COLUMNS // GROUP, GROUP * 4 * 4
    steps, step_bytes = GROUP // 4, 4 * 4 * 4
    block_bytes = panel_bytes(BLOCK_COLUMNS, 4, GROUP, False, blocks=True)
    header = (block_bytes - groups * group_bytes) // 3
    picture.text(24, 28, "A weight in weights.bin: int4, groups of 32, zero points", 16, bold=True)
    y = 232
    picture.zoom((176, 232, 176), (60, 840, y), BLUE)
    _draw_weight(picture)
    words = f"a block: {PANEL} rows, {BLOCK_COLUMNS} columns, {block_bytes:,} bytes"
    picture.text(450, y - 14, words, 13, "middle", bold=True)
    x = 60.0
    for name in ("units", "multiples", "zero points"):
        picture.cell((x, y, 88, 36), name, PURPLE)
        picture.text(x + 44, y + 48, f"{header} bytes", 11, "middle", MUTED)
        x += 88
    for index in range(groups):
        picture.cell((x, y, 129, 36), f"group {index}", BLUE)
        picture.text(x + 64.5, y + 48, f"{group_bytes} bytes", 11, "middle", MUTED)
        x += 129

    y = 336
    picture.zoom((453, 582, 290), (60, 840, y), BLUE)
    picture.text(450, y - 14, f"a group: {GROUP} columns, {steps} steps", 13, "middle", bold=True)
    for index in range(steps):
        words = "columns " * (not index) + f"{4 * index}–{4 * index + 3}"
        picture.cell((60 + 97.5 * index, y, 97.5, 32), words, BLUE)

    y = 430
    picture.zoom((157.5, 255, 368), (60, 840, y), BLUE)
    picture.text(450, y - 14, f"a step: 4 columns of 32 rows, {step_bytes} bytes", 13, "middle", bold=True)
    for lane in range(16):
        for column in range(4):
            picture.box(60 + 48.75 * lane + 12.19 * column, y, 12.19, 28, BLUE, 0)
        picture.text(60 + 48.75 * lane + 24.4, y + 39, f"{lane}, {lane + 16}", 10.5, "middle", MUTED)
    picture.text(852, y + 39, "rows", 10.5, "start", MUTED)

    y = 530
    picture.zoom((60 + 48.75 * 2, 60 + 48.75 * 2 + 12.19, 476), (60, 420, y), BLUE)
    picture.text(240, y - 14, "a byte: two weights of one column", 13, "middle", bold=True)
    picture.cell((60, y, 180, 34), "high 4 bits: row 18", BLUE)
    picture.cell((240, y, 180, 34), "low 4 bits: row 2", BLUE)
    picture.box(456, y - 28, 384, 82, (LINE, SHADE), 8)
    picture.text(648, y - 6, "weight = (q − zero point) × multiple × unit", 13.5, "middle", bold=True)
    picture.text(648, y + 18, "q: 4 bits each.  zero point, multiple (1 to 16): a row and group.", 11, "middle", MUTED)
    picture.text(648, y + 37, "unit: a row of the block, float16.", 11, "middle", MUTED)
    bits = block_bytes * 8 / PANEL / BLOCK_COLUMNS
    words = f"{block_bytes:,} bytes for {PANEL * BLOCK_COLUMNS:,} weights: {bits:.1f} bits a weight"
    picture.text(450, 610, words, 12, "middle", MUTED)
    return picture


def _draw_weight(picture: Picture) -> None:
    """The matrix: one panel is marked, and in it one block."""
    x, y, width, height = 120, 72, 280, 104
    picture.text(x + width / 2, y - 14, "in_features →", 11, "middle", MUTED)
    picture.text(x - 10, y + height / 2, "out_features ↓", 11, "end", MUTED)
    picture.box(x, y, width, height, GREY, 2)
    picture.box(x, y + 26, width, 26, BLUE, 0)
    picture.box(x + 56, y + 26, 56, 26, (BLUE[0], "#9cccf9"), 0)
    for row in range(1, 4):
        picture.line((x, y + 26 * row), (x + width, y + 26 * row))
    for column in range(1, 5):
        picture.line((x + 56 * column, y + 26), (x + 56 * column, y + 52), colour=BLUE[0])
    picture.line((x + 56, y + 52), (x + 56, y + height), colour=BLUE[0], dashed=True)
    picture.line((x + 112, y + 52), (x + 112, y + height), colour=BLUE[0], dashed=True)
    picture.arrow((450, y + 39), (x + width + 5, y + 39))
    picture.text(458, y + 32, f"a panel: {PANEL} rows (outputs).", 13, bold=True)
    picture.text(458, y + 51, "Panels lie one after the other in the file;", 12, colour=MUTED)
    picture.text(458, y + 69, "a panel is its blocks, from left to right.", 12, colour=MUTED)


def cache() -> Picture:
    """Two sequences, their block tables and the pool."""
    size = BuildOptions().block_size
    picture = Picture(900, 470, "Block tables name the blocks of each sequence; two sequences share a block")
    picture.text(24, 28, "The paged cache", 16, bold=True)
    picture.text(24, 50, f"A block holds keys and values of {size} tokens of one sequence.", 12, colour=MUTED)
    sequences = [
        ("sequence A, 150 tokens", (3, 7, 1), (size, size, 150 - 2 * size), BLUE, 90),
        ("sequence B, 100 tokens: begins like A", (3, 5), (size, 100 - size), ORANGE, 200),
    ]
    owners: dict[int, Colour] = {7: BLUE, 1: BLUE, 5: ORANGE, 3: PURPLE, 8: GREEN}
    for name, blocks, counts, colour, y in sequences:
        picture.text(24, y, name, 13, bold=True, colour=colour[0])
        picture.text(24, y + 27, "tokens", 12, colour=MUTED)
        picture.text(24, y + 61, "block table", 12, colour=MUTED)
        for index, (block, count) in enumerate(zip(blocks, counts, strict=True)):
            x, used = 112 + 112 * index, 108 * count / size
            picture.box(x, y + 14, 108, 26, (GREY[0], PAPER), 3)
            picture.box(x, y + 14, used, 26, PURPLE if block == 3 else colour, 3)
            picture.label((x, y + 14, max(used, 40), 26), f"{count}", 12)
            picture.cell((x + 34, y + 48, 40, 26), str(block), PURPLE if block == 3 else colour, mono=True)
    picture.text(544, 50, "the pool of blocks", 13, bold=True)
    picture.text(544, 69, "one for each layer, with the same numbers in all", 11.5, colour=MUTED)
    for block in range(12):
        x, y = 544 + 84 * (block % 4), 84 + 62 * (block // 4)
        picture.box(x, y, 78, 56, owners.get(block, (GREY[0], PAPER)), 4)
        picture.text(x + 8, y + 13, str(block), 12, mono=True, bold=block in owners)
        words = {3: ("A and B", "share it"), 7: ("A", ""), 1: ("A", ""), 5: ("B", ""), 8: ("free, but", "known")}
        for row, word in enumerate(words.get(block, ("free", ""))):
            picture.text(x + 39, y + 29 + 15 * row, word, 11, "middle", INK if block in owners else MUTED)
    picture.text(544, 284, "known: a prompt that begins with its tokens", 11.5, colour=MUTED)
    picture.text(544, 301, "takes the block in place of computing it", 11.5, colour=MUTED)
    _draw_block(picture, size)
    return picture


def _draw_block(picture: Picture, size: int) -> None:
    """What is inside a block of one layer."""
    y = 366
    picture.line((24, 318), (876, 318), colour=RULE)
    picture.text(24, 338, "inside a block, for each key and value head", 13, bold=True)
    picture.text(24, y + 13, "keys", 12, colour=MUTED)
    tiles = size // KEY_TILE
    for tile in range(tiles):
        words = f"tokens {tile * KEY_TILE}–{(tile + 1) * KEY_TILE - 1}, transposed"
        picture.cell((112 + 384 * tile, y, 380, 26), words, BLUE)
    picture.text(24, y + 47, "values", 12, colour=MUTED)
    shown = [f"token {token}" for token in (0, 1, 2, 3)] + ["…", f"token {size - 1}"]
    for index, words in enumerate(shown):
        picture.cell((112 + 128 * index, y + 34, 124, 26), words, GREEN)
    note = f"Transposed: the first number of {KEY_TILE} keys, then the second of all, and so on."
    picture.text(112, y + 78, f"{note} A vector adds {KEY_TILE} scores at a time.", 11.5, colour=MUTED)


def step() -> Picture:
    """One step of the scheduler: two answers and two prompts."""
    budget, size = STEP_TOKENS, BuildOptions().block_size
    picture = Picture(900, 520, "A step feeds one token of every answer, and shares the rest among the prompts")
    first, second = fair_shares(budget - 2, [600 - size, 40])
    rows = [
        ("A", "answers", "700 tokens in the cache", 700, 1, BLUE),
        ("B", "answers", "90 tokens in the cache", 90, 1, BLUE),
        ("C", "a prompt of 600", f"its first {size} were found in the cache", size, first, ORANGE),
        ("D", "a prompt of 40", "it has just come", 0, second, GREEN),
    ]
    picture.text(24, 28, "One step of the scheduler", 16, bold=True)
    words = f"Budget: {budget} tokens. Answers first, one token each; prompts share the rest."
    picture.text(24, 50, words, 12, colour=MUTED)
    later = f"what is left; {600 - size - first} wait for later steps"
    reasons = ("its last token", "its last token", later, "all of it, which is less than its fair half")
    for index, (name, kind, note, _, count, colour) in enumerate(rows):
        y = 70 + 40 * index
        picture.cell((24, y, 34, 32), name, colour, 14)
        picture.text(70, y + 9, kind, 13, bold=True)
        picture.text(70, y + 25, note, 11.5, colour=MUTED)
        picture.arrow((330, y + 16), (400, y + 16))
        picture.text(410, y + 16, f"{count} token" + "s" * (count > 1), 13, bold=True)
        picture.text(510, y + 16, reasons[index], 12, colour=MUTED)
    _draw_batch(picture, rows)
    return picture


def _draw_batch(picture: Picture, rows: Sequence[tuple[str, str, str, int, int, Colour]]) -> None:
    """The chunks of a step as the graph's inputs, and what comes out."""
    counts = [row[4] for row in rows]
    ends = [sum(counts[: index + 1]) for index in range(len(counts))]
    widths, x, y = (60, 60, 430, 200), 126.0, 262
    picture.text(24, y + 17, "input_ids", 12, mono=True)
    for (name, _, _, past, count, colour), width in zip(rows, widths, strict=True):
        words = f"{name}: {past}" if count == 1 else f"{name}: tokens {past} to {past + count - 1}"
        picture.cell((x, y, width, 34), words, colour)
        x += width
    picture.text(24, y + 52, "cumulative_lengths", 12, mono=True)
    picture.text(186, y + 52, f"0, {', '.join(map(str, ends))}", 12, mono=True)
    picture.text(396, y + 52, "past_lengths", 12, mono=True)
    picture.text(516, y + 52, ", ".join(str(row[3]) for row in rows), 12, mono=True)
    picture.text(876, y + 52, "not to scale", 11, "end", MUTED)
    for centre in (156, 216, 461, 776):
        picture.arrow((centre, y + 66), (centre, y + 90))
    picture.cell((126, y + 92, 750, 40), "the graph runs once: embedding, layers with the paged cache, head", GREY, 13)
    y += 160
    for name, centre, colour in (("A", 156, BLUE), ("B", 216, BLUE), ("D", 776, GREEN)):
        picture.arrow((centre, y - 26), (centre, y))
        picture.cell((centre - 26, y, 52, 28), "logits", colour, 11)
        picture.arrow((centre, y + 30), (centre, y + 52))
        picture.text(centre, y + 64, f"{name}'s next", 12, "middle")
        picture.text(centre, y + 80, "token", 12, "middle")
    picture.text(461, y + 14, "C has no logits yet: its prompt goes on in the next step", 12, "middle", MUTED)
    picture.text(461, y + 64, "sampling chooses; what has its end leaves, who waits may join", 12, "middle", MUTED)


PICTURES: dict[str, Callable[[], Picture]] = {"overview": overview, "panel": panel, "cache": cache, "step": step}


def main() -> None:
    for name, draw in PICTURES.items():
        Path(__file__).with_name(f"{name}.svg").write_text(draw().to_svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
