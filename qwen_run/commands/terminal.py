"""Answers on a terminal: control characters are shown and not obeyed, and words do not break at the edge."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable
from typing import TextIO

TAB = 8
# C0 has symbols of its own; C1 and DEL drive terminals as well
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
_VISIBLE |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def visible(text: str) -> str:
    r"""``text`` of a model, which must not drive the terminal: control characters but for tab and line feed as symbols.

    >>> print(visible("a\x1b[2J\x9b2J"))
    a␛[2J�2J
    """
    return text.translate(_VISIBLE)


class TerminalText:
    """Text that comes in pieces, shown on a terminal; a word is held back until it is known to fit the line.

    Args:
        out: the terminal.
        columns: its width in cells, asked for every word because it may change; that of ``out`` if None.
    """

    def __init__(self, out: TextIO, columns: Callable[[], int] | None = None) -> None:
        self._out = out
        self._columns = columns or (lambda: _columns_of(out))
        self._word = ""
        self._word_cells = self._column = 0
        self._is_long = False  # inside a word longer than a line, which the terminal breaks

    def write(self, text: str) -> None:
        """Show ``text`` but for its last word, which may go on."""
        if "\x1b" in text:  # the program's own, such as clearing the screen
            self._end_word()
            self._out.write(text)
            self._column = 0
        else:
            for character in text:
                self._add(character)
        self._out.flush()

    def close(self) -> None:
        """Show what is held back."""
        self._end_word()
        self._out.flush()

    def _add(self, character: str) -> None:
        cells = _cells(character)
        if character.isspace():
            self._end_word()
            self._space(character, cells)
            return
        if cells == 2:  # a line may break before and after each
            self._end_word()
        self._word += character
        self._word_cells += cells
        if cells == 2:
            self._end_word()
        elif self._is_long or self._word_cells > self._columns():
            self._show_word()
            self._is_long = True

    def _space(self, character: str, cells: int) -> None:
        if character == "\n":
            self._out.write("\n")
            self._column = 0
        elif self._column < self._columns():  # beyond, it would begin the next line
            self._out.write(character)
            self._column += TAB - self._column % TAB if character == "\t" else cells

    def _end_word(self) -> None:
        self._show_word()
        self._is_long = False

    def _show_word(self) -> None:
        if not self._word:
            return
        columns = self._columns()
        if self._column and self._column + self._word_cells > columns and not self._is_long:
            self._out.write("\n")
            self._column = 0
        self._out.write(self._word)
        end = self._column + self._word_cells
        self._column = end and (end - 1) % columns + 1
        self._word, self._word_cells = "", 0


def _cells(character: str) -> int:
    """How many cells of a line a character takes.

    >>> _cells("a"), _cells("你"), _cells("\\u0301")
    (1, 2, 0)
    """
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def _columns_of(out: TextIO) -> int:
    try:
        return os.get_terminal_size(out.fileno()).columns or 80
    except OSError:
        return 80
