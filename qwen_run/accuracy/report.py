"""What one comparison of an engine with its references found, as ``report.json`` holds it.

Everything here is data. ``reports/ci.py`` and ``reports/html_page.py`` make text of it, ``reports/files.py`` writes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from qwen_engine import strict_json
from qwen_engine.errors import RequestError
from qwen_engine.regular_files import read_regular
from qwen_run.accuracy.gate import Verdict
from qwen_run.accuracy.metrics import Metric
from qwen_run.accuracy.number_words import format_value

SCHEMA_VERSION = 3

# Significant digits of numbers in the arrays of report.json: far below what any plot shows, half the bytes.
ARRAY_DIGITS = 6

Outcome = Literal["passed", "failed", "undecided", "not judged"]
Change = Literal["better", "worse", "same", "neither"]


@dataclass(frozen=True)
class EngineInfo:
    """The engine that was judged; ``quantization`` in words (``int4, groups of 32``), ``sha256`` by file."""

    name: str
    directory: str
    quantization: str
    size_bytes: int
    sha256: Mapping[str, str]


@dataclass(frozen=True)
class CheckpointInfo:
    """The checkpoint it was judged against; ``sha256`` by file."""

    name: str
    sha256: Mapping[str, str]


@dataclass(frozen=True)
class DatasetInfo:
    """What both sides read: ``sha256`` of the documents, how many there were, positions compared in all."""

    name: str
    sha256: str
    documents: int
    positions: int


@dataclass(frozen=True)
class Check:
    """Something that is either so or not: the tokenizer, the chat template, the end-of-sequence ids."""

    name: str
    passed: bool
    message: str


@dataclass(frozen=True)
class SampleResult:
    """One document. ``kl``: KL(reference || engine) in nats of every position, against the original weights.

    ``top1``: share of positions where both sides rank the same token first. ``engine_text`` and ``reference_text`` are
    the greedy answers of both, ``summary`` the one a person wrote; None for plain text. ``first_divergence``: the first
    answer token that differs, None where none does. ``rouge``: F1 by metric name (``rouge.engine.rougeL``).
    """

    id: str
    kl: tuple[float, ...]
    top1: float
    engine_text: str | None
    reference_text: str | None
    summary: str | None
    first_divergence: int | None
    rouge: Mapping[str, float]


@dataclass(frozen=True)
class WorstPosition:
    """The position with the largest KL: the token both sides had to predict, with the text around it.

    ``kl`` in nats; ``reference_choice`` and ``engine_choice`` are the tokens each side ranked first.
    """

    sample: str
    position: int
    kl: float
    before: str
    following: str
    after: str
    reference_choice: str
    engine_choice: str


@dataclass(frozen=True)
class LogitPairs:
    """Some logits of both sides, pair by pair: the same position and vocabulary entry."""

    reference: tuple[float, ...]
    engine: tuple[float, ...]


@dataclass(frozen=True)
class LayerError:
    """How far the output of one layer or sub-block is from the reference's, over all positions and features.

    ``name`` as in ``layers.onnx`` (``model.layers.3.mlp``); ``mean`` and ``standard_deviation`` of the reference's
    values; ``relative_rms``: root mean square of the difference over that of the reference; ``jumps`` marks where the
    error starts.
    """

    name: str
    reference: Literal["original", "as_built"]
    mean: float
    standard_deviation: float
    max_difference: float
    cosine: float
    relative_rms: float
    jumps: bool


@dataclass(frozen=True)
class RouterAgreement:
    """The share of tokens for which a router chose the experts that it chooses with the original weights.

    ``name`` as in ``layers.onnx`` (``model.layers.3.mlp.gate``).
    """

    name: str
    same_experts: float


@dataclass(frozen=True)
class Cost:
    """What one side takes (``engine``, ``reference``), both at the same batch and threads; None where not measured."""

    side: str
    batch: int
    threads: int
    ttft_ms: float | None
    decode_tokens_per_s: float | None
    peak_memory_bytes: int | None
    size_bytes: int | None


@dataclass(frozen=True)
class MetricChange:
    """One metric in the other report and in this one.

    ``overlap``: the intervals of the two share values, so the change may be chance; False where one has no interval.
    """

    metric: str
    unit: str
    before: float
    after: float
    change: Change
    overlap: bool


@dataclass(frozen=True)
class Baseline:
    """Another engine's report beside this one. ``caveats``: why the two are not measured on equal terms, if so."""

    engine: str
    created: str
    caveats: tuple[str, ...]
    changes: tuple[MetricChange, ...]


@dataclass(frozen=True)
class Report:
    """Everything one run of ``qwen-summarize`` found. ``created``: UTC, ISO 8601.

    ``seconds``: wall time by what it was spent on; ``all`` for the whole run, which takes a little more than its parts.
    """

    schema_version: int
    engine: EngineInfo
    checkpoint: CheckpointInfo
    dataset: DatasetInfo
    versions: Mapping[str, str]
    command: str
    created: str
    seconds: Mapping[str, float]
    metrics: tuple[Metric, ...]
    checks: tuple[Check, ...]
    verdicts: tuple[Verdict, ...]
    samples: tuple[SampleResult, ...]
    worst: WorstPosition | None
    logits: LogitPairs | None
    layers: tuple[LayerError, ...]
    routers: tuple[RouterAgreement, ...]
    costs: tuple[Cost, ...]
    baseline: Baseline | None

    @property
    def outcome(self) -> Outcome:
        """A failed check or threshold fails the whole; nothing to judge by is ``not judged``."""
        outcomes = {verdict.outcome for verdict in self.verdicts}
        outcomes |= {"passed" if check.passed else "failed" for check in self.checks}
        order: tuple[Outcome, ...] = ("failed", "undecided", "passed")
        return next((outcome for outcome in order if outcome in outcomes), "not judged")

    @property
    def total_seconds(self) -> float:
        return self.seconds.get("all", sum(self.seconds.values()))

    def metric(self, name: str) -> Metric | None:
        return next((metric for metric in self.metrics if metric.name == name), None)

    def to_json(self) -> str:
        """JSON; numbers in arrays keep 6 significant digits, all others every digit."""
        return strict_json.dump(self, ARRAY_DIGITS)

    @classmethod
    def from_json(cls, text: str, where: str = "report.json") -> Report:
        """Read what :meth:`to_json` wrote.

        Raises:
            RequestError: not JSON, of another schema version, or a field is missing, unknown or mistyped.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{where} is not JSON: {error}; give a report.json of qwen-summarize") from error
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise RequestError(
                f"{where} has schema version {version}, this program reads {SCHEMA_VERSION}; "
                "make the report again with this installation's qwen-summarize"
            )
        try:
            report = strict_json.parse(cls, data, where)
        except strict_json.MismatchError as error:
            raise RequestError(f"{error}; make the report again with qwen-summarize") from error
        assert isinstance(report, cls)
        return report

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read a ``report.json``.

        Raises:
            RequestError: it cannot be read, or as :meth:`from_json` says.
        """
        try:
            text = read_regular(path).decode()
        except OSError as error:
            raise RequestError(f"{path} cannot be read: {error.strerror}; give a report.json") from error
        except UnicodeDecodeError as error:
            raise RequestError(f"{path} is not UTF-8: {error.reason}; give a report.json of qwen-summarize") from error
        return cls.from_json(text, str(path))


@dataclass(frozen=True)
class Meaning:
    """How a metric is shown to people, and which way is better: ``lower``, ``higher``, nearer ``one``, or neither.

    ``unit`` where people want another than the metric has: ``share`` is shown in per cent.
    """

    label: str
    better: Literal["lower", "higher", "one", "neither"]
    unit: str = ""


# By the last part of a metric's name.
MEANINGS: dict[str, Meaning] = {
    "kl_mean": Meaning("KL divergence, mean", "lower"),
    "kl_ratio": Meaning("KL, engine / reference that rounds alike", "one"),
    "kl_p99": Meaning("KL divergence, 99th percentile", "lower"),
    "kl_max": Meaning("KL divergence, worst position", "lower"),
    "top1": Meaning("Same first choice (top-1)", "higher", "share"),
    "top5": Meaning("Shared among the first five (top-5)", "higher", "share"),
    "cosine_mean": Meaning("Cosine of logits, mean", "higher"),
    "max_difference": Meaning("Largest logit difference", "lower"),
    "mean_difference": Meaning("Mean logit difference", "lower"),
    "perplexity": Meaning("Perplexity of the engine", "neither"),
    "reference_perplexity": Meaning("Perplexity of the reference", "neither"),
    "perplexity_ratio": Meaning("Perplexity, engine / reference", "one"),
    "same_experts": Meaning("Same experts of a token and layer", "higher", "share"),
    "identical": Meaning("Identical greedy answers", "higher", "share"),
    "first_divergence": Meaning("First differing token, where they differ", "higher"),
    "rouge1": Meaning("ROUGE-1", "higher"),
    "rouge2": Meaning("ROUGE-2", "higher"),
    "rougeL": Meaning("ROUGE-L", "higher"),
    "rougeLsum": Meaning("ROUGE-Lsum", "higher"),
    "ttft_ms": Meaning("Time to first token", "lower", "ms"),
    "decode_tokens_per_s": Meaning("Output speed", "higher", "tokens/s"),
    "peak_memory_bytes": Meaning("Peak memory", "lower", "bytes"),
    "size_bytes": Meaning("Size on disk", "lower", "bytes"),
}
COST_FIELDS = ("ttft_ms", "decode_tokens_per_s", "peak_memory_bytes", "size_bytes")


def meaning(metric: str) -> Meaning:
    """Label and better direction of a metric; an unknown one is shown by its name and judged neither way.

    What says something about the reference only (``rouge.reference``) is judged neither way.
    """
    group, _, last = metric.rpartition(".")
    found = MEANINGS.get(last, Meaning(last, "neither"))
    return replace(found, better="neither") if group.endswith("reference") else found


def compare_baseline(report: Report, baseline: Report) -> Baseline:
    """What changed from ``baseline`` to ``report``: every metric both have, costs of the engines included."""
    before = {metric.name: metric for metric in _measured(baseline)}
    changes = tuple(_change(before[metric.name], metric) for metric in _measured(report) if metric.name in before)
    return Baseline(baseline.engine.name, baseline.created, tuple(_caveats(report, baseline)), changes)


def _measured(report: Report) -> Iterator[Metric]:
    yield from report.metrics
    for cost in report.costs:
        if cost.side == "engine":
            for field in COST_FIELDS:
                if (value := getattr(cost, field)) is not None:
                    yield Metric(f"cost.engine.{field}", float(value), unit=meaning(field).unit)


def _caveats(report: Report, baseline: Report) -> Iterator[str]:
    if report.dataset.sha256 != baseline.dataset.sha256:
        yield f"the documents differ: {report.dataset.name} here, {baseline.dataset.name} there"
    if report.checkpoint.sha256 != baseline.checkpoint.sha256:
        yield f"the checkpoints differ: {report.checkpoint.name} here, {baseline.checkpoint.name} there"
    settings = [
        {(cost.batch, cost.threads) for cost in one.costs if cost.side == "engine"} for one in (report, baseline)
    ]
    if all(settings) and settings[0] != settings[1]:
        yield "the costs were measured at another batch or number of threads"


def _change(before: Metric, after: Metric) -> MetricChange:
    change = _judge(after.name, before.value, after.value)
    return MetricChange(after.name, after.unit, before.value, after.value, change, _overlap(before, after))


def _overlap(one: Metric, other: Metric) -> bool:
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return False
    return one.low <= other.high and other.low <= one.high


def _judge(name: str, before: float, after: float) -> Change:
    better = meaning(name).better
    if better == "one":
        before, after = abs(before - 1), abs(after - 1)
    unit = meaning(name).unit
    if format_value(before, unit) == format_value(after, unit):  # what no table shows is no change
        return "same"
    if better == "neither":
        return "neither"
    if math.isnan(before) or math.isnan(after):
        return "worse" if math.isnan(after) else "better"
    return "better" if (after > before) == (better == "higher") else "worse"
