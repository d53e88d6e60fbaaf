"""Sampling: the surviving tokens and probabilities of transformers; random numbers that depend on nothing else."""

import doctest
import functools
import itertools

import numpy as np
import pytest

import qwen_run.sampling
from qwen_engine.errors import EngineError, RequestError
from qwen_run.sampling import SamplingParams, distribution, penalize_repetition, sample, uniform

GREEDY = SamplingParams(temperature=0)
SETTINGS = [
    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    for temperature, top_k, top_p, penalty in itertools.product(
        (0.3, 1.0, 1.7), (0, 1, 20, 10_000), (0.0, 0.5, 0.9, 0.999, 1.0), (0.8, 1.0, 1.3)
    )
]


def logits_of(seed: int, vocab_size: int, decimals: int) -> np.ndarray:
    """Random logits; one decimal makes most of them ties."""
    return np.random.default_rng(seed).normal(0, 3, vocab_size).round(decimals).astype(np.float32)


def transformers_probabilities(logits: np.ndarray, params: SamplingParams, context: list[int]) -> np.ndarray:
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    steps = [process.TemperatureLogitsWarper(float(params.temperature))]
    if params.repetition_penalty != 1:
        steps.insert(0, process.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.top_k:
        steps.append(process.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(process.TopPLogitsWarper(params.top_p))
    scores, ids = torch.from_numpy(logits.copy())[None], torch.tensor([context])
    with pytest.MonkeyPatch.context() as patch:
        # torch's sort leaves the order of equal values open, and so which of them top-p keeps; ours is the stable one
        patch.setattr(torch, "sort", functools.partial(torch.sort, stable=True))
        for step in steps:
            scores = step(ids, scores)
    return torch.softmax(scores[0].double(), dim=-1).numpy()


@pytest.mark.parametrize("decimals", [7, 1], ids=["distinct", "ties"])
@pytest.mark.parametrize("vocab_size", [37, 3001])
def test_equals_transformers(vocab_size, decimals):
    context = [3, 5, 5, 36, 0]
    for seed, params in enumerate(SETTINGS):
        logits = logits_of(seed, vocab_size, decimals)
        ids, probabilities = distribution(penalize_repetition(logits, context, params.repetition_penalty), params)
        ours = np.zeros(vocab_size)
        ours[ids] = probabilities
        expected = transformers_probabilities(logits, params, context)
        assert np.array_equal(ours > 0, expected > 0), params
        # the logits are float32: seven digits
        np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=1e-9, err_msg=str(params))


def test_nucleus_beyond_the_first_candidates():
    """A nearly flat distribution needs more tokens than the first partition looks at."""
    logits = np.random.default_rng(0).normal(0, 0.1, 20_011).astype(np.float32)
    ids, probabilities = distribution(logits, SamplingParams(top_p=0.9))
    smallest_kept = (
        probabilities.min() * np.exp(logits[ids], dtype=np.float64).sum() / np.exp(logits, dtype=np.float64).sum()
    )
    mass = np.exp(logits[ids], dtype=np.float64).sum() / np.exp(logits, dtype=np.float64).sum()
    assert mass - smallest_kept < 0.9 <= mass + 1e-7


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, [0]), (0.51, [0, 2]), (0.75, [0, 2]), (0.76, [0, 1, 2]), (0.0, [0])])
def test_top_p_boundary(top_p, kept):
    """Probabilities 1/2, 1/4, 1/4: a set that reaches top_p exactly is enough; of equals the later stays."""
    ids, _ = distribution(np.log(np.array([0.5, 0.25, 0.25], np.float32)), SamplingParams(top_p=top_p))
    assert ids.tolist() == kept


def test_top_k_keeps_ties():
    ids, _ = distribution(np.array([1, 3, 2, 3, 2], np.float32), SamplingParams(top_k=3))
    assert ids.tolist() == [1, 2, 3, 4]


def test_penalty_moves_both_signs_down_once():
    logits = np.array([2, -2, 4, -4], np.float32)
    assert penalize_repetition(logits, [0, 1, 0], 2.0).tolist() == [1, -4, 4, -4]
    assert logits.tolist() == [2, -2, 4, -4]


def test_greedy_takes_the_lowest_id_of_equals_after_the_penalty():
    logits = np.array([1, 5, 5, 6], np.float32)
    assert sample(logits, GREEDY, [], 0) == 3
    assert sample(logits, SamplingParams(temperature=0, repetition_penalty=2.0), [3], 0) == 1


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.2, 0.3, 1e-30], np.float32))
    drawn = np.bincount([sample(logits, SamplingParams(seed=7), [], position) for position in range(4000)], minlength=4)
    # four standard deviations of a binomial of 4000 draws are 0.032
    np.testing.assert_allclose(drawn / 4000, [0.5, 0.2, 0.3, 0], atol=0.032)


@pytest.mark.parametrize(("number", "drawn"), [(0.0, 1), (0.49, 1), (0.5, 3), (1 - 2**-53, 3)])
def test_impossible_tokens_are_never_drawn(monkeypatch, number, drawn):
    monkeypatch.setattr(qwen_run.sampling, "uniform", lambda seed, position: number)
    logits = np.array([-np.inf, 0, -np.inf, 0, -np.inf], np.float32)
    assert sample(logits, SamplingParams(), [], 0) == drawn


def test_random_numbers_are_a_function_of_seed_and_position():
    numbers = {(seed, position): uniform(seed, position) for seed in (0, 1, 2**64 - 1) for position in range(100)}
    assert len(set(numbers.values())) == 300
    assert all(0 <= number < 1 for number in numbers.values())
    assert uniform(1, 50) == numbers[1, 50]
    # an answer must not change with the next release: the first 53 bits NumPy's Philox4x64-10 gives for zeros
    assert uniform(0, 0) == (0x02F4BA6408E4D89B >> 11) / 2**53


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_numbers(bad):
    with pytest.raises(EngineError, match="position 9"):
        sample(np.array([1, bad, 2], np.float32), GREEDY, [], 9)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", "hot"), ("temperature", 1e-9),
        ("temperature", 1e300), ("temperature", 10**400),
        ("top_p", 1.1), ("top_p", -0.1), ("top_k", -1), ("top_k", 2.5), ("top_k", True),
        ("repetition_penalty", 0), ("repetition_penalty", float("inf")),
        ("repetition_penalty", 1e-46), ("repetition_penalty", 1e300), ("seed", -1), ("seed", 2**64),
        ("max_tokens", 0),
    ],
)  # fmt: skip
def test_values_out_of_range(name, value):
    with pytest.raises(RequestError, match=f"^{name.replace('max_', 'max_new_')} is .*expected"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, SamplingParams(0, top_k=50)),
        ({"do_sample": False, "temperature": 0.7}, SamplingParams(0, top_k=50)),
        ({"do_sample": True}, SamplingParams(1.0, top_k=50)),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
         SamplingParams(0.7, 0.8, 20, 1.05)),
        ({"do_sample": True, "top_k": 0, "top_p": None, "max_new_tokens": 2048}, SamplingParams(1.0, max_tokens=2048)),
    ],
)  # fmt: skip
def test_generation_config(config, expected):
    assert SamplingParams.from_generation_config(config) == expected


def test_doctests():
    assert doctest.testmod(qwen_run.sampling).failed == 0
