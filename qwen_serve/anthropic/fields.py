"""``POST /v1/messages`` as clients of Anthropic's write it, and what it means in OpenAI's words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from qwen_engine.errors import shown
from qwen_serve.common.errors import ServeError
from qwen_serve.openai.fields import MAX_STOP_TEXTS, Body, Chat, validated


class Counting(Body):
    """``POST /v1/messages/count_tokens``."""

    model: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None


class Messages(Counting):
    """``POST /v1/messages``."""

    max_tokens: Annotated[int, Field(ge=1)]
    stream: bool | None = None
    stop_sequences: Annotated[list[str], Field(max_length=MAX_STOP_TEXTS)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    # read by others, and without effect here
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None


_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def as_chat(body: Counting) -> Chat:
    """``body`` as a request of OpenAI's.

    Raises:
        ServeError: it holds what is no text, or a choice that is none.
    """
    messages: list[dict[str, Any]] = []
    if body.system is not None:
        messages.append({"role": "system", "content": _text(body.system, "system")})
    for index, message in enumerate(body.messages):
        messages += _messages(message, f"messages.{index}")
    choice: Mapping[str, Any] = body.tool_choice or {}
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "tools": [_tool(tool, index) for index, tool in enumerate(body.tools or [])] or None,
        "tool_choice": _choice(choice) if choice else None,
        "parallel_tool_calls": not choice.get("disable_parallel_tool_use", False),
        **_thinking(body.thinking),
    }
    if isinstance(body, Messages):
        fields |= {"max_tokens": body.max_tokens, "stream": body.stream, "stop": body.stop_sequences}
        fields |= {"temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k}
    return validated(Chat, {name: value for name, value in fields.items() if value is not None})


def _messages(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """One message, and the results of tools that it holds, which come first."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant"):
        raise ServeError("invalid_request", f"{where}.role is {shown(role)}, expected user or assistant", where)
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise ServeError("invalid_request", f"{where}.content is {shown(content)}, expected a text or blocks", where)
    texts, results, calls, thoughts = [], [], [], []
    for index, block in enumerate(content):
        place = f"{where}.content.{index}"
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "text":
            texts.append(_text([block], place))
        elif kind == "tool_result" and role == "user":
            said = block.get("content") or ""
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": _text(said, place)})
        elif kind == "tool_use" and role == "assistant":
            function = {"name": block.get("name"), "arguments": json.dumps(block.get("input") or {})}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "thinking" and role == "assistant":
            thoughts.append(str(block.get("thinking", "")))
        elif kind != "redacted_thinking" or role != "assistant":
            message_ = f"{place} is of type {shown(kind)}, which a message of {role}'s cannot hold here"
            raise ServeError("invalid_request", message_, place)
    found: dict[str, Any] = {"role": role, "content": "".join(texts)}
    if calls:
        found["tool_calls"] = calls
    if thoughts:
        found["reasoning_content"] = "".join(thoughts)
    return [*results, found] if texts or calls or thoughts or not results else results


def _text(content: Any, where: str) -> str:
    """A text, or the texts of blocks, joined."""
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for block in content if isinstance(content, list) else [None]:
        text = block.get("text") if isinstance(block, Mapping) and block.get("type") == "text" else None
        if not isinstance(text, str):
            message = f"{where} has {shown(block)}, expected a text or blocks of type text"
            raise ServeError("invalid_request", message, where)
        texts.append(text)
    return "".join(texts)


def _tool(tool: Mapping[str, Any], index: int) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        message = f"tools.{index} is of type {shown(tool.get('type'))}, and this server runs no tools; expected custom"
        raise ServeError("invalid_request", message, f"tools.{index}")
    names = {"name": "name", "description": "description", "input_schema": "parameters", "strict": "strict"}
    function = {theirs: tool[ours] for ours, theirs in names.items() if tool.get(ours) is not None}
    return {"type": "function", "function": function}


def _choice(choice: Mapping[str, Any]) -> str | dict[str, Any]:
    kind = str(choice.get("type"))
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if kind not in _CHOICES:
        message = f"tool_choice is {shown(choice)}, expected one of type {', '.join(_CHOICES)} or tool"
        raise ServeError("invalid_request", message, "tool_choice")
    return _CHOICES[kind]


def _thinking(thinking: Mapping[str, Any] | None) -> dict[str, Any]:
    """Without the field there is none, as in Anthropic's interface."""
    kind = "disabled" if thinking is None else thinking.get("type")
    budget = None if thinking is None else thinking.get("budget_tokens")
    if kind not in ("enabled", "disabled", "adaptive"):
        message = f"thinking is {shown(thinking)}, expected an object of type enabled, disabled or adaptive"
        raise ServeError("invalid_request", message, "thinking")
    if budget is not None and (not isinstance(budget, int) or isinstance(budget, bool) or budget < 0):
        message = f"thinking.budget_tokens is {shown(budget)}, expected a whole number"
        raise ServeError("invalid_request", message, "thinking")
    switch = {"chat_template_kwargs": {"enable_thinking": kind != "disabled"}}
    return switch if budget is None or kind != "enabled" else {**switch, "thinking_token_budget": budget}
