"""JSON files of checkpoints and engines: one way to read them, whose errors name the file and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen_engine.errors import QwenError
from qwen_engine.regular_files import read_regular

MOST_BYTES = 256 << 20  # a tokenizer.json has about ten MiB, the index of a large checkpoint one


def read_object(path: Path, error: type[QwenError], remedy: str) -> dict[str, Any]:
    """The object in a JSON file; ``error`` with ``remedy`` in its message where there is none.

    Raises:
        FileNotFoundError: there is no such file.
    """
    try:
        value = json.loads(read_regular(path, MOST_BYTES).decode("utf-8-sig"))  # some editors put a byte order mark
    except FileNotFoundError:
        raise
    except OSError as fault:
        raise error(f"{path} cannot be read: {fault.strerror}; {remedy}") from fault
    except (ValueError, RecursionError) as fault:
        raise error(f"{path} is not JSON: {fault}; {remedy}") from fault
    if not isinstance(value, dict):
        raise error(f"{path} holds a {type(value).__name__}, expected an object; {remedy}")
    return value
