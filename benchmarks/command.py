"""How a benchmark ends when something is wrong: with one line instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from qwen_engine.errors import QwenError


def run(main: Callable[[], None]) -> None:
    """Call ``main``; an error of the project is one line on standard error, and exit code 1."""
    try:
        main()
    except QwenError as error:
        sys.exit(f"Error: {error}")
