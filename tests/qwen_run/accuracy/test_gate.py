"""Verdicts: what passes, what fails, what cannot be decided, and where thresholds come from."""

import doctest
import math
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import qwen_run.accuracy.gate
from qwen_engine.errors import RequestError
from qwen_run.accuracy.gate import Threshold, exit_code, healthy_thresholds, judge, load_thresholds, parse_threshold
from qwen_run.accuracy.logits import FullLogits, compare
from qwen_run.accuracy.metrics import METRIC_NAMES, Metric, RoundedDocument, rounding_metrics, summarise_positions

AT_MOST = Threshold("original.kl_mean", 0.02, "at_most")
AT_LEAST = Threshold("original.top1", 0.9, "at_least")
MEASURED = ("kl_mean", "top1", "perplexity_ratio")  # of one comparison


def kl(value: float, low: float | None, high: float | None, n: int = 20) -> Metric:
    return Metric("original.kl_mean", value, low, high, n, "nats")


@pytest.mark.parametrize(
    ("metric", "outcome"),
    [
        (kl(0.010, 0.005, 0.015), "passed"),
        (kl(0.010, 0.005, 0.020), "passed"),  # the bound itself is good enough
        (kl(0.019, 0.015, 0.025), "undecided"),
        (kl(0.021, 0.015, 0.025), "undecided"),
        (kl(0.030, 0.020, 0.040), "undecided"),
        (kl(0.030, 0.021, 0.040), "failed"),
        (kl(0.010, 0.005, 0.015, n=5), "passed"),
        (kl(0.010, 0.005, 0.015, n=4), "undecided"),
        (kl(0.030, 0.021, 0.040, n=4), "undecided"),
        (kl(0.010, None, None, n=1), "undecided"),
        (kl(0.010, None, None, n=0), "passed"),  # was not sampled: a size, a count
        (kl(0.030, None, None, n=0), "failed"),
        (kl(math.nan, math.nan, math.nan), "failed"),
        (kl(math.nan, None, None, n=1), "failed"),
        (kl(math.nan, None, None, n=0), "failed"),
        (kl(0.010, math.nan, 0.015), "failed"),
        (kl(math.inf, math.inf, math.inf), "failed"),
        (None, "undecided"),
    ],
)
def test_at_most(metric, outcome):
    metrics = [Metric("original.top1", 1.0, 1.0, 1.0, 20), *([metric] if metric else [])]
    (verdict,) = judge(metrics, [AT_MOST])
    assert (verdict.outcome, verdict.metric, verdict.threshold) == (outcome, metric, AT_MOST)
    assert "\n" not in verdict.message


@pytest.mark.parametrize(
    ("value", "low", "high", "outcome"),
    [
        (0.95, 0.92, 0.97, "passed"),
        (0.95, 0.90, 0.97, "passed"),
        (0.95, 0.89, 0.97, "undecided"),
        (0.80, 0.75, 0.89, "failed"),
    ],
)
def test_at_least(value, low, high, outcome):
    assert judge([Metric("original.top1", value, low, high, 20)], [AT_LEAST])[0].outcome == outcome


def test_every_threshold_has_a_verdict_in_its_order():
    thresholds = [AT_LEAST, AT_MOST, Threshold("original.top1", 0.99, "at_most")]
    verdicts = judge([Metric("original.top1", 1.0, 1.0, 1.0, 20)], thresholds)
    assert [verdict.threshold for verdict in verdicts] == thresholds
    assert [verdict.outcome for verdict in verdicts] == ["passed", "undecided", "failed"]


def test_exit_codes():
    passed, failed, undecided = (
        judge([metric], [AT_MOST])[0] for metric in (kl(0.01, 0.01, 0.01), kl(1, 1, 1), kl(0.02, 0.01, 0.03))
    )
    assert exit_code([]) == 0
    assert exit_code([passed, passed]) == 0
    assert exit_code([passed, undecided, failed]) == 3
    assert exit_code([passed, undecided]) == 4


def test_messages_say_what_was_found_and_what_to_do():
    def message(metric: Metric) -> str:
        return judge([metric], [AT_MOST])[0].message

    assert message(kl(0.01, 0.005, 0.015)) == "original.kl_mean is 0.01 [0.005, 0.015], bound <= 0.02"
    assert message(kl(0.5, 0.5, 0.5)) == "original.kl_mean is 0.5, bound <= 0.02"
    assert message(kl(0.5, 0.5, 0.5, n=2)) == (
        "original.kl_mean is 0.5, bound <= 0.02; 2 documents decide nothing, give at least 5"
    )
    # the interval reaches 0.008 above, the bound is 0.004 away: twice too wide, four times the documents
    assert message(kl(0.016, 0.01, 0.024)).endswith("; about 84 documents would decide")
    # below the value, the lower half of the interval counts: 0.006 wide, 0.002 away
    assert message(kl(0.022, 0.016, 0.03)).endswith("; about 190 documents would decide")
    assert message(kl(0.02, 0.01, 0.03)).endswith("; more documents would hardly decide")
    assert (
        judge([], [AT_MOST])[0].message
        == "original.kl_mean <= 0.02 cannot be judged: original.kl_mean was not measured"
    )


def manifest(bits: int, activations: str, cache: str) -> Any:
    """Of an engine whose linears are all stored alike."""
    group_size = 32 if bits < 32 else 0
    stored = SimpleNamespace(quantization=SimpleNamespace(group_size=group_size, activations=activations))
    return SimpleNamespace(linears=(stored,), cache=SimpleNamespace(dtype=cache))


KINDS = {
    "float": manifest(32, "float32", "float32"),
    "float weights": manifest(32, "float32", "float16"),
    "rounded weights": manifest(4, "float32", "float16"),
    "rounded inputs": manifest(8, "int8", "float16"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_bounds_name_metrics_that_there_are_and_say_why(kind):
    thresholds = healthy_thresholds(KINDS[kind])
    assert {threshold.metric for threshold in thresholds} <= set(METRIC_NAMES)
    assert all(threshold.reason for threshold in thresholds)
    assert len({(threshold.metric, threshold.kind) for threshold in thresholds}) == len(thresholds)
    rounds = {threshold.metric.partition(".")[0] for threshold in thresholds}
    assert ("rounding" in rounds) == (kind == "rounded inputs")


def judged(kind: str, noise: float, saved: bool, own: float) -> set[str]:
    """Outcomes of an engine whose logits are off by ``noise``, beside a reference that is off by ``own``."""
    rng = np.random.default_rng(0)
    original, as_built, rounded = [], [], []
    for _ in range(8):
        logits = rng.normal(0, 3, (60, 500)).astype(np.float32)
        following = np.append(logits[:-1].argmax(1), -1)  # the reference knows best
        error = rng.normal(0, 1, logits.shape)
        engine, alike = ((logits + size * error).astype(np.float32) for size in (noise, own))
        reference = FullLogits(logits).top(following) if saved else FullLogits(logits)
        original.append(compare(reference, engine, following))
        as_built.append(compare(reference, logits, following))
        beside = compare(FullLogits(logits), alike, following)
        kl, likelihood = ((each.sum(), other.sum()) for each, other in (
            (original[-1].kl, beside.kl), (original[-1].log_likelihood, beside.log_likelihood),
        ))  # fmt: skip
        rounded.append(RoundedDocument(60, 59, kl, kl, likelihood))
    metrics = [*summarise_positions("original", original), *summarise_positions("as_built", as_built)]
    verdicts = judge([*metrics, *rounding_metrics(rounded)], healthy_thresholds(KINDS[kind]))
    return {verdict.outcome for verdict in verdicts}


@pytest.mark.parametrize("saved", [False, True])
def test_a_perfect_engine_passes_and_a_random_one_fails(saved):
    for kind in ("float", "float weights"):
        assert judged(kind, 0.0, saved, 0.0) == {"passed"}
        assert "failed" in judged(kind, 5.0, saved, 0.0)


@pytest.mark.parametrize("own", [0.02, 0.3])
@pytest.mark.parametrize("kind", ["rounded weights", "rounded inputs"])
def test_what_is_healthy_depends_on_the_model(kind, own):
    """The same noise is healthy beside a reference that has it too, and a fault beside one that has less."""
    assert judged(kind, own, False, own) == {"passed"}
    assert "failed" in judged(kind, 1.3 * own, False, own)
    assert "failed" in judged(kind, 0.7 * own, False, own)


def test_one_counterexample_fails_where_nothing_may_differ():
    metric = Metric("original.top1", 0.9999, 0.9997, 1.0, 20)
    (verdict,) = judge([metric], [Threshold("original.top1", 1.0, "at_least")])
    assert verdict.outcome == "failed"


@pytest.mark.parametrize("noise", [1e-5, 0.03, 0.1, 0.3, 1.0])
def test_a_saved_reference_gives_the_same_verdicts(noise):
    rng = np.random.default_rng(1)
    full, saved = [], []
    for _ in range(8):
        logits = rng.normal(0, 2.5, (60, 2000)).astype(np.float32)
        following = np.append(rng.integers(2000, size=59), -1)
        engine = logits + rng.normal(0, noise, logits.shape).astype(np.float32)
        reference = FullLogits(logits)
        full.append(compare(reference, engine, following))
        saved.append(compare(reference.top(following), engine, following))
    thresholds = [
        Threshold(f"original.{threshold.metric.partition('.')[2]}", threshold.bound, threshold.kind)
        for kind in KINDS.values()
        for threshold in healthy_thresholds(kind)
        if threshold.metric.partition(".")[2] in MEASURED
    ]
    outcomes = [
        [verdict.outcome for verdict in judge(summarise_positions("original", positions), thresholds)]
        for positions in (full, saved)
    ]
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("original.kl_mean<=0.01", ("original.kl_mean", 0.01, "at_most")),
        (" rouge.engine.rougeL >= .25 ", ("rouge.engine.rougeL", 0.25, "at_least")),
        ("as_built.kl_mean<=1e-4", ("as_built.kl_mean", 1e-4, "at_most")),
    ],
)
def test_a_threshold_on_the_command_line(text, expected):
    found = parse_threshold(text)
    assert (found.metric, found.bound, found.kind) == expected
    assert parse_threshold(str(found)) == found


@pytest.mark.parametrize(
    "text", ["", "kl<0.1", "kl=0.1", "kl<=", "<=0.1", "kl<=x", "kl<=nan", "kl>=inf", "a b<=1", "a<=1 2"]
)
def test_a_text_that_is_no_threshold(text):
    with pytest.raises(RequestError, match="is not METRIC<=NUMBER or METRIC>=NUMBER") as error:
        parse_threshold(text)
    assert repr(text) in str(error.value)


def test_a_file_of_thresholds(tmp_path):
    path = tmp_path / "thresholds.toml"
    path.write_text(
        """
        "greedy.identical" = { at_least = 0.5 }

        [original]
        kl_mean = { at_most = 0.01, reason = "what we need" }
        perplexity_ratio = { at_least = 0.98, at_most = 1 }

        [rouge.engine.rougeL]
        at_least = 0.2
        """,
        encoding="utf-8",
    )
    assert set(load_thresholds(path)) == {
        Threshold("greedy.identical", 0.5, "at_least"),
        Threshold("original.kl_mean", 0.01, "at_most", "what we need"),
        Threshold("original.perplexity_ratio", 0.98, "at_least"),
        Threshold("original.perplexity_ratio", 1.0, "at_most"),
        Threshold("rouge.engine.rougeL", 0.2, "at_least"),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no threshold"),
        ("[original]\n[as_built.kl_mean]", "holds no threshold"),
        ("kl = ", "is not TOML"),
        ("original.kl_mean = 0.01", r"original.kl_mean is 0.01, expected a table as \"original"),
        ('[a]\nat_most = "0.1"', "at_most of a is '0.1', expected a number"),
        ("[a]\nat_most = true", "at_most of a is True, expected a number"),
        ("[a]\nat_least = nan", "at_least of a is nan, expected a number"),
        ("[a]\nat_most = 1\nresaon = 'x'", "a has unknown resaon"),
        ("[a]\nat_most = 1\nreason = 3", "the reason of a is 3, expected text"),
        ("[a.b]\natmost = 1", "a.b.atmost is 1, expected a table"),
    ],
)
def test_a_file_that_holds_something_else(tmp_path, text, message):
    path = tmp_path / "thresholds.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match=message) as error:
        load_thresholds(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(RequestError, match="cannot be read: No such file or directory; choose another --thresholds"):
        load_thresholds(tmp_path / "none.toml")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match="is not TOML"):
        load_thresholds(binary)


def test_doctests():
    assert doctest.testmod(qwen_run.accuracy.gate).failed == 0


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("orignal.kl_mean", "there is no metric orignal.kl_mean; did you mean original.kl_mean"),
        ("zzz", "there is no metric zzz; expected one of original.kl_mean, "),
    ],
)
def test_a_metric_that_does_not_exist_is_refused_before_anything_runs(name, says, tmp_path):
    (tmp_path / "t.toml").write_text(f'"{name}" = {{ at_most = 1 }}')
    with pytest.raises(RequestError, match=re.escape(says)):
        parse_threshold(f"{name}<=1")
    with pytest.raises(RequestError, match=re.escape(says)):
        load_thresholds(tmp_path / "t.toml")


@pytest.mark.parametrize(
    ("metric", "why"),
    [
        (None, "original.kl_mean was not measured"),
        (kl(0.01, None, None, n=1), "1 document decides nothing, give at least 5"),
        (kl(0.01, 0.0, 0.1, n=3), "3 documents decide nothing, give at least 5"),
        (kl(0.019, 0.015, 0.025), "the bound is inside the interval; about 760 documents would decide"),
        (kl(0.01, 0.005, 0.015), ""),
    ],
)
def test_why_a_verdict_is_undecided(metric, why):
    (verdict,) = judge([metric] if metric else [], [AT_MOST])
    assert verdict.why == why
    assert verdict.message.endswith(why)
