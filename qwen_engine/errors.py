"""Errors a user can act on. A command line prints them as one line; every other exception is our bug."""

from __future__ import annotations

import reprlib
from typing import Any


class QwenError(Exception):
    """Base of everything a user can cause: says what was found, what was expected and what to do.

    Attributes:
        exit_code: of a command that ends with it.
    """

    exit_code = 1


class BuildError(QwenError):
    """An engine cannot be built as asked."""


class OptionsError(BuildError):
    """An option of a command or of a build cannot be, alone or beside another, whatever the files are."""

    exit_code = 2  # as of every command line that cannot be


class CheckpointError(BuildError):
    """A file of the checkpoint is missing, damaged, or holds something it should not."""


class UnsupportedModel(BuildError):
    """The checkpoint is intact and asks for something the graph does not have."""


class WeightMismatch(BuildError):
    """Checkpoint and graph disagree on the name or the shape of a weight."""


class EngineError(QwenError):
    """An engine directory is missing, damaged, or of a version this runtime does not read."""


class EngineOptionError(EngineError):
    """An option of a command or of a program is outside what the engine was built for, or contradicts another."""

    exit_code = 2  # as of every command line that cannot be


class RequestError(QwenError):
    """A prompt or an option does not fit the engine it was given to."""


def shown(value: Any) -> str:
    """``value`` as a message quotes it: as Python writes it, cut short where that is long.

    >>> shown("x" * 1000)
    "'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'"
    """
    try:
        return _QUOTE.repr(value)
    except ValueError:  # of a whole number with more digits than Python writes
        return f"a {type(value).__name__} of thousands of digits"


_QUOTE = reprlib.Repr()
_QUOTE.maxstring = _QUOTE.maxother = 80


def first_line(error: BaseException) -> str:
    """What another library's exception says, for use inside a message of one line; its kind where it says nothing."""
    return next(iter(str(error).splitlines()), "").strip() or type(error).__name__
