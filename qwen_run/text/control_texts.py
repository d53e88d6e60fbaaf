"""What people and tools write stays text: a spelling of a control token in it never becomes that token."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

# whose content may hold tokens such as <think>, which templates look for: the operator's and the model's own
_MAY_STRUCTURE = ("system", "assistant")
# no character of any text (Unicode, noncharacters); a message that has it nevertheless makes the mark longer
_NONCHARACTER = "\ufdd0"


class Marked(NamedTuple):
    """Messages and tools with ``mark`` in every spelling of a control token; the mark is empty where there is none."""

    messages: list[dict[str, Any]]
    tools: list[Mapping[str, Any]] | None
    mark: str


class ControlTexts:
    """The spellings of a tokenizer's control tokens.

    Args:
        special: tokens such as ``<|im_end|>``: nobody may write them.
        structural: other added tokens, such as ``<tool_call>``: system messages and the model's own may.
    """

    def __init__(self, special: Collection[str], structural: Collection[str] = ()) -> None:
        self._special = _starts_of(special)
        self._all = _starts_of([*special, *structural])

    def marked(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> Marked:
        """``messages`` and ``tools``, normalized, with a mark after the first character of every spelling.

        Text that is cut at the marks and encoded piece by piece has no control token where there was a mark.
        """
        if not any(map(self._found_in, _texts_of([messages, tools]))):
            return Marked([dict(message) for message in messages], None if tools is None else list(tools), "")
        mark = _NONCHARACTER
        while any(mark in text for text in _texts_of([messages, tools])):
            mark += _NONCHARACTER
        split = [self._split(message, mark) for message in messages]
        return Marked(split, None if tools is None else _mapped(tools, _marker(self._all, mark)), mark)

    def _found_in(self, text: str) -> bool:
        return self._all is not None and self._all.search(text) is not None

    def _split(self, message: Mapping[str, Any], mark: str) -> dict[str, Any]:
        own = self._special if message["role"] in _MAY_STRUCTURE else self._all
        return {
            name: value if name == "role" else _mapped(value, _marker(self._all if name == "tool_calls" else own, mark))
            for name, value in message.items()
        }


def _starts_of(spellings: Collection[str]) -> re.Pattern[str] | None:
    """Matches the first character of every spelling, also of those that overlap."""
    longer = sorted({each for each in spellings if len(each) > 1}, key=len, reverse=True)
    if not longer:
        return None
    return re.compile("|".join(f"{re.escape(each[0])}(?={re.escape(each[1:])})" for each in longer), re.DOTALL)


def _marker(starts: re.Pattern[str] | None, mark: str) -> Callable[[str], str]:
    return lambda text: text if starts is None else starts.sub(lambda found: found[0] + mark, text)


def _texts_of(value: Any) -> Iterable[str]:
    """Every text in ``value``, which is as JSON has it."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, Mapping):
            waiting += [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple):
            waiting += each


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """``value``, which is as JSON has it, with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(name, change): _mapped(each, change) for name, each in value.items()}
    return [_mapped(each, change) for each in value] if isinstance(value, list | tuple) else value
