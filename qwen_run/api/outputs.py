"""What an answered prompt looks like to a program; the names are those of vLLM's results."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from qwen_run.runtime.request import FinishReason


@dataclass(frozen=True)
class Logprob:
    """How likely the model found one token.

    Attributes:
        logprob: natural logarithm of its probability, before temperature and everything else that chooses.
        rank: 1 for the likeliest token.
        decoded_token: its text, where the engine has a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


Logprobs = dict[int, Logprob]  # of one position: the token that stands there and the likeliest, by id


@dataclass
class RequestMetrics:
    """When what happened to a request, in seconds since the epoch; None for what has not.

    Attributes:
        arrival_time: it was prepared.
        first_scheduled_time: the model began to read its prompt.
        time_in_queue: seconds between these two.
        first_token_time: its first token was there.
        last_token_time: its newest token was there.
        finished_time: the last of its answers ended.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    time_in_queue: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None

    @property
    def first_token_latency(self) -> float | None:
        """Seconds from its arrival to its first token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass(frozen=True)
class CompletionOutput:
    """One answer, as far as it has come.

    Attributes:
        index: 0 for the first of ``n`` samples, or the best beam.
        text: without the token or the text that ended it; empty where the engine has no tokenizer.
        token_ids: with the token that ended it.
        cumulative_logprob: sum over the answer's tokens, if ``logprobs`` were asked for.
        logprobs: one entry a token, if asked for.
        finish_reason: ``stop``, ``length``, ``abort`` or ``error``; None while there is more to come.
        stop_reason: the stop string or token id that ended the answer; None for an end-of-sequence token.
        error: what went wrong, where ``finish_reason`` is ``error``.
        is_refused: the request itself is why: the form that it asks for cannot be followed any further.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[Logprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    is_refused: bool = False

    def followed_by(self, later: CompletionOutput) -> CompletionOutput:
        """Both as one, where ``later`` holds only what is new since this one."""
        logprobs = None if later.logprobs is None else [*(self.logprobs or []), *later.logprobs]
        text, token_ids = self.text + later.text, self.token_ids + later.token_ids
        return replace(later, text=text, token_ids=token_ids, logprobs=logprobs)

    def finished(self) -> bool:
        """Nothing more will come."""
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its answers, as far as they have come.

    What later outputs of the same request bring is in new lists; ``prompt_token_ids`` and the entries of
    ``prompt_logprobs`` and ``logprobs`` are the same objects in all of them and not to be changed. Two are equal where
    the answers are, however they came about.

    Attributes:
        prompt: None where token ids were given.
        prompt_logprobs: one entry a token of the prompt, None for the first, if asked for.
        finished: nothing more will come.
        seed: what the random numbers were made from, also where none was asked for; None at temperature 0.
        metrics: when what happened to it.
        num_cached_tokens: tokens of the prompt that an earlier one had left in the cache; None before it runs.
        num_draft_tokens: guessed tokens that were verified, of which ``num_accepted_tokens`` were right.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[Logprobs | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    seed: int | None = None
    metrics: RequestMetrics | None = field(default=None, compare=False)
    num_cached_tokens: int | None = field(default=None, compare=False)
    num_draft_tokens: int = field(default=0, compare=False)
    num_accepted_tokens: int = field(default=0, compare=False)

    def followed_by(self, later: RequestOutput) -> RequestOutput:
        """Both as one, where ``later`` holds only what is new since this one."""
        earlier = {answer.index: answer for answer in self.outputs}
        joined = [earlier[each.index].followed_by(each) if each.index in earlier else each for each in later.outputs]
        return replace(later, outputs=joined)

    @property
    def error(self) -> str | None:
        """What went wrong with the first answer that ended with an error; None where none did."""
        return next((answer.error for answer in self.outputs if answer.error is not None), None)
