"""Metrics of a comparison, with intervals: of logits (``logits.py``), texts (``rouge.py``) and continuations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qwen_run.accuracy.logits import LARGEST_EXPONENT, Floats, Positions
from qwen_run.accuracy.rouge import ROUGE_TYPES, rouge_scores

RESAMPLES = 1000
INTERVAL = (0.025, 0.975)
# A mean KL that is no rounding of weights or inputs: sums in another order, keys and values in float16.
NO_ROUNDING = 1e-6
SEED = 0

# Every metric that a comparison may measure, by group.
METRIC_NAMES = tuple(
    f"{group}.{name}"
    for groups, names in (
        (
            ("original", "as_built"),
            (
                "kl_mean", "kl_p99", "kl_max", "top1", "top5", "cosine_mean", "max_difference", "mean_difference",
                "perplexity", "reference_perplexity", "perplexity_ratio",
            ),
        ),
        (("original",), ("kl_ratio",)),
        (("rounding",), ("kl_mean", "kl_ratio", "perplexity_ratio")),
        (("router",), ("same_experts",)),
        (("greedy",), ("identical", "first_divergence")),
        (("rouge.engine", "rouge.reference", "rouge.agreement"), ROUGE_TYPES),
    )
    for group in groups
    for name in names
)  # fmt: skip

# An error starts at the sub-block where it is this many times larger than everywhere before, and than the floor: keys
# that a float16 cache rounds the other way, because sums before it differ in their last bit, cost attention about 1e-4.
JUMP_FACTOR = 8.0
JUMP_FLOOR = 1e-4


@dataclass(frozen=True)
class Metric:
    """A number of the report.

    ``low`` and ``high`` bound its 95 % interval, None where there is none to be had (a single document). A largest
    value is a fact about what was measured and no estimate: its interval is the value. ``n``: independent measurements,
    which are documents and not positions; 0 for what was not sampled.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    n: int = 0
    unit: str = ""


def summarise_positions(prefix: Literal["original", "as_built"], sequences: Sequence[Positions]) -> list[Metric]:
    """The metrics of a comparison, named ``{prefix}.kl_mean`` and so on.

    Means weigh every position the same. Perplexity is ``exp`` of the mean negative log-likelihood of all tokens of all
    documents. Intervals are percentile bootstraps (Efron, 1979) over documents, because positions of one document are
    not independent; both sides of the perplexity ratio are resampled together.

    Args:
        sequences: one a document.
    """

    def mean(
        name: str, values: Sequence[Floats], unit: str = "", of: Callable[[Floats], Floats] = np.asarray
    ) -> Metric:
        totals, counts = (np.array([f(value) for value in values], np.float64) for f in (np.sum, len))
        return _metric(f"{prefix}.{name}", of, totals, counts, unit)

    def largest(name: str, values: Sequence[Floats], unit: str = "") -> Metric:
        value = float(max(value.max() for value in values))
        return Metric(f"{prefix}.{name}", value, value, value, len(values), unit)

    sequences = [sequence for sequence in sequences if len(sequence.kl)]
    if not sequences:
        return []
    kl = [sequence.kl for sequence in sequences]
    metrics = [
        mean("kl_mean", kl, "nats"),
        _percentile(f"{prefix}.kl_p99", kl, 0.99, "nats"),
        largest("kl_max", kl, "nats"),
        mean("top1", [sequence.top1 for sequence in sequences]),
        mean("top5", [sequence.top5 for sequence in sequences]),
        mean("cosine_mean", [sequence.cosine for sequence in sequences]),
        largest("max_difference", [sequence.max_difference for sequence in sequences]),
        mean("mean_difference", [sequence.mean_difference for sequence in sequences]),
    ]
    predicted = [sequence for sequence in sequences if len(sequence.log_likelihood)]
    if predicted:
        surprise = [-sequence.log_likelihood for sequence in predicted]
        reference_surprise = [-sequence.reference_log_likelihood for sequence in predicted]
        excess = [a - b for a, b in zip(surprise, reference_surprise, strict=True)]
        metrics += [
            mean("perplexity", surprise, of=_exp),
            mean("reference_perplexity", reference_surprise, of=_exp),
            mean("perplexity_ratio", excess, of=_exp),
        ]
    return metrics


@dataclass(frozen=True)
class RoundedDocument:
    """Sums over the positions of one document of what an engine says, and of what the reference says that rounds alike.

    Attributes:
        positions, tokens: how many positions there are, and how many tokens follow them.
        rounding_kl: KL(its own float activations || as it runs), of engine and reference.
        original_kl: KL(the original weights || as it runs), of engine and reference.
        log_likelihood: of the tokens that follow, by engine and reference.
    """

    positions: int
    tokens: int
    rounding_kl: tuple[float, float]
    original_kl: tuple[float, float]
    log_likelihood: tuple[float, float]


def rounding_metrics(documents: Sequence[RoundedDocument]) -> list[Metric]:
    """How an engine that rounds compares with the reference that rounds alike, on the same documents.

    Ratios are of sums over all documents, engine over reference, both resampled together; one of nothing is left out.
    """
    if not documents:
        return []

    def ratio(name: str, pairs: Sequence[tuple[float, float]]) -> list[Metric]:
        engine, reference = np.array(pairs, np.float64).T
        return [_metric(name, np.asarray, engine, reference, "")] if (reference > least).all() else []

    positions, tokens = np.array([(one.positions, one.tokens) for one in documents], np.float64).T
    least = NO_ROUNDING * positions
    rounding, reference_rounding = np.array([one.rounding_kl for one in documents], np.float64).T
    excess = np.array([reference - engine for engine, reference in (one.log_likelihood for one in documents)])
    metrics = ratio("original.kl_ratio", [one.original_kl for one in documents])
    if (reference_rounding > least).all():  # what rounds no inputs has nothing to compare
        metrics += [
            _metric("rounding.kl_mean", np.asarray, rounding, positions, "nats"),
            *ratio("rounding.kl_ratio", [one.rounding_kl for one in documents]),
            _metric("rounding.perplexity_ratio", _exp, excess, tokens, ""),
        ]
    return metrics


def router_agreement(documents: Sequence[Mapping[str, int]]) -> list[Metric]:
    """How often routers choose the experts that they choose with the original weights, over all layers.

    Args:
        documents: of each, ``tokens``, and by the name of each router the tokens of which it chose the same experts.

    Returns:
        ``router.same_experts``: the share; nothing where there are no documents.
    """
    if not documents:
        return []
    same = [sum(count for name, count in found.items() if name != "tokens") for found in documents]
    asked = [found["tokens"] * (len(found) - 1) for found in documents]
    return [_metric("router.same_experts", np.asarray, np.array(same, np.float64), np.array(asked, np.float64), "")]


def worst_position(sequences: Sequence[Positions]) -> tuple[int, int]:
    """Index of the sequence and of the position in it where KL is largest (or NaN)."""
    worst = [(index, int(np.argmax(sequence.kl))) for index, sequence in enumerate(sequences) if len(sequence.kl)]
    values = [sequences[index].kl[position] for index, position in worst]
    return worst[int(np.argmax(values))]


def continuation_agreement(engine: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> list[Metric]:
    """How alike greedy continuations of the same prompts are.

    Returns:
        ``greedy.identical``: share that are the same to the last token. ``greedy.first_divergence``: mean position,
        from 0, of the first differing token, over those that differ; absent where none does.
    """
    divergences = [first_divergence(ours, theirs) for ours, theirs in zip(engine, reference, strict=True)]
    positions = [position for position in divergences if position is not None]
    return [
        *_mean_metrics("greedy.identical", [position is None for position in divergences]),
        *_mean_metrics("greedy.first_divergence", positions, "tokens"),
    ]


def first_divergence(engine: Sequence[int], reference: Sequence[int]) -> int | None:
    """Position, from 0, of the first token that differs or that only one side has; None where both are the same.

    >>> first_divergence([5, 6, 7], [5, 6])
    2
    """
    pairs = enumerate(zip(engine, reference, strict=False))
    shorter = min(len(engine), len(reference))
    position = next((index for index, (ours, theirs) in pairs if ours != theirs), shorter)
    return None if position == len(engine) == len(reference) else position


def rouge(predictions: Sequence[str], references: Sequence[str], prefix: str) -> list[Metric]:
    """Mean F1 of ROUGE-1, 2, L and Lsum over documents: ``{prefix}.rouge1`` and so on; see :func:`rouge_scores`."""
    scores = [rouge_scores(*pair) for pair in zip(predictions, references, strict=True)]
    names = ROUGE_TYPES if scores else ()
    return [metric for name in names for metric in _mean_metrics(f"{prefix}.{name}", [one[name] for one in scores])]


def first_jump(errors: Mapping[str, float]) -> str | None:
    """The sub-block where an error starts.

    Args:
        errors: root mean square of the difference of each sub-block's output over that of the reference, by name, in
            the order they are computed. Against the weights as built: against the original ones, rounding itself jumps
            at the first layer.

    Returns:
        The first name whose error is at least 8 times the largest before it and at least 8e-4, or is NaN; None where
        there is none, the errors being those of rounding.
    """
    before = JUMP_FLOOR
    for name, error in errors.items():
        if not error < JUMP_FACTOR * before:
            return name
        before = max(before, error)
    return None


def _exp(values: Floats) -> Floats:
    return np.exp(np.minimum(values, LARGEST_EXPONENT))


def _mean_metrics(name: str, values: Sequence[float], unit: str = "") -> list[Metric]:
    """The mean over documents, or nothing where there are none."""
    totals = np.array(values, np.float64)
    return [_metric(name, np.asarray, totals, np.ones(len(totals)), unit)] if len(totals) else []


def _metric(name: str, of: Callable[[Floats], Floats], totals: Floats, counts: Floats, unit: str) -> Metric:
    """``of(sum of totals / sum of counts)`` over documents, (N,) each, with its bootstrap interval."""
    documents = len(totals)
    value = float(of(totals.sum() / counts.sum()))
    if documents == 1:
        return Metric(name, value, n=1, unit=unit)
    weights = _resamples(documents)
    low, high = np.quantile(of(weights @ totals / (weights @ counts)), INTERVAL)
    return Metric(name, value, float(low), float(high), documents, unit)


def _percentile(name: str, values: Sequence[Floats], share: float, unit: str) -> Metric:
    """The smallest value that ``share`` of all positions do not exceed, with its bootstrap interval.

    Args:
        values: one array (T,) a document.
    """
    pooled = np.concatenate(values)
    order = np.argsort(pooled, kind="stable")
    document = np.repeat(np.arange(len(values)), [len(value) for value in values])[order]

    def percentile(weights: Floats) -> float:
        cumulative = np.cumsum(weights[document])
        return float(pooled[order[np.searchsorted(cumulative, share * cumulative[-1])]])

    value = percentile(np.ones(len(values)))
    if len(values) == 1:
        return Metric(name, value, n=1, unit=unit)
    low, high = np.quantile([percentile(weights) for weights in _resamples(len(values))], INTERVAL)
    return Metric(name, value, float(low), float(high), len(values), unit)


def _resamples(documents: int) -> Floats:
    """How often each document is drawn in each resample of as many documents, (1000, documents)."""
    rng = np.random.default_rng(SEED)
    return rng.multinomial(documents, np.full(documents, 1 / documents), size=RESAMPLES).astype(np.float64)
