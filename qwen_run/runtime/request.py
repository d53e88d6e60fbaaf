"""One prompt on its way to its answers, and the rules a request must keep."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol

import numpy as np

from qwen_engine.errors import QwenError, RequestError
from qwen_engine.manifest import Manifest
from qwen_engine.tasks import GENERATE, TASKS, check_task
from qwen_run.runtime.kv_cache import Blocks
from qwen_run.sampling.beam import BeamSearch
from qwen_run.sampling.constraint import Constraint
from qwen_run.sampling.logprobs import TokenLogprobs
from qwen_run.sampling.sample import SamplingContext, SamplingParams

SEED_BITS = 32  # of a drawn seed: short enough to be typed again, and exact in every reader of JSON

FinishReason = Literal["stop", "length", "abort", "error"]


class StopCondition(Protocol):
    """Ends an answer for a reason that its token ids alone do not show, such as a stop string."""

    def push(self, token_id: int) -> bool:
        """Take the next token of the answer; True when the answer ends with it."""


NO_TOKEN = -1  # where a prompt ends in an output and no token


@dataclass(frozen=True, eq=False)
class Token:
    """A new token of sequence ``sequence_index`` of request ``request_index``.

    Attributes:
        request_index: the number ``Core.add`` gave the request; with ``generate``, its place in the list.
        finish_reason: set on a sequence's last token: ``stop`` (this token is one of its stop tokens, or the
            request's stopper said so) or ``length``.
        logits: (vocab_size,) float32, what the token was sampled from, if asked for.
        logprobs: if asked for by the request's ``params``.
    """

    request_index: int
    token_id: int
    finish_reason: FinishReason | None
    logits: np.ndarray | None = None
    sequence_index: int = 0
    logprobs: TokenLogprobs | None = None


@dataclass(eq=False)
class Request:
    """A prompt and how to answer it; ``sequences`` holds the answers, one a sample or beam.

    Until the prompt has been fed there is only the first sequence; the others are forked from it.

    Attributes:
        stop_token_ids: what ends an answer: the ids given, which the checkpoint says, as ``params`` changes them.
        new_stopper: makes a stopper for each sequence.
        bad_words: ids of the texts that may not come.
        constraints: what bounds the answer, for its first sequence; others fork them.
        max_tokens: most tokens of an answer, as ``params`` say for this prompt.
        prompt_logprobs: if ``params`` asks for it, of each prompt token as far as it is fed; None for the first.
        beam_search: the choice among beams.
        seed: what its random numbers are made from: that of ``params``, or one drawn for it.
        num_cached_tokens: of the prompt, found in the cache when it began to run; None before.
        num_drafts: guessed tokens that were verified for its answers, of which ``num_accepted`` were right.
        pools: whether the last token's output is asked for and no answer; see ``qwen_engine/tasks.py``.
        pooled: that output, (width,) float32, once the prompt is fed.
        number: given by the core the request was added to; requests are served in this order.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    stop_token_ids: frozenset[int] = frozenset()
    new_stopper: Callable[[], StopCondition] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    constraints: tuple[Constraint, ...] = ()
    pools: bool = False
    pooled: np.ndarray | None = field(init=False, default=None)
    seed: int = field(init=False)
    max_tokens: int = field(init=False)
    sequences: list[Sequence] = field(init=False)
    prompt_logprobs: list[TokenLogprobs | None] = field(init=False, default_factory=list)
    beam_search: BeamSearch | None = field(init=False, default=None)
    num_cached_tokens: int | None = field(init=False, default=None)
    num_drafts: int = field(init=False, default=0)
    num_accepted: int = field(init=False, default=0)
    number: int = field(init=False, default=-1)

    def __post_init__(self) -> None:
        self.stop_token_ids = self.params.stop_ids(self.stop_token_ids)
        self.max_tokens = self.params.most_tokens(len(self.prompt))
        self.seed = secrets.randbits(SEED_BITS) if self.params.seed is None else self.params.seed
        if self.params.prompt_logprobs is not None:
            first = min(max(self.params.prompt_logprobs_start, 1), len(self.prompt))  # nothing comes before token 0
            self.prompt_logprobs += [None] * first
        self.sequences = [Sequence(self)]

    @property
    def is_finished(self) -> bool:
        """Every sequence has its last token."""
        return all(sequence.finish_reason for sequence in self.sequences)

    @property
    def width(self) -> int:
        """Sequences the request has once its prompt is fed."""
        return max(self.params.n, self.params.num_beams)


@dataclass(eq=False)
class Sequence:
    """Prompt and one answer, and where its keys and values are cached.

    A token is *pending* until it has been fed to the engine. It is *in flight* until the engine has told what came of
    it, and then its keys and values are cached. The last four fields belong to the scheduler.

    Attributes:
        token_ids: the prompt and the answer so far.
        logprobs: of each token of the answer, if ``params`` asks for it.
        error: why the sequence ended before its answer did, where ``finish_reason`` is ``error``.
        score: of an answer found by beam search.
        beam_logprobs: of the token that follows, while other beams are still waiting for theirs.
        num_cached: tokens whose keys and values are cached; ``num_in_flight`` follow them.
        block_ids: cache blocks in order; positions from ``num_cached`` on may hold leftovers of rejected drafts.
        block_keys: of the first full blocks, as far as they have been needed; see ``prefix_cache``.
    """

    request: Request
    index: int = 0
    token_ids: list[int] = field(init=False)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    error: Exception | None = None
    score: float | None = None
    beam_logprobs: np.ndarray | None = None
    num_cached: int = 0
    num_in_flight: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt)

    @cached_property
    def stopper(self) -> StopCondition | None:
        """The request's own for this answer."""
        return self.request.new_stopper() if self.request.new_stopper else None

    @cached_property
    def context(self) -> SamplingContext:
        """What sampling knows of the sequence; made of ids that :func:`check_request` has seen."""
        request = self.request
        return SamplingContext(
            request.params,
            request.prompt,
            request.stop_token_ids,
            request.bad_words,
            request.constraints,
            request.max_tokens,
        )

    def fork(self, index: int, *token_ids: int) -> Sequence:
        """A sequence of the same tokens and ``token_ids``; what is cached is the scheduler's to copy."""
        child = copy(self)
        child.index = index
        child.token_ids = [*self.token_ids, *token_ids]
        child.context = self.context.fork()
        for token_id in token_ids:
            child.context.append(token_id)
        child.__dict__.pop("stopper", None)  # each has its own
        child.logprobs, child.beam_logprobs = list(self.logprobs), None
        child.num_cached, child.num_in_flight, child.block_ids, child.block_keys = 0, 0, [], []
        return child

    @property
    def output(self) -> list[int]:
        """The answer so far."""
        return self.token_ids[len(self.request.prompt) :]

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - len(self.request.prompt)

    @property
    def num_pending(self) -> int:
        """Tokens still to be fed: of the prompt, the one sampled last, or all after a preemption."""
        return max(0, len(self.token_ids) - self.num_fed)  # drafts in flight are no tokens yet

    @property
    def num_fed(self) -> int:
        """Tokens that are cached or in flight, guessed ones included."""
        return self.num_cached + self.num_in_flight


def message_of(error: BaseException) -> str:
    """What a user is told of ``error``; what is none of the project's own is named."""
    return str(error) if isinstance(error, QwenError) else f"{type(error).__name__}: {error}".removesuffix(": ")


def check_request(request: Request, manifest: Manifest, name: str = "the prompt") -> None:
    """Check that the engine of ``manifest`` can answer ``request``; ``name`` stands in the message.

    Raises:
        RequestError: the prompt is empty, too long, or it or its parameters hold ids the model does not have.
    """
    assert request.number == -1, "a request is answered once"
    if request.pools:
        check_task(manifest.task, *(task for task in TASKS if task != GENERATE))
    else:
        check_task(manifest.task, GENERATE)
    longest = manifest.limits.max_seq_len - (not request.pools)
    vocab_size = manifest.model.vocab_size
    request.params.check_vocabulary(vocab_size)
    if not request.prompt:
        raise RequestError(f"{name} is empty, expected at least one token")
    if len(request.prompt) > longest:
        room = f"{longest}" if request.pools else f"{longest} and an answer of one"
        raise RequestError(
            f"{name} has {len(request.prompt)} tokens, the engine takes {room}; "
            "shorten it, or run or build the engine with a larger --max-seq-len if its model was trained for more"
        )
    if request.max_tokens < 1:
        raise RequestError(
            f"{name} has {len(request.prompt)} tokens, and max_length is {request.params.max_length} for it and the "
            "answer together; ask for a number of new tokens, which counts before it"
        )
    for token_id in (min(request.prompt), max(request.prompt)):
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{name} holds token {token_id}, expected 0 to {vocab_size - 1}; "
                "the tokenizer does not belong to this engine"
            )
    least = request.params.least_tokens(len(request.prompt))
    if least and len(request.stop_token_ids.intersection(range(vocab_size))) == vocab_size:
        raise RequestError(
            f"min_tokens is {least} and each of the {vocab_size} tokens ends an answer, "
            "expected one that does not; leave min_tokens out"
        )
    _ = request.sequences[0].context  # made by the thread that prepares the request, not by the engine's


def check_beams(request: Request, longest: int, cache: Blocks, max_batch_size: int) -> None:
    """All beams must run together: a search goes on when it has the logits of each.

    Args:
        longest: tokens of prompt and answer, at most.

    Raises:
        RequestError: there is no place for so many, or there are no blocks.
    """
    num_beams = request.params.num_beams
    if num_beams > max_batch_size:
        raise RequestError(f"num_beams is {num_beams}, expected at most the {max_batch_size} sequences of a batch")
    needed = num_beams * cache.blocks_for(longest)
    if needed > cache.num_blocks:
        raise RequestError(
            f"{num_beams} beams of {longest} tokens need {needed} cache blocks, there are {cache.num_blocks}; set "
            f"fewer beams, a smaller max_tokens or {cache.mebibytes_of(needed)} MiB or more of cache memory "
            "(--kv-cache-memory, in Python cache_bytes)"
        )
