"""How the next token is chosen from its logits. Pure functions, arrays in and arrays out.

The random number of a token depends only on the request's seed, the sample and the token's position, so an answer does
not change with what else is in the batch, nor with how many tokens are verified at once.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qwen_engine.errors import RequestError
from qwen_run.sampling.logprobs import token_logprobs
from qwen_run.sampling.params import SamplingParams
from qwen_run.sampling.processors import SamplingContext, best_bounded, bounded, changed, check_finite, distribution

__all__ = ["Sampled", "SamplingContext", "SamplingParams", "sample", "uniform"]

# positions whose random numbers are made together: making a generator takes longer than all of them
NUMBERS = 64

NO_TOKEN_ADVICE = "exclude fewer, or leave min_tokens out"

# weights that are summed in float32; sums of more are float64
SUM_SIZE = 512


class Sampled(NamedTuple):
    """A chosen token; the other three, as in ``TokenLogprobs``, where ``params.logprobs`` asks for them."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None
    rank: int | None = None


def sample(
    logits: NDArray[np.float32],
    params: SamplingParams,
    context: SamplingContext,
    position: int,
    seed: int = 0,
    sample_index: int = 0,
) -> Sampled:
    """Choose the next token of a sequence; ``context.append`` it before the next call.

    Args:
        logits: (vocab_size,), not modified.
        context: of this sequence, made from the same ``params``.
        position: index of the new token in its sequence (prompt and answer).
        seed: of the request, what ``params`` say or what was drawn for it.
        sample_index: which of the request's ``n`` answers this is.

    Returns:
        The token (greedy: the lowest id among the largest logits). Its log probabilities are those of the raw
        distribution, before penalties, temperature and the like.

    Raises:
        EngineError: the largest logit is NaN or infinite.
        RequestError: the options leave no token to choose.
    """
    scores = changed(logits, params, context)
    token_id = int(scores.argmax())
    peak = scores[token_id]
    if context.is_bounded and not params.greedy:
        scores = bounded(scores, context)
        token_id = int(scores.argmax())
        peak = scores[token_id]
    elif context.is_bounded and not context.permits(token_id):
        token_id, peak = best_bounded(scores, context, token_id)
    if not math.isfinite(peak):
        check_finite(logits.max(), position)
        raise RequestError(f"the options of the request leave no token for position {position}; {NO_TOKEN_ADVICE}")
    if not params.greedy:
        token_id = draw(scores, peak, params, uniform(seed, position, sample_index))
    if params.logprobs is None:
        return Sampled(token_id)
    return Sampled(token_id, *token_logprobs(logits, token_id, params.logprobs))


def uniform(seed: int, position: int, sample_index: int = 0) -> float:
    """A number in [0, 1) that is a function of its arguments alone (Philox, counter-based).

    >>> uniform(seed=1, position=2) == uniform(seed=1, position=2) != uniform(seed=1, position=3)
    True
    """
    block, index = divmod(position, NUMBERS)
    return float(_uniforms(seed, sample_index, block)[index])


@lru_cache(maxsize=1024)  # half a megabyte
def _uniforms(seed: int, sample_index: int, block: int) -> NDArray[np.float64]:
    """The numbers of ``NUMBERS`` positions, the first of the four that a generator yields at each."""
    bits = np.random.Philox(key=seed + (sample_index << 64), counter=block * NUMBERS).random_raw(4 * NUMBERS)[::4]
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw(scores: NDArray[np.float32], peak: np.float32, params: SamplingParams, number: float) -> int:
    """The token at ``number``, a share of all probability counted from token 0 on.

    Args:
        scores: (vocab_size,), of which ``peak`` is the largest.
    """
    if params.top_k or params.top_p < 1 or params.min_p:
        ids, probabilities = distribution(scores, params)
        cumulative = np.cumsum(probabilities)
        return int(ids[np.searchsorted(cumulative, number * cumulative[-1], side="right")])
    # All tokens stay. In float32 the probability of one is off by 1e-6 of itself, more only where it is below 1e-9.
    weights = scores - peak
    weights *= np.float32(1 / params.temperature)
    np.exp(weights, out=weights)
    sums = np.add.reduceat(weights, np.arange(0, len(weights), SUM_SIZE)).cumsum(dtype=np.float64)
    wanted = number * sums[-1]
    index = int(np.searchsorted(sums, wanted, side="right"))
    inside = weights[index * SUM_SIZE : (index + 1) * SUM_SIZE].cumsum(dtype=np.float64)
    wanted -= sums[index - 1] if index else 0
    wanted = min(wanted, np.nextafter(inside[-1], 0))  # the sum before was rounded otherwise
    return index * SUM_SIZE + int(np.searchsorted(inside, wanted, side="right"))
