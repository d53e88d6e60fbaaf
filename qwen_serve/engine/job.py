"""One request on its way through the engine: :class:`RequestJob`."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from qwen_engine.errors import EngineError, RequestError
from qwen_run.api.async_llm import RequestStream
from qwen_run.api.outputs import RequestOutput
from qwen_run.api.pooling import PoolingParams
from qwen_run.api.prompts import ChatPrompt
from qwen_run.runtime.request import message_of
from qwen_run.sampling.params import SamplingParams
from qwen_serve.common.errors import ServeError
from qwen_serve.engine.serving import Serving, refused


@dataclass
class Counted:
    """What a request has cost, for the usage of an answer, the log and the metrics."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    accepted_tokens: int = 0

    def usage(self) -> dict[str, Any]:
        """OpenAI's object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {
                "reasoning_tokens": self.reasoning_tokens,
                "accepted_prediction_tokens": self.accepted_tokens,
            },
        }


@dataclass
class RequestJob:
    """A request that was let in, until it is closed.

    Attributes:
        timeout_s: after so many seconds it is given up.
        session: what it has in common with requests that are best answered by the same replica.
        counted: its tokens so far.
        finish_reasons: of its answers that have ended.
    """

    serving: Serving
    timeout_s: float | None = None
    session: str | None = None
    counted: Counted = field(default_factory=Counted)
    finish_reasons: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    is_expired: bool = False
    _streams: list[RequestStream] = field(default_factory=list)
    _kept: ExitStack = field(default_factory=ExitStack)
    _last_token: float | None = None

    def head(self, prefix: str, kind: str) -> dict[str, Any]:
        """What every object of an answer begins with: an id ``prefix-…``, its ``kind``, the time, the model."""
        return {
            "id": f"{prefix}-{secrets.token_hex(16)}",
            "object": kind,
            "created": int(time.time()),
            "model": self.serving.name,
        }

    def enter(self, num_answers: int) -> None:
        """Take a place for each answer.

        Raises:
            ServeError: there is none.
        """
        try:
            self._kept.enter_context(self.serving.admission.place(num_answers))
        except ServeError:
            self.serving.metrics.refuse()
            raise
        if self.timeout_s is not None:
            timer = asyncio.get_running_loop().call_later(self.timeout_s, self._expire)
            self._kept.callback(timer.cancel)

    async def encode(self, prompt: str | Sequence[int], name: str = "the prompt", cut: bool = False) -> list[int]:
        """The token ids of a prompt.

        Args:
            cut: a longer one is not refused.

        Raises:
            ServeError: it is longer than the engine takes.
        """
        llm = self.serving.llm.llm
        most = llm.max_seq_len
        if not isinstance(prompt, str):
            ids = list(prompt)
        else:
            try:
                ids = await self.serving.tokenizing(_encoded, llm.tokenizer, prompt, None if cut else most)
            except RequestError as error:
                too_long = len(prompt) > most
                raise ServeError("context_length_exceeded" if too_long else "invalid_request", str(error)) from None
        if len(ids) >= most and not cut:
            raise ServeError(
                "context_length_exceeded",
                f"{name} has {len(ids)} tokens, the engine takes {most - 1} and an answer of one; shorten it, or start "
                "the server with a larger --max-seq-len if its model was trained for more",
                more={"n_prompt_tokens": len(ids), "n_ctx": most},
            )
        return ids

    async def begin(self, ids: Sequence[int], params: SamplingParams | PoolingParams) -> RequestStream:
        """Let the engine answer.

        Raises:
            ServeError: it cannot.
        """
        try:
            stream = await self.serving.begin(ids, params, self.session)
        except (RequestError, EngineError) as error:
            raise await self._why(error) from None
        self._streams.append(stream)
        self._kept.callback(stream.close)
        if self.is_expired:
            raise self._expired()
        return stream

    async def outputs(self, stream: RequestStream) -> AsyncIterator[RequestOutput]:
        """What the engine answers, as it comes; counted.

        Raises:
            ServeError: it has failed, or was ended before the answer was complete.
        """
        counts: dict[int, int] = {}
        try:
            async for output in stream:
                self._count(output, counts)
                for answer in output.outputs:
                    if answer.finish_reason == "abort":
                        raise self._expired() if self.is_expired else self._ended()
                    if answer.finish_reason == "error":
                        code = "invalid_request" if answer.is_refused else "engine_error"
                        raise ServeError(code, answer.error or "the engine has failed")
                yield output
        except EngineError as error:
            raise await self._why(error) from None

    def close(self) -> None:
        """Give up what is unfinished, and let others in; may be called again."""
        self._kept.close()

    def _count(self, output: RequestOutput, counts: dict[int, int]) -> None:
        counted, new = self.counted, 0
        if not counts:
            counted.prompt_tokens += len(output.prompt_token_ids)
            counted.cached_tokens += output.num_cached_tokens or 0
        for answer in output.outputs:
            counts[answer.index] = counts.get(answer.index, 0) + len(answer.token_ids)
            new += len(answer.token_ids)
        counted.completion_tokens += new
        now = time.monotonic()
        if self._last_token is not None and new:
            self.serving.metrics.token_after((now - self._last_token) / new)
        self._last_token = now
        if output.finished:
            counted.accepted_tokens += output.num_accepted_tokens
            self.finish_reasons += [answer.finish_reason or "abort" for answer in output.outputs]
            self.serving.metrics.end(output, sum(counts.values()))

    def _expire(self) -> None:
        self.is_expired = True
        llm = self.serving.opened
        if llm is not None:
            for stream in self._streams:
                asyncio.ensure_future(llm.abort(stream.request_id))  # noqa: RUF006 - it does not wait for anything

    def _expired(self) -> ServeError:
        return ServeError(
            "deadline_exceeded", f"the answer is not complete after {self.timeout_s:g} s, which is the request's limit"
        )

    def _ended(self) -> ServeError:
        return ServeError("draining", "the server has ended before the answer was complete", retry_after=5)

    async def _why(self, error: RequestError | EngineError) -> ServeError:
        if isinstance(error, EngineError):
            await self.serving.check()  # raises what a client is told where the engine has failed
            return ServeError("engine_error", message_of(error))
        return refused(error)


def _encoded(tokenizer: Any, prompt: str, most: int | None) -> list[int]:
    if isinstance(prompt, ChatPrompt):
        ids: list[int] = tokenizer.encode_pieces(prompt.pieces, most)
    else:
        ids = tokenizer.encode(prompt, True, most)
    return ids


def timings(output: RequestOutput, num_tokens: int) -> dict[str, Any]:
    """llama-server's object: how many tokens, and how long they took in milliseconds."""
    times, cached = output.metrics, output.num_cached_tokens or 0
    found: dict[str, Any] = {"prompt_n": len(output.prompt_token_ids) - cached, "cache_n": cached}
    found["predicted_n"] = num_tokens
    if times is None or times.first_scheduled_time is None or times.first_token_time is None:
        return found
    began, first, last = times.first_scheduled_time, times.first_token_time, times.last_token_time
    prompt_ms, predicted_ms = 1000 * (first - began), 1000 * ((last or first) - first)
    found |= {"queue_ms": _rounded(1000 * (began - times.arrival_time)), "prompt_ms": _rounded(prompt_ms)}
    found |= {"predicted_ms": _rounded(predicted_ms)}
    if prompt_ms > 0:
        found["prompt_per_second"] = _rounded(1000 * found["prompt_n"] / prompt_ms)
    if predicted_ms > 0:
        found["predicted_per_second"] = _rounded(1000 * (num_tokens - 1) / predicted_ms)
    return found


def _rounded(value: float) -> float:
    return round(value, 3)
