"""What configs say of some linears by name: patterns, and the objects and lists that hold them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from qwen_engine.errors import CheckpointError, UnsupportedModel

LONGEST = 1000

# a repetition of what repeats: such patterns may take for ever, and a config may come from anyone
_NESTED = re.compile(r"[+*}]\??\)+[+*{]")


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    if len(pattern) > LONGEST or _NESTED.search(pattern):
        raise UnsupportedModel(
            f"a config has the pattern {pattern[:80]!r}, which may take for ever to match; "
            "write it without a repetition of repetitions"
        )
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"a config has {pattern[:80]!r}, which is no pattern: {error}") from error


def matches(pattern: str, name: str) -> bool:
    """Whether the regular expression ``pattern`` matches ``name`` from its beginning.

    Raises:
        CheckpointError, UnsupportedModel: it is no pattern, or may take for ever.
    """
    return _compiled(pattern).match(name) is not None


def expect_object(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The object ``key`` of a quantization_config; empty where it is null or absent.

    Raises:
        CheckpointError: it is something else.
    """
    value = config.get(key)
    if not isinstance(value, dict | None):
        raise CheckpointError(f"config.json: {key} of quantization_config is {value!r}, expected an object")
    return value or {}


def expect_names(config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """The list of strings ``key`` of a quantization_config; empty where it is null or absent.

    Raises:
        CheckpointError: it is something else.
    """
    value = config.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"config.json: {key} of quantization_config is {value!r}, expected a list of names")
    return tuple(value)
