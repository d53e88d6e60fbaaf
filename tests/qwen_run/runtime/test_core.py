"""Many requests at once: whatever happens around a request, its answers are those it gets alone.

More than 400 lines: all tests run the scripted engine and look at what it is left with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases.scripted_engine import VOCAB_SIZE, ScriptedEngine
from cases.traffic import Asked, answers, assert_answered_as_alone, assert_nothing_is_owned, make_guesses_cheap, play
from qwen_engine.errors import EngineError, RequestError
from qwen_engine.sizes import ExpertSizes
from qwen_run.runtime.core import Core, CoreOptions
from qwen_run.runtime.engine import Engine
from qwen_run.runtime.request import Request, Token
from qwen_run.sampling.sample import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)
MAX_SEQ_LEN = 30


def make_core(engine: ScriptedEngine | None = None, **options: Any) -> Core:
    return Core(engine or ScriptedEngine(), CoreOptions(**options))  # type: ignore[arg-type]


def finish(core: Core) -> list[Token]:
    tokens = []
    while not core.is_done:
        tokens += core.step()
    return tokens


@dataclass(frozen=True)
class Traffic:
    """Requests and limits, sized so that prompts are chunked, shared and preempted often."""

    asked: list[Asked]
    num_blocks: int
    block_size: int
    options: CoreOptions

    def engine(self, num_blocks: int) -> ScriptedEngine:
        engine = ScriptedEngine(num_blocks, self.block_size, MAX_SEQ_LEN)
        engine.leaves_drafts = self.options.max_drafts > 0
        return engine


logprobs = st.sampled_from([None, None, 0, 2])
sampled = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.7, 1.5]),
    top_k=st.sampled_from([0, 3]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 3),
    max_tokens=st.integers(1, 14),
    n=st.integers(1, 4),
    logprobs=logprobs,
    prompt_logprobs=logprobs,
)
greedy = st.builds(
    SamplingParams, temperature=st.just(0.0), max_tokens=st.integers(1, 20), logprobs=logprobs, prompt_logprobs=logprobs
)
beams = st.builds(
    SamplingParams,
    temperature=st.just(0.0),
    max_tokens=st.integers(1, 8),
    num_beams=st.integers(2, 3),
    early_stopping=st.sampled_from([False, True]),
)


@st.composite
def traffic(draw: st.DrawFn) -> Traffic:
    bases = [draw(st.lists(st.integers(0, 2), min_size=20, max_size=20)), [0, 1, 2] * 7]
    block_size = draw(st.sampled_from([1, 2, 4, 8]))
    one_sequence = -(-MAX_SEQ_LEN // block_size)
    num_blocks = one_sequence + draw(st.integers(0, one_sequence))

    def asked() -> Asked:
        end = draw(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=6))
        prompt = tuple(draw(st.sampled_from(bases))[: draw(st.integers(1, 20))] + end)
        params = draw(st.one_of(greedy, sampled, beams))
        longest = min(len(prompt) + params.max_tokens, MAX_SEQ_LEN)
        if params.num_beams * -(-longest // block_size) > num_blocks:
            params = replace(params, num_beams=1, early_stopping=False)
        stop = draw(st.frozensets(st.integers(0, VOCAB_SIZE - 1), max_size=1))
        aborted_after = draw(st.one_of(st.none(), st.none(), st.integers(0, 10)))
        return Asked(prompt, params, stop, draw(st.booleans()), draw(st.integers(0, 15)), aborted_after)

    return Traffic(
        [asked() for _ in range(draw(st.integers(1, 7)))],
        num_blocks,
        block_size,
        CoreOptions(
            max_batch_size=(max_batch_size := draw(st.integers(3, 6))),
            max_batch_tokens=draw(st.integers(max_batch_size, 40)),
            prompt_tokens_beside=draw(st.none() | st.integers(1, 9)),
            prefix_caching=draw(st.sampled_from([True, True, False])),
            max_drafts=draw(st.sampled_from([0, 1, 5])),
        ),
    )


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(traffic())
def test_any_mixture_answers_as_each_request_alone(load: Traffic) -> None:
    engine = load.engine(load.num_blocks)
    core = Core(engine, load.options)  # type: ignore[arg-type]
    make_guesses_cheap(core)
    played = play(core, load.asked)
    assert_nothing_is_owned(engine)
    for batch in engine.batches:
        assert 0 < len(batch.past_lengths) <= load.options.max_batch_size
        assert 0 < len(batch.input_ids) <= load.options.step_tokens
    statistics = core.statistics
    assert (statistics.num_running, statistics.num_waiting, statistics.num_steps) == (0, 0, len(engine.batches))
    assert_answered_as_alone(load.asked, played, lambda: load.engine(200))


def answer(engine: ScriptedEngine, request: Request, **options: Any) -> Core:
    core = make_core(engine, **options)
    make_guesses_cheap(core)
    core.add(request)
    finish(core)
    assert_nothing_is_owned(engine)
    return core


def test_a_second_turn_feeds_only_what_is_new() -> None:
    engine = ScriptedEngine()
    first = Request((1, 2, 3, 4, 5, 6), replace(GREEDY, max_tokens=8))
    answer(engine, first)
    engine.batches.clear()
    answer(engine, Request((*first.prompt, *first.sequences[0].output, 7, 7, 7), GREEDY))
    assert engine.batches[0].past_lengths.tolist() == [12]  # 13 of 14 tokens were fed, in blocks of 4
    assert len(engine.batches[0].input_ids) == 5


def test_samples_share_their_prompt() -> None:
    engine = ScriptedEngine(num_blocks=6 + 4 + 4)
    params = SamplingParams(temperature=1.0, max_tokens=3, n=4)
    core = answer(engine, Request((1, 2, 3) * 9, params))
    assert [len(batch.input_ids) for batch in engine.batches] == [27, 4, 4]
    assert core.statistics.num_preempted == 0


def test_samples_differ_and_the_first_is_that_of_a_single_one() -> None:
    params = SamplingParams(temperature=1.5, max_tokens=8, repetition_penalty=5.0, seed=0)
    samples, single = (Request((1, 2, 3), replace(params, n=n)) for n in (5, 1))
    answer(ScriptedEngine(), samples)
    answer(ScriptedEngine(), single)
    outputs = [tuple(sequence.output) for sequence in samples.sequences]
    assert len(set(outputs)) == 5
    assert outputs[0] == tuple(single.sequences[0].output)


def test_requests_without_a_seed_draw_one_that_repeats_them() -> None:
    params = SamplingParams(temperature=1.5, max_tokens=8)
    drawn = [Request((1, 2, 3), params) for _ in range(4)]
    for request in drawn:
        answer(ScriptedEngine(), request)
    assert len({request.seed for request in drawn}) == 4
    assert len({tuple(request.sequences[0].output) for request in drawn}) > 1
    for request in drawn:
        answer(ScriptedEngine(), again := Request((1, 2, 3), replace(params, seed=request.seed)))
        assert answers(again) == answers(request)


def test_several_answers_at_temperature_0_are_equal() -> None:
    answer(ScriptedEngine(), request := Request((1, 2, 3), replace(GREEDY, n=3)))
    answer(ScriptedEngine(), single := Request((1, 2, 3), GREEDY))
    assert [sequence.output for sequence in request.sequences] == [single.sequences[0].output] * 3


@pytest.mark.parametrize("token_id", [2**63, 10**30, -1])
def test_ids_are_compared_with_the_vocabulary_before_anything_is_made_of_them(token_id: int) -> None:
    request = Request((1, token_id), replace(GREEDY, repetition_penalty=1.5))
    with pytest.raises(RequestError, match=f"the prompt holds token {token_id}, expected 0 to 10"):
        make_core().add(request)


def test_min_tokens_where_every_token_ends_an_answer_is_refused() -> None:
    params = replace(GREEDY, min_tokens=1, stop_token_ids=range(11))
    with pytest.raises(RequestError, match="min_tokens is 1 and each of the 11 tokens ends an answer"):
        make_core().add(Request((1,), params))
    core = answer(ScriptedEngine(), request := Request((1,), replace(params, min_tokens=0)))
    assert (core.is_done, request.sequences[0].num_output) == (True, 1)


def test_beams_that_all_end_at_once_are_answers() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=9, num_beams=2, stop_token_ids=range(11), n=2)
    answer(ScriptedEngine(), request := Request((1, 2), params))
    assert [sequence.finish_reason for sequence in request.sequences] == ["stop", "stop"]
    assert [sequence.num_output for sequence in request.sequences] == [1, 1]


def test_guesses_save_runs_and_change_nothing() -> None:
    plain, guessed = (Request((0, 1, 2) * 4, replace(GREEDY, max_tokens=14, logprobs=1)) for _ in range(2))
    answer(engine := ScriptedEngine(), plain)
    assert len(engine.batches) == 14
    engine = ScriptedEngine()
    engine.leaves_drafts = True
    statistics = answer(engine, guessed, max_drafts=4).statistics
    assert answers(guessed) == answers(plain)
    assert len(engine.batches) < 14
    assert statistics.num_drafts >= statistics.num_accepted == 14 - len(engine.batches)


def test_abort_after_close_does_nothing() -> None:
    core = make_core(engine := ScriptedEngine())
    core.add(request := Request((1, 2, 3), GREEDY))
    core.step()
    core.close()
    core.abort(request)
    assert request.sequences[0].finish_reason == "abort"
    assert_nothing_is_owned(engine)


def test_nothing_is_guessed_beyond_the_longest_sequence() -> None:
    """The rotary table ends there: an engine refuses the whole batch."""
    for max_seq_len in range(20, 40):
        engine = ScriptedEngine(max_seq_len=max_seq_len)
        engine.leaves_drafts = True
        core = answer(engine, request := Request((0, 1, 2) * 4, replace(GREEDY, max_tokens=100)), max_drafts=6)
        assert max(int(batch.past_lengths[0]) + len(batch.input_ids) for batch in engine.batches) < max_seq_len
        assert core.statistics.num_drafts
        assert len(request.sequences[0].token_ids) == max_seq_len


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size is 0, expected a whole number, 1 or more"),
        ({"max_batch_tokens": 0}, "max_batch_tokens is 0, expected"),
        ({"max_logprobs": -1}, "max_logprobs is -1, expected a whole number, 0 or more"),
        ({"max_drafts": -1}, "max_drafts is -1, expected a whole number, 0 or more"),
        (
            {"max_batch_size": 600, "max_batch_tokens": 256},
            "max_batch_tokens is 256, expected at least the max_batch_size of 600",
        ),
    ],
)
def test_options_that_would_starve_prompts_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        CoreOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("experts", "given", "expected"),
    [
        (None, {}, 256),
        (None, {"max_batch_size": 600}, 600),
        ((128, 8), {}, 512),  # Qwen3-30B-A3B
        ((60, 4), {}, 480),  # Qwen1.5-MoE-A2.7B
        ((8, 8), {}, 256),
        ((512, 10), {}, 1024),
        ((128, 8), {"max_batch_tokens": 64}, 64),
    ],
)
def test_tokens_of_a_step_suit_the_model(experts: tuple[int, int] | None, given: dict[str, int], expected: int) -> None:
    sizes: Any = SimpleNamespace(experts=None if experts is None else ExpertSizes(*experts, 64, 0, True))
    assert CoreOptions(**given).for_model(sizes).max_batch_tokens == expected  # type: ignore[arg-type]


def test_a_stop_among_accepted_guesses_ends_the_answer() -> None:
    request = Request((0, 1, 2) * 4, replace(GREEDY, max_tokens=14), stop_token_ids=frozenset({1}))
    engine = ScriptedEngine()
    engine.leaves_drafts = True
    answer(engine, request, max_drafts=5)
    assert request.sequences[0].output[-1] == 1
    assert 1 not in request.sequences[0].output[:-1]


def test_prompt_logprobs_do_not_depend_on_chunks_or_hits() -> None:
    engine = ScriptedEngine()
    whole, chunked = (Request((1, 2, 3, 4, 5, 6, 7, 8, 9), replace(GREEDY, prompt_logprobs=2)) for _ in range(2))
    answer(engine, whole)
    answer(engine, chunked, max_batch_size=1, max_batch_tokens=2)
    assert whole.prompt_logprobs == chunked.prompt_logprobs
    assert [found and found.logprob for found in whole.prompt_logprobs][:1] == [None]
    assert len(whole.prompt_logprobs) == 9
    assert all(found and len(found.top_logprobs) == 2 for found in whole.prompt_logprobs[1:])


def test_few_logits_at_a_time_for_prompts_that_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def judged(most: int, num_others: int) -> tuple[list[Any], int]:
        monkeypatch.setattr("qwen_run.runtime.scheduler.MAX_JUDGED", most)
        engine = ScriptedEngine(num_blocks=400, max_seq_len=300)
        core = make_core(engine, max_batch_tokens=500)
        asked = [Request((1, 2, 3, *[i] * 120), replace(GREEDY, prompt_logprobs=1)) for i in range(3)]
        for request in asked:
            core.add(request)
        for _ in range(num_others):
            core.add(Request((5,) * 20, GREEDY))
        finish(core)
        assert_nothing_is_owned(engine)
        return [answers(request) for request in asked], max(len(batch.logits_indices) for batch in engine.batches)

    whole, all_at_once = judged(10**6, 0)
    assert all_at_once == 3 * 123
    assert judged(64, 4) == (whole, 64 + 4 + 2)  # while the others, and two of these, answer
    assert judged(1, 0) == (whole, 1 + 1)  # one is judged while the one before answers


@pytest.mark.parametrize("field", ["logprobs", "prompt_logprobs"])
def test_more_log_probabilities_than_the_engine_tells_are_refused(field: str) -> None:
    make_core().check(Request((1,), replace(GREEDY, **{field: 20})))
    make_core(max_logprobs=100).check(Request((1,), replace(GREEDY, **{field: 100})))
    for core, count, most in ((make_core(), 21, 20), (make_core(max_logprobs=3), 4, 3)):
        with pytest.raises(
            RequestError, match=f"^{field} is {count}, expected at most .* max_logprobs, which is {most}"
        ):
            core.add(Request((1,), replace(GREEDY, **{field: count})))


def test_a_short_prompt_beside_many_long_ones_answers_soon_and_nobody_answers_otherwise() -> None:
    def requests() -> list[Request]:
        long = [Request(tuple(i * j % 3 for j in range(90)), replace(GREEDY, max_tokens=20)) for i in range(1, 31)]
        return [*long, Request((1, 2, 3), replace(GREEDY, max_tokens=9))]

    together = requests()
    engine = ScriptedEngine(num_blocks=400, max_seq_len=120)
    core = make_core(engine, max_batch_size=8, max_batch_tokens=32)
    for request in together[:-1]:
        core.add(request)
    for _ in range(30):
        core.step()
    core.add(short := together[-1])
    steps = 0
    while not short.is_finished:
        core.step()
        steps += 1
    assert steps <= 9 + 2
    assert not any(request.is_finished for request in together[8:-1])
    finish(core)
    assert_nothing_is_owned(engine)
    assert max(len(batch.past_lengths) for batch in engine.batches) == 8
    for request, alone in zip(together, requests(), strict=True):
        answer(ScriptedEngine(num_blocks=400, max_seq_len=120), alone)
        assert answers(request) == answers(alone)


def test_abort_anywhere() -> None:
    for steps in range(8):
        engine = ScriptedEngine(num_blocks=12)
        core = make_core(engine, max_batch_size=4, max_batch_tokens=5)
        beams = SamplingParams(temperature=0.0, max_tokens=4, num_beams=2)
        requests = [
            Request((1, 2, 3, 4, 5, 6, 7), SamplingParams(temperature=1.0, max_tokens=9, n=3)),
            Request((1, 2, 3), beams),
            Request((2, 2), GREEDY),
        ]
        for request in requests:
            core.add(request)
        for _ in range(steps):
            core.step()
        for request in requests:
            core.abort(request)
            core.abort(request)
        assert core.is_done
        assert core.step() == []
        assert_nothing_is_owned(engine)
        assert all(request.is_finished for request in requests)


def test_beams_that_cannot_run_together_are_refused() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20, num_beams=5)
    with pytest.raises(RequestError, match="num_beams is 5, expected at most the 4 sequences of a batch"):
        make_core(max_batch_size=4).add(Request((1,), params))
    with pytest.raises(
        RequestError,
        match=r"need 30 cache blocks, there are 8; set fewer beams, .* or 1 MiB or more",
    ):
        make_core(ScriptedEngine(num_blocks=8)).add(Request((1,), params))


def test_a_biased_token_the_model_lacks_is_refused() -> None:
    with pytest.raises(RequestError, match="logit_bias holds token 11, expected 0 to 10"):
        make_core().add(Request((1,), replace(GREEDY, logit_bias={11: 1.0})))


@pytest.mark.parametrize(
    "scheme",
    [
        {"quant": "int4", "group_size": 32, "embedding_quant": "int8"},
        {"quant": "int8", "group_size": 64, "kv_cache_dtype": "int8"},
        {"quant": "none"},
    ],
    ids=lambda scheme: "-".join(map(str, scheme.values())),
)
def test_logits_of_a_real_engine_do_not_depend_on_what_else_it_does(
    tiny_checkpoint: Callable[..., Any], build_engine: Callable[..., Path], scheme: dict[str, Any]
) -> None:
    """The same bits alone on one thread, and batched, chunked, guessed, copied, found again and fed again on two."""
    directory = build_engine(tiny_checkpoint("qwen3-tied").path, max_seq_len=150, **scheme)
    rng = np.random.default_rng(3)
    phrase = rng.integers(0, 131, 45).tolist()

    def requests() -> list[Request]:
        rng = np.random.default_rng(4)
        ends = [rng.integers(0, 131, length).tolist() for length in (1, 20, 33, 2, 5, 40)]
        prompts = [*([*phrase, *end] for end in ends), ends[4], phrase * 2]
        return [
            Request(
                tuple(prompt),
                SamplingParams(
                    temperature=float(i % 2), seed=i, max_tokens=30, n=1 + 2 * (i % 2), prompt_logprobs=i % 3 or None
                ),
            )
            for i, prompt in enumerate(prompts)
        ]

    def logits(core: Core, asked: list[Request]) -> dict[tuple[int, int], list[np.ndarray]]:
        found: dict[tuple[int, int], list[np.ndarray]] = {}
        make_guesses_cheap(core)
        for request in asked:
            core.add(request)
        for token in finish(core):
            assert token.logits is not None
            found.setdefault((token.request_index, token.sequence_index), []).append(token.logits)
        assert core.engine.cache.num_free == core.engine.cache.num_blocks
        return found

    one_thread = Engine.load(directory, threads=1)
    alone, expected = requests(), {}
    for number, request in enumerate(alone):
        rows = logits(Core(one_thread, CoreOptions(prefix_caching=False, keep_logits=True)), [request])
        expected |= {(number, index): arrays for (_, index), arrays in rows.items()}
    smallest = Engine.load(directory, threads=2, num_blocks=one_thread.cache.blocks_for(150) + 2)
    core, together = Core(smallest, CoreOptions(8, 19, max_drafts=3, keep_logits=True)), requests()
    found = logits(core, together)
    statistics = core.statistics
    assert statistics.num_preempted
    assert statistics.num_prefix_tokens
    assert statistics.num_accepted
    assert [answers(request) for request in together] == [answers(request) for request in alone]
    assert found.keys() == expected.keys()
    for key, arrays in found.items():
        np.testing.assert_array_equal(arrays, expected[key])
