"""How the next token is chosen from its logits. Pure functions, arrays in and arrays out.

The random number of a token depends only on the request's seed, the sample and the token's position, so an answer does
not change with what else is in the batch, nor with how many tokens are verified at once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qwen_run.logprobs import token_logprobs
from qwen_run.processors import SamplingContext, check_finite, distribution, process
from qwen_run.sampling_params import SamplingParams

__all__ = ["Sampled", "SamplingContext", "SamplingParams", "sample", "uniform"]


class Sampled(NamedTuple):
    """A chosen token; the other three, as in ``TokenLogprobs``, where ``params.logprobs`` asks for them."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None
    rank: int | None = None


def sample(
    logits: NDArray[np.float32], params: SamplingParams, context: SamplingContext, position: int, sample_index: int = 0
) -> Sampled:
    """Choose the next token of a sequence; ``context.append`` it before the next call.

    Args:
        logits: (vocab_size,), not modified.
        context: of this sequence, made from the same ``params``.
        position: index of the new token in its sequence (prompt and answer).
        sample_index: which of the request's ``n`` answers this is.

    Returns:
        The token (greedy: the lowest id among the largest logits). Its log probabilities are those of the raw
        distribution, before penalties, temperature and the like.

    Raises:
        EngineError: the largest logit is NaN or infinite.
    """
    scores = process(logits, params, context)
    token_id = int(scores.argmax())
    check_finite(scores[token_id], position)
    if not params.greedy:
        ids, probabilities = distribution(scores, params)
        cumulative = np.cumsum(probabilities)
        number = uniform(params.seed, position, sample_index)
        token_id = int(ids[np.searchsorted(cumulative, number * cumulative[-1], side="right")])
    if params.logprobs is None:
        return Sampled(token_id)
    return Sampled(token_id, *token_logprobs(logits, token_id, params.logprobs))


def uniform(seed: int, position: int, sample_index: int = 0) -> float:
    """A number in [0, 1) that is a function of its arguments alone (Philox, counter-based).

    >>> uniform(seed=1, position=2) == uniform(seed=1, position=2) != uniform(seed=1, position=3)
    True
    """
    bits = np.random.Philox(key=seed + (sample_index << 64), counter=position).random_raw()
    return float(int(bits) >> 11) * 2.0**-53
