"""How the next token is chosen from its logits: the processors of transformers, in their order, and one random number.

Pure functions, arrays in and arrays out. The random number of a token depends only on the request's
seed and the token's position, so an answer does not change with what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qwen_engine.errors import EngineError, RequestError

# what transformers' GenerationConfig uses where generation_config.json is silent
TRANSFORMERS_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0}

# without top-k, top-p first looks for its mass among this many of the best tokens
FIRST_CANDIDATES = 1024


@dataclass(frozen=True)
class SamplingParams:
    """How one answer is sampled. ``temperature`` 0 is greedy, ``top_k`` 0 and ``top_p`` 1 are off.

    Raises:
        RequestError: a value is out of range; the message names the option and what it may be.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_tokens: int = 512

    def __post_init__(self) -> None:
        _check(
            "temperature",
            self.temperature,
            float,
            "0 (greedy) or from 1e-6 to 100",
            lambda v: v == 0 or 1e-6 <= v <= 100,
        )
        _check("top_p", self.top_p, float, "a number from 0 to 1", lambda v: 0 <= v <= 1)
        _check("top_k", self.top_k, int, "a whole number, 0 (off) or more", lambda v: v >= 0)
        _check(
            "repetition_penalty",
            self.repetition_penalty,
            float,
            "a number from 0.01 to 100",
            lambda v: 0.01 <= v <= 100,
        )
        _check("seed", self.seed, int, "a whole number from 0 to 2^64 - 1", lambda v: 0 <= v < 2**64)
        _check("max_new_tokens", self.max_tokens, int, "a whole number, 1 or more", lambda v: v >= 1)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> Self:
        """The defaults a checkpoint asks for in ``generation_config.json``, read as transformers reads them.

        Without ``do_sample`` the temperature is 0; ``top_k`` and ``top_p`` are kept for a user who sets one.
        """
        given = {name: config[name] for name in TRANSFORMERS_DEFAULTS if config.get(name) is not None}
        values = {**TRANSFORMERS_DEFAULTS, **given}
        if not config.get("do_sample"):
            values["temperature"] = 0.0
        if config.get("max_new_tokens") is not None:
            values["max_tokens"] = config["max_new_tokens"]
        return cls(**values)


def sample(logits: NDArray[np.float32], params: SamplingParams, context: Sequence[int], position: int) -> int:
    """Choose the token that follows ``context``.

    Args:
        logits: (vocab_size,), not modified.
        context: ids of prompt and answer so far, which the repetition penalty falls on.
        position: index of the new token in its sequence; with the seed it decides the random number.

    Returns:
        A token id. Greedy: the lowest id among the largest logits.

    Raises:
        EngineError: the largest logit is NaN or infinite.
    """
    scores = penalize_repetition(logits, context, params.repetition_penalty)
    best = int(np.argmax(scores))
    if not np.isfinite(scores[best]):
        raise EngineError(
            f"the logits of position {position} hold {scores[best]}, expected numbers; "
            "build the engine with --kv-cache-dtype float32"
        )
    if params.greedy:
        return best
    ids, probabilities = distribution(scores, params)
    cumulative = np.cumsum(probabilities)
    return int(ids[np.searchsorted(cumulative / cumulative[-1], uniform(params.seed, position), side="right")])


def penalize_repetition(logits: NDArray[np.float32], context: Sequence[int], penalty: float) -> NDArray[np.float32]:
    """``logits`` (vocab_size,) with every token of ``context`` made less likely (arXiv 1909.05858, section 4.1)."""
    if penalty == 1 or not len(context):
        return logits
    ids = np.asarray(context, dtype=np.int64)
    seen = logits[ids]
    scores = logits.copy()
    scores[ids] = np.where(seen < 0, seen * np.float32(penalty), seen / np.float32(penalty))
    return scores


def distribution(scores: NDArray[np.float32], params: SamplingParams) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that temperature, top-k and top-p leave, and their probabilities.

    Args:
        scores: (vocab_size,), after the repetition penalty; finite maximum.
        params: not greedy.

    Returns:
        ids (n,) rising, probabilities (n,) that sum to 1.
    """
    scaled = scores / np.float32(params.temperature)
    ids = _at_least_kth(scaled, params.top_k or len(scaled))
    weights = np.exp(scaled[ids].astype(np.float64) - float(scaled.max()))
    if params.top_p < 1:
        kept = _nucleus(weights, params.top_p)
        ids, weights = ids[kept], weights[kept]
    return ids, weights / weights.sum()


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is a function of its arguments alone (Philox, counter-based).

    >>> uniform(seed=1, position=2) == uniform(seed=1, position=2) != uniform(seed=1, position=3)
    True
    """
    bits = np.random.Philox(key=seed, counter=position).random_raw()
    return float(int(bits) >> 11) * 2.0**-53


def _at_least_kth(values: NDArray[Any], k: int) -> NDArray[np.int64]:
    """Indexes, rising, of the values not below the k-th largest; more than k where several are equal to it."""
    if k >= len(values):
        return np.arange(len(values))
    return np.flatnonzero(values >= np.partition(values, -k)[-k])


def _nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Indexes, rising, of the fewest largest weights (n,) whose share of the sum reaches ``top_p``.

    As in transformers the test is ``share of this and all smaller ones > 1 - top_p`` in float32; of equal weights the
    later ones stay; at least one stays.
    """
    total, threshold, count = weights.sum(), np.float32(1 - top_p), FIRST_CANDIDATES
    while True:
        candidates = _at_least_kth(weights, count)
        falling = candidates[np.argsort(weights[candidates], kind="stable")[::-1]]
        larger = np.cumsum(weights[falling]) - weights[falling]  # the sum of those before each
        kept = (1 - larger / total).astype(np.float32) > threshold
        kept[0] = True
        if not kept[-1] or len(candidates) == len(weights):
            return np.sort(falling[kept])
        count *= 8


def _check(name: str, value: Any, kind: type, expected: str, allowed: Any) -> None:
    numeric = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if not (numeric and allowed(value)):  # NaN is in no range
        raise RequestError(f"{name} is {value!r}, expected {expected}")
