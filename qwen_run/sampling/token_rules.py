"""Which tokens may not come next, or alone may: the rules of transformers' ``generation_config.json``.

Names and meaning are those of the logits processors of ``transformers.generation``. They see prompt and answer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from qwen_run.sampling.params import SamplingParams


class TokenRules:
    """The rules of one request, and what they must know of one of its sequences."""

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], stop_token_ids: Collection[int], max_tokens: int
    ) -> None:
        """The rules of a sequence that begins with ``prompt``.

        Args:
            stop_token_ids: end an answer; none of them alone is a bad word.
            max_tokens: the answer's most tokens; ``params.forced_eos_token_id`` are the only ones that may be the last.
        """
        self._num_prompt, self._num_tokens = len(prompt), len(prompt)
        self._suppressed = np.array(params.suppress_tokens, np.int64)
        self._suppressed_first = np.array(params.begin_suppress_tokens, np.int64)
        self._forced_first, self._forced_last = params.forced_bos_token_id, list(params.forced_last)
        self._last = len(prompt) + max_tokens - 1
        self._bad_words = _continuations(word for word in params.bad_words_ids if not _ends(word, stop_token_ids))
        self._ngram_size = params.no_repeat_ngram_size
        self._ngrams: dict[tuple[int, ...], list[int]] = {}  # the tokens that followed each n - 1 tokens
        self._tail: list[int] = []  # as many of the last tokens as somebody looks at
        self._looks_back = max(self._bad_words, default=0)
        self._looks_back = max(self._looks_back, self._ngram_size - 1)
        self.is_active = bool(
            len(self._suppressed)
            or len(self._suppressed_first)
            or self._forced_first is not None
            or self._forced_last
            or self._bad_words
            or self._ngram_size
        )
        if self._ngram_size:
            for token_id in prompt:
                self._note(token_id)
        elif self._looks_back:
            self._tail = list(prompt[-self._looks_back :])

    def append(self, token_id: int) -> None:
        """Note the next token of the answer."""
        self._num_tokens += 1
        if self._looks_back or self._ngram_size:
            self._note(token_id)

    def fork(self) -> TokenRules:
        """A copy that goes its own way."""
        copy: TokenRules = object.__new__(TokenRules)
        copy.__dict__.update(self.__dict__)
        copy._tail = self._tail.copy()
        copy._ngrams = {begun: followed.copy() for begun, followed in self._ngrams.items()}
        return copy

    def apply(self, scores: NDArray[np.float32]) -> None:
        """Set the scores (vocab_size,) of tokens that may not come to minus infinity, and those of forced ones to 0."""
        if self._ngram_size and len(self._tail) >= self._ngram_size - 1:
            scores[self._ngrams.get(self._last_tokens(self._ngram_size - 1), [])] = -np.inf
        for length, continuations in self._bad_words.items():
            if length <= len(self._tail):
                scores[continuations.get(self._last_tokens(length), [])] = -np.inf
        if self._forced_first is not None and self._num_tokens == 1:
            _force(scores, [self._forced_first])
        if self._forced_last and self._num_tokens == self._last:
            _force(scores, self._forced_last)
        scores[self._suppressed] = -np.inf
        if len(self._suppressed_first) and self._num_tokens == self._begin:
            scores[self._suppressed_first] = -np.inf

    @property
    def _begin(self) -> int:
        """Where the answer begins; a forced first token does not count."""
        return self._num_prompt + (self._num_prompt == 1 and self._forced_first is not None)

    def _last_tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._tail[len(self._tail) - count :])

    def _note(self, token_id: int) -> None:
        if self._ngram_size and len(self._tail) >= self._ngram_size - 1:
            self._ngrams.setdefault(self._last_tokens(self._ngram_size - 1), []).append(token_id)
        self._tail.append(token_id)
        del self._tail[: max(0, len(self._tail) - self._looks_back)]


def _continuations(words: Iterable[Sequence[int]]) -> dict[int, dict[tuple[int, ...], list[int]]]:
    """The last tokens of ``words``, by how many tokens stand before and by which."""
    found: dict[int, dict[tuple[int, ...], list[int]]] = {}
    for word in words:
        found.setdefault(len(word) - 1, {}).setdefault(tuple(word[:-1]), []).append(word[-1])
    return found


def _ends(word: Sequence[int], stop_token_ids: Collection[int]) -> bool:
    return len(word) == 1 and word[0] in stop_token_ids


def _force(scores: NDArray[np.float32], token_ids: list[int]) -> None:
    scores[:] = -np.inf
    scores[token_ids] = 0
