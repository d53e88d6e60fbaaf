"""The tables and sentences of a report, as plain text: Markdown and HTML show the same ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qwen_run.accuracy.gate import Threshold, Verdict
from qwen_run.accuracy.metrics import Metric
from qwen_run.accuracy.number_words import format_bytes
from qwen_run.accuracy.number_words import format_value as format_value
from qwen_run.accuracy.report import (
    COST_FIELDS,
    Change,
    LayerError,
    MetricChange,
    Outcome,
    Report,
    SampleResult,
    meaning,
)

ICONS: dict[str, str] = {"passed": "✅", "failed": "❌", "undecided": "⚠️", "not judged": "📏"}
ARROWS: dict[Change, str] = {"better": "▲ better", "worse": "▼ worse", "same": "= same", "neither": "· changed"}

REFERENCES = {
    "original": "the original weights",
    "as_built": "the weights as built",
}
ROUNDING = "rounding inputs"
FIDELITY_NOTE = (
    "Both sides read the same tokens. Against the original weights: what rounding costs. Against the weights as built "
    "(read from the engine, in float32 arithmetic): whether it computes what was meant. That they are those of the "
    "checkpoint, rounded as the engine records it, is a check of its own. Of rounding inputs: the engine as it runs "
    "beside itself with float32 activations, and beside the reference that rounds alike."
)
ROUGE_NOTE = (
    "ROUGE counts words shared with a summary a person wrote. It can rise when quality falls, so it is never the "
    "measure of fidelity: that is the KL divergence."
)
ROUGE_SIDES = {
    "rouge.engine": "Engine / summaries",
    "rouge.reference": "Reference / summaries",
    "rouge.agreement": "Engine / reference",
}


@dataclass(frozen=True)
class Table:
    """Column heads and rows of plain text, every row as long as ``head``."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def format_metric(metric: Metric | None) -> str:
    """Value and 95 % interval; a dash for a metric that was not measured."""
    if metric is None:
        return "–"
    unit = shown_unit(metric)
    value = format_value(metric.value, unit)
    if metric.low is None or metric.high is None or metric.low == metric.high:
        return value
    # The value has said the unit already.
    low, high = (
        format_value(end, unit).removesuffix(f" {unit}").removesuffix(" %") for end in (metric.low, metric.high)
    )
    return f"{value} ({low} to {high})"


def shown_unit(metric: Metric | MetricChange | Threshold) -> str:
    """The unit in which a metric, its change or its bound is shown."""
    name = metric.name if isinstance(metric, Metric) else metric.metric
    return meaning(name).unit or getattr(metric, "unit", "")


def visible(token: str) -> str:
    """A token with its white space as signs that can be seen.

    >>> visible(" the\\n")
    '␣the⏎'
    """
    return token.translate(str.maketrans(" \n\t", "␣⏎⇥")) or "(nothing)"


def headline(report: Report) -> str:
    """The verdict in one line, with an icon for those who only glance."""
    outcomes = [verdict.outcome for verdict in report.verdicts]
    outcomes += ["passed" if check.passed else "failed" for check in report.checks]
    counts = [f"{outcomes.count(kind)} {kind}" for kind in ("failed", "undecided", "passed") if kind in outcomes]
    what = f"{report.engine.name} against {report.checkpoint.name}"
    return f"{ICONS[report.outcome]} {_shout(report.outcome)}: {what}" + (f" ({', '.join(counts)})" if counts else "")


def _shout(outcome: Outcome) -> str:
    return outcome.upper() if outcome in ("failed", "undecided") else outcome.capitalize()


def full_label(name: str) -> str:
    """A metric in words: ``KL divergence, mean, against the original weights``."""
    group, _, _ = name.rpartition(".")
    if group == "rounding":
        return f"{meaning(name).label}, of {ROUNDING}"
    against = REFERENCES.get(group)
    side = ROUGE_SIDES.get(group)
    label = meaning(name).label
    return f"{label}, against {against}" if against else f"{label}, {side.lower()}" if side else label


def bound(threshold: Threshold) -> str:
    return f"{'≤' if threshold.kind == 'at_most' else '≥'} {format_value(threshold.bound, shown_unit(threshold))}"


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """Every threshold; what failed stands first."""
    order = ("failed", "undecided", "passed")
    rows = tuple(
        (
            _outcome(verdict.outcome),
            full_label(verdict.threshold.metric),
            format_metric(verdict.metric),
            bound(verdict.threshold),
            verdict.threshold.reason,
            *([verdict.why] if any(each.why for each in verdicts) else []),
        )
        for verdict in sorted(verdicts, key=lambda verdict: order.index(verdict.outcome))
    )
    head = ("Verdict", "Metric", "Measured (95 % interval)", "Bound", "Why this bound")
    return Table((*head, "Why undecided") if any(each.why for each in verdicts) else head, rows)


def _outcome(outcome: Outcome) -> str:
    return f"{ICONS[outcome]}\N{NO-BREAK SPACE}{outcome}"


def check_table(report: Report) -> Table:
    checks = sorted(report.checks, key=lambda check: check.passed)
    rows = tuple((_outcome("passed" if c.passed else "failed"), c.name, c.message) for c in checks)
    return Table(("Verdict", "Check", "Found"), rows)


def fidelity_table(report: Report) -> Table:
    """One row a metric, one column a reference, and one of what rounding inputs costs."""
    columns = {group: f"Against {words}" for group, words in REFERENCES.items()}
    return _grid(report, "Metric", columns | {"rounding": f"Of {ROUNDING}"})


def rouge_table(report: Report) -> Table:
    """One row a ROUGE, one column a pair of texts."""
    return _grid(report, "F1, mean", ROUGE_SIDES)


def greedy_table(report: Report) -> Table:
    return _grid(report, "Greedy answers", {"greedy": "Engine / reference"})


def _grid(report: Report, corner: str, columns: Mapping[str, str]) -> Table:
    """The metrics of the groups ``columns``, one row for each last part of a name; no rows where none was measured."""
    groups = [group for group in columns if any(m.name.startswith(f"{group}.") for m in report.metrics)]
    names = dict.fromkeys(m.name.rpartition(".")[2] for m in report.metrics if m.name.rpartition(".")[0] in groups)
    rows = tuple(
        (meaning(name).label, *(format_metric(report.metric(f"{group}.{name}")) for group in groups)) for name in names
    )
    return Table((corner, *(columns[group] for group in groups)), rows)


def cost_table(report: Report) -> Table:
    """One row a measure, one column a side."""
    rows = tuple(
        (meaning(field).label, *(_optional(getattr(cost, field), meaning(field).unit) for cost in report.costs))
        for field in COST_FIELDS
        if any(getattr(cost, field) is not None for cost in report.costs)
    )
    return Table(("", *(cost.side.capitalize() for cost in report.costs)), rows)


def cost_settings(report: Report) -> str:
    """At what batch and how many threads each side was measured, once where all agree."""
    settings = {cost.side: f"batch {cost.batch}, {_plural(cost.threads, 'thread')}" for cost in report.costs}
    if len(set(settings.values())) == 1:
        return f"Both at {next(iter(settings.values()))}." if len(settings) > 1 else f"{next(iter(settings.values()))}."
    return "; ".join(f"{side}: {words}" for side, words in settings.items()) + "."


def lowest_agreement_first(samples: Sequence[SampleResult]) -> list[SampleResult]:
    """Samples by their share of equal first choices, those where it is NaN before all others."""
    return sorted(samples, key=lambda sample: -1.0 if math.isnan(sample.top1) else sample.top1)


def layer_table(layers: Sequence[LayerError]) -> Table:
    head = ("Output", "Against", "Relative error", "Largest difference", "Cosine", "Mean", "Standard deviation")
    values: tuple[Callable[[LayerError], float], ...] = (
        lambda layer: layer.relative_rms,
        lambda layer: layer.max_difference,
        lambda layer: layer.cosine,
        lambda layer: layer.mean,
        lambda layer: layer.standard_deviation,
    )
    rows = tuple(
        (
            layer.name + (" ← the error jumps here" if layer.jumps else ""),
            REFERENCES[layer.reference],
            *(format_value(value(layer)) for value in values),
        )
        for layer in layers
    )
    return Table(head, rows)


def router_table(report: Report) -> Table:
    """How often each router chose as with the original weights; no rows without routers."""
    rows = tuple((router.name, format_value(router.same_experts, "share")) for router in report.routers)
    return Table(("Router", meaning("same_experts").label), rows)


def router_sentence(report: Report) -> str:
    """How often all routers chose as with the original weights."""
    return (
        f"Of a token and layer, the engine has the experts that the original has in "
        f"{format_metric(report.metric('router.same_experts'))}, in whatever order; "
        "asked of the first tokens of the first documents."
    )


def jump_sentence(layers: Sequence[LayerError]) -> str:
    """Where the error starts, or how large it gets, for each reference."""
    sentences = []
    for reference, words in REFERENCES.items():
        rows = [layer for layer in layers if layer.reference == reference]
        jumps = [layer.name for layer in rows if layer.jumps]
        if jumps:
            sentences.append(f"Against {words}, the error jumps first at {jumps[0]}.")
        elif rows:
            largest = max(rows, key=lambda layer: layer.relative_rms)
            size = format_value(largest.relative_rms)
            sentences.append(f"Against {words}, the error jumps nowhere; it is largest at {largest.name}, {size}.")
    return " ".join(sentences)


def around_jumps(layers: Sequence[LayerError]) -> list[LayerError]:
    """The outputs a few steps before and after each jump, against the same reference."""
    jumps = [(index, layer.reference) for index, layer in enumerate(layers) if layer.jumps]
    return [
        layer
        for index, layer in enumerate(layers)
        if any(-3 <= index - jump <= 3 and layer.reference == reference for jump, reference in jumps)
    ]


def baseline_table(report: Report) -> Table:
    """What changed, the worse first; unchanged metrics are left out."""
    assert report.baseline is not None
    order = ("worse", "better", "neither")
    changed = [change for change in report.baseline.changes if change.change in order]
    rows = tuple(
        (
            ARROWS[change.change] + (" (intervals overlap)" if change.overlap else ""),
            full_label(change.metric),
            format_value(change.before, shown_unit(change)),
            format_value(change.after, shown_unit(change)),
        )
        for change in sorted(changed, key=lambda change: order.index(change.change))
    )
    return Table(("Change", "Metric", "Before", "Now"), rows)


def about_table(report: Report) -> Table:
    """What was compared with what, by whom, when."""
    dataset = report.dataset
    hashes = {"documents": dataset.sha256}
    hashes |= {f"engine/{name}": digest for name, digest in report.engine.sha256.items()}
    hashes |= {f"checkpoint/{name}": digest for name, digest in report.checkpoint.sha256.items()}
    size = f"{report.engine.quantization}, {format_bytes(report.engine.size_bytes)}"
    counts = f"{_plural(dataset.documents, 'document')}, {_plural(dataset.positions, 'position')}"
    rows = [
        ("Engine", f"{report.engine.name} ({size})"),
        ("Checkpoint", report.checkpoint.name),
        ("Documents", f"{dataset.name} ({counts})"),
        ("Created", when(report.created)),
        ("Command", report.command),
        ("Versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
        ("Time", _time(report)),
        ("SHA-256", ", ".join(f"{name} {digest[:12]}" for name, digest in hashes.items())),
    ]
    return Table(("", ""), tuple(row for row in rows if row[1]))


def when(created: str) -> str:
    """A report's time as people read it.

    >>> when("2025-11-21T00:30:00+00:00")
    '2025-11-21 00:30 UTC'
    """
    return f"{created[:16].replace('T', ' ')} UTC"


def _time(report: Report) -> str:
    total = report.total_seconds
    parts = [
        f"{part} {s:.1f} s ({100 * s / (total or 1):.0f} %)" for part, s in report.seconds.items() if part != "all"
    ]
    return ", ".join([f"{total:.1f} s in all", *parts])


def _optional(value: float | None, unit: str) -> str:
    return "–" if value is None else format_value(value, unit)


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
