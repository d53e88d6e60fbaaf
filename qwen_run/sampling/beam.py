"""Beam search as transformers does it: which continuations are kept, which answers are finished, when it ends.

Pure choice. Who runs the model feeds every beam's next log probabilities and, with what comes back, rearranges whatever
it keeps for each beam (cache blocks, contexts).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen_run.sampling.logprobs import log_softmax
from qwen_run.sampling.params import SamplingParams
from qwen_run.sampling.processors import SamplingContext, check_finite, largest, process


@dataclass(frozen=True)
class Hypothesis:
    """An answer, its stop token included, and ``score``: its log probability / tokens ** length_penalty."""

    token_ids: tuple[int, ...]
    score: float


def beam_logprobs(logits: NDArray[np.float32], params: SamplingParams, context: SamplingContext) -> NDArray[np.float32]:
    """What :class:`BeamSearch` adds up for one beam, (vocab_size,): processors see log probabilities.

    Raises:
        EngineError: the largest logit is NaN or infinite.
    """
    check_finite(logits.max(), context.position)
    return process(log_softmax(logits), params, context)


class BeamSearch:
    """The beams of one request: :meth:`advance` until :attr:`is_done`. At first there is one, the prompt."""

    def __init__(self, params: SamplingParams, stop_token_ids: Collection[int], max_tokens: int) -> None:
        """A search that has not begun.

        Args:
            params: ``num_beams``, ``length_penalty`` and ``early_stopping`` are read.
            stop_token_ids: what ends a beam.
            max_tokens: most tokens of an answer in this engine, at most ``params.max_tokens``.
        """
        self._params = params
        self._stop_token_ids = np.array(sorted(stop_token_ids), np.int64)
        self._max_tokens = max_tokens
        self._beams: list[tuple[int, ...]] = [()]
        self._log_probabilities = np.zeros(1, np.float32)  # of the beams, falling
        self._finished: list[Hypothesis] = []  # the best so far, best first
        self._num_tokens = 0

    @property
    def is_done(self) -> bool:
        """No beam is followed any further."""
        if self._num_tokens == self._max_tokens or not self._beams:
            return True
        if len(self._finished) < self._params.num_beams:
            return False
        return self._params.early_stopping is True or not self._can_improve()

    def advance(self, logprobs: NDArray[np.float32]) -> list[tuple[int, int]]:
        """Replace the beams by their best continuations.

        Args:
            logprobs: (beams, vocab_size) of :func:`beam_logprobs`, a row for each beam that the last call returned; one
                row, what follows the prompt, in the first call.

        Returns:
            For each new beam, likeliest first, the row it continues and its new token. Empty when all have ended.
        """
        assert not self.is_done, "the search is done"
        self._num_tokens += 1
        width = self._params.num_beams
        totals = (logprobs + self._log_probabilities[:, np.newaxis]).ravel()
        # enough for a full width of beams that go on, whatever ends
        best = largest(totals, max(2, 1 + len(self._stop_token_ids)) * width)
        ends = np.isin(best % logprobs.shape[1], self._stop_token_ids) | (self._num_tokens == self._max_tokens)
        for index in best[:width][ends[:width]].tolist():
            parent, token_id = divmod(index, logprobs.shape[1])
            self._finish((*self._beams[parent], token_id), totals[index])
        running = best[~ends][:width]
        continued = [divmod(index, logprobs.shape[1]) for index in running.tolist()]
        self._beams = [(*self._beams[parent], token_id) for parent, token_id in continued]
        self._log_probabilities = totals[running]
        return continued

    def hypotheses(self) -> list[Hypothesis]:
        """The best ``params.n`` finished answers, best first."""
        return self._finished[: self._params.n]

    def _finish(self, token_ids: tuple[int, ...], log_probability: np.float32) -> None:
        self._finished.append(Hypothesis(token_ids, self._score(log_probability, self._num_tokens)))
        self._finished.sort(key=lambda hypothesis: -hypothesis.score)  # stable: of equals the earlier stays first
        del self._finished[self._params.num_beams :]

    def _can_improve(self) -> bool:
        """The likeliest beam could beat the worst finished answer, by transformers' estimate of its final length."""
        longest = self._params.early_stopping == "never" and self._params.length_penalty > 0
        length = self._max_tokens if longest else self._num_tokens
        return self._score(self._log_probabilities[0], length) > self._finished[-1].score

    def _score(self, log_probability: np.float32, num_tokens: int) -> float:
        return float(log_probability / np.float32(num_tokens**self._params.length_penalty))
