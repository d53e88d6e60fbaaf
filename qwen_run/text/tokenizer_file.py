"""Opening a ``tokenizer.json``, which is a program of the checkpoint's: it may neither hang nor fill the memory.

Files of known parts are opened at once. What has other parts is tried in a process of its own first, on texts that such
programs take long for.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator
from contextlib import contextmanager

import tokenizers

from qwen_engine.errors import QwenError, first_line
from qwen_run.text.bounded_run import BoundsError, run_bounded

MOST_BYTES = 256 << 20  # a tokenizer.json has about ten MiB

# how tokenizers of Qwen and Llama cut text into words: patterns whose time grows with the text alone
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_WORDS = QWEN_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_KNOWN_PATTERNS = frozenset([QWEN_WORDS, LLAMA_WORDS])
_KNOWN_TYPES = frozenset([b"BPE", b"ByteLevel", b"Digits", b"NFC", b"Sequence", b"Split"])

_TYPES = re.compile(rb'"type"\s*:\s*"([^"]*)"')
_PATTERNS = re.compile(rb'"Regex"\s*:\s*("(?:[^"\\]|\\.)*")')
_ESCAPED_LETTER = re.compile(rb"\\u00[2-7]")  # would hide a name from the two above

_TRIAL_MEMORY_BYTES = 1 << 30
_MOST_TOKENS = 16  # of a byte of text


@contextmanager
def panics_as(kind: type[QwenError], what: str, remedy: str) -> Iterator[None]:
    """Turn what tokenizers raises into an error of ``kind``: bare Exception, and PanicException, which is none."""
    try:
        yield
    except QwenError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{what}: {' '.join(str(error).split())}; {remedy}") from error


def open_tokenizer(content: bytes, where: object, kind: type[QwenError], remedy: str) -> tokenizers.Tokenizer:
    """The tokenizer that ``content`` describes; ``where`` names the file in messages.

    Raises:
        QwenError: of ``kind``: it describes none, or takes more time or memory than it may.
    """
    if not has_known_parts(content):
        try:
            fault = run_bounded(lambda: _try(content), _TRIAL_MEMORY_BYTES)
        except BoundsError as error:
            raise kind(
                f"{where}: to read it and to tokenize short texts takes {error}; {remedy}, or use another checkpoint"
            ) from error
        if fault:
            raise kind(f"{where} cannot tokenize: {fault}; {remedy}, or use another checkpoint")
    with panics_as(kind, f"{where} is no tokenizer", remedy):
        return tokenizers.Tokenizer.from_buffer(content)


def has_known_parts(content: bytes) -> bool:
    """All parts of the file are of kinds, and with patterns, whose time and memory grow with the text alone."""
    types = set(_TYPES.findall(content))
    if b"BPE" not in types or not types <= _KNOWN_TYPES or _ESCAPED_LETTER.search(content):
        return False
    try:
        return all(json.loads(pattern) in _KNOWN_PATTERNS for pattern in _PATTERNS.findall(content))
    except ValueError:
        return False


def _try(content: bytes) -> str:
    """Read it and tokenize: runs of every character, words, lines. What then goes wrong; empty for nothing.

    Raises:
        MemoryError: a text has become far more tokens than it has bytes.
        Exception: the file cannot be read.
    """
    core = tokenizers.Tokenizer.from_buffer(content)
    runs = [character * 64 + end for character in string.printable for end in ("", "\x00", "a!")]
    for text in (*runs, "The answer is 42.\n" * 100, " \t" * 500 + "x", "é你🤗" * 300):
        try:
            ids = core.encode(text).ids
            core.decode(ids)
        except MemoryError:
            raise
        except BaseException as error:  # a PanicException is no Exception
            return first_line(error)
        if len(ids) > _MOST_TOKENS * len(text.encode()):
            raise MemoryError
    return ""
