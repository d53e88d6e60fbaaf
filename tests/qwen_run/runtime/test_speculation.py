"""What is guessed, how much of it, and when guessing stops."""

from __future__ import annotations

import pytest

from qwen_run.runtime.request import Request, Sequence
from qwen_run.runtime.speculation import PromptLookup, RunCost, Speculator
from qwen_run.sampling.sample import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=100)


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 1, 2, 3], [4, 5, 6, 1]),  # after the last three tokens
        ([9, 2, 3, 4, 5, 6, 1, 2, 3], [4, 5, 6, 1]),  # after the last two
        ([1, 2, 3, 7, 2, 3, 8, 1, 2, 3], [7, 2, 3, 8]),  # three before two
        ([2, 3, 7, 0, 2, 3, 8, 0, 2, 3], [8, 0, 2, 3]),  # the last time, not the first
        ([5, 1, 2, 1, 2], [1, 2, 1, 2]),  # a loop goes on
        ([1, 2, 3, 4], []),
        ([3], []),
        ([3, 3, 3], [3, 3, 3, 3]),
    ],
)
def test_guess(token_ids: list[int], expected: list[int]) -> None:
    assert PromptLookup(4).propose(token_ids) == expected
    grown = PromptLookup(4)
    for end in range(1, len(token_ids)):
        grown.propose(token_ids[:end])
    assert grown.propose(token_ids) == expected


def test_good_guesses_get_longer_and_bad_ones_end() -> None:
    """Whether they were verified or not: the tokens that come tell."""
    good, bad, price = PromptLookup(8), PromptLookup(8), 0.3
    assert good.worthwhile(price) == 1  # one half, until something is known
    loop = [1, 2, 3, 4, 5] * 20
    lengths = []
    for end in range(10, 60):
        good.propose(loop[:end])
        lengths.append(good.worthwhile(price))
    assert lengths == sorted(lengths)
    assert lengths[-1] == 8
    misleading = [token for number in range(30) for token in (1, 2, 10 + number)]
    for end in range(3, 60):
        bad.propose(misleading[:end])
    assert bad.worthwhile(price) == 0
    for end in range(60, 61 + 90):
        bad.propose(misleading[:60] + loop[: end - 60])
    assert bad.worthwhile(price) > 0


def test_a_guess_must_be_right_more_often_than_it_costs() -> None:
    lookup = PromptLookup(8)
    for end in range(10, 60):
        lookup.propose([1, 2, 3, 4, 5] * 20)[:end]
    assert lookup.worthwhile(0.05) >= lookup.worthwhile(0.3) >= lookup.worthwhile(0.9)
    assert lookup.worthwhile(1.0) == 0


def test_price_of_a_token() -> None:
    cost = RunCost()
    assert cost.price(1, 1) == 0.25
    assert cost.price(8, 8) == 8 * 0.25 / 2.75
    for num_tokens in (1, 9, 2, 5, 1):
        cost.observe(num_tokens, 0.010 + 0.002 * num_tokens)
    cost.observe(512, 7.0)  # a prompt tells nothing
    assert cost.price(1, 1) == pytest.approx(2 / 12)
    assert cost.price(4, 4) == pytest.approx(4 * 2 / 18)
    assert cost.price(4, 60) == pytest.approx(4 * 2 / 130)  # beside a prompt a step is slow: its tokens are dear


def test_price_where_runs_are_bound_by_arithmetic_or_by_noise() -> None:
    cost = RunCost()
    for num_tokens in (4, 12, 4, 6):
        cost.observe(num_tokens, 0.003 * num_tokens)
    assert cost.price(4, 4) == pytest.approx(1)
    for num_tokens in range(1, 400):
        cost.observe(1 + num_tokens % 3, 0.03 - 0.001 * (num_tokens % 3))
    assert cost.price(1, 1) == 0.05


def test_what_a_speculator_leaves_alone() -> None:
    speculator = Speculator(8, 1000)
    loop = [1, 2, 3] * 9

    def sequence(num_output: int, num_pending: int = 1, **params: int) -> Sequence:
        made = Request(tuple(loop), SamplingParams(**{"temperature": 0, "max_tokens": 100} | params)).sequences[0]
        made.token_ids += loop[:num_output]
        made.num_cached = len(made.token_ids) - num_pending
        return made

    answering, prompt, last = sequence(6), sequence(0), sequence(6, max_tokens=7)
    preempted = sequence(6, num_pending=2)
    speculator.cost.price = lambda *_: 0.06  # type: ignore[method-assign]
    plan = dict.fromkeys((answering, prompt, last, preempted), 1)
    drafts = speculator.propose(plan, limit=10)
    assert drafts == {answering: [1, 2, 3], last: []}
    assert speculator.propose(plan, limit=2)[answering] == [1, 2]
    speculator.cost.price = lambda *_: 0.34  # type: ignore[method-assign]
    assert speculator.propose(plan, limit=9)[answering] == []  # half of the guesses are right: not half as much again
    speculator.cost.price = lambda *_: 0.7  # type: ignore[method-assign]
    assert speculator.propose(plan, limit=9) == {}


def test_what_is_learned_of_one_sequence_is_thought_of_the_next() -> None:
    speculator = Speculator(8, 1000)
    speculator.cost.price = lambda *_: 0.3  # type: ignore[method-assign]

    def answer(token_ids: list[int]) -> int:
        """How many tokens were guessed."""
        sequence = Request((1, 2), SamplingParams(temperature=0, max_tokens=100)).sequences[0]
        num_guessed = 0
        for token_id in token_ids:
            sequence.token_ids.append(token_id)
            sequence.num_cached = len(sequence.token_ids) - 1
            num_guessed += len(speculator.propose({sequence: 1}, limit=99)[sequence])
        speculator.forget(sequence)
        return num_guessed

    misleading = [token for number in range(20) for token in (1, 2, 10 + number)]
    first = answer(misleading)
    assert first > 0
    for _ in range(5):
        last = answer(misleading)
    assert last == 0
    assert answer([3, 4, 5] * 20) > 20  # one that quotes itself is still found out
