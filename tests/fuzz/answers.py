"""Requests of every kind and their answers as plain data: the same for a streamed answer and for a whole one."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from cases.scripted import last_question
from qwen_engine.errors import RequestError
from qwen_run.bench.http_client import Address, post

CHAT, COMPLETIONS, RESPONSES, MESSAGES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
THOUGHT = "<think>\nHm.\n</think>\n\n"
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "%s"}}\n</tool_call>'
PARAMETERS = {"type": "object", "properties": {"x": {"type": "string", "maxLength": 9}}, "required": ["x"]}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 8}, "b": {"enum": [1, "x", None]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
SYSTEM = "You answer in capital letters, whatever you are asked. " * 2


def scripted_reply(prompt: str) -> str:
    """What the scripted model says: the question in capitals, after a thought, or as the argument of a call."""
    question = last_question(prompt) if "<|im_start|>" in prompt else prompt
    if question.startswith("call"):
        return CALL % question
    return (THOUGHT if question.startswith("think") else "") + question.upper()


@dataclass(frozen=True)
class Ask:
    """A request.

    Attributes:
        expected: a text of the scripted model's answer to it; None where it samples.
    """

    path: str
    body: dict[str, Any]
    expected: str | None = None


def make_ask(rng: random.Random, index: int) -> Ask:
    """Request ``index`` of a run; no two are the same."""
    kind = rng.choice(list(_KINDS))
    return _KINDS[kind](rng, f"{kind} {index} " + "x" * rng.randint(0, 120))


def _chat(rng: random.Random, text: str) -> Ask:
    system = [{"role": "system", "content": SYSTEM}] if rng.random() < 0.5 else []
    return Ask(CHAT, {"messages": [*system, *_asked(text)], "n": rng.choice([1, 1, 2])}, text.upper())


def _call(_: random.Random, text: str) -> Ask:
    return Ask(CHAT, {"messages": _asked(text), "tools": TOOLS}, text)


def _forced(rng: random.Random, text: str) -> Ask:
    fields = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    return Ask(CHAT, {"messages": _asked(text), **fields, **_hot(rng)})


def _sampled(rng: random.Random, text: str) -> Ask:
    return Ask(CHAT, {"messages": _asked(text), "n": 2, "logprobs": True, "top_logprobs": 2, **_hot(rng)})


def _schema(rng: random.Random, text: str) -> Ask:
    return Ask(CHAT, {"messages": _asked(text), "response_format": FORM, **_hot(rng)})


def _completion(_: random.Random, text: str) -> Ask:
    return Ask(COMPLETIONS, {"prompt": text, "max_tokens": 150, "logprobs": 1}, text.upper())


def _completions(rng: random.Random, text: str) -> Ask:
    return Ask(COMPLETIONS, {"prompt": [text, f"b{text}"], "stop": ["XXXXXXXXXXXXXXXXXXXX"], **_hot(rng)})


def _responses(_: random.Random, text: str) -> Ask:
    return Ask(RESPONSES, {"input": text, "instructions": SYSTEM}, text.upper())


def _messages(_: random.Random, text: str) -> Ask:
    return Ask(MESSAGES, {"messages": _asked(text), "max_tokens": 200}, text.upper())


_KINDS = {
    "say": _chat, "think": _chat, "call": _call, "forced": _forced, "sampled": _sampled, "schema": _schema,
    "completion": _completion, "completions": _completions, "responses": _responses, "messages": _messages,
}  # fmt: skip


def _asked(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def _hot(rng: random.Random) -> dict[str, Any]:
    return {"temperature": rng.choice([0.8, 1.5]), "seed": rng.randrange(10**6), "max_tokens": 100}


async def answer(address: Address, ask: Ask, stream: bool) -> list[Any]:
    """What comes back: of every choice its texts, calls, log probabilities and its end.

    Raises:
        RequestError: the server answers with an error.
    """
    async with aclosing(post(address, ask.path, {**ask.body, "stream": stream})) as lines:
        found = [line async for line in lines]
    if not stream:
        return _WHOLE[ask.path](json.loads("\n".join(found)))
    chunks = [json.loads(line[6:]) for line in found if line.startswith("data: {")]
    if errors := [chunk for chunk in chunks if chunk.get("error") or chunk.get("type") == "error"]:
        raise RequestError(f"an error in the stream: {errors[0]}")
    return _STREAMED[ask.path](chunks)


def _whole_choices(found: dict[str, Any]) -> list[Any]:
    return _choices(found["choices"])


def _streamed_choices(chunks: list[dict[str, Any]]) -> list[Any]:
    return _choices(choice for chunk in chunks for choice in chunk["choices"])


def _choices(pieces: Iterable[dict[str, Any]]) -> list[Any]:
    """Of each choice: text, thinking, calls, log probabilities, end; put together of the pieces that came of it."""
    made: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        made.setdefault(piece["index"], {"text": "", "thought": "", "calls": [], "logprobs": [], "end": None})
        one, said = made[piece["index"]], piece.get("message") or piece.get("delta") or {}
        one["text"] += piece.get("text") or said.get("content") or ""
        one["thought"] += said.get("reasoning_content") or ""
        one["end"] = piece["finish_reason"] or one["end"]
        logprobs = piece.get("logprobs") or {}
        one["logprobs"] += logprobs.get("content") or logprobs.get("token_logprobs") or []
        for place, call in enumerate(said.get("tool_calls") or []):
            index, function = call.get("index", place), call["function"]
            one["calls"] += [["", ""]] if index == len(one["calls"]) else []
            one["calls"][index][0] += function.get("name", "")
            one["calls"][index][1] += function.get("arguments", "")
    return sorted(made.items())


def _whole_response(found: dict[str, Any]) -> list[Any]:
    texts = [part["text"] for item in found["output"] for part in item.get("content") or []]
    return [found["status"], "".join(texts)]


def _streamed_response(events: list[dict[str, Any]]) -> list[Any]:
    told = "".join(each["delta"] for each in events if each["type"] == "response.output_text.delta")
    status, text = _whole_response(events[-1]["response"])
    return [status, text] if told == text else ["the pieces are not the whole", told, text]


def _whole_message(found: dict[str, Any]) -> list[Any]:
    return [found["stop_reason"], "".join(block["text"] for block in found["content"] if block["type"] == "text")]


def _streamed_message(events: list[dict[str, Any]]) -> list[Any]:
    told = "".join(each["delta"].get("text", "") for each in events if each["type"] == "content_block_delta")
    return [next(each["delta"]["stop_reason"] for each in events if each["type"] == "message_delta"), told]


_WHOLE = {
    CHAT: _whole_choices, COMPLETIONS: _whole_choices, RESPONSES: _whole_response, MESSAGES: _whole_message
}  # fmt: skip
_STREAMED = {
    CHAT: _streamed_choices, COMPLETIONS: _streamed_choices, RESPONSES: _streamed_response, MESSAGES: _streamed_message
}  # fmt: skip
