"""Files of prompts: JSON Lines or plain text, one prompt a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen_engine.errors import RequestError
from qwen_run.sampling.params import SamplingParams

# what a line of JSON may have beside the fields of SamplingParams
FIELDS = ("prompt", "messages", "tools", "id")
PARAMS = tuple(SamplingParams.__dataclass_fields__)


@dataclass(frozen=True)
class FilePrompt:
    """One prompt of a file: ``text``, or a conversation (``messages``, possibly ``tools``).

    Attributes:
        line: its number, counted from 1.
        source: the line as it stands in the file.
        id: what the line calls itself, any JSON value; None if it does not.
        params: the fields of SamplingParams it sets for itself.
        error: what is wrong with a line that cannot be used.
    """

    line: int
    source: str
    text: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    id: Any = None
    params: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


def parse_prompts(text: str) -> Iterator[FilePrompt]:
    """The prompts of a file, which is JSON Lines if its first line with anything on it begins with ``{``.

    Raises:
        RequestError: the whole file is one JSON array.

    >>> [prompt.text for prompt in parse_prompts('{"prompt": "Hi"}')]
    ['Hi']
    """
    _refuse_array(text)
    json_lines = text.lstrip().startswith("{")
    # str.splitlines would also split at U+2028, which may stand in a JSON string
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _parse_json(number, line) if json_lines else FilePrompt(number, line, text=line.removesuffix("\r"))


def _refuse_array(text: str) -> None:
    """An array of objects or texts is meant as prompts, though every line of it could be one."""
    if not text.lstrip().startswith("["):
        return
    try:
        array = json.loads(text)
    except (ValueError, RecursionError):
        return
    if any(isinstance(item, dict | str) for item in array):
        raise RequestError("the prompts are a JSON array, expected one prompt a line; convert them with jq -c '.[]'")


def _parse_json(number: int, line: str) -> FilePrompt:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return FilePrompt(number, line, error=f"not JSON: {error}")
    if not isinstance(record, dict):
        return FilePrompt(number, line, error=_NEITHER)
    record = {name: value for name, value in record.items() if value is not None}  # null stands for absent
    if fault := _find_fault(record):
        return FilePrompt(number, line, id=record.get("id"), error=fault)
    params = {name: value for name, value in record.items() if name in PARAMS}
    return FilePrompt(
        number, line, record.get("prompt"), record.get("messages"), record.get("tools"), record.get("id"), params
    )


_NEITHER = 'expected an object with either "prompt" or "messages"'


def _find_fault(record: Mapping[str, Any]) -> str | None:
    """What is wrong with the names and kinds of a line's values; SamplingParams judges its own."""
    if ("prompt" in record) == ("messages" in record):
        return _NEITHER
    if unknown := sorted(record.keys() - {*FIELDS, *PARAMS}):
        return f'unknown "{unknown[0]}", expected {", ".join(FIELDS)} or one of {", ".join(PARAMS)}'
    for name, kind, expected in (("prompt", str, "text"), ("messages", list, "a list"), ("tools", list, "a list")):
        value = record.get(name)
        if value is not None and not isinstance(value, kind):
            return f'"{name}" is {type(value).__name__}, expected {expected}'
    if not all(isinstance(message, dict) for message in record.get("messages") or ()):
        return '"messages" holds something that is no object with role and content'
    return None
