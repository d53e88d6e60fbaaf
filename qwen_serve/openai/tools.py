"""Which tools a conversation has, and whether the model may, must or must not call one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_engine.errors import shown
from qwen_run.text.grammar import json_style
from qwen_run.text.tokenizer import Tokenizer
from qwen_serve.answers.parser import CALL, END_CALL
from qwen_serve.answers.xml_call import FUNCTION, is_text_schema
from qwen_serve.common.errors import ServeError
from qwen_serve.openai.fields import Chat


@dataclass(frozen=True)
class Tools:
    """The tools of a request.

    Attributes:
        shown: what the chat template writes; None for no tools.
        schemas: of their parameters, by name.
        forced: names of those one of which must be called; empty where none must.
        is_named: the request names the one.
        strict: names of those whose schema is kept to in every detail.
    """

    shown: list[dict[str, Any]] | None
    schemas: Mapping[str, Any]
    forced: tuple[str, ...] = ()
    is_named: bool = False
    strict: frozenset[str] = frozenset()

    @property
    def may_call(self) -> bool:
        return self.shown is not None

    def grammar(self, tokenizer: Tokenizer, template: str, parallel: bool) -> str:
        """The calls that must come, in the form that the chat template shows, as a grammar of llguidance."""
        choices, rules = self._rules(template, self.forced)
        start = 'start: call ("\\n" call)*' if parallel else "start: call"
        call = f'call: {_marker(tokenizer, CALL)} "\\n" ({choices}) "\\n" {_marker(tokenizer, END_CALL)}'
        return "\n".join([start, call, *rules])

    def grammar_of_rest(self, tokenizer: Tokenizer, template: str) -> str:
        """The same of what follows a ``<tool_call>`` that the model has begun by itself."""
        choices, rules = self._rules(template, tuple(self.schemas))
        return "\n".join([f'start: "\\n"? ({choices}) "\\n"? {_marker(tokenizer, END_CALL)}', *rules])

    def _rules(self, template: str, names: Sequence[str]) -> tuple[str, list[str]]:
        """A choice among calls of the tools ``names``, and the rules of each."""
        rule = _xml_rule if FUNCTION in template else _json_rule
        rules = [rule(f"f{i}", name, self.schemas[name], name in self.strict) for i, name in enumerate(names)]
        return " | ".join(f"f{i}" for i in range(len(names))), rules


def tools_of(body: Chat) -> Tools:
    """What ``tools`` and ``tool_choice`` of ``body`` say.

    Raises:
        ServeError: a tool has no name, or the choice is none of those there are.
    """
    tools, schemas, strict = body.tools or [], {}, set()
    for index, tool in enumerate(tools):
        function = tool.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type") != "function" or not isinstance(name, str) or not name:
            message = f"tools.{index} is {shown(tool)}, expected an object of type function with a name in it"
            raise ServeError("invalid_request", message, f"tools.{index}")
        schemas[name] = function.get("parameters")
        strict |= {name} if function.get("strict") else set()
    choice = body.tool_choice
    if choice in ("auto", None):
        return Tools(tools or None, schemas, strict=frozenset(strict))
    if choice == "none":
        return Tools(None, schemas)
    if choice == "required" and schemas:
        return Tools(tools, schemas, tuple(schemas), strict=frozenset(strict))
    function = choice.get("function") if isinstance(choice, Mapping) else None
    named = function.get("name") if isinstance(function, Mapping) else None
    if isinstance(named, str) and named in schemas:
        return Tools(tools, schemas, (named,), True, frozenset(strict))
    expected = f"auto, none, required or one of the tools {', '.join(schemas)}" if schemas else "auto or none: no tools"
    raise ServeError("invalid_request", f"tool_choice is {shown(choice)}, expected {expected}", "tool_choice")


def _marker(tokenizer: Tokenizer, token: str) -> str:
    """A token, or its letters where the tokenizer does not have it."""
    return token if tokenizer.token_id(token) is not None else json.dumps(token)


def _json_rule(rule: str, name: str, schema: Any, strict: bool) -> str:
    """A call as Qwen2.5 and Qwen3 write it."""
    parameters, shared = _hoisted(schema)
    whole = {
        **shared,
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
        "x-guidance": json_style(strict),
    }
    return f"{rule}: %json {json.dumps(whole)}"


def _xml_rule(rule: str, name: str, schema: Any, strict: bool) -> str:
    """A call as Qwen3-Coder writes it: parameters in their order, those that are not required at most once."""
    parameters, shared = _hoisted(schema)
    properties = parameters.get("properties")
    required: Sequence[str] = parameters.get("required") or ()
    names, rules = [], []
    for index, (each, kind) in enumerate(properties.items() if isinstance(properties, Mapping) else ()):
        value = f"{rule}v{index}"
        names.append(f"{rule}p{index}{'' if each in required else '?'}")
        rules.append(f'{rule}p{index}: {json.dumps(f"<parameter={each}>")} "\\n" {value}')
        if is_text_schema(kind):
            rules.append(f'{value}[suffix="\\n</parameter>\\n"]: /(?s:.*)/')
        else:
            text = json.dumps({**shared, **kind, "x-guidance": json_style(strict)})
            rules.append(f'{value}: {value}j "\\n</parameter>\\n"\n{value}j: %json {text}')
    begin = json.dumps(f"{FUNCTION}{name}>\n")
    return "\n".join([f'{rule}: {begin} {" ".join(names)} "</function>"', *rules])


def _hoisted(schema: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A schema of parameters that can stand within another, and the definitions it refers to."""
    parameters = {"type": "object", **(schema if isinstance(schema, Mapping) else {})}
    shared = {name: parameters.pop(name) for name in ("$defs", "definitions") if name in parameters}
    return parameters, shared
