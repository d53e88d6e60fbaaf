"""``/v1/chat/completions``: a conversation in, one or several messages out, whole or as they come."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

from qwen_engine.errors import RequestError, shown
from qwen_run.api.async_llm import RequestStream
from qwen_run.api.outputs import CompletionOutput, RequestOutput
from qwen_run.api.prompts import ChatPrompt
from qwen_run.sampling.constraint import Thinking, thinking_at_end
from qwen_run.sampling.params import SamplingParams
from qwen_run.sampling.rules import RequestOutputKind
from qwen_run.sampling.structured import StructuredOutputsParams
from qwen_serve.answers.events import Answer, CallArguments, CallBegin, Content, Event, Reasoning
from qwen_serve.answers.parser import CALL, END_THINK, THINK, AnswerParser, Reading
from qwen_serve.common.errors import ServeError
from qwen_serve.common.sse import DONE, Chunks, event
from qwen_serve.engine.job import RequestJob, timings
from qwen_serve.engine.serving import Serving, refused, writes_tools
from qwen_serve.openai.fields import Chat, form_of, sampling_params
from qwen_serve.openai.logprobs import chat_logprobs
from qwen_serve.openai.tools import Tools, tools_of


@dataclass
class ChatAnswer:
    """A conversation that is being answered.

    Attributes:
        stream: from the engine.
        reading: how its answers are told apart.
        tools: those of the request.
        num_logprobs: likeliest tokens to report; None for no log probabilities.
    """

    job: RequestJob
    body: Chat
    stream: RequestStream
    reading: Reading
    tools: Tools
    num_logprobs: int | None
    warnings: list[str]

    def __post_init__(self) -> None:
        self.head = self.job.head("chatcmpl", "chat.completion")
        self._written = Chunks({**self.head, "object": "chat.completion.chunk"})
        self.tokenizer = self.job.serving.llm.llm.tokenizer

    @classmethod
    async def begin(cls, job: RequestJob, body: Chat, cache_salt: str | None = None) -> ChatAnswer:
        """Let the engine answer ``body``.

        Raises:
            ServeError: something in it is wrong, or there is no room.
        """
        serving = job.serving
        serving.check_model(body.model)
        tools = tools_of(body)
        params = _params(serving, body, tools, cache_salt)
        job.enter(params.n)
        prompt, warnings = await rendered(serving, body, tools.shown, _variables(body))
        if body.tools and not writes_tools(template_of(serving)):
            warnings.append("tools have no effect: the model's chat template does not write them")
        ids = await job.encode(prompt, "the conversation", cut=params.truncate_prompt_tokens is not None)
        reading = _reading(serving, body, tools, prompt, ids, params)
        stream = await job.begin(ids, params)
        top = (body.top_logprobs or 0) if body.logprobs else None
        return cls(job, body, stream, reading, tools, top, [*body.warnings, *warnings])

    def _finish_reason(self, answer: CompletionOutput, num_calls: int) -> str | None:
        """As OpenAI has it: ``stop`` where the request named the tool."""
        called = num_calls and answer.finish_reason == "stop" and not self.tools.is_named
        return "tool_calls" if called else answer.finish_reason

    async def whole(self) -> dict[str, Any]:
        """The answer at once.

        Raises:
            ServeError: the engine has failed.
        """
        output = None
        async for each in self.job.outputs(self.stream):
            output = each
        assert output is not None
        choices = [self._choice(answer) for answer in output.outputs]
        found = {**self.head, "choices": choices, "usage": self.job.counted.usage(), "seed": output.seed}
        if self.warnings:
            found["warnings"] = self.warnings
        if self.body.return_token_ids:
            found["prompt_token_ids"] = output.prompt_token_ids
        return {**found, "timings": timings(output, self.job.counted.completion_tokens)}

    async def chunks(self) -> AsyncGenerator[str, None]:
        """The answer as it comes, as events of a stream; at most one a choice and step."""
        parsers: dict[int, AnswerParser] = {}
        output = None
        try:
            for index in range(self.body.n or 1):
                parsers[index] = AnswerParser(self.tokenizer, self.reading)
                yield self._chunk(index, {"role": "assistant", "content": ""})
            async for output in self.job.outputs(self.stream):
                for answer in output.outputs:
                    for chunk in self._parts(answer, parsers, output):
                        yield chunk
            if self.body.includes_usage:
                yield self._written.event({"choices": [], "usage": self.job.counted.usage()})
            yield DONE
        except ServeError as error:
            yield event(error.body())

    def _parts(self, answer: CompletionOutput, parsers: dict[int, AnswerParser], output: RequestOutput) -> list[str]:
        """The chunks of what is new of one choice."""
        parser = parsers.get(answer.index)
        if parser is None:
            return []
        delta = self._delta(parser.push(answer))
        logprobs = self._logprobs(answer)
        chunks = []
        if delta or (logprobs and logprobs["content"]):
            more: dict[str, Any] = {"token_ids": answer.token_ids} if self.body.return_token_ids else {}
            chunks.append(self._chunk(answer.index, delta, logprobs, None, more))
        if answer.finish_reason is not None:
            del parsers[answer.index]
            self.job.counted.reasoning_tokens += parser.num_reasoning_tokens
            more = {"stop_reason": answer.stop_reason}
            last = {} if parsers else self._last(output)
            reason = self._finish_reason(answer, parser.num_calls)
            chunks.append(self._chunk(answer.index, {}, None, reason, more, last))
        return chunks

    def _last(self, output: RequestOutput) -> dict[str, Any]:
        """What the last chunk of all choices tells besides."""
        found: dict[str, Any] = {"seed": output.seed}
        if self.warnings:
            found["warnings"] = self.warnings
        return {**found, "timings": timings(output, self.job.counted.completion_tokens)}

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, Any],
        logprobs: Any = None,
        finish_reason: str | None = None,
        more: Mapping[str, Any] | None = None,
        last: Mapping[str, Any] | None = None,
    ) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason, **(more or {})}
        chunk: dict[str, Any] = {"choices": [choice], **(last or {})}
        if self.body.includes_usage:
            chunk["usage"] = self.job.counted.usage() if self.body.usage_goes_on else None
        return self._written.event(chunk)

    def _delta(self, events: list[Event]) -> dict[str, Any]:
        """Everything new in one object."""
        delta: dict[str, Any] = {}
        calls: list[dict[str, Any]] = []
        for each in events:
            match each:
                case Reasoning(text):
                    if self.body.include_reasoning is not False:
                        for name in ("reasoning_content", "reasoning"):
                            delta[name] = delta.get(name, "") + text
                case Content(text):
                    delta["content"] = delta.get("content", "") + text
                case CallBegin(index, name):
                    function = {"name": name, "arguments": ""}
                    calls.append({"index": index, "id": new_call_id(), "type": "function", "function": function})
                case CallArguments(index, text):
                    if calls and calls[-1]["index"] == index:
                        calls[-1]["function"]["arguments"] += text
                    else:
                        calls.append({"index": index, "function": {"arguments": text}})
        return {**delta, "tool_calls": calls} if calls else delta

    def _choice(self, answer: CompletionOutput) -> dict[str, Any]:
        parser, found = AnswerParser(self.tokenizer, self.reading), Answer()
        for each in parser.push(answer):
            found.add(each)
        self.job.counted.reasoning_tokens += parser.num_reasoning_tokens
        message: dict[str, Any] = {"role": "assistant", "content": found.content, "refusal": None}
        if found.reasoning and self.body.include_reasoning is not False:
            message |= {"reasoning_content": found.reasoning, "reasoning": found.reasoning}
        if found.calls:
            message["content"] = found.content or None
            message["tool_calls"] = [
                {
                    "id": new_call_id(),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in found.calls
            ]
        choice = {"index": answer.index, "message": message, "logprobs": self._logprobs(answer)}
        choice |= {"finish_reason": self._finish_reason(answer, len(found.calls)), "stop_reason": answer.stop_reason}
        return {**choice, "token_ids": answer.token_ids} if self.body.return_token_ids else choice

    def _logprobs(self, answer: CompletionOutput) -> dict[str, Any] | None:
        if self.num_logprobs is None or answer.logprobs is None:
            return None
        content = chat_logprobs(self.tokenizer, answer.token_ids, answer.logprobs, self.num_logprobs)
        return {"content": content, "refusal": None}


async def rendered(
    serving: Serving, body: Any, tools: list[dict[str, Any]] | None, variables: Mapping[str, Any]
) -> tuple[ChatPrompt, list[str]]:
    """The text of a conversation, and what of ``variables`` the template does not read.

    Raises:
        ServeError: the template refuses the messages, or a variable is none.
    """
    _check_variables(variables)
    llm = serving.llm
    goes_on = bool(body.continue_final_message)
    opens = body.add_generation_prompt is not False and not goes_on
    options = {**variables, "continue_final_message": goes_on, "add_generation_prompt": opens}
    template = llm.llm.text.template
    known = template.variables if template is not None else frozenset()
    idle = [f"chat_template_kwargs.{name} has no effect" for name in variables if name not in known | _SWITCHES]
    try:
        return await serving.tokenizing(lambda: llm.llm.chat_prompt(body.messages, tools, **options)), idle
    except RequestError as error:
        raise refused(error, "messages") from None


_FIELDS_OF_REQUESTS = (
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "control_texts",
)
_SWITCHES = frozenset(["enable_thinking"])  # asked for of any model; those that do not think know nothing of it


def _variables(body: Chat) -> dict[str, Any]:
    """What the chat template is told."""
    given = dict(body.chat_template_kwargs or {})
    return {"enable_thinking": False, **given} if body.reasoning_effort == "none" else given


def _check_variables(given: Mapping[str, Any]) -> None:
    """
    Raises:
        ServeError: one is no simple value, or has a name that means something else.
    """
    for name, value in given.items():
        if name in _FIELDS_OF_REQUESTS:
            raise ServeError("invalid_request", f"{name} is a field of the request itself", "chat_template_kwargs")
        if not isinstance(value, str | int | float | bool | None):
            message = f"chat_template_kwargs.{name} is {shown(value)}, expected a text, a number, true or false"
            raise ServeError("invalid_request", message, "chat_template_kwargs")


def _params(serving: Serving, body: Chat, tools: Tools, cache_salt: str | None) -> SamplingParams:
    llm = serving.llm
    fixed: dict[str, Any] = {
        "output_kind": RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY,
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
    }
    if body.max_tokens is None and body.max_completion_tokens is None:
        fixed["max_tokens"] = None
    if (form := _form(serving, body, tools)) is not None:
        fixed["structured_outputs"] = form
    if cache_salt is not None:
        fixed["cache_salt"] = cache_salt + (body.cache_salt or "")
    budget = serving.settings.thinking_budget
    if budget is not None and body.thinking_token_budget is None and body.reasoning_budget_tokens is None:
        fixed["thinking_token_budget"] = budget
    return sampling_params(body, llm.default_params, fixed)


def _form(serving: Serving, body: Chat, tools: Tools) -> StructuredOutputsParams | None:
    """The form of the answer: what is asked for, or that of calls which must come or may, where a tool is strict.

    Raises:
        ServeError: both are asked for, or the model's template has no tools.
    """
    form, template = form_of(body), template_of(serving)
    tokenizer = serving.llm.llm.tokenizer
    if not tools.forced:
        if form is None and tools.may_call and tools.strict and tokenizer.token_id(CALL) is not None:
            return StructuredOutputsParams(grammar=tools.grammar_of_rest(tokenizer, template), after=CALL)
        return form
    if form is not None:
        message = "tool_choice forces a call, and a form of the answer is asked for; leave one out"
        raise ServeError("invalid_request", message, "tool_choice")
    if not writes_tools(template):
        message = "tool_choice forces a call, and the model's chat template does not write tools; leave it out"
        raise ServeError("invalid_request", message, "tool_choice")
    grammar = tools.grammar(tokenizer, template, body.parallel_tool_calls is not False)
    return StructuredOutputsParams(grammar=grammar)


def template_of(serving: Serving) -> str:
    """The chat template's text; empty where there is none."""
    template = serving.llm.llm.text.template
    return "" if template is None else template.source


def _reading(
    serving: Serving, body: Chat, tools: Tools, prompt: str, ids: list[int], params: SamplingParams
) -> Reading:
    tokenizer = serving.llm.llm.tokenizer
    begin, end = tokenizer.token_id(THINK), tokenizer.token_id(END_THINK)
    if begin is None or end is None:
        is_thinking = prompt.rstrip().endswith(THINK)
    else:
        is_thinking = thinking_at_end(ids, begin, end) is Thinking.OPEN
    return Reading(
        starts_thinking=is_thinking,
        calls=tools.may_call,
        schemas=tools.schemas,
        skip_special_tokens=params.skip_special_tokens,
    )


def new_call_id() -> str:
    """A name for a call, which its result refers to."""
    return f"call_{secrets.token_hex(12)}"
