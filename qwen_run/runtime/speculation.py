"""Prompt-lookup speculation: guess that what followed the last tokens before follows them again.

Answers that quote their prompt (summaries, code, extraction) are guessed well, and a run that verifies a few tokens
costs little more than a run for one. Guesses never change an answer, only how many runs it takes: the core samples
each position from its own logits with its own random number and goes on while that equals the guess.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from qwen_run.runtime.request import Sequence

# Guess from the longest of these runs of last tokens that came before.
_NGRAMS = (3, 2)

# Runs with more tokens are prompts: another price per token.
_LARGEST_RUN = 64

# What one more token adds to a run, as a share of a run for one, until it is measured.
_FIRST_SHARE = 0.25

# Until the squares of the tokens' deviations sum up to this, what runs took tells more of noise than of tokens.
_LEAST_SPREAD = 30

# A guess has to promise so much more than it costs: all others of the batch wait for it, and may have more to come.
_MARGIN = 1.5

# Runs and guesses count this much less with every one that follows.
_RUN_DECAY, _GUESS_DECAY = 0.98, 0.95

# What a sequence that ends adds to what is thought of the guesses of those that begin.
_SEQUENCE_SHARE = 0.2


class Speculator:
    """Decides how many tokens to guess: as many as are likely to save more time than they cost."""

    def __init__(self, max_drafts: int, max_seq_len: int) -> None:
        """A speculator that knows nothing yet of what runs cost.

        Args:
            max_drafts: most guesses for one sequence in one step.
            max_seq_len: most tokens of a sequence; nothing is guessed beyond.
        """
        self._max_drafts = max_drafts
        self._max_seq_len = max_seq_len
        self._lookups: dict[Sequence, PromptLookup] = {}
        self._probability = 0.5  # of a guess to be right, before anything is known of its sequence
        self.cost = RunCost()

    def propose(self, plan: Mapping[Sequence, int], limit: int) -> dict[Sequence, list[int]]:
        """Guesses for the sequences of ``plan`` that have one token to feed and are no beams, ``limit`` at most in all.

        Args:
            plan: how many tokens each sequence feeds in this step.
        """
        price = _MARGIN * self.cost.price(len(plan), sum(plan.values()))
        drafts: dict[Sequence, list[int]] = {}
        if price >= 1:  # no guess pays: nor is one looked for
            return drafts
        for sequence in plan:
            if sequence.num_pending == 1 and sequence.num_output and not sequence.request.beam_search:
                lookup = self._lookups.get(sequence)
                if lookup is None:
                    lookup = self._lookups[sequence] = PromptLookup(self._max_drafts, self._probability)
                left = sequence.request.max_tokens - sequence.num_output - 1
                left = min(left, self._max_seq_len - len(sequence.token_ids) - 1)
                guess = lookup.propose(sequence.token_ids)[: max(0, min(lookup.worthwhile(price), left, limit))]
                limit -= len(guess)
                drafts[sequence] = guess
        return drafts

    def forget(self, sequence: Sequence) -> None:
        """``sequence`` is finished."""
        if lookup := self._lookups.pop(sequence, None):
            self._probability += _SEQUENCE_SHARE * (lookup.probability - self._probability)


class PromptLookup:
    """Where each run of tokens of one sequence was last followed by others, and how often that was a good guess."""

    def __init__(self, max_drafts: int, probability: float = 0.5) -> None:
        """A lookup of a sequence of which nothing is indexed yet.

        Args:
            probability: of a guess to be right, as two guesses would have shown it.
        """
        self._max_drafts = max_drafts
        self._after: dict[tuple[int, ...], int] = {}  # run of tokens -> index of the token after its last occurrence
        self._num_indexed = 0
        self._guess: list[int] = []
        self._guessed_from = 0
        self._prior = 2 * probability, 2.0  # of a Beta distribution
        self._num_right, self._num_judged = self._prior

    @property
    def probability(self) -> float:
        """Of the next guess to be right."""
        return self._num_right / self._num_judged

    def propose(self, token_ids: list[int]) -> list[int]:
        """What may follow ``token_ids``, which begin with those of the last call; possibly nothing."""
        self._judge(token_ids)
        for end in range(self._num_indexed, len(token_ids)):  # the last token's run is followed by nothing yet
            for size in _NGRAMS:
                if end >= size:
                    self._after[tuple(token_ids[end - size : end])] = end
        self._num_indexed = len(token_ids)
        self._guess, self._guessed_from = [], len(token_ids)
        for size in _NGRAMS:
            start = self._after.get(tuple(token_ids[-size:]))
            if start is not None:
                found = token_ids[start : start + self._max_drafts]
                self._guess = (found * self._max_drafts)[: self._max_drafts]  # its own end is followed by its beginning
                break
        return self._guess

    def worthwhile(self, price: float) -> int:
        """How many guesses to verify at ``price``: the last is right with a probability above it."""
        if self.probability <= price:
            return 0
        return min(self._max_drafts, int(math.log(price) / math.log(self.probability)))

    def _judge(self, token_ids: list[int]) -> None:
        """Compare the last guess, verified by the engine or not, with what came."""
        for guess, token_id in zip(self._guess, token_ids[self._guessed_from :], strict=False):
            right, judged = self._prior
            self._num_right = right + (self._num_right - right) * _GUESS_DECAY + (guess == token_id)
            self._num_judged = judged + (self._num_judged - judged) * _GUESS_DECAY + 1
            if guess != token_id:
                break


class RunCost:
    """Seconds of a run as a straight line over its tokens, fitted to recent runs by least squares."""

    def __init__(self) -> None:
        # of runs, tokens, seconds, tokens squared, tokens times seconds
        self._sums = np.zeros(5)

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Note a run; those of long chunks of prompts are left out."""
        if num_tokens <= _LARGEST_RUN:
            self._sums *= _RUN_DECAY
            self._sums += (1, num_tokens, seconds, num_tokens**2, num_tokens * seconds)

    def price(self, num_sequences: int, num_tokens: int) -> float:
        """What one more token adds to a run, over what the run spends on each new token it brings.

        A guess pays when it is right with a greater probability.

        Args:
            num_sequences: those that get a token from the run.
            num_tokens: fed by the run without guesses.

        Returns:
            Between 0.05 and 1.
        """
        count, tokens, total_s, squares, product = self._sums
        spread = squares - tokens**2 / max(count, 1)
        if spread < _LEAST_SPREAD:
            slope, run_s = _FIRST_SHARE, 1 + _FIRST_SHARE * (num_tokens - 1)
        else:
            slope = (product - tokens * total_s / count) / spread
            run_s = (total_s - slope * tokens) / count + slope * num_tokens
        return min(1.0, max(0.05, slope * num_sequences / run_s)) if run_s > 0 else 1.0
