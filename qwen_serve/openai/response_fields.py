"""``POST /v1/responses`` as clients write it, and what it means as a request for a chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_engine.errors import shown
from qwen_serve.common.errors import ServeError
from qwen_serve.openai.fields import Body, Chat, validated


class Responses(Body):
    """``POST /v1/responses``; nothing is stored between requests."""

    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    previous_response_id: str | None = None
    prompt_cache_key: str | None = None
    # read by others, and without effect here
    store: bool | None = None
    user: str | None = None
    include: list[str] | None = None
    service_tier: str | None = None
    truncation: str | None = None
    safety_identifier: str | None = None
    stream_options: dict[str, Any] | None = None


_TEXT_PARTS = ("input_text", "output_text", "text")


def as_chat(body: Responses) -> Chat:
    """``body`` as a request for a chat.

    Raises:
        ServeError: it refers to what is not stored, or holds what is no text.
    """
    if body.previous_response_id is not None:
        message = "previous_response_id: nothing is stored here; send the items of the conversation as input"
        raise ServeError("invalid_request", message, "previous_response_id")
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    if not items:
        raise ServeError("invalid_request", "input is [], expected a text, or items, at least one", "input")
    for index, item in enumerate(items):
        _add(messages, item, f"input.{index}")
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "stream": body.stream,
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "tools": [_tool(tool, index) for index, tool in enumerate(body.tools or [])] or None,
        "tool_choice": _choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning_effort": _effort(body.reasoning),
        "response_format": _format(body.text),
    }
    return validated(Chat, {name: value for name, value in fields.items() if value is not None})


def _add(messages: list[dict[str, Any]], item: Mapping[str, Any], where: str) -> None:
    """Put an item to the messages; calls and thoughts of one turn are one message."""
    kind = item.get("type", "message")
    if kind == "message":
        messages.append({"role": item.get("role"), "content": _text(item.get("content"), where)})
    elif kind == "function_call_output":
        said = _text(item.get("output"), where)
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": said})
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        _open_turn(messages).setdefault("tool_calls", []).append(call)
    elif kind == "reasoning":
        parts = item.get("content") or item.get("summary") or []
        thoughts = "".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping))
        messages.append({"role": "assistant", "content": "", "reasoning_content": thoughts})
    else:
        raise ServeError("invalid_request", f"{where} is of type {shown(kind)}, which this server does not know", where)
    if kind == "message" and len(messages) > 1 and messages[-1]["role"] == "assistant" and _is_thought(messages[-2]):
        thought = messages.pop(-2)
        messages[-1]["reasoning_content"] = thought["reasoning_content"]


def _open_turn(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The model's turn that is going on, or a new one."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _is_thought(message: Mapping[str, Any]) -> bool:
    return "reasoning_content" in message and not message["content"] and "tool_calls" not in message


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for part in content if isinstance(content, list) else [None]:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") in _TEXT_PARTS else None
        if not isinstance(text, str):
            raise ServeError("invalid_request", f"{where} has {shown(part)}, expected a text or parts of text", where)
        texts.append(text)
    return "".join(texts)


def _tool(tool: Mapping[str, Any], index: int) -> dict[str, Any]:
    if tool.get("type") != "function":
        found = shown(tool.get("type"))
        message = f"tools.{index} is of type {found}, and this server runs no tools; expected function"
        raise ServeError("invalid_request", message, f"tools.{index}")
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in names if tool.get(name) is not None}}


def _choice(choice: Any) -> Any:
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _effort(reasoning: Mapping[str, Any] | None) -> str | None:
    effort = None if reasoning is None else reasoning.get("effort")
    if not isinstance(effort, str | None):
        raise ServeError("invalid_request", f"reasoning.effort is {shown(effort)}, expected a text", "reasoning")
    return effort


def _format(text: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """``text.format``, whose schema stands beside its type."""
    form = None if text is None else text.get("format")
    if isinstance(form, Mapping) and form.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {name: form[name] for name in form if name != "type"}}
    return form
