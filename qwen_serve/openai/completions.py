"""``/v1/completions``: prompts in, what follows them out, whole or as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from qwen_engine.errors import shown
from qwen_run.api.async_llm import RequestStream
from qwen_run.api.outputs import CompletionOutput, Logprobs, RequestOutput
from qwen_run.sampling.params import SamplingParams
from qwen_run.sampling.rules import RequestOutputKind
from qwen_serve.common.errors import ServeError
from qwen_serve.common.sse import DONE, Chunks, event
from qwen_serve.engine.job import RequestJob, timings
from qwen_serve.engine.serving import Serving
from qwen_serve.openai.fields import MAX_PROMPTS, Completion, form_of, sampling_params
from qwen_serve.openai.logprobs import completion_logprobs

DEFAULT_MAX_TOKENS = 16  # OpenAI's, for completions
FILL_TOKENS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


@dataclass
class CompletionAnswer:
    """Prompts that are being continued; choice ``i * n + j`` is the ``j``-th of the ``i``-th prompt.

    Attributes:
        num_answers: of each prompt.
        no_answers: the prompt alone is asked for, by ``max_tokens`` of 0.
    """

    job: RequestJob
    body: Completion
    prompts: list[list[int]]
    streams: list[RequestStream]
    num_answers: int
    no_answers: bool

    def __post_init__(self) -> None:
        self.head = self.job.head("cmpl", "text_completion")
        self.tokenizer = self.job.serving.llm.llm.tokenizer

    @classmethod
    async def begin(cls, job: RequestJob, body: Completion, cache_salt: str | None = None) -> CompletionAnswer:
        """Let the engine answer ``body``.

        Raises:
            ServeError: something in it is wrong, or there is no room.
        """
        serving = job.serving
        serving.check_model(body.model)
        given = _prompts(body)
        no_answers = body.max_tokens == 0 and bool(body.echo)
        params = _params(serving, body, cache_salt, no_answers)
        job.enter(params.n * len(given))
        names = [f"prompt {index + 1}" if len(given) > 1 else "the prompt" for index in range(len(given))]
        cut = params.truncate_prompt_tokens is not None
        prompts = [await _encoded(job, body, each, name, cut) for each, name in zip(given, names, strict=True)]
        streams = [await job.begin(ids, params) for ids in prompts]
        return cls(job, body, prompts, streams, params.n, no_answers)

    async def whole(self) -> dict[str, Any]:
        """The answers at once.

        Raises:
            ServeError: the engine has failed.
        """
        last = {index: output async for index, output in self._outputs()}
        ordered = sorted(last.items())
        choices = [self._choice(index, each, answer, True) for index, each in ordered for answer in each.outputs]
        if self.no_answers:
            self.job.counted.completion_tokens = 0
        first = last[0]
        found = {**self.head, "choices": choices, "usage": self.job.counted.usage(), "seed": first.seed}
        if self.body.warnings:
            found["warnings"] = self.body.warnings
        if len(self.streams) == 1:
            found["timings"] = timings(first, self.job.counted.completion_tokens)
        return found

    async def chunks(self) -> AsyncGenerator[str, None]:
        """The answers as they come, as events of a stream."""
        begun: set[tuple[int, int]] = set()
        chunks = Chunks(self.head)
        try:
            async for index, output in self._outputs():
                for answer in output.outputs:
                    is_first = (index, answer.index) not in begun
                    if answer.token_ids or answer.text or answer.finish_reason is not None:
                        begun.add((index, answer.index))
                        choice = self._choice(index, output, answer, is_first)
                        chunk: dict[str, Any] = {"choices": [choice]}
                        if self.body.includes_usage:
                            chunk["usage"] = self.job.counted.usage() if self.body.usage_goes_on else None
                        if output.finished:
                            chunk |= {"seed": output.seed}
                        yield chunks.event(chunk)
            if self.body.includes_usage:
                yield chunks.event({"choices": [], "usage": self.job.counted.usage()})
            yield DONE
        except ServeError as error:
            yield event(error.body())

    async def _outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """What all streams tell, as it comes, with the prompt's index."""
        if len(self.streams) == 1:
            async for output in self.job.outputs(self.streams[0]):
                yield 0, output
            return
        told: asyncio.Queue[tuple[int, RequestOutput | ServeError | None]] = asyncio.Queue(maxsize=1)
        tasks = [asyncio.ensure_future(self._tell(told, index)) for index in range(len(self.streams))]
        try:
            num_left = len(tasks)
            while num_left:
                index, news = await told.get()
                if isinstance(news, ServeError):
                    raise news
                if news is None:
                    num_left -= 1
                else:
                    yield index, news
        finally:
            for task in tasks:
                task.cancel()
            for task in tasks:
                with suppress(asyncio.CancelledError):
                    await task

    async def _tell(self, told: asyncio.Queue[tuple[int, RequestOutput | ServeError | None]], index: int) -> None:
        try:
            async for output in self.job.outputs(self.streams[index]):
                await told.put((index, output))
            await told.put((index, None))
        except ServeError as error:
            await told.put((index, error))

    def _choice(self, index: int, output: RequestOutput, answer: CompletionOutput, is_first: bool) -> dict[str, Any]:
        text, token_ids, reason = answer.text, answer.token_ids, answer.finish_reason
        if self.no_answers:
            text, token_ids = "", []
            reason = reason and "length"
        echoed = bool(self.body.echo) and is_first
        if echoed:
            text = self.tokenizer.decode(output.prompt_token_ids, False) + text
        choice: dict[str, Any] = {"index": index * self.num_answers + answer.index, "text": text}
        choice["logprobs"] = self._logprobs(output, answer, token_ids, echoed)
        choice |= {"finish_reason": reason, "stop_reason": answer.stop_reason}
        if self.body.return_token_ids:
            choice |= {"token_ids": token_ids, "prompt_token_ids": output.prompt_token_ids if is_first else None}
        return choice

    def _logprobs(
        self, output: RequestOutput, answer: CompletionOutput, token_ids: list[int], echoed: bool
    ) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        ids = [*output.prompt_token_ids, *token_ids] if echoed else token_ids
        found: list[Logprobs | None] = list(output.prompt_logprobs or []) if echoed else []
        found += (answer.logprobs or [])[: len(token_ids)]
        return completion_logprobs(self.tokenizer, ids, found, self.body.logprobs, 0)


def _prompts(body: Completion) -> list[str | list[int]]:
    """The prompts of ``body``, one or many.

    Raises:
        ServeError: there are none, or too many.
    """
    prompt: Any = body.prompt
    is_one = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))
    prompts = [prompt] if is_one else prompt
    if not 0 < len(prompts) <= MAX_PROMPTS or not all(prompts):
        message = f"prompt is {shown(prompt)}, expected 1 to {MAX_PROMPTS} prompts, none of them empty"
        raise ServeError("invalid_request", message, "prompt")
    if body.suffix is not None and (len(prompts) > 1 or not isinstance(prompts[0], str) or body.echo):
        raise ServeError("invalid_request", "suffix needs one prompt that is a text, and no echo", "suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ServeError("invalid_request", f"best_of is {body.best_of}, expected n, which is {body.n or 1}", "best_of")
    return list(prompts)


async def _encoded(job: RequestJob, body: Completion, prompt: str | list[int], name: str, cut: bool) -> list[int]:
    """The ids of a prompt; with a suffix those that ask for what stands between.

    Raises:
        ServeError: it is too long, or the model cannot fill in.
    """
    if body.suffix is None:
        return await job.encode(prompt, name, cut)
    tokenizer = job.serving.llm.llm.tokenizer
    fill = [tokenizer.token_id(token) for token in FILL_TOKENS]
    if None in fill:
        raise ServeError("invalid_request", "suffix: the model has no tokens for filling in; leave it out", "suffix")
    before, after = [await job.encode(each, name) for each in (prompt, body.suffix)]
    return await job.encode([fill[0], *before, fill[1], *after, fill[2]], name)  # type: ignore[list-item]


def _params(serving: Serving, body: Completion, cache_salt: str | None, no_answers: bool) -> SamplingParams:
    fixed: dict[str, Any] = {
        "output_kind": RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY,
        "logprobs": body.logprobs,
        "prompt_logprobs": body.logprobs if body.echo else None,
    }
    if (form := form_of(body)) is not None:
        fixed["structured_outputs"] = form
    if cache_salt is not None:
        fixed["cache_salt"] = cache_salt + (body.cache_salt or "")
    if body.max_tokens is None or no_answers:
        fixed["max_tokens"] = 1 if no_answers else max(DEFAULT_MAX_TOKENS, body.min_tokens or 0)
        body = body.model_copy(update={"max_tokens": None})
    return sampling_params(body, serving.llm.default_params, fixed)
