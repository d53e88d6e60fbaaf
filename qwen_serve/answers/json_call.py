"""A call as Qwen2.5, Qwen3 and QwQ write it: ``{"name": "f", "arguments": {...}}``, read character by character.

The text of ``arguments`` is passed on as it stands, so what was streamed never has to be taken back.
"""

from __future__ import annotations

import json
from enum import Enum, auto

_SPACE = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")


class _JsonState(Enum):
    START = auto()  # before the brace that opens the call
    KEY = auto()  # before a key, or the brace that closes
    IN_KEY = auto()
    COLON = auto()
    VALUE = auto()  # before a value
    IN_VALUE = auto()
    AFTER_VALUE = auto()
    DONE = auto()
    BAD = auto()


class JsonCall:
    """One call.

    Attributes:
        name: of the tool, once it is known.
        arguments: the part of the arguments' text that was not fetched yet.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.arguments = ""
        self._state, self._key, self._value = _JsonState.START, "", ""
        self._depth, self._in_string, self._is_escaped = 0, False, False
        self._streams = self._has_arguments = False

    @property
    def has_begun(self) -> bool:
        """The tool is known, and so is the beginning of its arguments, or that there are none."""
        return self.name is not None and (self._streams or self._has_arguments or self.is_done)

    @property
    def is_done(self) -> bool:
        """The call is complete."""
        return self._state is _JsonState.DONE

    @property
    def is_bad(self) -> bool:
        """This is no call, or no longer one."""
        return self._state is _JsonState.BAD

    @property
    def is_in_text(self) -> bool:
        """Within quotation marks: whatever comes is text."""
        return self._in_string or self._state is _JsonState.IN_KEY

    def push(self, text: str) -> int:
        """Read on; how many characters of ``text`` belong to the call: all, unless it ends or turns bad."""
        for index, character in enumerate(text):
            if self.is_bad or self.is_done:
                return index
            self._step(character)
            if self.is_bad:
                return index
        return len(text)

    def close(self) -> None:
        """There is no more: a call whose tool is known, and which has begun no arguments, has none."""
        if self.name is not None and not self._streams and self._state not in (_JsonState.BAD, _JsonState.DONE):
            self._finish()

    def _step(self, character: str) -> None:
        state = self._state
        if state is _JsonState.IN_VALUE:
            self._step_value(character)
        elif state is _JsonState.IN_KEY:
            self._step_key(character)
        elif character in _SPACE:
            return
        elif state is _JsonState.VALUE:
            self._begin_value(character)
        elif (state, character) in _EXPECTED:
            self._state = _EXPECTED[state, character]
            if self._state is _JsonState.IN_KEY:
                self._key = ""
            elif self.is_done:
                self._finish()
        else:
            self._state = _JsonState.BAD

    def _step_key(self, character: str) -> None:
        if character == '"' and not self._is_escaped:
            self._state = _JsonState.COLON
        else:
            self._is_escaped = character == "\\" and not self._is_escaped
            self._key += character

    def _begin_value(self, character: str) -> None:
        if character in ",}]:":
            self._state = _JsonState.BAD
            return
        self._state, self._value, self._depth = _JsonState.IN_VALUE, "", 0
        self._in_string = self._is_escaped = False
        self._streams = character == "{" and self._key in _ARGUMENTS and not self._has_arguments
        self._step_value(character)

    def _step_value(self, character: str) -> None:
        is_scalar = bool(self._value) and self._value[0] not in '{["'
        if is_scalar and (character in _SPACE or character in ",}"):
            self._end_value()
            self._step(character)
            return
        if self._streams:
            self.arguments += character
            self._value = self._value or character
        else:
            self._value += character
        if self._in_string:
            if character == '"' and not self._is_escaped:
                self._in_string = False
            self._is_escaped = character == "\\" and not self._is_escaped
        elif character == '"':
            self._in_string, self._is_escaped = True, False
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
        if not self._in_string and self._depth == 0 and not is_scalar and self._value[0] in '{["':
            self._end_value()

    def _end_value(self) -> None:
        self._state = _JsonState.AFTER_VALUE
        if self._streams:
            self._streams, self._has_arguments = False, True
        elif self._key in _ARGUMENTS and not self._has_arguments:
            self.arguments, self._has_arguments = _unquoted(self._value), True
        elif self._key == "name":
            self.name = _name(self._value)
            if self.name is None:
                self._state = _JsonState.BAD

    def _finish(self) -> None:
        if self.name is None:
            self._state = _JsonState.BAD
            return
        if not self._has_arguments:
            self.arguments, self._has_arguments = "{}", True
        self._state = _JsonState.DONE


_EXPECTED = {
    (_JsonState.START, "{"): _JsonState.KEY,
    (_JsonState.KEY, '"'): _JsonState.IN_KEY,
    (_JsonState.KEY, "}"): _JsonState.DONE,
    (_JsonState.COLON, ":"): _JsonState.VALUE,
    (_JsonState.AFTER_VALUE, ","): _JsonState.KEY,
    (_JsonState.AFTER_VALUE, "}"): _JsonState.DONE,
}


def _name(value: str) -> str | None:
    try:
        name = json.loads(value)
    except ValueError:
        return None
    return name if isinstance(name, str) and name else None


def _unquoted(value: str) -> str:
    """Arguments that are no object: JSON in a string is what the string says, null is nothing.

    >>> _unquoted('"{}"'), _unquoted("null"), _unquoted("[1]")
    ('{}', '{}', '[1]')
    """
    try:
        said = json.loads(value)
    except ValueError:
        return value
    return "{}" if said is None else said if isinstance(said, str) else value
