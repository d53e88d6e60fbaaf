"""Log probabilities of the raw model distribution: log-softmax of the logits, before any processor, as vLLM reports."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qwen_run.sampling.processors import largest


class TokenLogprobs(NamedTuple):
    """How likely the model found one token.

    Attributes:
        logprob: natural logarithm of its probability.
        top_logprobs: the likeliest tokens as (token id, logprob), best first; of equals the lower id first.
        rank: 1 where no token was likelier.
    """

    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]
    rank: int


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log probabilities (vocab_size,) float32 of ``logits`` (vocab_size,), whose largest is finite."""
    shifted: NDArray[np.float32] = logits - logits.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def token_logprobs(logits: NDArray[np.float32], token_id: int, count: int) -> TokenLogprobs:
    """How likely ``token_id`` and the ``count`` likeliest tokens are after ``logits`` (vocab_size,).

    For a prompt: of token ``t + 1`` under the logits of position ``t``.
    """
    peak = logits.max()
    normalizer = float(peak) + float(np.log(np.exp(logits - peak).sum()))
    top = largest(logits, min(count, len(logits))) if count else np.empty(0, np.int64)
    return TokenLogprobs(
        float(logits[token_id]) - normalizer,
        tuple((int(i), float(logits[i]) - normalizer) for i in top),
        int(np.count_nonzero(logits > logits[token_id])) + 1,
    )
