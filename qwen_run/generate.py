"""The decode loop: schedule, run, sample, until every request has its answer. Token ids only, no text."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np

from qwen_engine.errors import RequestError
from qwen_engine.manifest import Manifest
from qwen_run.engine import Batch, Engine
from qwen_run.request import FinishReason, Request
from qwen_run.sampling import sample
from qwen_run.scheduler import Chunk, Scheduler


@dataclass(frozen=True, eq=False)
class Token:
    """A new token of ``requests[request_index]``.

    ``finish_reason`` is set on a request's last token: ``stop`` (this token is one of its stop tokens) or ``length``.
    ``logits`` (vocab_size,) float32 is what the token was sampled from, if asked for.
    """

    request_index: int
    token_id: int
    finish_reason: FinishReason | None
    logits: np.ndarray | None = None


def generate(
    engine: Engine,
    requests: Sequence[Request],
    *,
    keep_logits: bool = False,
    max_batch_size: int = 16,
    max_batch_tokens: int = 512,
) -> Generator[Token, None, None]:
    """Answer ``requests`` together; yield each token as soon as it is known.

    Tokens of different requests alternate; those of one come in order. What a request answers does not
    depend on the others. Closing the iterator frees every cache block; an engine serves one iterator at a time.

    Args:
        max_batch_size: most requests in one step.
        max_batch_tokens: most tokens in one step; longer prompts are fed in chunks.

    Raises:
        RequestError: at once, for a prompt that is empty, too long, or holds ids the model does not have.
    """
    for index, request in enumerate(requests):
        check_request(request, engine.manifest, f"prompt {index + 1}" if len(requests) > 1 else "the prompt")
    return _generate(engine, requests, keep_logits, Scheduler(engine.cache, max_batch_size, max_batch_tokens))


def check_request(request: Request, manifest: Manifest, name: str = "the prompt") -> None:
    """Check that the engine of ``manifest`` can answer ``request``; ``name`` stands in the message.

    Raises:
        RequestError: the prompt is empty, too long, or holds ids the model does not have.
    """
    assert request.finish_reason is None, "a request is answered once"
    longest = manifest.limits.max_seq_len - 1
    vocab_size = manifest.model.vocab_size
    if not request.prompt:
        raise RequestError(f"{name} is empty, expected at least one token")
    if len(request.prompt) > longest:
        raise RequestError(
            f"{name} has {len(request.prompt)} tokens, the engine takes {longest} and an answer of one; "
            "shorten it or build the engine with a larger --max-seq-len"
        )
    for token_id in (min(request.prompt), max(request.prompt)):
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{name} holds token {token_id}, expected 0 to {vocab_size - 1}; "
                "the tokenizer does not belong to this engine"
            )


def build_batch(chunks: Sequence[Chunk]) -> Batch:
    """The inputs of one engine run. Unused entries of the block table are 0."""
    lengths = np.array([len(chunk.token_ids) for chunk in chunks])
    ends = np.cumsum(lengths)
    width = max(len(chunk.request.block_ids) for chunk in chunks)
    block_table = np.zeros((len(chunks), width), np.int32)
    for row, chunk in zip(block_table, chunks, strict=True):
        row[: len(chunk.request.block_ids)] = chunk.request.block_ids
    return Batch(
        input_ids=np.array([token_id for chunk in chunks for token_id in chunk.token_ids], np.int64),
        cumulative_lengths=np.concatenate([[0], ends]).astype(np.int32),
        past_lengths=np.array([chunk.request.num_cached for chunk in chunks], np.int32),
        block_table=block_table,
        logits_indices=np.array(
            [end - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.wants_logits], np.int64
        ),
    )


def _generate(
    engine: Engine, requests: Sequence[Request], keep_logits: bool, scheduler: Scheduler
) -> Generator[Token, None, None]:
    indices = {request: index for index, request in enumerate(requests)}
    assert len(indices) == len(requests), "a request is given twice"
    for request in requests:
        scheduler.add(request)
    try:
        while not scheduler.is_done:
            chunks = scheduler.schedule()
            logits = engine.run(build_batch(chunks))  # (L, vocab_size)
            scheduler.advance(chunks)
            answered = [chunk.request for chunk in chunks if chunk.wants_logits]
            for request, row in zip(answered, logits, strict=True):
                # only the penalty looks at what came before, and a long context takes a while to list
                context = request.tokens(0, request.num_tokens) if request.params.repetition_penalty != 1 else ()
                token_id = sample(row, request.params, context, request.num_tokens)
                request.output.append(token_id)
                request.finish_reason = _finish_reason(request, engine.manifest.limits.max_seq_len)
                if request.finish_reason:
                    scheduler.finish(request)
                yield Token(indices[request], token_id, request.finish_reason, row if keep_logits else None)
    finally:
        scheduler.close()


def _finish_reason(request: Request, max_seq_len: int) -> FinishReason | None:
    if request.output[-1] in request.stop_token_ids:
        return "stop"
    if len(request.output) >= request.params.max_tokens or request.num_tokens >= max_seq_len:
        return "length"
    return None
