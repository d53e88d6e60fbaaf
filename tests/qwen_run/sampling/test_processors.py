"""Logits processors: the surviving tokens and probabilities of transformers, in its order; OpenAI's penalties."""

import collections
import functools
import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen_run.sampling.params import SamplingParams
from qwen_run.sampling.processors import SamplingContext, at_least_kth, distribution, largest, process

PROMPT, ANSWER, STOP = [3, 5, 5, 36, 0], [5, 7, 7, 7, 0], (2, 7)
SETTINGS = [
    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    for temperature, top_k, top_p, penalty in itertools.product(
        (0.3, 1.0, 1.7), (0, 1, 20, 10_000), (0.0, 0.5, 0.9, 0.999, 1.0), (0.8, 1.0, 1.3)
    )
]


def logits_of(seed, vocab_size, decimals):
    """Random logits; one decimal makes most of them ties."""
    return np.random.default_rng(seed).normal(0, 3, vocab_size).round(decimals).astype(np.float32)


def context_of(params, prompt, answer, stop_token_ids=()):
    context = SamplingContext(params, prompt, stop_token_ids)
    for token_id in answer:
        context.append(token_id)
    return context


def probabilities_of(logits, params, prompt=PROMPT, answer=(), stop_token_ids=()):
    """(vocab_size,) float64, 0 for what is left out."""
    ids, probabilities = distribution(
        process(logits, params, context_of(params, prompt, answer, stop_token_ids)), params
    )
    assert (np.diff(ids) > 0).all()
    assert probabilities.sum() == pytest.approx(1)
    ours = np.zeros(len(logits))
    ours[ids] = probabilities
    return ours


def transformers_probabilities(logits, params, prompt=PROMPT, answer=(), stop_token_ids=()):
    """The same by the processors that ``generate`` would put together, in its order."""
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("transformers.generation.logits_process")
    steps = []
    if params.biases:
        steps.append(library.SequenceBiasLogitsProcessor({(token_id,): float(b) for token_id, b in params.biases}))
    if params.repetition_penalty != 1:
        steps.append(library.RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    if params.min_tokens and stop_token_ids:
        steps.append(
            library.MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, list(stop_token_ids), "cpu")
        )
    steps.append(library.TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        steps.append(library.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(library.TopPLogitsWarper(float(params.top_p)))
    steps.append(library.MinPLogitsWarper(float(params.min_p)))
    scores, ids = torch.from_numpy(logits.copy())[None], torch.tensor([[*prompt, *answer]])
    with pytest.MonkeyPatch.context() as patch:
        # torch's sort leaves the order of equal values open, and so which of them top-p keeps; ours is the stable one
        patch.setattr(torch, "sort", functools.partial(torch.sort, stable=True))
        for step in steps:
            scores = step(ids, scores)
    return torch.softmax(scores[0].double(), dim=-1).numpy()


def assert_equal(logits, params, **rest):
    ours, expected = probabilities_of(logits, params, **rest), transformers_probabilities(logits, params, **rest)
    assert np.array_equal(ours > 0, expected > 0), params
    # the logits are float32: seven digits
    np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=1e-9, err_msg=str(params))


@pytest.mark.parametrize("decimals", [7, 1], ids=["distinct", "ties"])
@pytest.mark.parametrize("vocab_size", [37, 3001])
def test_equals_transformers(vocab_size, decimals):
    for seed, params in enumerate(SETTINGS):
        assert_equal(logits_of(seed, vocab_size, decimals), params)


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 2**32),
    decimals=st.sampled_from([0, 1, 7]),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    options=st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.sampled_from([0.01, 0.3, 1.7, 50.0]),
            "top_k": st.integers(0, 60),
            "top_p": st.floats(0, 1).map(lambda p: round(p, 3)),
            "min_p": st.sampled_from([0.0, 0.0437, 0.31, 0.83, 1.0]),
            "repetition_penalty": st.sampled_from([0.5, 1.1, 3.0]),
            "logit_bias": st.dictionaries(st.integers(0, 36), st.floats(-100, 100, width=32), max_size=5),
            "min_tokens": st.integers(0, 8),
        },
    ),
    prompt=st.lists(st.integers(0, 36), min_size=1, max_size=9),
    answer=st.lists(st.integers(0, 36), max_size=9),
)
@example(0, 7, 1.0, {"min_tokens": 5}, [1], [2] * 4)
@example(0, 7, 1.0, {"min_tokens": 5}, [1], [2] * 5)
@example(3, 1, 1.0, {"min_p": 1.0}, [1], [])
@pytest.mark.slow
def test_any_mixture_equals_transformers(seed, decimals, scale, options, prompt, answer):
    logits = (logits_of(seed, 37, decimals) * np.float32(scale)).astype(np.float32)
    params = SamplingParams(**options)
    rest = {"prompt": prompt, "answer": answer, "stop_token_ids": STOP}
    ours, expected = probabilities_of(logits, params, **rest), transformers_probabilities(logits, params, **rest)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)
    assert np.array_equal(ours > 0, expected > 0)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 40), max_size=80), st.lists(st.integers(0, 40), max_size=80),
    st.sampled_from([0.0, 0.6, -2.0]), st.sampled_from([0.0, 1.3, -0.25]), st.sampled_from([1.0, 1.4]),
)  # fmt: skip
def test_penalties_are_their_formula(prompt, answer, presence, frequency, repetition):
    params = SamplingParams(
        presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=repetition, logit_bias={4: 2}
    )
    logits = logits_of(len(answer), 41, 7)
    counts = collections.Counter(answer)
    expected = logits.astype(np.float64)
    expected[4] += 2
    for token_id in {*prompt, *answer}:
        expected[token_id] *= repetition if expected[token_id] < 0 else 1 / repetition
    for token_id, count in counts.items():
        expected[token_id] -= frequency * count + presence
    before = logits.copy()
    scores = process(logits, params, context_of(params, prompt, answer))
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    assert scores.dtype == np.float32
    assert np.array_equal(logits, before)


def test_a_long_context_equals_counting_it_at_once():
    """Tables that grow while the answer does: 6,000 tokens of prompt, 5,000 of answer, a vocabulary of 9,001."""
    generator = np.random.default_rng(5)
    prompt, answer = generator.integers(0, 9001, 6000), generator.integers(0, 9001, 5000)
    params = SamplingParams(repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.1)
    logits = logits_of(1, 9001, 7)
    counts = np.bincount(answer, minlength=9001).astype(np.float32)
    seen = counts + np.bincount(prompt, minlength=9001) > 0
    expected = np.where(seen, np.where(logits < 0, logits * np.float32(1.2), logits / np.float32(1.2)), logits)
    expected = expected - np.float32(0.1) * counts - np.float32(0.4) * (counts > 0)
    context = context_of(params, prompt.tolist(), answer.tolist())
    np.testing.assert_allclose(process(logits, params, context), expected, rtol=1e-6, atol=1e-6)
    repeated = SamplingParams(repetition_penalty=1.2)
    assert_equal(logits, repeated, prompt=prompt.tolist(), answer=answer.tolist())


def test_presence_and_frequency_penalty_leave_the_prompt_alone():
    params = SamplingParams(presence_penalty=1, frequency_penalty=0.5)
    scores = process(np.zeros(4, np.float32), params, context_of(params, [0, 1, 1], [1, 2, 2]))
    assert scores.tolist() == [0, -1.5, -2, 0]


def test_repetition_penalty_moves_both_signs_down_once():
    logits, params = np.array([2, -2, 4, -4], np.float32), SamplingParams(repetition_penalty=2)
    assert process(logits, params, context_of(params, [0, 1], [0])).tolist() == [1, -4, 4, -4]


def test_nothing_is_copied_when_all_is_off():
    logits, params = np.zeros(5, np.float32), SamplingParams()
    assert process(logits, params, context_of(params, [1, 2], [3], stop_token_ids=(4,))) is logits


def test_an_end_of_sequence_beyond_the_vocabulary():
    params = SamplingParams(min_tokens=2)
    scores = process(np.zeros(4, np.float32), params, context_of(params, [1], [], stop_token_ids=(3, 4, 900)))
    assert scores.tolist() == [0, 0, 0, -np.inf]


def test_a_fork_goes_its_own_way():
    params = SamplingParams(repetition_penalty=2, frequency_penalty=1, min_tokens=3)
    first = context_of(params, [0, 1], [2], (5,))
    second = first.fork()
    logits = np.ones(6, np.float32)
    before = process(logits, params, first).tolist()
    for _ in range(70):  # beyond the room there is
        second.append(3)
        second.append(2)
    assert process(logits, params, first).tolist() == before == [0.5, 0.5, -0.5, 1, 1, -np.inf]
    assert process(logits, params, second).tolist() == [0.5, 0.5, -70.5, -69.5, 1, 1]


def test_nucleus_beyond_the_first_candidates():
    """A nearly flat distribution needs more tokens than the first partition looks at."""
    logits = np.random.default_rng(0).normal(0, 0.1, 20_011).astype(np.float32)
    ids, probabilities = distribution(logits, SamplingParams(top_p=0.9))
    shares = np.exp(logits, dtype=np.float64) / np.exp(logits, dtype=np.float64).sum()
    mass = shares[ids].sum()
    assert mass - probabilities.min() * mass < 0.9 <= mass + 1e-7


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, [0]), (0.51, [0, 2]), (0.75, [0, 2]), (0.76, [0, 1, 2]), (0.0, [0])])
def test_top_p_boundary(top_p, kept):
    """Probabilities 1/2, 1/4, 1/4: a set that reaches top_p exactly is enough; of equals the later stays."""
    ids, _ = distribution(np.log(np.array([0.5, 0.25, 0.25], np.float32)), SamplingParams(top_p=top_p))
    assert ids.tolist() == kept


@pytest.mark.parametrize(("min_p", "kept"), [(0.5, [0, 1, 2]), (0.51, [0]), (1.0, [0]), (0.2, [0, 1, 2])])
def test_min_p_boundary(min_p, kept):
    """Probabilities 1/2, 1/4, 1/4: exactly the share is enough."""
    ids, _ = distribution(np.log(np.array([0.5, 0.25, 0.25], np.float32)), SamplingParams(min_p=min_p))
    assert ids.tolist() == kept


def test_top_k_keeps_ties():
    ids, _ = distribution(np.array([1, 3, 2, 3, 2], np.float32), SamplingParams(top_k=3))
    assert ids.tolist() == [1, 2, 3, 4]


@settings(deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 5, 63, 640, 20_000]), st.integers(1, 100), st.sampled_from([0, 1, 7]))
def test_selection_equals_sorting(seed, length, k, decimals):
    values = logits_of(seed, length, decimals)
    falling = np.argsort(-values, kind="stable")
    assert largest(values, k).tolist() == falling[:k].tolist()
    assert at_least_kth(values, k).tolist() == np.flatnonzero(values >= values[falling[min(k, length) - 1]]).tolist()


def test_selection_among_values_that_are_minus_infinity():
    values = np.full(5000, -np.inf, np.float32)
    values[[7, 4000]] = [1, 2]
    assert largest(values, 2).tolist() == [4000, 7]
    assert at_least_kth(values, 2).tolist() == [7, 4000]
    assert largest(values, 4).tolist() == [4000, 7, 0, 1]


def test_a_stop_token_of_minus_one_forbids_nothing() -> None:
    params = SamplingParams(min_tokens=2)
    logits = np.arange(5, dtype=np.float32)
    assert process(logits, params, SamplingContext(params, (1,), {-1})).tolist() == logits.tolist()
