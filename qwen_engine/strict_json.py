"""Frozen dataclasses as JSON and back, strict both ways: a field that is missing, unknown or mistyped is an error."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

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
    origin, arguments = get_origin(expected), get_args(expected)
    if isinstance(expected, type) and dataclasses.is_dataclass(expected):
        if not isinstance(value, dict):
            raise MismatchError(f"{where} is {_short(value)}, expected an object")
        hints = _hints(expected)
        for complaint, names in (("lacks", hints.keys() - value.keys()), ("has unknown", value.keys() - hints.keys())):
            if names:
                raise MismatchError(f"{where} {complaint} {', '.join(sorted(names))}")
        fields = {name: parse(hint, value[name], f"{where}: {name}") for name, hint in hints.items()}
        return expected(**fields)
    if origin in (Union, types.UnionType):
        for choice in arguments:
            try:
                return parse(choice, value, where)
            except MismatchError:
                continue
    elif origin is tuple and isinstance(value, list):
        return tuple(parse(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    elif origin is not None and _is_mapping(origin) and isinstance(value, dict):
        return {key: parse(arguments[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    elif origin is Literal:
        if value in arguments:
            return value
    elif expected is float and isinstance(value, str) and value in _NON_FINITE:
        return _NON_FINITE[value]
    elif expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(expected, type) and type(value) is expected:
        return value
    wanted = expected.__name__ if isinstance(expected, type) else str(expected)
    raise MismatchError(f"{where} is {_short(value)}, expected {wanted}")


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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_mapping(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, Mapping)
