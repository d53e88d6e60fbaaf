"""How a benchmark ends when something is wrong: with one line instead of a traceback."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable

from qwen_engine.errors import QwenError

# What some benchmarks need and the package does not -> the extra that installs it.
EXTRAS = {"torch": "hf", "transformers": "hf", "gguf": "demo", "lm_eval": "eval"}


def run(main: Callable[[], None]) -> None:
    """Call ``main``; an error of the project, or a missing extra, is one line on standard error and exit code 1."""
    try:
        main()
    except QwenError as error:
        sys.exit(f"Error: {error}")
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        sys.exit(f"Error: the package {error.name} is not installed; run pip install -e '.[{EXTRAS[error.name]}]'")


def paragraph(words: str) -> str:
    """``words`` in lines of at most 120 characters."""
    return textwrap.fill(words, 120, break_long_words=False, break_on_hyphens=False)


def say(words: str) -> None:
    """A line of progress, to standard error."""
    print(words, file=sys.stderr, flush=True)
