"""A request on its way to its answers, and what a program sees of it: :class:`PendingRequest`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import numpy as np

from qwen_engine.errors import RequestError
from qwen_run.api.outputs import CompletionOutput, Logprob, Logprobs, RequestMetrics, RequestOutput
from qwen_run.runtime.request import Request, Sequence, message_of
from qwen_run.sampling.logprobs import TokenLogprobs
from qwen_run.sampling.rules import RequestOutputKind
from qwen_run.text.stops import TextStopper
from qwen_run.text.tokenizer import Tokenizer


@dataclass
class _Made:
    """What was made of a sequence's tokens, and how much of it was told where only what is new is told."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    num_told_texts: int = 0
    num_told: int = 0


class PendingRequest:
    """A request on its way, and the text of its answers.

    Attributes:
        is_new: an answer has grown or was given up since :meth:`output` was last called.
        is_told: :meth:`output` has told the end.
        failure: why the engine gave the request up, if it did.
        metrics: when what happened; kept by the loop.
        prompt: its text; None where token ids were given.
        prompt_token_ids: those of the prompt.
        logits: what each token was chosen from, (vocab_size,) float32, where the core has ``keep_logits``.
    """

    def __init__(self, request_id: str, prompt: str | None, request: Request, tokenizer: Tokenizer | None) -> None:
        self.request_id = request_id
        self.request = request
        self.is_new = self.is_told = False
        self.failure: BaseException | None = None
        self.logits: list[np.ndarray] = []
        self.metrics = RequestMetrics(arrival_time=time.time())
        self.prompt = prompt
        self.prompt_token_ids = list(request.prompt)
        self._prompt_logprobs: list[Logprobs | None] = []
        self._tokenizer = tokenizer
        self._made: dict[int, _Made] = {}  # by the sequence's index

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
        is_delta = request.params.output_kind == RequestOutputKind.DELTA and not whole
        return RequestOutput(
            self.request_id,
            self.prompt,
            self.prompt_token_ids,
            list(judged) if request.params.prompt_logprobs is not None else None,
            [self._completion(sequence, is_delta) for sequence in request.sequences if self._has_answer(sequence)],
            request.is_finished,
            seed=None if request.params.greedy else request.seed,
            metrics=replace(self.metrics),
            num_cached_tokens=request.num_cached_tokens,
            num_draft_tokens=request.num_drafts,
            num_accepted_tokens=request.num_accepted,
        )

    def _has_answer(self, sequence: Sequence) -> bool:
        """Beams are no answers before their search ends."""
        return self.request.beam_search is None or sequence.finish_reason is not None

    def _completion(self, sequence: Sequence, is_delta: bool) -> CompletionOutput:
        is_new = sequence.index not in self._made
        made = self._made.setdefault(sequence.index, _Made())
        self._make_text(sequence, made, is_new)
        asks_logprobs = self.request.params.logprobs is not None
        if asks_logprobs:
            self._make_logprobs(sequence, made)
        first_text, first = (made.num_told_texts, made.num_told) if is_delta else (0, 0)
        made.num_told_texts, made.num_told = len(made.texts), sequence.num_output
        return CompletionOutput(
            index=sequence.index,
            text="".join(made.texts[first_text:]),
            token_ids=sequence.token_ids[len(self.request.prompt) + first :],
            cumulative_logprob=made.cumulative_logprob if asks_logprobs else None,
            logprobs=made.logprobs[first:] if asks_logprobs else None,
            finish_reason=sequence.finish_reason,
            stop_reason=self._stop_reason(sequence),
            error=None if sequence.error is None else message_of(sequence.error),
            is_refused=isinstance(sequence.error, RequestError),
        )

    def _make_logprobs(self, sequence: Sequence, made: _Made) -> None:
        start = len(made.logprobs)
        tokens = sequence.token_ids[len(self.request.prompt) + start :]
        for token_id, found in zip(tokens, sequence.logprobs[start:], strict=False):
            made.logprobs.append(self._readable(token_id, found))
            made.cumulative_logprob += found.logprob

    def _make_text(self, sequence: Sequence, made: _Made, is_new: bool) -> None:
        stopper = sequence.stopper
        if not isinstance(stopper, TextStopper):
            return
        if self.request.beam_search and is_new:  # nobody has told it the beam's tokens
            for token_id in sequence.output[: -1 if sequence.finish_reason == "stop" else None]:
                stopper.push(token_id)
        text = stopper.release()
        if sequence.finish_reason:
            text += stopper.close()
        if text:
            made.texts.append(text)

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
