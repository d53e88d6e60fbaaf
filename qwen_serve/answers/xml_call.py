"""A call as Qwen3-Coder writes it: ``<function=f>``, then a ``<parameter=name>`` for each argument, as plain text.

The arguments become JSON while they come. Nothing that a model wrote is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum, auto
from typing import Any

FUNCTION = "<function="
_PARAMETER, _END_PARAMETER, _END_FUNCTION = "<parameter=", "</parameter>", "</function>"
_ENDS_OF_VALUE = (_END_PARAMETER, _PARAMETER, _END_FUNCTION)


class _XmlState(Enum):
    START = auto()
    NAME = auto()
    BETWEEN = auto()  # before a parameter, or the end
    KEY = auto()
    VALUE = auto()
    DONE = auto()
    BAD = auto()


class XmlCall:
    """One call; attributes as those of :class:`~qwen_serve.answers.json_call.JsonCall`.

    Args:
        schemas: of the tools' parameters, by name: ``{"f": {"type": "object", "properties": ...}}``.
    """

    def __init__(self, schemas: Mapping[str, Any]) -> None:
        self.name: str | None = None
        self.arguments = ""
        self._schemas = schemas
        self._state = _XmlState.START
        self._rest = ""  # not read yet
        self._key, self._value, self._num_values = "", "", 0
        self._is_text = self._is_first = False

    @property
    def has_begun(self) -> bool:
        """The tool is known."""
        return self.name is not None and self._state is not _XmlState.BAD

    @property
    def is_done(self) -> bool:
        """The call is complete."""
        return self._state is _XmlState.DONE

    @property
    def is_bad(self) -> bool:
        """This is no call."""
        return self._state is _XmlState.BAD

    @property
    def is_in_text(self) -> bool:
        """A tag ends whatever it is in."""
        return False

    def push(self, text: str) -> int:
        """Read on; how many characters of ``text`` belong to the call: all, unless it ends or turns bad."""
        self._rest += text
        steps = {_XmlState.START: self._start, _XmlState.NAME: self._read_name, _XmlState.BETWEEN: self._between}
        steps |= {_XmlState.KEY: self._read_key, _XmlState.VALUE: self._read_value}
        while self._state in steps and steps[self._state]():
            pass
        if self.is_done or self.is_bad:
            left, self._rest = min(len(self._rest), len(text)), ""
            return len(text) - left
        return len(text)

    def close(self) -> None:
        """There is no more: what is open is closed where its value is complete as far as it goes."""
        if self._state is _XmlState.VALUE:
            self._end_value(self._rest)
        if self._state in (_XmlState.BETWEEN, _XmlState.KEY):
            self._finish()

    def _start(self) -> bool:
        return self._tag({FUNCTION: _XmlState.NAME})

    def _between(self) -> bool:
        found = self._tag({_PARAMETER: _XmlState.KEY, _END_FUNCTION: _XmlState.DONE})
        if self.is_done:
            self._finish()
        return found

    def _tag(self, following: Mapping[str, _XmlState]) -> bool:
        """Go on after one of the tags; False while none is complete. Anything else is bad."""
        self._rest = self._rest.lstrip()
        for tag, state in following.items():
            if self._rest.startswith(tag):
                self._rest, self._state = self._rest.removeprefix(tag), state
                return True
        if not any(tag.startswith(self._rest) for tag in following):
            self._state = _XmlState.BAD
        return False

    def _read_name(self) -> bool:
        name = self._until_end_of_tag()
        if name is None:
            return False
        if not name:
            self._state = _XmlState.BAD
            return False
        self.name, self.arguments, self._state = name, "{", _XmlState.BETWEEN
        return True

    def _read_key(self) -> bool:
        key = self._until_end_of_tag()
        if key is None:
            return False
        self._key, self._value, self._state, self._is_first = key, "", _XmlState.VALUE, True
        self.arguments += f"{', ' if self._num_values else ''}{json.dumps(key, ensure_ascii=False)}: "
        self._num_values += 1
        self._is_text = is_text_schema(self._schema())
        if self._is_text:
            self.arguments += '"'
        return True

    def _until_end_of_tag(self) -> str | None:
        """What stands before ``>``, or before a line end where the model forgot it; None while it is incomplete."""
        ends = [index for index in (self._rest.find(">"), self._rest.find("\n")) if index >= 0]
        if not ends:
            return None
        word, end = self._rest[: min(ends)], self._rest[min(ends)]
        self._rest = self._rest[min(ends) + (end == ">") :]
        return word.strip()

    def _read_value(self) -> bool:
        found = [(self._rest.find(end), end) for end in _ENDS_OF_VALUE if end in self._rest]
        if found:
            index, end = min(found)
            value, self._rest = self._rest[:index], self._rest[index + (len(end) if end == _END_PARAMETER else 0) :]
            self._end_value(value)
            return True
        held = max(_held(self._rest, end) for end in _ENDS_OF_VALUE)
        certain = len(self._rest) - held
        if certain and self._rest[certain - 1] == "\n":  # the last line end before a tag is no part of the value
            certain -= 1
        value, self._rest = self._rest[:certain], self._rest[certain:]
        self._take(value)
        return False

    def _take(self, value: str) -> None:
        if self._is_first and value:
            value, self._is_first = value.removeprefix("\n"), False
        if self._is_text:
            self.arguments += json.dumps(value, ensure_ascii=False)[1:-1]
        else:
            self._value += value

    def _end_value(self, value: str) -> None:
        if self._is_first and value == "\n":
            value = ""
        self._take(value.removesuffix("\n"))
        self.arguments += '"' if self._is_text else _typed(self._value, _kinds(self._schema()))
        self._state = _XmlState.BETWEEN

    def _finish(self) -> None:
        self.arguments += "}"
        self._state = _XmlState.DONE

    def _schema(self) -> Any:
        tool = self._schemas.get(self.name or "")
        properties = tool.get("properties") if isinstance(tool, Mapping) else None
        return properties.get(self._key) if isinstance(properties, Mapping) else None


def is_text_schema(schema: Any) -> bool:
    """Whether a value is taken as it stands: of type string, or of none that is known."""
    kinds = _kinds(schema)
    return not kinds or kinds == {"string"}


def _kinds(schema: Any) -> set[str]:
    if not isinstance(schema, Mapping):
        return set()
    found = schema.get("type")
    kinds = {found} if isinstance(found, str) else {each for each in found or () if isinstance(each, str)}
    for name in ("anyOf", "oneOf"):
        for each in schema.get(name) or ():
            kinds |= _kinds(each)
    return kinds


def _typed(value: str, kinds: set[str]) -> str:
    """The JSON of a value that is no plain text: its own where it is JSON of one of the ``kinds``, else a string.

    >>> _typed("5", {"integer"}), _typed("5", {"string", "null"}), _typed("Köln", {"object"}), _typed("NaN", {"number"})
    ('5', '"5"', '"Köln"', '"NaN"')
    """
    try:
        parsed = json.loads(value, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return json.dumps(value, ensure_ascii=False)
    if "string" in kinds and not kinds & _KINDS_OF[type(parsed)]:
        return json.dumps(value, ensure_ascii=False)
    return value.strip()


_KINDS_OF: dict[type, set[str]] = {
    int: {"integer", "number"},
    float: {"number"},
    bool: {"boolean"},
    type(None): {"null"},
    str: {"string"},
    list: {"array"},
    dict: {"object"},
}


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _held(text: str, tag: str) -> int:
    """Characters at the end of ``text`` that may be the beginning of ``tag``."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])), 0)
