"""Several batches on their way: the same answers as with one, nobody left out, no block lost, whatever is lost."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cases.scripted_engine import ScriptedEngine, ScriptedStages
from qwen_engine.errors import EngineError
from qwen_run.runtime.core import Core, CoreOptions
from qwen_run.runtime.request import Request
from qwen_run.sampling.params import SamplingParams

Answers = list[list[tuple[Any, ...]]]


def some_requests(seed: int, count: int = 9) -> list[Request]:
    """Prompts, some of which begin alike; samples, beams, judged prompts, seeds."""
    rng = random.Random(seed)
    shared = [rng.randrange(11) for _ in range(14)]
    requests = []
    for index in range(count):
        prompt = shared[: rng.choice([0, 8, 14])] + [rng.randrange(11) for _ in range(rng.choice([1, 3, 9]))]
        kind = rng.choice(["greedy", "seed", "samples", "beams", "judged", "logprobs"])
        options: dict[str, Any] = {
            "greedy": {"temperature": 0},
            "seed": {"temperature": 0.9, "seed": index},
            "samples": {"temperature": 0.9, "seed": index, "n": 3},
            "beams": {"temperature": 0, "num_beams": 2},
            "judged": {"temperature": 0, "prompt_logprobs": 2},
            "logprobs": {"temperature": 0, "logprobs": 2},
        }[kind]
        requests.append(Request(tuple(prompt), SamplingParams(max_tokens=rng.randrange(1, 7), **options)))
    return requests


def answers(requests: list[Request]) -> Answers:
    """All that a request has been told."""
    return [
        [(s.token_ids, s.finish_reason, s.score, s.logprobs) for s in request.sequences]
        + [(request.prompt_logprobs, request.is_finished)]
        for request in requests
    ]


def run(core: Core, requests: list[Request], at_once: int = 4) -> Answers:
    """Answer ``requests``, which come ``at_once`` at a time."""
    waiting = list(requests)
    while waiting or not core.is_done:
        for request in waiting[:at_once]:
            core.add(request)
        del waiting[:at_once]
        core.step()
    return answers(requests)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_stages=st.integers(1, 5),
    num_blocks=st.sampled_from([16, 20, 40]),
    budget=st.sampled_from([6, 13, 64]),
    drafts=st.sampled_from([0, 3]),
    prefixes=st.booleans(),
)
def test_answers_are_those_of_one_batch_at_a_time(
    seed: int, num_stages: int, num_blocks: int, budget: int, drafts: int, prefixes: bool
) -> None:
    options = CoreOptions(max_batch_size=6, max_batch_tokens=budget, max_drafts=drafts, prefix_caching=prefixes)
    alone = Core(ScriptedEngine(num_blocks=40), CoreOptions(max_batch_size=6, max_batch_tokens=64))
    engine = ScriptedStages(num_stages, num_blocks=num_blocks)
    assert run(Core(engine, options), some_requests(seed)) == run(alone, some_requests(seed))
    assert engine.cache.num_free == num_blocks


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), num_stages=st.integers(2, 4), lost=st.sets(st.integers(1, 60), max_size=4))
def test_a_lost_stage_changes_no_answer(seed: int, num_stages: int, lost: set[int]) -> None:
    """Everything that runs is fed again; blocks that others wrote to are zeros before they are used."""
    expected = run(Core(ScriptedEngine()), some_requests(seed))
    engine = ScriptedStages(num_stages, num_blocks=16)
    engine.loses = lost
    core = Core(engine, CoreOptions(max_batch_size=5, max_batch_tokens=9, max_drafts=2))
    assert run(core, some_requests(seed)) == expected
    assert engine.cache.num_free == 16
    assert core.statistics.num_lost_stages == sum(number <= engine.num_collects for number in lost)


@settings(max_examples=60, deadline=None)
@example(seed=2, num_stages=2, refused={12, 13})  # one of two beams that are fed together
@given(seed=st.integers(0, 10**6), num_stages=st.integers(2, 4), refused=st.sets(st.integers(1, 60), max_size=4))
def test_a_refused_batch_is_fed_apart_and_what_followed_again(seed: int, num_stages: int, refused: set[int]) -> None:
    """Where a batch was refused and its parts are not, no answer changes."""
    expected = run(Core(ScriptedEngine()), some_requests(seed))
    engine = ScriptedStages(num_stages, num_blocks=20)
    core = Core(engine, CoreOptions(max_batch_size=5, max_batch_tokens=9, max_drafts=2))
    engine.refuses = {2 * number for number in refused}
    failed: list[Any] = []
    waiting = requests = some_requests(seed)
    waiting = list(requests)
    while waiting or not core.is_done:
        for request in waiting[:4]:
            core.add(request)
        del waiting[:4]
        core.step(failed)
    told = {sequence.request.number for sequence in failed}
    found = answers(requests)
    assert [each for n, each in enumerate(found) if n not in told] == [
        each for n, each in enumerate(expected) if n not in told
    ]
    assert len(told) <= len(refused)  # only where the part itself was refused, too
    assert engine.cache.num_free == 20


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), num_stages=st.integers(2, 4), when=st.lists(st.integers(0, 20), max_size=6))
def test_requests_that_are_given_up_leave_nothing(seed: int, num_stages: int, when: list[int]) -> None:
    """Also while they are on their way; the blocks they write to then belong to others, who clear them first."""
    expected = run(Core(ScriptedEngine()), some_requests(seed))
    engine = ScriptedStages(num_stages, num_blocks=16)
    core = Core(engine, CoreOptions(max_batch_size=6, max_batch_tokens=12))
    requests = some_requests(seed)
    for request in requests:
        core.add(request)
    steps = 0
    while not core.is_done:
        for number in (n for n, step in enumerate(when) if step == steps):
            core.abort(requests[number])
        core.step()
        steps += 1
    whole = [n for n, request in enumerate(requests) if all(s.finish_reason != "abort" for s in request.sequences)]
    found = answers(requests)
    assert [found[n] for n in whole] == [expected[n] for n in whole]
    assert engine.cache.num_free == 16


def test_as_many_are_on_their_way_as_there_are_stages() -> None:
    """Those that answer are divided among the batches, and no batch is without."""
    engine = ScriptedStages(3, num_blocks=60)
    core = Core(engine, CoreOptions(max_batch_size=8))
    for index in range(8):
        core.add(Request((index,) * 3, SamplingParams(temperature=0, max_tokens=24)))
    while not core.is_done:
        core.step()
    sizes = [len(batch.input_ids) for batch in engine.batches]
    assert engine.most_in_flight == 3
    assert max(sizes[3:]) == 3  # of 8 in 3 batches
    assert len(sizes) <= 3 * 24 + 6


def test_a_long_prompt_follows_itself_through_the_stages() -> None:
    engine = ScriptedStages(4, num_blocks=60, max_seq_len=120)
    core = Core(engine, CoreOptions(max_batch_tokens=16))
    core.add(Request((1, 2, 3, 4) * 20, SamplingParams(temperature=0, max_tokens=1)))
    core.step()
    assert [len(batch.input_ids) for batch, _ in engine.sent] == [16] * 3  # the first has come back
    assert [int(batch.past_lengths[0]) for batch, _ in engine.sent] == [16, 32, 48]


def test_nobody_waits_for_ever() -> None:
    """Every one of those that answer gets its token while as many batches come back as there are stages, and one."""
    engine = ScriptedStages(4, num_blocks=100)
    core = Core(engine, CoreOptions(max_batch_size=11))
    requests = [Request((index,) * 3, SamplingParams(temperature=0, max_tokens=20 + index % 3)) for index in range(11)]
    for request in requests:
        core.add(request)
    told, late = dict.fromkeys(range(11), 0), 0
    for step in range(1000):
        if core.is_done:
            break
        for token in core.step():
            late = max(late, step - told[token.request_index])
            told[token.request_index] = step
    assert core.is_done
    assert late <= 5


def test_a_request_that_loses_stages_again_and_again_is_an_error() -> None:
    engine = ScriptedStages(2)
    engine.loses = set(range(3, 100))
    core = Core(engine)
    core.add(Request((1, 2), SamplingParams(temperature=0, max_tokens=20)))
    with pytest.raises(EngineError, match="a scripted stage is lost, 6 times before another token was there"):
        run(core, [])
    core.close()
    assert engine.cache.num_free == engine.cache.num_blocks


def test_a_core_that_is_closed_takes_no_result_of_what_is_on_its_way() -> None:
    engine = ScriptedStages(3)
    core = Core(engine)
    first = Request((1, 2), SamplingParams(temperature=0, max_tokens=9))
    core.add(first)
    core.add(Request((5,) * 20, SamplingParams(temperature=0, max_tokens=9)))
    for _ in range(3):
        core.step()
    assert engine.sent
    core.close()
    second = Request((3, 4), SamplingParams(temperature=0, max_tokens=4))
    core.add(second)
    while not core.is_done:
        core.step()
    alone = Request((3, 4), SamplingParams(temperature=0, max_tokens=4))
    assert second.sequences[0].token_ids == run(Core(ScriptedEngine()), [alone])[0][0][0]
    assert engine.cache.num_free == engine.cache.num_blocks


def test_logits_are_kept_as_of_one_batch() -> None:
    def kept(engine: Any) -> list[bytes]:
        core = Core(engine, CoreOptions(keep_logits=True, max_batch_tokens=16))
        for request in some_requests(5, 4):
            core.add(request)
        found = {}
        while not core.is_done:
            for token in core.step():
                if token.logits is not None:
                    found[token.request_index, token.sequence_index, len(found)] = np.asarray(token.logits).tobytes()
        return sorted(found.values())

    assert kept(ScriptedStages(3)) == kept(ScriptedEngine())
