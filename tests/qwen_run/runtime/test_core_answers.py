"""The decode loop over a scripted engine: no model, and logits that any wrong table, length or index changes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases.answering import generate
from cases.scripted_engine import VOCAB_SIZE, ScriptedEngine, expected_tokens, scripted_logits
from qwen_engine.errors import EngineError, RequestError
from qwen_run.runtime.chunk import Chunk
from qwen_run.runtime.core import build_batch
from qwen_run.runtime.request import Request, Token
from qwen_run.sampling.sample import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


def answer(engine: ScriptedEngine, *requests: Request, **limits: int) -> list[Token]:
    tokens = list(generate(engine, requests, **limits))  # type: ignore[arg-type]
    assert engine.cache.num_free == engine.cache.num_blocks
    for index, request in enumerate(requests):
        own = [token for token in tokens if token.request_index == index]
        assert [token.token_id for token in own] == request.sequences[0].output
        assert [token.finish_reason for token in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == request.sequences[0].finish_reason is not None
    return tokens


def test_build_batch() -> None:
    long, short = (Request(prompt, GREEDY).sequences[0] for prompt in ((5, 6, 7, 8, 9), (1, 2, 3)))
    long.num_cached, long.block_ids = 2, [4, 0]
    short.num_cached, short.block_ids = 2, [7]
    batch = build_batch([Chunk(long, [7, 8], 0, 0, 2), Chunk(short, [3, 9, 9], 2, 3, 2)])
    expected = {
        "input_ids": ([7, 8, 3, 9, 9], np.int64),
        "cumulative_lengths": ([0, 2, 5], np.int32),
        "past_lengths": ([2, 2], np.int32),
        "block_table": ([[4, 0], [7, 0]], np.int32),
        "logits_indices": ([2, 3, 4], np.int64),
    }
    for name, (values, dtype) in expected.items():
        array = getattr(batch, name)
        assert (array.tolist(), array.dtype, array.flags.c_contiguous) == (values, dtype, True), name


def test_no_logits_in_the_middle_of_a_prompt() -> None:
    engine = ScriptedEngine()
    answer(engine, Request((1, 2, 3, 4, 5), replace(GREEDY, max_tokens=1)), max_batch_tokens=2)
    assert [batch.logits_indices.tolist() for batch in engine.batches] == [[], [], [0]]
    assert [batch.logits_indices.dtype for batch in engine.batches] == [np.int64] * 3


def test_greedy_answer() -> None:
    request = Request((1, 2, 3), GREEDY)
    answer(ScriptedEngine(), request)
    assert request.sequences[0].output == expected_tokens((1, 2, 3), 6)
    assert request.sequences[0].finish_reason == "length"


def test_the_repetition_penalty_falls_on_prompt_and_answer() -> None:
    """Divided or multiplied by a million, a seen token wins only against worse ones."""
    request = Request((4, 9), SamplingParams(temperature=0.0, repetition_penalty=100, max_tokens=8))
    context = [4, 9]
    for _ in range(8):
        logits = scripted_logits(np.array(context, np.int32) + 1)
        logits[context] *= np.where(logits[context] < 0, 100, 0.01)
        context.append(int(np.argmax(logits)))
    answer(ScriptedEngine(), request)
    assert request.sequences[0].output == context[2:]


def test_stop_token_ends_the_answer_and_is_its_last_token() -> None:
    answer_ids = expected_tokens((1, 2, 3), 6)
    stop = answer_ids[2]
    request = Request((1, 2, 3), GREEDY, stop_token_ids=frozenset({stop, 99}))
    answer(ScriptedEngine(), request)
    assert request.sequences[0].output == answer_ids[: answer_ids.index(stop) + 1]
    assert request.sequences[0].finish_reason == "stop"


def test_stop_token_as_the_last_allowed_one_is_a_stop() -> None:
    first = expected_tokens((1, 2, 3), 1)[0]
    request = Request((1, 2, 3), replace(GREEDY, max_tokens=1), stop_token_ids=frozenset({first}))
    answer(ScriptedEngine(), request)
    assert (request.sequences[0].output, request.sequences[0].finish_reason) == ([first], "stop")


@pytest.mark.parametrize(("length", "expected"), [(27, 3), (29, 1)])
def test_the_engine_ends_an_answer_that_fills_it(length: int, expected: int) -> None:
    request = Request((1,) * length, GREEDY)
    answer(ScriptedEngine(num_blocks=8, max_seq_len=30), request)
    assert len(request.sequences[0].output) == expected
    assert request.sequences[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ((), "the prompt is empty"),
        ((1,) * 30, "the prompt has 30 tokens, the engine takes 29 .*shorten it, .*--max-seq-len"),
        ((1, VOCAB_SIZE, 2), "the prompt holds token 11, expected 0 to 10"),
        ((1, -1), "the prompt holds token -1, expected 0 to 10"),
    ],
)
def test_a_bad_prompt_is_refused_at_once(prompt: tuple[int, ...], message: str) -> None:
    engine: Any = ScriptedEngine(max_seq_len=30)
    with pytest.raises(RequestError, match=message):
        generate(engine, [Request(prompt, GREEDY)])
    with pytest.raises(RequestError, match=message.replace("the prompt", "prompt 2")):
        generate(engine, [Request((1,), GREEDY), Request(prompt, GREEDY)])
    assert engine.batches == []


def test_tokens_come_as_soon_as_they_are_known() -> None:
    engine: Any = ScriptedEngine()
    tokens = generate(engine, [Request((1, 2), GREEDY)])
    for runs in (1, 2, 3):
        next(tokens)
        assert len(engine.batches) == runs


def test_logits_are_those_the_token_was_sampled_from() -> None:
    engine: Any = ScriptedEngine()
    request = Request((1, 2), GREEDY)
    tokens = list(generate(engine, [request], keep_logits=True))
    for count, token in enumerate(tokens):
        history = np.array([1, 2, *request.sequences[0].output[:count]], np.int32) + 1
        np.testing.assert_array_equal(token.logits, scripted_logits(history))
    assert answer(ScriptedEngine(), Request((1, 2), GREEDY))[0].logits is None


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_early_frees_every_block(taken: int) -> None:
    engine: Any = ScriptedEngine()
    requests = [Request((index + 1,) * (3 * index + 2), GREEDY) for index in range(4)]
    tokens = generate(engine, requests, max_batch_size=3, max_batch_tokens=7)
    for _ in range(taken):
        next(tokens)
    assert (engine.cache.num_free < engine.cache.num_blocks) == (taken > 0)
    tokens.close()
    assert engine.cache.num_free == engine.cache.num_blocks
    assert all(request.sequences[0].block_ids == [] for request in requests)


def test_an_engine_that_fails_leaves_no_block_behind() -> None:
    engine: Any = ScriptedEngine()
    engine.fails_after = 2
    with pytest.raises(EngineError, match="scripted failure"):
        list(generate(engine, [Request((1, 2), GREEDY), Request((3,), GREEDY)]))
    assert engine.cache.num_free == engine.cache.num_blocks


@dataclass(frozen=True)
class Load:
    """Requests and limits, sized so that prompts are chunked and requests preempted often."""

    prompts: list[tuple[tuple[int, ...], SamplingParams]]
    stop_token_ids: frozenset[int]
    num_blocks: int
    block_size: int
    max_batch_size: int
    max_batch_tokens: int

    def requests(self) -> list[Request]:
        return [Request(prompt, params, self.stop_token_ids) for prompt, params in self.prompts]

    def engine(self, num_blocks: int) -> ScriptedEngine:
        return ScriptedEngine(num_blocks, self.block_size, max_seq_len=30)


@st.composite
def loads(draw: st.DrawFn) -> Load:
    params = st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.7, 1.5]),
        top_k=st.sampled_from([0, 3]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        seed=st.integers(0, 3),
        max_tokens=st.integers(1, 12),
    )
    prompt = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=29).map(tuple)
    block_size = draw(st.sampled_from([1, 2, 4, 8]))
    one_sequence = -(-30 // block_size)
    return Load(
        prompts=draw(st.lists(st.tuples(prompt, params), min_size=1, max_size=7)),
        stop_token_ids=draw(st.frozensets(st.integers(0, VOCAB_SIZE - 1), max_size=1)),
        num_blocks=one_sequence + draw(st.integers(0, 2 * one_sequence)),
        block_size=block_size,
        max_batch_size=draw(st.integers(1, 6)),
        max_batch_tokens=draw(st.integers(1, 40)),
    )


@settings(max_examples=300, deadline=None)
@given(loads())
def test_an_answer_does_not_depend_on_batch_mates_budgets_or_pool(load: Load) -> None:
    together = load.requests()
    engine = load.engine(load.num_blocks)
    answer(engine, *together, max_batch_size=load.max_batch_size, max_batch_tokens=load.max_batch_tokens)
    for batch in engine.batches:
        assert len(batch.past_lengths) <= load.max_batch_size
        assert 0 < len(batch.input_ids) <= load.max_batch_tokens
    for request, alone in zip(together, load.requests(), strict=True):
        answer(load.engine(30), alone)
        assert (request.sequences[0].output, request.sequences[0].finish_reason) == (
            alone.sequences[0].output,
            alone.sequences[0].finish_reason,
        )


@pytest.mark.parametrize(("prefix_caching", "fed"), [(True, 1), (False, 5)])
def test_a_prompt_is_fed_again_where_that_is_asked_for(prefix_caching: bool, fed: int) -> None:
    engine: Any = ScriptedEngine()
    for _ in range(2):
        engine.batches.clear()
        list(generate(engine, [Request((1, 2, 3, 4, 5), GREEDY)], prefix_caching=prefix_caching))
    assert len(engine.batches[0].input_ids) == fed
