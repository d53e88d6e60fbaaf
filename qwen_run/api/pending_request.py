"""A request on its way to its answers, and what a program sees of it: :class:`PendingRequest`."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from qwen_run.api.outputs import CompletionOutput, Logprob, Logprobs, RequestMetrics, RequestOutput
from qwen_run.runtime.request import Request, Sequence, message_of
from qwen_run.sampling.logprobs import TokenLogprobs
from qwen_run.sampling.params import RequestOutputKind
from qwen_run.text.stops import TextStopper
from qwen_run.text.tokenizer import Tokenizer


class PendingRequest:
    """A request on its way, and the text of its answers.

    Attributes:
        is_new: an answer has grown or was given up since :meth:`output` was last called.
        is_told: :meth:`output` has told the end.
        failure: why the engine gave the request up, if it did.
        metrics: when what happened; kept by the loop.
        logits: what each token was chosen from, (vocab_size,) float32, where the core has ``keep_logits``.
    """

    def __init__(self, request_id: str, prompt: str | None, request: Request, tokenizer: Tokenizer | None) -> None:
        self.request_id = request_id
        self.request = request
        self.is_new = self.is_told = False
        self.failure: BaseException | None = None
        self.logits: list[np.ndarray] = []
        self.metrics = RequestMetrics(arrival_time=time.time())
        self._prompt = prompt
        self._prompt_token_ids = list(request.prompt)
        self._prompt_logprobs: list[Logprobs | None] = []
        self._tokenizer = tokenizer
        # what is made of each sequence's tokens so far, by its index
        self._texts: dict[int, str] = {}
        self._logprobs: dict[int, list[Logprobs]] = {}
        self._told: dict[int, tuple[int, int]] = {}  # characters and tokens, where only what is new is told

    @property
    def is_silent(self) -> bool:
        """Nothing is to be told before the end."""
        return self.request.params.output_kind == RequestOutputKind.FINAL_ONLY and not self.request.is_finished

    def output(self, whole: bool = False) -> RequestOutput:
        """The answers as far as they have come, or what is new of them if the request asks for that.

        Args:
            whole: all in any case.
        """
        request = self.request
        self.is_new, self.is_told = False, request.is_finished
        judged = self._prompt_logprobs
        for token_id, found in zip(request.prompt[len(judged) :], request.prompt_logprobs[len(judged) :], strict=False):
            judged.append(found and self._readable(token_id, found))
        answers = [self._completion(sequence) for sequence in request.sequences if self._has_answer(sequence)]
        is_delta = request.params.output_kind == RequestOutputKind.DELTA and not whole
        return RequestOutput(
            self.request_id,
            self._prompt,
            self._prompt_token_ids,
            list(judged) if request.params.prompt_logprobs is not None else None,
            self._new_parts(answers) if is_delta else answers,
            request.is_finished,
            seed=None if request.params.greedy else request.seed,
            metrics=replace(self.metrics),
            num_cached_tokens=request.num_cached_tokens,
        )

    def _new_parts(self, answers: list[CompletionOutput]) -> list[CompletionOutput]:
        parts = [answer.since(*self._told.get(answer.index, (0, 0))) for answer in answers]
        self._told = {answer.index: (len(answer.text), len(answer.token_ids)) for answer in answers}
        return parts

    def _has_answer(self, sequence: Sequence) -> bool:
        """Beams are no answers before their search ends."""
        return self.request.beam_search is None or sequence.finish_reason is not None

    def _completion(self, sequence: Sequence) -> CompletionOutput:
        token_ids = sequence.output
        logprobs = None
        if self.request.params.logprobs is not None:
            logprobs = self._logprobs.setdefault(sequence.index, [])
            logprobs += map(self._readable, token_ids[len(logprobs) :], sequence.logprobs[len(logprobs) :])
        return CompletionOutput(
            index=sequence.index,
            text=self._text(sequence),
            token_ids=token_ids,
            cumulative_logprob=sum(found.logprob for found in sequence.logprobs) if logprobs is not None else None,
            logprobs=None if logprobs is None else list(logprobs),
            finish_reason=sequence.finish_reason,
            stop_reason=self._stop_reason(sequence),
            error=None if sequence.error is None else message_of(sequence.error),
        )

    def _text(self, sequence: Sequence) -> str:
        stopper = sequence.stopper
        if not isinstance(stopper, TextStopper):
            return ""
        if self.request.beam_search and sequence.index not in self._texts:  # nobody has told it the beam's tokens
            for token_id in sequence.output[: -1 if sequence.finish_reason == "stop" else None]:
                stopper.push(token_id)
        text = self._texts.get(sequence.index, "") + stopper.release()
        if sequence.finish_reason:
            text += stopper.close()
        self._texts[sequence.index] = text
        return text

    def _readable(self, token_id: int, found: TokenLogprobs) -> Logprobs:
        entries = {token_id: (found.logprob, found.rank)}
        for rank, (other_id, logprob) in enumerate(found.top_logprobs, start=1):
            entries.setdefault(other_id, (logprob, rank))
        decode = self._tokenizer.decode if self._tokenizer else lambda *_: None
        return {i: Logprob(*entry, decode([i], False)) for i, entry in entries.items()}

    def _stop_reason(self, sequence: Sequence) -> int | str | None:
        if sequence.finish_reason != "stop":
            return None
        if isinstance(sequence.stopper, TextStopper) and sequence.stopper.stop_reason is not None:
            return sequence.stopper.stop_reason
        last = sequence.token_ids[-1]
        return last if last in (self.request.params.stop_token_ids or ()) else None
