"""Requests that come and go, and the check that what happens around a request does not change its answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwen_run.core import Core, CoreOptions
from qwen_run.request import Request, Sequence, Token
from qwen_run.sampling import SamplingParams


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
