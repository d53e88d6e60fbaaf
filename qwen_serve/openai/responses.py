"""``/v1/responses``: an answer told in items, whole or as they come. Nothing is stored."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from qwen_run.api.outputs import CompletionOutput
from qwen_serve.answers.events import CallArguments, CallBegin, Content, Event, Reasoning
from qwen_serve.answers.parser import AnswerParser
from qwen_serve.common.errors import ServeError
from qwen_serve.common.sse import event
from qwen_serve.engine.job import RequestJob
from qwen_serve.openai.chat import ChatAnswer, new_call_id
from qwen_serve.openai.response_fields import Responses, as_chat


@dataclass
class ResponsesAnswer:
    """An answer on its way."""

    job: RequestJob
    body: Responses
    chat: ChatAnswer

    def __post_init__(self) -> None:
        body = self.body
        self.head: dict[str, Any] = {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": self.job.serving.name,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": body.top_p,
        }
        self.items = _Items()

    @classmethod
    async def begin(cls, job: RequestJob, body: Responses, cache_salt: str | None = None) -> ResponsesAnswer:
        """Let the engine answer ``body``.

        Raises:
            ServeError: something in it is wrong, or there is no room.
        """
        return cls(job, body, await ChatAnswer.begin(job, as_chat(body), cache_salt))

    async def whole(self) -> dict[str, Any]:
        """The answer at once.

        Raises:
            ServeError: the engine has failed.
        """
        parser, ended = AnswerParser(self.chat.tokenizer, self.chat.reading), None
        async for output in self.job.outputs(self.chat.stream):
            (ended,) = output.outputs
            for each in parser.push(ended):
                self.items.tell(each)
        self.items.close()
        assert ended is not None
        return self._response(ended, parser)

    async def chunks(self) -> AsyncGenerator[str, None]:
        """The answer as it comes, as events of a stream."""
        number, parser = 0, AnswerParser(self.chat.tokenizer, self.chat.reading)
        try:
            for kind in ("response.created", "response.in_progress"):
                yield _event(kind, number, response={**self.head, "status": "in_progress", "output": []})
                number += 1
            async for output in self.job.outputs(self.chat.stream):
                for answer in output.outputs:
                    told = [line for each in parser.push(answer) for line in self.items.tell(each)]
                    told += self.items.close() if answer.finish_reason is not None else []
                    for kind, fields in told:
                        yield _event(kind, number, **fields)
                        number += 1
                    if answer.finish_reason is not None:
                        response = self._response(answer, parser)
                        yield _event(f"response.{response['status']}", number, response=response)
        except ServeError as error:
            yield _event("error", number, message=error.message, code=error.code, param=error.param)

    def _response(self, answer: CompletionOutput, parser: AnswerParser) -> dict[str, Any]:
        counted = self.job.counted
        counted.reasoning_tokens = parser.num_reasoning_tokens
        is_cut = answer.finish_reason == "length"
        found = {**self.head, "status": "incomplete" if is_cut else "completed", "output": self.items.done}
        found["incomplete_details"] = {"reason": "max_output_tokens"} if is_cut else None
        found["usage"] = {
            "input_tokens": counted.prompt_tokens,
            "input_tokens_details": {"cached_tokens": counted.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": counted.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": counted.reasoning_tokens},
            "total_tokens": counted.prompt_tokens + counted.completion_tokens,
        }
        warnings = [*self.body.warnings, *self.chat.warnings]
        return {**found, "warnings": warnings} if warnings else found


Told = tuple[str, dict[str, Any]]  # an event's name and its fields


@dataclass
class _Items:
    """The items of an answer: one is open at a time.

    Attributes:
        done: those that are complete.
    """

    done: list[dict[str, Any]] = field(default_factory=list)
    _open: dict[str, Any] | None = None
    _text: str = ""

    def tell(self, each: Event) -> list[Told]:
        """The events that ``each`` becomes."""
        match each:
            case Reasoning(text):
                return [*self._begin("reasoning"), *self._grow("reasoning_text", text)]
            case Content(text):
                return [*self._begin("message"), *self._grow("output_text", text)]
            case CallBegin(_, name):
                return self._begin("function_call", name)
            case CallArguments(_, text):
                return self._grow("function_call_arguments", text)

    def close(self) -> list[Told]:
        """End what is open."""
        item, text = self._open, self._text
        if item is None:
            return []
        place = {"item_id": item["id"], "output_index": len(self.done)}
        self._open, self._text = None, ""
        told: list[Told] = []
        if item["type"] == "function_call":
            item |= {"arguments": text, "status": "completed"}
            done = {**place, "arguments": text, "name": item["name"]}
            told.append(("response.function_call_arguments.done", done))
        else:
            kind = "output_text" if item["type"] == "message" else "reasoning_text"
            part = _part(kind, text)
            item |= {"content": [part], "status": "completed"}
            place = {**place, "content_index": 0}
            more: dict[str, Any] = {"logprobs": []} if kind == "output_text" else {}
            told.append((f"response.{kind}.done", {**place, "text": text, **more}))
            told.append(("response.content_part.done", {**place, "part": part}))
        told.append(("response.output_item.done", {"output_index": len(self.done), "item": item}))
        self.done.append(item)
        return told

    def _begin(self, kind: str, name: str = "") -> list[Told]:
        """Open an item, unless this one goes on; a call is always a new one."""
        if self._open is not None and self._open["type"] == kind != "function_call":
            return []
        told = self.close()
        item: dict[str, Any] = {"id": f"{_PREFIXES[kind]}_{secrets.token_hex(12)}", "type": kind}
        item |= {"status": "in_progress"}
        if kind == "function_call":
            item |= {"call_id": new_call_id(), "name": name, "arguments": ""}
        else:
            item |= {"role": "assistant", "content": []} if kind == "message" else {"summary": [], "content": []}
        self._open = item
        told.append(("response.output_item.added", {"output_index": len(self.done), "item": dict(item)}))
        if kind != "function_call":
            part = _part("output_text" if kind == "message" else "reasoning_text", "")
            place = {"item_id": item["id"], "output_index": len(self.done), "content_index": 0}
            told.append(("response.content_part.added", {**place, "part": part}))
        return told

    def _grow(self, kind: str, text: str) -> list[Told]:
        assert self._open is not None
        self._text += text
        fields: dict[str, Any] = {"item_id": self._open["id"], "output_index": len(self.done), "delta": text}
        if kind != "function_call_arguments":
            fields["content_index"] = 0
        if kind == "output_text":
            fields["logprobs"] = []
        return [(f"response.{kind}.delta", fields)]


_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


def _part(kind: str, text: str) -> dict[str, Any]:
    more: dict[str, Any] = {"annotations": [], "logprobs": []} if kind == "output_text" else {}
    return {"type": kind, "text": text, **more}


def _event(kind: str, number: int, **fields: Any) -> str:
    return event({"type": kind, "sequence_number": number, **fields}, kind)
