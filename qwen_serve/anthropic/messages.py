"""``/v1/messages``: answers told in blocks, whole or as they come; and how many tokens a conversation has."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from qwen_run.api.outputs import CompletionOutput
from qwen_serve.answers.events import Answer, CallArguments, CallBegin, Content, Event, Reasoning
from qwen_serve.answers.parser import AnswerParser
from qwen_serve.anthropic.fields import Counting, Messages, as_chat
from qwen_serve.common.errors import ServeError
from qwen_serve.common.sse import event
from qwen_serve.engine.job import RequestJob
from qwen_serve.engine.serving import Serving
from qwen_serve.openai.chat import ChatAnswer, rendered
from qwen_serve.openai.tools import tools_of

_REASONS = {"stop": "end_turn", "length": "max_tokens"}


@dataclass
class MessagesAnswer:
    """A conversation that is being answered, told as Anthropic's clients read it."""

    job: RequestJob
    chat: ChatAnswer
    warnings: list[str]

    def __post_init__(self) -> None:
        self.head = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": self.job.serving.name,
        }

    @classmethod
    async def begin(cls, job: RequestJob, body: Messages, cache_salt: str | None = None) -> MessagesAnswer:
        """Let the engine answer ``body``.

        Raises:
            ServeError: something in it is wrong, or there is no room.
        """
        return cls(job, await ChatAnswer.begin(job, as_chat(body), cache_salt), body.warnings)

    async def whole(self) -> dict[str, Any]:
        """The answer at once.

        Raises:
            ServeError: the engine has failed.
        """
        output = None
        async for each in self.job.outputs(self.chat.stream):
            output = each
        assert output is not None
        (answer,) = output.outputs
        parser, found = AnswerParser(self.chat.tokenizer, self.chat.reading), Answer()
        for part in parser.push(answer):
            found.add(part)
        content: list[dict[str, Any]] = []
        if found.reasoning:
            content.append({"type": "thinking", "thinking": found.reasoning, "signature": ""})
        if found.content or not (found.calls or found.reasoning):
            content.append({"type": "text", "text": found.content})
        for call in found.calls:
            block = {"type": "tool_use", "id": _new_id(), "name": call.name, "input": _input(call.arguments)}
            content.append(block)
        told = {**self.head, "content": content, **_end(answer, bool(found.calls)), "usage": self._usage()}
        return {**told, "warnings": self.warnings} if self.warnings else told

    async def chunks(self) -> AsyncGenerator[str, None]:
        """The answer as it comes, as events of a stream."""
        parser, blocks = AnswerParser(self.chat.tokenizer, self.chat.reading), _Blocks()
        try:
            begun = False
            async for output in self.job.outputs(self.chat.stream):
                if not begun:
                    begun = True
                    message: dict[str, Any] = {**self.head, "content": [], "stop_reason": None, "stop_sequence": None}
                    usage = {**self._usage(), "output_tokens": 0}
                    yield _event("message_start", message={**message, "usage": usage})
                for answer in output.outputs:
                    for each in parser.push(answer):
                        for line in blocks.tell(each):
                            yield line
                    if answer.finish_reason is not None:
                        for line in blocks.end():
                            yield line
                        delta = _end(answer, parser.num_calls > 0)
                        yield _event("message_delta", delta=delta, usage=self._usage())
            yield _event("message_stop")
        except ServeError as error:
            yield event(anthropic_error(error), "error")

    def _usage(self) -> dict[str, Any]:
        """Anthropic counts what was in the cache apart."""
        counted = self.job.counted
        return {
            "input_tokens": counted.prompt_tokens - counted.cached_tokens,
            "cache_read_input_tokens": counted.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": counted.completion_tokens,
        }


class _Blocks:
    """The blocks of a streamed answer: one is open at a time."""

    def __init__(self) -> None:
        self._index, self._kind, self._has_arguments = -1, "", False

    def tell(self, each: Event) -> list[str]:
        """The events that ``each`` becomes."""
        match each:
            case Reasoning(text):
                lines = self._open("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                return [*lines, self._delta({"type": "thinking_delta", "thinking": text})]
            case Content(text):
                lines = self._open("text", {"type": "text", "text": ""})
                return [*lines, self._delta({"type": "text_delta", "text": text})]
            case CallBegin(index, name):
                block = {"type": "tool_use", "id": _new_id(), "name": name, "input": {}}
                return self._open(f"call {index}", block)
            case CallArguments(_, text):
                return [self._delta({"type": "input_json_delta", "partial_json": text})]

    def end(self) -> list[str]:
        """Close what is open; an answer without a word has one empty block."""
        lines = [] if self._kind else self._open("text", {"type": "text", "text": ""})
        return [*lines, _event("content_block_stop", index=self._index)]

    def _open(self, kind: str, block: dict[str, Any]) -> list[str]:
        if kind == self._kind:
            return []
        lines = [_event("content_block_stop", index=self._index)] if self._kind else []
        self._kind, self._index = kind, self._index + 1
        return [*lines, _event("content_block_start", index=self._index, content_block=block)]

    def _delta(self, delta: dict[str, Any]) -> str:
        return _event("content_block_delta", index=self._index, delta=delta)


async def count_tokens(serving: Serving, body: Counting) -> dict[str, Any]:
    """How many tokens a conversation has.

    Raises:
        ServeError: the template refuses it.
    """
    chat = as_chat(body)
    prompt, _ = await rendered(serving, chat, tools_of(chat).shown, chat.chat_template_kwargs or {})
    ids = await serving.tokenizing(serving.llm.llm.tokenizer.encode_pieces, prompt.pieces)
    return {"input_tokens": len(ids)}


def anthropic_error(error: ServeError) -> dict[str, Any]:
    """``error`` as Anthropic's clients read it."""
    kind = {429: "rate_limit_error", 500: "api_error", 503: "overloaded_error"}.get(error.kind.status, error.kind.type)
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def _event(kind: str, **fields: Any) -> str:
    return event({"type": kind, **fields}, kind)


def _end(answer: CompletionOutput, has_calls: bool) -> dict[str, Any]:
    """Why an answer has ended."""
    if has_calls and answer.finish_reason == "stop":
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if isinstance(answer.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": answer.stop_reason}
    return {"stop_reason": _REASONS.get(answer.finish_reason or "stop", "end_turn"), "stop_sequence": None}


def _input(arguments: str) -> Any:
    """The arguments of a call as an object; text that is none, as of a call that was cut, under its own name."""
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"arguments": arguments}


def _new_id() -> str:
    return f"toolu_{secrets.token_hex(12)}"
