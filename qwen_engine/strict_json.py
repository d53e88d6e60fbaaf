"""Frozen dataclasses as JSON and back, strict both ways: a field that is missing, unknown or mistyped is an error."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import re
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qwen_engine.errors import shown

# JSON has no words for these: they are written as text.
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MismatchError(ValueError):
    """A value is not what its annotation asks for; the message names the place, what was found and expected.

    Callers turn it into an error of their own that says what to do.
    """


def parse(expected: Any, value: Any, where: str) -> Any:
    """``value`` from ``json.loads`` as an instance of the annotation ``expected``; ``where`` names it in errors.

    Annotations may be dataclasses, ``tuple[X, ...]``, mappings with text keys, unions, literals, and JSON's own types.

    Raises:
        MismatchError: ``value`` is something else.
    """
    if isinstance(expected, type):
        return (
            _object(expected, value, where) if dataclasses.is_dataclass(expected) else _scalar(expected, value, where)
        )
    origin, arguments = get_origin(expected), get_args(expected)
    if origin in (Union, types.UnionType):
        return _first_that_fits(expected, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(parse(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if _is_mapping(origin) and isinstance(value, dict):
        return {key: parse(arguments[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    if origin is Literal and value in arguments:
        return value
    raise _mismatch(expected, value, where)


def _object(expected: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise MismatchError(f"{where} is {shown(value)}, expected an object")
    hints = _hints(expected)
    for complaint, names in (("lacks", hints.keys() - value.keys()), ("has unknown", value.keys() - hints.keys())):
        if names:
            raise MismatchError(f"{where} {complaint} {', '.join(sorted(names))}")
    return expected(**{name: parse(hint, value[name], f"{where}: {name}") for name, hint in hints.items()})


def _first_that_fits(expected: Any, value: Any, where: str) -> Any:
    for choice in get_args(expected):
        try:
            return parse(choice, value, where)
        except MismatchError:
            continue
    raise _mismatch(expected, value, where)


def _scalar(expected: type, value: Any, where: str) -> Any:
    if expected is float and isinstance(value, str) and value in _NON_FINITE:
        return _NON_FINITE[value]
    if expected is float and type(value) is int:
        with contextlib.suppress(OverflowError):  # of one beyond 1e308
            return float(value)
    elif type(value) is expected:
        return value
    raise _mismatch(expected, value, where)


def _mismatch(expected: Any, value: Any, where: str) -> MismatchError:
    wanted = expected.__name__ if isinstance(expected, type) else str(expected)
    return MismatchError(f"{where} is {shown(value)}, expected {wanted}")


def dump(instance: Any, digits: int | None = None) -> str:
    """The JSON text of a dataclass, one field a line, arrays of numbers in one line.

    ``digits``: significant digits to which numbers in arrays are rounded; other numbers are always exact.
    """
    text = json.dumps(_plain(dataclasses.asdict(instance), digits), indent=1, ensure_ascii=False, allow_nan=False)
    # A line break right after a bracket cannot be inside a JSON string, where it would be written \n.
    return re.sub(r'\[\n[^][{}"]*\]', lambda array: " ".join(array[0].split()), text) + "\n"


@functools.cache
def _hints(expected: type) -> Mapping[str, Any]:
    """Annotations of a dataclass by field; to evaluate them takes longer than to parse a value."""
    return get_type_hints(expected)


def _plain(value: Any, digits: int | None) -> Any:
    """``value`` (made of dicts, lists, tuples and scalars) with arrays rounded and without NaN and infinities."""
    if isinstance(value, dict):
        return {key: _plain(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(_rounded(item, digits), digits) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value).replace("nan", "NaN").replace("inf", "Infinity")
    return value


def _rounded(item: Any, digits: int | None) -> Any:
    return float(f"{item:.{digits}g}") if digits and isinstance(item, float) else item


def _is_mapping(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, Mapping)
