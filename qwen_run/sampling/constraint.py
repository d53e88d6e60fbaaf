"""What may come next in an answer, token by token: :class:`Constraint`; and one that ends thinking in time."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from enum import Enum, auto
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

# Qwen's documentation (getting_started/thinking_budget) has models end their thinking with these words.
END_OF_THINKING = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
    "</think>"
)


class Constraint(Protocol):
    """Says which tokens an answer may go on with. It only ever sees tokens that the answer has."""

    def prepare(self) -> None:
        """Work out what may come next, so that ``allowed`` takes no time; what fails here fails there. Any thread."""

    def allowed(self) -> NDArray[np.int64] | NDArray[np.bool_] | None:
        """Ids (n,) that may come next, or for each id (vocab_size,) whether it may; None where all may."""

    def permits(self, token_id: int) -> bool:
        """``token_id`` may come next; takes less time than :meth:`allowed`."""

    def append(self, token_id: int) -> None:
        """Note the next token of the answer."""

    def fork(self) -> Self:
        """A copy that goes its own way."""


class ThinkingBudget:
    """Ends thinking after so many tokens, with words the model knows.

    Args:
        budget: tokens of thinking.
        begin, end: the tokens ``<think>`` and ``</think>``.
        words: ids of what is said when the budget is used up; ``end`` is one of them.
        is_thinking: the prompt has begun to think.
    """

    def __init__(self, budget: int, begin: int, end: int, words: Sequence[int], is_thinking: bool) -> None:
        self._left, self._begin, self._end = budget, begin, end
        self._words, self._num_said = np.array(words, np.int64), 0
        self._is_thinking, self._is_first = is_thinking, True

    @property
    def _is_ending(self) -> bool:
        return self._num_said > 0 or (self._is_thinking and self._left <= 0)

    def prepare(self) -> None:
        """There is nothing to work out."""

    def allowed(self) -> NDArray[np.int64] | None:
        """The next of the words once the budget is used up; else all."""
        return self._words[self._num_said : self._num_said + 1] if self._is_ending else None

    def permits(self, token_id: int) -> bool:
        """``token_id`` may come next."""
        return not self._is_ending or token_id == self._words[self._num_said]

    def append(self, token_id: int) -> None:
        """Note the next token of the answer."""
        if self._is_ending:
            self._num_said += 1
            if self._num_said == len(self._words):
                self._is_thinking, self._num_said = False, 0
        elif self._is_thinking:
            self._is_thinking = token_id != self._end
            self._left -= 1
        elif self._is_first:
            self._is_thinking = token_id == self._begin
        self._is_first = False

    def fork(self) -> ThinkingBudget:
        """A copy that goes its own way."""
        return copy(self)


class Thinking(Enum):
    """Whether a prompt has begun to think, has been told not to, or says nothing of it."""

    OPEN = auto()
    CLOSED = auto()
    UNSAID = auto()


def thinking_at_end(prompt: Sequence[int], begin: int | None, end: int | None) -> Thinking:
    """What the last of the tokens ``begin`` and ``end`` near the end of ``prompt`` says.

    >>> thinking_at_end([5, 1, 9], begin=1, end=2), thinking_at_end([1, 5, 2], begin=1, end=2)
    (<Thinking.OPEN: 1>, <Thinking.CLOSED: 2>)
    """
    for token_id in reversed(prompt[-_NEAR_END:]):
        if token_id == begin:
            return Thinking.OPEN
        if token_id == end:
            return Thinking.CLOSED
    return Thinking.UNSAID


_NEAR_END = 4  # templates write <think> and a line end behind the opening of an answer
