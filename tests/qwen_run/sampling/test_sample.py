"""Sampling: random numbers that depend on nothing else, draws that follow the distribution, raw log probabilities."""

import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen_run.sampling.sample
from qwen_engine.errors import EngineError, RequestError
from qwen_run.sampling.logprobs import log_softmax, token_logprobs
from qwen_run.sampling.processors import best_bounded, bounded, distribution
from qwen_run.sampling.sample import Sampled, SamplingContext, SamplingParams, sample, uniform

GREEDY = SamplingParams(temperature=0)


def draw(logits, params, position=0, sample_index=0, prompt=(), answer=()):
    context = SamplingContext(params, prompt)
    for token_id in answer:
        context.append(token_id)
    return sample(logits, params, context, position, params.seed or 0, sample_index)


def test_greedy_takes_the_lowest_id_of_equals_after_the_penalty():
    logits = np.array([1, 5, 5, 6], np.float32)
    assert draw(logits, GREEDY) == Sampled(3)
    assert draw(logits, SamplingParams(temperature=0, repetition_penalty=2.0), prompt=[3]).token_id == 1


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.2, 0.3, 1e-30], np.float32))
    drawn = np.bincount(
        [draw(logits, SamplingParams(seed=7), i // 2, i % 2).token_id for i in range(4000)], minlength=4
    )
    # four standard deviations of a binomial of 4000 draws are 0.032
    np.testing.assert_allclose(drawn / 4000, [0.5, 0.2, 0.3, 0], atol=0.032)


@pytest.mark.parametrize(("number", "drawn"), [(0.0, 1), (0.49, 1), (0.5, 3), (1 - 2**-53, 3)])
def test_impossible_tokens_are_never_drawn(monkeypatch, number, drawn):
    monkeypatch.setattr(qwen_run.sampling.sample, "uniform", lambda seed, position, sample_index: number)
    logits = np.array([-np.inf, 0, -np.inf, 0, -np.inf], np.float32)
    assert draw(logits, SamplingParams()).token_id == drawn


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    vocab_size=st.sampled_from([1, 7, 511, 512, 513, 2000]),
    spread=st.sampled_from([0.0, 3.0, 60.0]),
    temperature=st.sampled_from([1e-6, 0.3, 1.0, 100.0]),
    number=st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1 - 2**-53])),
)
def test_a_draw_among_all_tokens_is_where_the_number_falls(seed, vocab_size, spread, temperature, number):
    """As the inverse of the distribution that is computed in float64, where float32 sums tell tokens apart."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, spread, vocab_size).astype(np.float32)
    logits[generator.random(vocab_size) < 0.2] = -np.inf
    logits[generator.integers(vocab_size)] = 1
    params = SamplingParams(temperature=temperature)
    token_id = qwen_run.sampling.sample.draw(logits, logits.max(), params, number)
    _, probabilities = distribution(logits, params)
    assert probabilities[token_id] > 0
    assert probabilities[:token_id].sum() - 1e-6 <= number <= probabilities[: token_id + 1].sum() + 1e-6


def test_options_that_leave_no_token_are_no_fault_of_the_logits():
    params = SamplingParams(min_tokens=1)
    context = SamplingContext(params, (0,), stop_token_ids=range(4))
    with pytest.raises(RequestError, match="the options of the request leave no token for position 1; exclude fewer"):
        sample(np.zeros(4, np.float32), params, context, 1)
    with pytest.raises(EngineError, match="the logits of position 1 hold nan, expected numbers"):
        sample(np.full(4, np.nan, np.float32), params, context, 1)


def test_random_numbers_are_a_function_of_seed_sample_and_position():
    numbers = {
        (seed, position, index): uniform(seed, position, index)
        for seed in (0, 1, 2**64 - 1) for position in range(100) for index in (0, 1, 1023)
    }  # fmt: skip
    assert len(set(numbers.values())) == 900
    assert all(0 <= number < 1 for number in numbers.values())
    assert uniform(1, 50) == numbers[1, 50, 0]
    for position in (0, 63, 64, 1000):
        bits = np.random.Philox(key=5 + (2 << 64), counter=position).random_raw()
        assert uniform(5, position, 2) == (int(bits) >> 11) / 2**53
    # an answer must not change with the next release: the first 53 bits NumPy's Philox4x64-10 gives for zeros
    assert uniform(0, 0) == (0x02F4BA6408E4D89B >> 11) / 2**53


def test_samples_draw_different_tokens():
    logits, params = np.zeros(1000, np.float32), SamplingParams(n=20)
    assert len({draw(logits, params, 5, index).token_id for index in range(20)}) > 15


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(presence_penalty=1.0)])
def test_logits_that_are_not_numbers(bad, params):
    with pytest.raises(EngineError, match="position 9"):
        draw(np.array([1, bad, 2], np.float32), params, 9, answer=[0])


def test_logprobs_are_those_of_the_raw_distribution():
    logits = np.log(np.array([0.1, 0.4, 0.3, 0.2], np.float32)) + np.float32(11)
    params = SamplingParams(temperature=0, logit_bias={3: 50}, logprobs=2, repetition_penalty=3)
    found = draw(logits, params, prompt=[1])
    assert (found.token_id, found.rank) == (3, 3)
    assert found.logprob == pytest.approx(np.log(0.2), abs=1e-6)
    assert [token_id for token_id, _ in found.top_logprobs] == [1, 2]
    assert [logprob for _, logprob in found.top_logprobs] == pytest.approx(np.log([0.4, 0.3]).tolist(), abs=1e-6)
    assert draw(logits, SamplingParams(temperature=0, logprobs=0)).top_logprobs == ()
    assert draw(logits, GREEDY) == Sampled(1, None, None, None)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1.0, 100.0]), st.integers(0, 40), st.sampled_from([1, 7]))
def test_logprobs_equal_transformers(seed, scale, count, decimals):
    """Its log-softmax is torch's."""
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(seed).normal(0, scale, 37).round(decimals).astype(np.float32)
    expected = torch.log_softmax(torch.from_numpy(logits), dim=-1).numpy()
    np.testing.assert_allclose(log_softmax(logits), expected, rtol=1e-6, atol=1e-6)
    found = token_logprobs(logits, seed % 37, count)
    # of equals the lower id first
    assert [token_id for token_id, _ in found.top_logprobs] == np.argsort(-logits, kind="stable")[:count].tolist()
    np.testing.assert_allclose(
        [p for _, p in found.top_logprobs], np.sort(expected)[::-1][:count], rtol=1e-6, atol=1e-6
    )
    assert found.logprob == pytest.approx(expected[seed % 37], rel=1e-6, abs=1e-6)
    assert found.rank == 1 + (logits > logits[seed % 37]).sum()


class Allowed:
    """A constraint that allows the same at every token."""

    def __init__(self, mask):
        self.mask = mask

    def allowed(self):
        return self.mask

    def permits(self, token_id):
        return bool(self.mask[token_id])


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocab_size=st.integers(1, 300),
    share=st.sampled_from([0.0, 0.01, 0.2, 0.5, 0.9, 1.0]),
    decimals=st.integers(0, 3),
    ids=st.sampled_from([None, [0], [5, 3, 299]]),
)
def test_the_best_that_is_allowed_is_that_of_the_bounded_scores(seed, vocab_size, share, decimals, ids):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=vocab_size).round(decimals).astype(np.float32)  # with equals among them
    ids = None if ids is None else [each % vocab_size for each in ids]
    params = SamplingParams(temperature=0, allowed_token_ids=ids)
    context = SamplingContext(params, [0], constraints=[Allowed(rng.random(vocab_size) < share)])
    expected = bounded(logits, context)
    best = int(logits.argmax())
    if not context.permits(best):
        best, peak = best_bounded(logits, context, best)
        assert peak == expected.max()
    if np.isfinite(expected.max()):
        assert best == expected.argmax()
        assert sample(logits, params, context, 1).token_id == best
    else:
        with pytest.raises(RequestError, match="no token"):
            sample(logits, params, context, 1)


def test_doctests():
    assert doctest.testmod(qwen_run.sampling.sample).failed == 0
