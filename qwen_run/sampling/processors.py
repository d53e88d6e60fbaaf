"""From the logits of one position to the tokens that may follow and their probabilities.

The steps and their order are those of transformers: logit bias, repetition penalty, minimum tokens; then temperature,
top-k, top-p, min-p. Frequency and presence penalty, which it does not have, follow the repetition penalty as in vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_engine.errors import EngineError
from qwen_run.sampling.constraint import Constraint
from qwen_run.sampling.custom import apply_processors, forbidden_tokens
from qwen_run.sampling.params import SamplingParams
from qwen_run.sampling.rules import MAX_NUMBER
from qwen_run.sampling.token_rules import TokenRules

# values of which the largest stands for all when the k-th largest of many is looked for: three times as quick
GROUP_SIZE = 32

# a mask that allows less than this part of the vocabulary is read as a list, one that allows more is tried so often
FEW = 4

# top-p first looks for its mass among this many of the best tokens
FIRST_CANDIDATES = 1024


class SamplingContext:
    """What the processors must know of one sequence: its tokens as far as a penalty falls on them.

    Without penalties it only counts tokens. ``token_ids`` (m,) int64 are the different tokens that a penalty falls on,
    ``counts`` (m,) float32 says how often each is in the answer (0: in the prompt only).
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        stop_token_ids: Collection[int] = (),
        bad_words: Sequence[Sequence[int]] = (),
        constraints: Sequence[Constraint] = (),
        max_tokens: int = MAX_NUMBER,
    ) -> None:
        """The context of a sequence that begins with ``prompt``.

        Args:
            stop_token_ids: what may not come before the answer has ``params.min_tokens`` tokens.
            bad_words: ids of ``params.bad_words``.
            constraints: this sequence's own.
            max_tokens: most tokens of the answer.
        """
        self.num_prompt, self.num_output = len(prompt), 0
        self._counts_tokens = (
            params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        )
        self._min_tokens = params.least_tokens(len(prompt))
        self._rules = TokenRules(params, prompt, stop_token_ids, max_tokens)
        self.stop_token_ids = np.array(sorted(stop_token_ids), np.int64)
        self.bias_ids = np.array([token_id for token_id, _ in params.biases], np.int64)
        self.biases = np.array([bias for _, bias in params.biases], np.float32)
        self.allowed_ids = None if params.allowed_token_ids is None else np.array(params.allowed_token_ids, np.int64)
        self.bad_words, self.processors = bad_words, tuple(params.logits_processors or ())
        self.constraints = tuple(constraints)
        self.prompt: Sequence[int] = prompt if self.processors else ()
        self.output: list[int] = []  # the answer, where somebody looks at it
        # the repetition penalty alone falls on the prompt, too
        seen = np.unique(np.asarray(prompt, np.int64)) if params.repetition_penalty != 1 else np.empty(0, np.int64)
        self._slots = {token_id: slot for slot, token_id in enumerate(seen.tolist())}
        self._token_ids = seen
        self._counts = np.zeros(len(seen), np.float32)

    @property
    def token_ids(self) -> NDArray[np.int64]:
        return self._token_ids[: len(self._slots)]

    @property
    def counts(self) -> NDArray[np.float32]:
        return self._counts[: len(self._slots)]

    @property
    def position(self) -> int:
        """Index of the next token in its sequence."""
        return self.num_prompt + self.num_output

    @property
    def suppresses_stop(self) -> bool:
        """The answer is still too short to end."""
        return self.num_output < self._min_tokens and len(self.stop_token_ids) > 0

    @property
    def changes_logits(self) -> bool:
        """:func:`changed` does anything."""
        return bool(
            self._slots
            or len(self.bias_ids)
            or self.suppresses_stop
            or self.bad_words
            or self.processors
            or self._rules.is_active
        )

    @property
    def is_bounded(self) -> bool:
        """:func:`bounded` may leave tokens out."""
        return self.allowed_ids is not None or len(self.constraints) > 0

    def permits(self, token_id: int) -> bool:
        """What bounds the answer lets ``token_id`` come next."""
        named = self.allowed_ids is None or bool((self.allowed_ids == token_id).any())
        return named and all(constraint.permits(token_id) for constraint in self.constraints)

    def apply_rules(self, scores: NDArray[np.float32]) -> None:
        """Change ``scores`` (vocab_size,) as the rules of the checkpoint's ``generation_config.json`` do."""
        if self._rules.is_active:
            self._rules.apply(scores)

    def append(self, token_id: int) -> None:
        """Note the next token of the answer."""
        self.num_output += 1
        for constraint in self.constraints:
            constraint.append(token_id)
        if self.bad_words or self.processors:
            self.output.append(token_id)
        self._rules.append(token_id)
        if not self._counts_tokens:
            return
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot == len(self._token_ids):  # full: double it
            self._token_ids = np.resize(self._token_ids, 2 * slot + 64)
            self._counts = np.concatenate([self._counts, np.zeros(slot + 64, np.float32)])
        self._token_ids[slot] = token_id
        self._counts[slot] += 1

    def fork(self) -> SamplingContext:
        """A copy that goes its own way: for another sample of the prompt, or a beam."""
        copy: SamplingContext = object.__new__(SamplingContext)
        copy.__dict__.update(self.__dict__)
        copy.output = self.output.copy()
        copy.constraints = tuple(constraint.fork() for constraint in self.constraints)
        copy._rules = self._rules.fork()
        if self._counts_tokens:
            copy._slots = self._slots.copy()
            copy._token_ids, copy._counts = self._token_ids.copy(), self._counts.copy()
        return copy


def process(logits: NDArray[np.float32], params: SamplingParams, context: SamplingContext) -> NDArray[np.float32]:
    """``logits`` (vocab_size,) after all that changes them; not modified, and returned where all is off.

    That is :func:`changed` and then :func:`bounded`.
    """
    return bounded(changed(logits, params, context), context)


def changed(logits: NDArray[np.float32], params: SamplingParams, context: SamplingContext) -> NDArray[np.float32]:
    """``logits`` (vocab_size,) after all that changes them but for what bounds the answer; not modified.

    In this order: functions of the caller's, bias, penalties; then tokens that may not come are left out.

    Presence and frequency penalty are OpenAI's: ``logit - count * frequency_penalty - (count > 0) * presence_penalty``
    with the token's count in the answer, the prompt not counted.
    """
    if not context.changes_logits:
        return logits
    scores = logits.copy()
    if context.processors:
        scores = apply_processors(context.processors, context.prompt, context.output, scores)
    if len(context.bias_ids):
        scores[context.bias_ids] += context.biases
    if len(ids := context.token_ids):
        penalized = scores[ids]
        if params.repetition_penalty != 1:
            penalty = np.float32(params.repetition_penalty)
            penalized = np.where(penalized < 0, penalized * penalty, penalized / penalty)
        if params.frequency_penalty != 0:
            penalized -= np.float32(params.frequency_penalty) * context.counts
        if params.presence_penalty != 0:
            penalized -= np.float32(params.presence_penalty) * (context.counts > 0)
        scores[ids] = penalized
    if context.suppresses_stop:
        ids = context.stop_token_ids  # a checkpoint may name one that its vocabulary does not reach, or -1 for none
        scores[ids[(ids >= 0) & (ids < len(scores))]] = -np.inf
    if context.bad_words:
        scores[forbidden_tokens(context.bad_words, context.output)] = -np.inf
    context.apply_rules(scores)
    return scores


def bounded(scores: NDArray[np.float32], context: SamplingContext) -> NDArray[np.float32]:
    """``scores`` (vocab_size,) without the tokens that the answer may not go on with; not modified."""
    if not context.is_bounded:
        return scores
    scores = scores.copy()
    for bound in (context.allowed_ids, *(constraint.allowed() for constraint in context.constraints)):
        if bound is None:
            continue
        if bound.dtype != np.bool_:
            ids = bound
        elif 2 * np.count_nonzero(bound) > len(bound):  # the few others are quicker to name
            scores[np.flatnonzero(~bound)] = -np.inf
            continue
        else:
            ids = np.flatnonzero(bound)
        kept = scores[ids]
        scores.fill(-np.inf)
        scores[ids] = kept
    return scores


def best_bounded(scores: NDArray[np.float32], context: SamplingContext, best: int) -> tuple[int, np.float32]:
    """The token with the largest of ``scores`` that the answer may go on with, as :func:`bounded` leaves it; its score.

    Args:
        scores: (vocab_size,), not modified.
        best: the token with the largest of all, which may not be chosen.
    """
    bounds = [context.allowed_ids, *(constraint.allowed() for constraint in context.constraints)]
    given = [bound for bound in bounds if bound is not None]
    if len(given) == 1 and given[0].dtype == np.bool_:
        (mask,) = given
        if FEW * np.count_nonzero(mask) < len(mask):
            ids = np.flatnonzero(mask)
            if len(ids):
                token_id = int(ids[scores[ids].argmax()])
                return token_id, scores[token_id]
        left = scores.copy()
        for _ in range(FEW):
            left[best] = -np.inf
            best = int(left.argmax())
            if mask[best]:
                return best, left[best]
    left = bounded(scores, context)
    best = int(left.argmax())
    return best, left[best]


def check_finite(largest_score: np.float32, position: int) -> None:
    """Refuse logits whose largest is no number.

    Raises:
        EngineError: the logits from which the token at ``position`` is chosen are not numbers.
    """
    if not math.isfinite(largest_score):
        raise EngineError(
            f"the logits of position {position} hold {largest_score}, expected numbers; "
            "build the engine with --kv-cache-dtype float32"
        )


def distribution(scores: NDArray[np.float32], params: SamplingParams) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that temperature, top-k, top-p and min-p leave, and their probabilities.

    Args:
        scores: (vocab_size,), what :func:`process` returned; finite maximum.
        params: not greedy.

    Returns:
        ids (n,) rising, probabilities (n,) that sum to 1.
    """
    ids = _candidates(scores, params)
    few = scores if len(ids) == len(scores) else scores[ids]
    if params.top_p < 1:
        kept = _nucleus(few, params)
        ids, few = ids[kept], few[kept]
    weights = _weights(few, params.temperature)
    if params.min_p > 0:
        kept = np.flatnonzero(weights.astype(np.float32) >= np.float32(params.min_p))  # the likeliest weighs 1
        ids, weights = ids[kept], weights[kept]
    weights /= weights.sum()
    return ids, weights


def _weights(scores: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    """What the tokens of ``scores`` (n,) weigh after temperature, as a share of the likeliest's weight."""
    weights = (scores / np.float32(temperature)).astype(np.float64)
    weights -= weights.max()
    np.exp(weights, out=weights)
    return weights


def _candidates(scores: NDArray[np.float32], params: SamplingParams) -> NDArray[np.int64]:
    """Indexes, rising, of what top-k leaves; without it of what the next steps need to look at."""
    if not params.top_k and params.min_p > 0 and params.top_p == 1:
        lowest = scores.max() + params.temperature * math.log(params.min_p)
        return np.flatnonzero(scores >= lowest - 1e-3 * params.temperature)  # min-p itself is decided on probabilities
    return at_least_kth(scores, params.top_k or len(scores))


def at_least_kth(values: NDArray[Any], k: int) -> NDArray[np.int64]:
    """Indexes, rising, of the values (n,) not below the k-th largest; more than k where several are equal to it."""
    if k >= len(values):
        return np.arange(len(values))
    num_groups = len(values) // GROUP_SIZE
    if num_groups < k:
        return np.flatnonzero(values >= np.partition(values, -k)[-k])
    # the k-th of the groups' largest is no more than the k-th of all, and few are above it
    peaks = values[: num_groups * GROUP_SIZE].reshape(GROUP_SIZE, num_groups).max(axis=0)
    candidates = np.flatnonzero(values >= np.partition(peaks, -k)[-k])
    few = values[candidates]
    kept: NDArray[np.int64] = candidates[few >= np.partition(few, -k)[-k]]
    return kept


def largest(values: NDArray[Any], k: int) -> NDArray[np.int64]:
    """Indexes of the k largest of ``values`` (n,), falling; of equals the lower index first."""
    candidates = at_least_kth(values, k)
    return candidates[np.argsort(-values[candidates], kind="stable")[:k]]


def _nucleus(scores: NDArray[np.float32], params: SamplingParams) -> NDArray[np.int64]:
    """Indexes, rising, of the fewest largest of ``scores`` (n,) whose share of all weights reaches ``params.top_p``.

    As in transformers the test is ``share of this and all smaller ones > 1 - top_p`` in float32; of equal scores the
    later ones stay; at least one stays.
    """
    total = _weights(scores, params.temperature).sum()
    threshold, count = np.float32(1 - params.top_p), FIRST_CANDIDATES
    while True:
        candidates = at_least_kth(scores, count)
        falling = candidates[np.argsort(scores[candidates], kind="stable")[::-1]]
        weights = _weights(scores[falling], params.temperature)
        larger = np.cumsum(weights) - weights  # the sum of those before each
        kept = (1 - larger / total).astype(np.float32) > threshold
        kept[0] = True
        if not kept[-1] or len(candidates) == len(scores):
            return np.sort(falling[kept])
        count *= 8
