"""Fields of ``config.json``, checked one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_engine.errors import CheckpointError, UnsupportedModel

MOST = 2**31 - 1  # no size is larger, and none makes the product of two overflow 64 bits


def token_ids(value: Any) -> tuple[int, ...]:
    """``eos_token_id`` of a config: absent, one id, or a list of ids.

    >>> token_ids([151645, 151643]), token_ids(2), token_ids(None)
    ((151645, 151643), (2,), ())
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):
        raise CheckpointError(f"eos_token_id is {value!r}, expected an integer or a list of integers")
    return tuple(ids)


def integer(hf: Mapping[str, Any], key: str, default: int | None = None, most: int = MOST) -> int:
    """A field from 1 to ``most``; ``default`` where it is null or absent."""
    value = default if hf.get(key) is None else hf[key]
    if type(value) is not int or value < 1:
        raise CheckpointError(f"config.json: {key} is {value!r}, expected a positive integer")
    if value > most:
        raise UnsupportedModel(f"config.json: {key} is {value}, expected at most {most}")
    return value


def number(hf: Mapping[str, Any], key: str) -> float:
    """A positive number field that a float32 can hold."""
    value = hf.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 3e38:  # NaN is not
        raise CheckpointError(f"config.json: {key} is {value!r}, expected a positive number")
    return float(value)


def boolean(hf: Mapping[str, Any], key: str) -> bool:
    """A true or false field."""
    value = hf.get(key)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {key} is {value!r}, expected true or false")
    return value
