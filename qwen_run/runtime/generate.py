"""The answers to a list of requests, token by token. Token ids only, no text."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from qwen_run.runtime.core import Core, CoreOptions
from qwen_run.runtime.engine import Engine
from qwen_run.runtime.request import Request, Token, check_request

__all__ = ["Token", "check_request", "generate"]


def generate(
    engine: Engine,
    requests: Sequence[Request],
    *,
    keep_logits: bool = False,
    max_batch_size: int = 16,
    max_batch_tokens: int = CoreOptions.max_batch_tokens,
    prefix_caching: bool = True,
) -> Generator[Token, None, None]:
    """Answer ``requests`` together; yield each token as soon as it is known.

    Tokens of different requests alternate; those of one sequence come in order. What a request answers does not
    depend on the others. Closing the iterator frees every cache block; an engine serves one iterator at a time.

    Args:
        keep_logits: set ``logits`` of every token.
        max_batch_size: most sequences in one step; ``max_batch_tokens`` where that is less.
        max_batch_tokens: most tokens in one step; longer prompts are fed in chunks.
        prefix_caching: prompts that begin like an earlier one are not fed again.

    Raises:
        RequestError: at once, for a prompt that is empty, too long, or holds ids the model does not have.
    """
    max_batch_size = min(max_batch_size, max_batch_tokens)
    core = Core(engine, CoreOptions(max_batch_size, max_batch_tokens, prefix_caching, keep_logits=keep_logits))
    for index, request in enumerate(requests):
        core.add(request, f"prompt {index + 1}" if len(requests) > 1 else "the prompt")
    return _tokens(core)


def _tokens(core: Core) -> Generator[Token, None, None]:
    try:
        while not core.is_done:
            yield from core.step()
    finally:
        core.close()
