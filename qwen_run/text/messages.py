"""Messages as clients send them, made into what chat templates read: text content, known roles, calls as objects."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_engine.errors import RequestError
from qwen_run.sampling.rules import MAX_CHARACTERS, MAX_DEPTH, MAX_MESSAGES, MAX_PARTS, MAX_TOOLS, MAX_VALUES

Message = Mapping[str, Any]

# the names a message's reasoning goes by; templates read the first, some the second
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
# roles of newer clients, by what checkpoints were trained on
_SYNONYMS = {"developer": "system"}


def normalized_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """``messages`` as templates read them.

    Null fields are left out, text parts of ``content`` are joined, ``arguments`` of tool calls are objects where they
    are JSON of one, the role ``developer`` is ``system``, and reasoning goes by every name that templates read.

    Raises:
        RequestError: there are no messages, one is not an object with a role, or holds what is no text.
    """
    if not messages:
        raise RequestError("the conversation is empty, expected at least one message")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(f"messages has {len(messages)}, expected at most {MAX_MESSAGES}")
    _check_size("messages", messages)
    return [_normalized(index, message) for index, message in enumerate(messages)]


def check_tools(tools: Any) -> None:
    """Refuse what templates cannot write as tools.

    Raises:
        RequestError: ``tools`` is no list of objects, or is too large.
    """
    if tools is None:
        return
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RequestError(f"tools is {reprlib.repr(tools)}, expected a list of objects")
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools has {len(tools)}, expected at most {MAX_TOOLS}")
    _check_size("tools", tools)


def _check_size(name: str, values: Any) -> None:
    """Refuse nested lists and objects that are larger or deeper than any conversation."""
    characters, count, level, depth = 0, 0, [values], 0
    while level:
        if depth > MAX_DEPTH:
            raise RequestError(f"{name} are nested deeper than {MAX_DEPTH} levels")
        below: list[Any] = []
        for value in level:
            if isinstance(value, str):
                characters += len(value)
            elif isinstance(value, Mapping):
                count += len(value)
                below += (*value, *value.values())
            elif isinstance(value, list | tuple):
                count += len(value)
                below += value
            if count > MAX_VALUES or characters > MAX_CHARACTERS:
                raise RequestError(f"{name} hold more than {MAX_VALUES} values or {MAX_CHARACTERS} characters")
        level, depth = below, depth + 1


def _normalized(index: int, message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"message {index} is {reprlib.repr(message)}, expected an object with role and content")
    kept = {name: value for name, value in message.items() if value is not None}
    where = f"message {index} ({kept['role']})"
    kept["role"] = _SYNONYMS.get(kept["role"], kept["role"])
    if kept.get("tool_calls"):
        kept["tool_calls"] = _calls(where, kept["tool_calls"])
        kept.setdefault("content", "")  # what clients send as null beside calls
    kept["content"] = _text(where, kept.get("content"))
    reasoning = next((kept[name] for name in _REASONING_FIELDS if name in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}


def _text(where: str, content: Any) -> str:
    """The text of ``content``, which is text or a list of text parts.

    >>> _text("message 0", [{"type": "text", "text": "What is "}, {"type": "text", "text": "this?"}])
    'What is this?'
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        found = "null" if content is None else type(content).__name__
        raise RequestError(f"{where}: content is {found}, expected text or a list of text parts")
    if len(content) > MAX_PARTS:
        raise RequestError(f"{where}: content has {len(content)} parts, expected at most {MAX_PARTS}")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text":
            raise RequestError(f"{where}: content has a part of type {kind!r}, expected parts of type 'text' alone")
        if not isinstance(part.get("text"), str):
            raise RequestError(f"{where}: a text part has {reprlib.repr(part.get('text'))}, expected text")
    return "".join(part["text"] for part in content)


def _calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects; clients send JSON text, templates write JSON of what they get.

    Arguments that are no such text, which a model may have written, stay as they are.
    """
    if not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
        raise RequestError(f"{where}: tool_calls is {reprlib.repr(calls)}, expected a list of objects")
    return [_call(call) for call in calls]


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if isinstance(function, Mapping):
        return {**call, "function": _call(function)}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return dict(call)
    try:
        parsed = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        parsed = None
    return {**call, "arguments": parsed} if isinstance(parsed, dict) else dict(call)


def with_object_arguments(messages: Sequence[Message]) -> list[Message]:
    """``messages`` for a template that takes objects alone: arguments that are text are one argument of that name."""
    return [
        {**each, "tool_calls": [_object_call(call) for call in each["tool_calls"]]} if each.get("tool_calls") else each
        for each in messages
    ]


def _object_call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _object_call(call["function"])}
    arguments = call.get("arguments")
    return {**call, "arguments": {"arguments": arguments}} if isinstance(arguments, str) else call
