"""Accuracy metrics against scipy, rouge-score, transformers' own loss, and numbers worked by hand."""

import dataclasses
import doctest
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen_run.accuracy.logits
import qwen_run.accuracy.metrics
from cases.processes import run_python
from qwen_run.accuracy.logits import FullLogits, Positions, TopLogits, compare, logit_pairs
from qwen_run.accuracy.metrics import (
    Metric,
    continuation_agreement,
    first_divergence,
    first_jump,
    summarise_positions,
    worst_position,
)

NAMES = [field.name for field in dataclasses.fields(Positions)]


def random_logits(seed: int, positions: int, vocab_size: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Reference and engine, (positions, vocab_size) float32 each; the engine is off by ``noise``."""
    rng = np.random.default_rng(seed)
    reference = rng.normal(0, 3, (positions, vocab_size)).astype(np.float32)
    return reference, reference + rng.normal(0, noise, reference.shape).astype(np.float32)


def of_kl(*documents: list[float]) -> list[Positions]:
    """Documents with this KL at their positions; a token has probability 1/2, by the reference 1/4."""
    return [
        Positions(
            *(np.array(kl, float) for _ in NAMES[:-2]), np.log(np.full(len(kl), 0.5)), np.log(np.full(len(kl), 0.25))
        )
        for kl in documents
    ]


def by_name(metrics: list[Metric]) -> dict[str, Metric]:
    assert len({metric.name for metric in metrics}) == len(metrics)
    return {metric.name: metric for metric in metrics}


@pytest.mark.parametrize(("vocab_size", "noise"), [(3, 0.5), (5, 2.0), (1000, 1e-3), (4999, 1.0), (4999, 8.0)])
def test_every_value_is_what_scipy_says(vocab_size, noise):
    special = pytest.importorskip("scipy.special")
    distance = pytest.importorskip("scipy.spatial.distance")
    reference, engine = random_logits(1, 7, vocab_size, noise)
    engine += 100  # a constant that softmax does not see, and differences do
    following = np.array([1, 0, -1, 2, 1, 2, -1])
    found = compare(FullLogits(reference), engine, following)

    a, b = reference.astype(float), engine.astype(float)
    p, q = special.softmax(a, axis=1), special.softmax(b, axis=1)
    np.testing.assert_allclose(found.kl, special.rel_entr(p, q).sum(axis=1), rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(found.cosine, [1 - distance.cosine(x, y) for x, y in zip(a, b, strict=True)], atol=1e-13)
    np.testing.assert_allclose(found.max_difference, [distance.chebyshev(x, y) for x, y in zip(a, b, strict=True)])
    np.testing.assert_allclose(
        found.mean_difference, [distance.cityblock(x, y) / vocab_size for x, y in zip(a, b, strict=True)]
    )
    known = np.flatnonzero(following >= 0)
    for values, logits in ((found.log_likelihood, b), (found.reference_log_likelihood, a)):
        np.testing.assert_allclose(values, special.log_softmax(logits, axis=1)[known, following[known]], rtol=1e-12)
    assert found.top1.tolist() == (a.argmax(1) == b.argmax(1)).tolist()
    five = [set(np.argsort(x)[-5:]) & set(np.argsort(y)[-5:]) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(found.top5, [len(shared) / min(5, vocab_size) for shared in five])


def test_a_position_worked_by_hand():
    reference = np.log(np.array([[0.5, 0.25, 0.25]], np.float32))
    found = compare(FullLogits(reference), np.zeros((1, 3), np.float32), [2])
    assert found.kl == pytest.approx(0.5 * math.log(1.5) + 0.5 * math.log(0.75), abs=1e-7)
    assert found.log_likelihood == pytest.approx(-math.log(3))
    assert found.reference_log_likelihood == pytest.approx(-math.log(4), abs=1e-6)
    assert found.max_difference == pytest.approx(math.log(4), abs=1e-6)
    assert found.mean_difference == pytest.approx((math.log(2) + 2 * math.log(4)) / 3, abs=1e-6)


@pytest.mark.parametrize("saved", [False, True])
def test_identical_logits_have_no_error_at_all(saved):
    logits, _ = random_logits(2, 9, 777, 0)
    reference = FullLogits(logits).top(np.arange(9)) if saved else FullLogits(logits)
    found = compare(reference, logits, np.arange(9))
    assert found.kl.max() <= 1e-14  # the tail and the rest are summed in another order
    assert not (found.kl.max() and not saved)
    assert found.max_difference.max() == 0
    assert found.mean_difference.max() == 0
    assert found.cosine.min() >= 1 - 1e-15
    assert found.top1.min() == found.top5.min() == 1


@pytest.mark.parametrize("saved", [False, True])
def test_the_noise_of_float32_sums_is_measured_not_rounded_away(saved):
    reference, engine = random_logits(3, 200, 5000, 1e-5)
    a, b = reference.astype(np.longdouble), engine.astype(np.longdouble)
    log_p, log_q = (x - x.max(1, keepdims=True) for x in (a, b))
    log_p, log_q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (log_p, log_q))
    true = (np.exp(log_p) * (log_p - log_q)).sum(1).astype(float)
    assert true.mean() < 1e-10
    kept = FullLogits(reference).top(np.zeros(200)) if saved else FullLogits(reference)
    found = compare(kept, engine, np.zeros(200, int)).kl
    assert found.mean() == pytest.approx(true.mean(), rel=0.01 if saved else 1e-3)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("masked", [-np.inf, np.finfo(np.float32).min, -1e9])
def test_masked_logits_count_for_nothing(saved, masked):
    reference, engine = random_logits(4, 5, 300, 0.3)
    allowed = np.arange(300) % 3 > 0
    expected = compare(FullLogits(reference[:, allowed]), engine[:, allowed], [-1] * 5)
    reference[:, ~allowed] = engine[:, ~allowed] = masked
    kept = FullLogits(reference).top([1] * 5) if saved else FullLogits(reference)
    found = compare(kept, engine, [1] * 5)
    assert all(np.isfinite(getattr(found, name)).all() for name in NAMES)
    np.testing.assert_allclose(found.kl, expected.kl, rtol=0.1 if saved else 1e-9)
    assert found.top5.tolist() == expected.top5.tolist()


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_no_number_is_none_in_every_metric(saved, bad):
    reference, engine = random_logits(5, 3, 200, 0.1)
    engine[1, reference[1].argmax()] = bad  # where it would look like agreement
    kept = FullLogits(reference).top([1, 1, 1]) if saved else FullLogits(reference)
    found = compare(kept, engine, [1, 1, 1])
    for name in NAMES:
        assert np.isnan(getattr(found, name)).tolist() == [False, True, False], name
    metrics = summarise_positions("original", [found, *of_kl([0.1, 0.2])])
    broken = {metric.name for metric in metrics if math.isnan(metric.value)}
    # a percentile still sees past one position in five
    assert broken >= {metric.name for metric in metrics} - {"original.kl_p99"}


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(("gap", "agrees"), [(0.0, 1), (0.9e-4, 1), (1.2e-4, 0)])
def test_top1_of_a_tie(saved, gap, agrees):
    reference = np.full((1, 100), -5, np.float32)
    reference[0, [7, 30]] = 1, 1 - gap
    engine = reference.copy()
    engine[0, 30] += 0.01
    kept = FullLogits(reference).top([-1]) if saved else FullLogits(reference)
    assert compare(kept, engine, [-1]).top1.tolist() == [agrees]


@pytest.mark.parametrize("saved", [False, True])
def test_top5_worked_by_hand(saved):
    reference = np.zeros((2, 100), np.float32)
    reference[:, :6] = [9, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 5]  # the second has a tie for the fifth place
    engine = reference.copy()
    engine[:, [0, 5]] = engine[:, [5, 0]]  # both choose 5, 1, 2, 3, 4
    kept = FullLogits(reference).top([-1, -1]) if saved else FullLogits(reference)
    assert compare(kept, engine, [-1, -1]).top5.tolist() == [0.8, 1.0]


@pytest.mark.parametrize("noise", [1e-5, 0.07, 0.8, 3.0])
@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_a_saved_reference_reproduces_every_metric(noise, spread):
    rng = np.random.default_rng(6)
    reference = rng.normal(0, spread, (1500, 3000)).astype(np.float32)
    engine = reference + rng.normal(0, noise, reference.shape).astype(np.float32)
    following = rng.integers(3000, size=1500)
    full, top = FullLogits(reference), FullLogits(reference).top(following)
    a, b = compare(full, engine, following), compare(top, engine, following)

    for name in ("top1", "top5"):
        assert getattr(a, name).tolist() == getattr(b, name).tolist()
    for name in ("log_likelihood", "reference_log_likelihood"):
        np.testing.assert_allclose(getattr(b, name), getattr(a, name), rtol=1e-13)
    tail = np.exp(top.tail_logsumexp - top.logsumexp)
    standard_error = tail * math.sqrt(2 / 64) * a.kl
    assert abs((b.kl - a.kl) / standard_error).mean() < (
        1 if noise < 1 else 3
    )  # an engine that is wrong has wilder ratios
    assert b.kl.mean() == pytest.approx(a.kl.mean(), rel=0.02 if noise < 1 else 0.05)
    assert b.mean_difference.mean() == pytest.approx(a.mean_difference.mean(), rel=0.02)
    assert 1 - b.cosine.mean() == pytest.approx(1 - a.cosine.mean(), rel=0.02, abs=1e-12)
    assert (b.max_difference <= a.max_difference).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), vocab_size=st.integers(1, 400), noise=st.sampled_from([1e-4, 0.1, 5.0]))
def test_the_two_exact_parts_bound_the_kl_of_a_saved_reference_from_below(seed, vocab_size, noise):
    reference, engine = random_logits(seed, 3, vocab_size, noise)
    top = FullLogits(reference).top([-1] * 3)
    without_tail = dataclasses.replace(top, tail_ids=top.tail_ids[:, :0], tail_logits=top.tail_logits[:, :0])
    lower, estimate = (compare(kept, engine, [-1] * 3).kl for kept in (without_tail, top))
    true = compare(FullLogits(reference), engine, [-1] * 3).kl
    assert (lower <= true + 1e-12).all()
    assert (lower <= estimate + 1e-12).all()
    if vocab_size <= 64:
        np.testing.assert_allclose(lower, true, rtol=1e-9, atol=1e-13)


def test_a_saved_reference_is_small_and_the_same_each_time():
    reference, _ = random_logits(7, 20, 9999, 0)
    one, other = FullLogits(reference).top(np.arange(20)), FullLogits(reference.copy()).top(np.arange(20))
    for field in dataclasses.fields(TopLogits):
        assert np.array_equal(getattr(one, field.name), getattr(other, field.name)), field.name
    arrays = [getattr(one, field.name) for field in dataclasses.fields(TopLogits)[1:]]
    assert sum(array.nbytes for array in arrays) < 1600 * 20
    largest = np.sort(reference, axis=1)[:, ::-1][:, :64]
    assert np.array_equal(one.top_logits, largest)
    assert np.array_equal(one.following_logit, reference[np.arange(20), np.arange(20)])


def test_chunks_of_a_sequence_are_its_positions():
    reference, engine = random_logits(8, 10, 50, 0.2)
    following = [*range(9), -1]
    whole = compare(FullLogits(reference), engine, following)
    parts = [
        compare(FullLogits(reference[s]), engine[s], following[s]) for s in (slice(0, 4), slice(4, 9), slice(9, 10))
    ]
    joined = Positions.concatenate(parts)
    for name in NAMES:
        assert getattr(joined, name).tolist() == getattr(whole, name).tolist()
    assert len(joined.kl) == 10
    assert len(joined.log_likelihood) == 9


def test_pairs_to_plot_are_logits_of_the_same_entries():
    reference, _ = random_logits(9, 6, 500, 0)
    ours, theirs = logit_pairs(FullLogits(reference), reference + 1)
    assert len(ours) == 48
    np.testing.assert_allclose(theirs, ours + 1, rtol=1e-6)
    assert set(reference.max(1).tolist()) <= set(ours.tolist())
    saved = logit_pairs(FullLogits(reference).top([-1] * 6), reference + 1)
    assert np.array_equal(saved, (ours, theirs))
    for kept in (FullLogits(reference), FullLogits(reference).top([-1] * 6)):
        some, same = logit_pairs(kept, reference, every=4)
        assert np.array_equal(some, same)
        assert some[[0, 8]].tolist() == reference.max(1)[[0, 4]].tolist()
        assert len(some) == 16


def test_perplexity_is_what_the_loss_of_transformers_says():
    torch = pytest.importorskip("torch")
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    rng = np.random.default_rng(10)
    documents, losses, tokens = [], [], []
    for length in (3, 11, 6):  # a mean of perplexities, or of losses, would weigh them the same
        logits = rng.normal(0, 2, (length, 40)).astype(np.float32)
        token_ids = rng.integers(40, size=length)
        documents.append(compare(FullLogits(np.zeros_like(logits)), logits, [*token_ids[1:], -1]))
        loss = loss_utils.ForCausalLMLoss(torch.tensor(logits[None]), torch.tensor(token_ids[None]), 40)
        losses.append(loss.item())
        tokens.append(length - 1)
    metrics = by_name(summarise_positions("as_built", documents))
    expected = math.exp(np.average(losses, weights=tokens))
    assert metrics["as_built.perplexity"].value == pytest.approx(expected, rel=1e-6)
    assert metrics["as_built.reference_perplexity"].value == pytest.approx(40)
    assert metrics["as_built.perplexity_ratio"].value == pytest.approx(expected / 40, rel=1e-6)


def test_metrics_worked_by_hand():
    metrics = by_name(summarise_positions("original", of_kl([0.1, 0.3], [0.8])))
    assert metrics["original.kl_mean"].value == pytest.approx(0.4)  # every position weighs the same
    assert metrics["original.kl_max"] == Metric("original.kl_max", 0.8, 0.8, 0.8, 2, "nats")
    assert metrics["original.kl_p99"].value == 0.8
    assert metrics["original.perplexity"].value == pytest.approx(2)
    assert metrics["original.reference_perplexity"].value == pytest.approx(4)
    ratio = metrics["original.perplexity_ratio"]
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.5, 0.5, 0.5))


def test_percentile_is_numpys():
    kl = np.random.default_rng(11).gamma(0.3, size=1234)
    metrics = by_name(summarise_positions("original", of_kl(kl[:1000].tolist(), kl[1000:].tolist())))
    assert metrics["original.kl_p99"].value == np.quantile(kl, 0.99, method="inverted_cdf")


def test_intervals_are_those_of_scipy(monkeypatch):
    monkeypatch.setattr(qwen_run.accuracy.metrics, "RESAMPLES", 20_000)  # both draw at random: the more, the closer
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(12)
    documents = [(rng.gamma(0.5, size=rng.integers(5, 60)) + rng.gamma(1)).tolist() for _ in range(40)]
    totals, counts = np.array([sum(kl) for kl in documents]), np.array([len(kl) for kl in documents])
    expected = stats.bootstrap(
        (totals, counts), lambda t, c, axis: t.sum(axis) / c.sum(axis), paired=True, vectorized=True,
        n_resamples=20_000, method="percentile", rng=np.random.default_rng(13),
    ).confidence_interval  # fmt: skip
    found = by_name(summarise_positions("original", of_kl(*documents)))["original.kl_mean"]
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.02 * width)
    assert found.high == pytest.approx(expected.high, abs=0.02 * width)
    assert found.n == 40


def test_documents_are_resampled_and_not_their_positions():
    """Two documents of 500 equal positions each are two measurements, not a thousand."""
    metrics = by_name(summarise_positions("original", of_kl([1.0] * 500, [3.0] * 500)))
    for name in ("kl_mean", "kl_p99", "top1", "cosine_mean"):
        assert (metrics[f"original.{name}"].low, metrics[f"original.{name}"].high) == (1, 3)


def test_the_perplexity_ratio_resamples_both_sides_together():
    """Documents whose difficulty differs a lot, on which the engine is always the same factor worse."""
    difficulty = np.linspace(-8, -1, 12)
    documents = [dataclasses.replace(of_kl([0.1])[0], log_likelihood=np.array([d - 0.1]),
                                     reference_log_likelihood=np.array([d])) for d in difficulty]  # fmt: skip
    metrics = by_name(summarise_positions("original", documents))
    ratio, perplexity = metrics["original.perplexity_ratio"], metrics["original.perplexity"]
    assert perplexity.high / perplexity.low > 5
    assert (ratio.low, ratio.high) == pytest.approx((math.exp(0.1), math.exp(0.1)))


def test_one_document_has_no_interval():
    for metric in summarise_positions("original", of_kl([0.1, 0.2, 0.4])):
        assert metric.n == 1
        if metric.name.endswith("max") or metric.name.endswith("max_difference"):
            assert metric.low == metric.high == metric.value
        else:
            assert metric.low is metric.high is None


def test_a_single_token_has_no_perplexity():
    one = compare(FullLogits(np.zeros((1, 9), np.float32)), np.zeros((1, 9), np.float32), [-1])
    names = {metric.name for metric in summarise_positions("original", [one])}
    assert "original.kl_mean" in names
    assert "original.perplexity" not in names
    assert summarise_positions("original", []) == []
    both = by_name(summarise_positions("original", [one, *of_kl([0.5])]))
    assert both["original.perplexity"].value == pytest.approx(2)


def test_the_worst_position():
    assert worst_position(of_kl([0.1, 0.5], [], [0.2, 0.3, 0.9, 0.1])) == (2, 2)
    assert worst_position(of_kl([0.1, 0.5], [0.2, math.nan])) == (1, 1)


def test_continuations():
    reference = [[1, 2, 3], [1, 2, 3], [1, 2, 3], [4]]
    engine = [[1, 2, 3], [1, 9, 3], [1, 2, 3, 4], [5]]
    assert [first_divergence(*pair) for pair in zip(engine, reference, strict=True)] == [None, 1, 3, 0]
    metrics = by_name(continuation_agreement(engine, reference))
    assert metrics["greedy.identical"].value == 0.25
    assert metrics["greedy.identical"].n == 4
    assert metrics["greedy.first_divergence"].value == pytest.approx(4 / 3)
    assert metrics["greedy.first_divergence"].n == 3
    assert [metric.name for metric in continuation_agreement(reference, reference)] == ["greedy.identical"]
    assert continuation_agreement([], []) == []


def test_the_first_jump_of_an_error():
    rounding = {"embed": 0.0, "0.attn": 1e-6, "0.mlp": 1.4e-4, "1.attn": 3e-4, "1.mlp": 2e-3}
    assert first_jump(rounding) is None
    assert first_jump({}) is None
    assert first_jump({**rounding, "0.mlp": 0.05, "1.mlp": 0.9}) == "0.mlp"
    assert first_jump({**rounding, "embed": 8e-4}) == "embed"
    assert first_jump({**rounding, "1.attn": math.nan}) == "1.attn"
    assert first_jump({"0.attn": 7e-4, "0.mlp": 2e-3, "1.attn": 0.015, "1.mlp": 0.11}) is None  # never 8 times
    assert first_jump({"0.attn": 7e-4, "0.mlp": 2e-3, "1.attn": 0.015, "1.mlp": 0.13}) == "1.mlp"


def test_importing_it_costs_no_other_library():
    code = "import sys, qwen_run.accuracy.metrics\n"
    code += "print(sorted({'nltk', 'rouge_score', 'scipy', 'torch'} & set(sys.modules)))"
    assert run_python(code).stdout == "[]\n"


def test_doctests():
    assert doctest.testmod(qwen_run.accuracy.metrics).failed == 0


@pytest.mark.parametrize("threads", [2, 3, 50])
def test_positions_are_the_same_from_any_number_of_threads(threads, monkeypatch):
    reference, engine = random_logits(7, 40, 700, 0.5)
    following = np.append(reference[1:].argmax(1), -1)
    alone = compare(FullLogits(reference), engine, following)
    monkeypatch.setattr(qwen_run.accuracy.logits, "physical_cores", lambda: threads)
    shared = compare(FullLogits(reference), engine, following)
    assert all(np.array_equal(getattr(alone, name), getattr(shared, name)) for name in NAMES)


@pytest.mark.parametrize("size", [5, 63, 320, 321, 5000])
@pytest.mark.parametrize("kind", ["any", "ties", "flat", "lowest"])
def test_the_largest_values_are_found_among_stretches(size, kind):
    """As sorting all of them finds: the values, since among equal ones any may be taken."""
    rng = np.random.default_rng(size)
    row = rng.normal(size=size)
    row = {"any": row, "ties": np.round(row), "flat": np.zeros(size), "lowest": np.where(row > 1, row, -3e38)}[kind]
    for count in (1, 5, 64):
        if count <= size:
            found = qwen_run.accuracy.logits._largest(row, count)
            assert len(set(found.tolist())) == count
            assert np.array_equal(np.sort(row[found]), np.sort(row)[-count:])
