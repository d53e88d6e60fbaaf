"""What the form of an answer is bound to: :class:`StructuredOutputsParams`, with the names of vLLM's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from qwen_engine.errors import RequestError, shown

MAX_CHARACTERS = 1 << 20  # of a schema or a grammar
MAX_CHOICES = 10_000


@dataclass(frozen=True)
class StructuredOutputsParams:
    """The form of an answer; one of these.

    Attributes:
        json: a JSON schema, as an object or its text.
        regex: a regular expression that the whole answer matches.
        choice: texts, one of which is the answer.
        grammar: a context-free grammar in the form of Lark, as llguidance reads it.
        json_object: any JSON object.
        strict: of ``json``: a schema with something that cannot be kept is an error; else that is left out.
        after: a token, such as ``<tool_call>``: what follows it has the form, each time it comes; all else is free.

    Raises:
        RequestError: none of them is given, or several, or one is of another type.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    strict: bool = True
    after: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            found = " and ".join(given) or "nothing"
            raise RequestError(f"structured_outputs has {found}, expected one of {', '.join(KINDS)}")
        object.__setattr__(self, given[0], _checked(given[0], getattr(self, given[0])))

    @classmethod
    def of(cls, value: Any) -> StructuredOutputsParams | None:
        """``value``, which may also be a mapping with these names.

        Raises:
            RequestError: it is neither, or has other names.
        """
        if value is None or isinstance(value, StructuredOutputsParams):
            return value
        names = [field.name for field in fields(cls)]
        if not isinstance(value, Mapping) or not all(name in names for name in value):
            raise RequestError(
                f"structured_outputs is {shown(value)}, expected an object with one of {', '.join(KINDS)}"
            )
        return cls(**value)

    @classmethod
    def of_response_format(cls, value: Any) -> StructuredOutputsParams | None:
        """OpenAI's ``response_format``: text, ``json_object`` or ``json_schema``.

        Raises:
            RequestError: it is none of these.
        """
        kind = value.get("type") if isinstance(value, Mapping) else None
        if value is None or kind == "text":
            return None
        if kind == "json_object":
            return cls(json_object=True)
        described = value.get("json_schema") if kind == "json_schema" else None
        if not isinstance(described, Mapping) or "schema" not in described:
            expected = "an object of type text, json_object or json_schema, the last with json_schema.schema"
            raise RequestError(f"response_format is {shown(value)}, expected {expected}")
        return cls(json=described["schema"], strict=bool(described.get("strict")))

    @property
    def kind(self) -> str:
        """Which of them is given."""
        return next(name for name in KINDS if getattr(self, name) not in (None, False))

    @property
    def text(self) -> str:
        """What is given, as text; a key of what was compiled."""
        value = getattr(self, self.kind)
        return value if isinstance(value, str) else json.dumps(value)


KINDS = ("json", "regex", "choice", "grammar", "json_object")


def _checked(kind: str, value: Any) -> Any:
    """``value`` such that nobody can change it: a schema as its text.

    Raises:
        RequestError: it is of another type, or too large.
    """
    if kind == "json_object":
        return True
    if kind == "choice":
        choices = tuple(value) if isinstance(value, list | tuple) else ()
        if not 0 < len(choices) <= MAX_CHOICES or not all(isinstance(each, str) and each for each in choices):
            raise RequestError(f"choice is {shown(value)}, expected 1 to {MAX_CHOICES} texts, none of them empty")
        _check_characters(kind, "".join(choices))
        return choices
    if kind == "json":
        value = _schema_text(value)
    if not isinstance(value, str) or not 0 < len(value) <= MAX_CHARACTERS:
        raise RequestError(f"{kind} is {shown(value)}, expected a text of at most {MAX_CHARACTERS} characters")
    _check_characters(kind, value)
    return value


def _check_characters(kind: str, text: str) -> None:
    """
    Raises:
        RequestError: half of a character is in ``text``, as JSON can write it.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise RequestError(f"{kind} is {shown(text)}, expected whole characters of Unicode; leave the others out")


def _schema_text(schema: Any) -> str:
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(parsed)
    except (ValueError, TypeError, RecursionError):
        parsed, text = None, ""
    if not isinstance(parsed, Mapping):
        raise RequestError(f"json is {shown(schema)}, expected a JSON schema, which is an object")
    return text
