"""Text on a terminal: no control characters, and no word broken at the edge."""

import doctest
import io

import pytest

import qwen_run.commands.terminal
from qwen_run.commands.terminal import TerminalText, visible


def shown(pieces, columns=10):
    out = io.StringIO()
    text = TerminalText(out, lambda: columns)
    for piece in pieces:
        text.write(piece)
    text.close()
    return out.getvalue()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two three", "one two \nthree"),
        ("one two thr", "one two \nthr"),
        ("0123456789 x", "0123456789\nx"),
        ("0123456789\nx", "0123456789\nx"),
        ("a 0123456789abc d", "a \n0123456789abc d"),  # longer than a line: the terminal breaks it
        ("  indented text", "  indented\ntext"),
        ("a\tbcd", "a\t\nbcd"),
        ("你好你好你好", "你好你好你\n好"),
        ("e\u0301e\u0301e\u0301 abc def", "e\u0301e\u0301e\u0301 abc \ndef"),
        ("", ""),
    ],
)
def test_words_do_not_break_at_the_edge(text, expected):
    assert shown([text]) == expected
    assert shown(text) == expected  # a character at a time


def test_a_word_is_shown_as_soon_as_it_is_whole():
    out = io.StringIO()
    text = TerminalText(out, lambda: 10)
    text.write("one tw")
    assert out.getvalue() == "one "
    text.write("o ")
    assert out.getvalue() == "one two "


def test_the_programs_own_control_sequences_pass():
    assert shown(["abc", "\x1b[2J", "0123456789"]) == "abc\x1b[2J0123456789"


def test_a_model_cannot_drive_the_terminal():
    drives = [chr(code) for code in [*range(32), *range(0x7F, 0xA0)] if chr(code) not in "\t\n"]
    assert not set(visible("".join(drives))) & set(drives)
    assert visible("a\tb\nä") == "a\tb\nä"


def test_doctests():
    results = doctest.testmod(qwen_run.commands.terminal)
    assert (results.attempted > 0, results.failed) == (True, 0)
