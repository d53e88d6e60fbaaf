"""Requests that come and go, and the check that what happens around a request does not change its answers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases.tiny import run_alone
from qwen_run.runtime.core import Core, CoreOptions
from qwen_run.runtime.engine import Engine
from qwen_run.runtime.request import Request, Sequence, Token
from qwen_run.sampling.logprobs import token_logprobs
from qwen_run.sampling.sample import SamplingParams

MAX_SEQ_LEN = 150  # five blocks of the cache


def make_guesses_cheap(core: Core) -> None:
    """Let speculation guess whatever it can; in a scripted engine no guess ever pays."""
    if core._speculator:
        core._speculator.cost.price = lambda *_: 0.05  # type: ignore[method-assign]


def answers(request: Request) -> list[Any]:
    """Everything a request is told, floats to the last bit."""
    told = [(s.output, s.finish_reason, s.logprobs, s.score) for s in request.sequences]
    return [*told, request.prompt_logprobs]


def assert_nothing_is_owned(engine: Any) -> None:
    assert engine.cache.num_free == engine.cache.num_blocks
    assert not any(engine.cache._num_owners)


class StopAtSum:
    """Ends an answer by what no single token shows."""

    def __init__(self) -> None:
        self.sum = 0

    def push(self, token_id: int) -> bool:
        self.sum += token_id
        return self.sum % 13 == 12


@dataclass(frozen=True)
class Asked:
    prompt: tuple[int, ...]
    params: SamplingParams
    stop_token_ids: frozenset[int]
    has_stopper: bool
    arrives: int  # the step before which it is added
    aborted_after: int | None  # steps after its arrival

    def request(self) -> Request:
        stopper = StopAtSum if self.has_stopper and self.params.num_beams == 1 else None
        return Request(self.prompt, self.params, self.stop_token_ids, stopper)

    def alone(self, engine: Any) -> Request:
        """The same request, answered by an engine that does nothing else."""
        request = self.request()
        core = Core(engine, CoreOptions(prefix_caching=False))
        core.add(request)
        while not core.is_done:
            core.step()
        return request


def play(core: Core, asked: list[Asked]) -> list[tuple[Request, list[Token]]]:
    """Let ``asked`` come and go; each request and its tokens."""
    played: list[tuple[Request, list[Token]]] = []
    waiting = sorted(asked, key=lambda one: one.arrives)
    aborts: list[tuple[int, Request]] = []
    step = 0
    while waiting or not core.is_done:
        for step_due, request in aborts:
            if step_due == step:
                core.abort(request)
        while waiting and waiting[0].arrives <= step:
            one = waiting.pop(0)
            request = one.request()
            assert core.add(request) == len(played)
            played.append((request, []))
            if one.aborted_after is not None:
                aborts.append((step + 1 + one.aborted_after, request))
        for token in core.step():
            played[token.request_index][1].append(token)
        step += 1
    return played


def assert_answered_as_alone(
    asked: list[Asked], played: list[tuple[Request, list[Token]]], new_engine: Callable[[], Any]
) -> None:
    """What :func:`play` made of ``asked`` is, bit for bit, what each gets alone; a prefix of it where aborted."""
    in_order = sorted(asked, key=lambda one: one.arrives)
    for one, (request, tokens) in zip(in_order, played, strict=True):
        alone = one.alone(new_engine())
        for sequence in request.sequences:
            streamed = [token for token in tokens if token.sequence_index == sequence.index]
            assert_streamed(sequence, streamed)
        if any(sequence.finish_reason == "abort" for sequence in request.sequences):
            assert one.aborted_after is not None
            for cut, whole in zip(request.sequences, alone.sequences, strict=False):
                if one.params.num_beams == 1:
                    assert cut.output == whole.output[: cut.num_output]
                    assert cut.logprobs == whole.logprobs[: cut.num_output]
        else:
            assert answers(request) == answers(alone)


def assert_streamed(sequence: Sequence, tokens: list[Token]) -> None:
    if sequence.request.beam_search and sequence.finish_reason == "abort":
        assert not tokens
        return
    assert [token.token_id for token in tokens] == sequence.output
    assert [token.logprobs for token in tokens if token.logprobs] == sequence.logprobs
    reasons = [token.finish_reason for token in tokens]
    assert reasons[:-1] == [None] * len(reasons[:-1])
    assert not tokens or (reasons[-1] or "abort") == sequence.finish_reason


def assert_mixtures_answer_as_alone(directory: Path, seeds: Iterable[int], text: list[int]) -> Counter[str]:
    """Play a schedule of each seed on the engine in ``directory``, whose sequences have ``MAX_SEQ_LEN`` tokens.

    Args:
        directory: with blocks of 32 tokens.
        text: 1,000 token ids to make prompts of.

    Returns:
        What happened to requests, and how often.
    """
    happened: Counter[str] = Counter()
    lonely = Engine.load(directory, threads=1, num_blocks=9)  # nor does it matter how many threads there are
    for num_blocks in (6, 7, 8, 9):
        engine = Engine.load(directory, threads=2, num_blocks=num_blocks)
        for seed in seeds:
            if seed % 4 == num_blocks - 6:
                happened += play_mixture(engine, lonely, random.Random(seed), text)
    return happened


def play_mixture(engine: Engine, lonely: Engine, rng: random.Random, text: list[int]) -> Counter[str]:
    """Play one schedule on ``engine``, compare it with the answers of ``lonely``, and say how often what happened."""
    asked = [make_asked(rng, text) for _ in range(rng.randint(3, 7))]
    max_batch_size = rng.randint(3, 8)
    options = CoreOptions(
        max_batch_size,
        max_batch_tokens=rng.choice([max_batch_size, 13, 40, 150]),
        prompt_tokens_beside=rng.choice([None, 1, 20]),
        prefix_caching=rng.random() < 0.7,
        max_drafts=rng.choice([0, 2, 6]),
    )
    core = Core(engine, options)
    make_guesses_cheap(core)
    played = play(core, asked)
    assert_nothing_is_owned(engine)
    assert_answered_as_alone(asked, played, lambda: lonely)
    for request, _ in played:
        assert_judged_as_one_prefill(lonely, request)
    statistics = core.statistics
    happened = Counter(f"ended by {sequence.finish_reason}" for request, _ in played for sequence in request.sequences)
    happened["preempted"] = statistics.num_preempted
    happened["found in the cache"] = statistics.num_prefix_tokens
    happened["guessed rightly"] = statistics.num_accepted
    happened["guessed wrongly"] = statistics.num_drafts - statistics.num_accepted
    return happened


def make_asked(rng: random.Random, text: list[int]) -> Asked:
    """A prompt of ``text``, beginning at its start or repeating itself or neither."""
    start = rng.choice([0, 0, rng.randrange(500)])
    prompt = text[start : start + rng.randint(1, 90)] * rng.choice([1, 1, 2])
    logprobs = rng.choice([None, 0, 3])
    params = {"max_tokens": rng.randint(1, 24), "logprobs": logprobs, "prompt_logprobs": rng.choice([None, None, 1])}
    kind = rng.choice(["greedy", "sampled", "sampled", "beams"])
    if kind == "greedy":
        params["temperature"] = 0
    elif kind == "sampled":
        params |= {"temperature": rng.choice([0.3, 1.0]), "top_k": rng.choice([0, 20]), "n": rng.randint(1, 3)}
        params |= {"seed": rng.randrange(100), "repetition_penalty": rng.choice([1.0, 1.2])}
    else:
        prompt = prompt[:30]  # the beams' blocks must fit into the pool together
        params = {"temperature": 0, "max_tokens": rng.randint(1, 8), "num_beams": rng.randint(2, 3)}
    aborted_after = rng.choice([None, None, None, rng.randint(0, 12)])
    stop = frozenset(rng.sample(text, 5))
    return Asked(
        tuple(prompt[: MAX_SEQ_LEN - 1]), SamplingParams(**params), stop, False, rng.randrange(12), aborted_after
    )


def assert_judged_as_one_prefill(engine: Engine, request: Request) -> None:
    """The log probabilities of an answer are those of feeding prompt and answer at once; samples copy no mistake."""
    for sequence in request.sequences:
        if sequence.logprobs:
            rows = run_alone(engine, sequence.token_ids)[len(request.prompt) - 1 : -1]
            expected = [
                token_logprobs(row, i, request.params.logprobs) for i, row in zip(sequence.output, rows, strict=True)
            ]
            assert sequence.logprobs == expected
