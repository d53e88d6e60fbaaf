"""Objects that the commands print for programs: numbers to six significant digits, always UTF-8, one head for all.

Every ``--json`` is one object that begins with :func:`head`. Times are ``*_ms`` or ``seconds``, sizes ``*_bytes``,
rates ``*_per_s``; what a prompt has are ``input_tokens``, what an answer has ``output_tokens``.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
SIGNIFICANT_DIGITS = 6  # far below what any measurement repeats

_DRIVES_A_TERMINAL = re.compile("[\x7f-\x9f]")  # JSON itself escapes those below a space


def head(program: str, engine: Path | None) -> dict[str, Any]:
    """What every object begins with: which program made it, when and how, and of which engine; null where of none."""
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command_line(program),
        "created": now(),
        "engine": None if engine is None else engine_of(engine),
    }


def engine_of(directory: Path) -> dict[str, str]:
    """How every object names an engine."""
    return {"name": directory.resolve().name, "directory": str(directory)}


def command_line(program: str) -> str:
    """What was typed, such that a shell takes it again."""
    return shlex.join([program, *sys.argv[1:]])


def now() -> str:
    """The time as all objects have it: UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def rounded(value: Any) -> Any:
    """``value`` with every fraction in it to six significant digits.

    >>> rounded({"seconds": 1.23456789, "counts": [3, 1234567890]})
    {'seconds': 1.23457, 'counts': [3, 1234567890]}
    """
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    if isinstance(value, Mapping):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value


def to_json(record: Mapping[str, Any], indent: int | None = None) -> str:
    """``record`` as JSON that can be encoded as UTF-8 and does not drive a terminal."""
    text = json.dumps(record, ensure_ascii=False, indent=indent)
    if not is_utf8(text):
        text = json.dumps(record, indent=indent)
    return _DRIVES_A_TERMINAL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def is_utf8(text: str) -> bool:
    """Whether ``text`` can be encoded: it has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
