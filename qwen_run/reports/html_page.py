"""A report as one HTML page that needs nothing else: no scripts, no fonts, no addresses; plots are inline SVG."""

from __future__ import annotations

import html
import math
import re
import statistics
from collections.abc import Iterator, Sequence

from qwen_run.accuracy.report import LayerError, LogitPairs, Report, SampleResult, WorstPosition
from qwen_run.reports import svg
from qwen_run.reports.tables import (
    FIDELITY_NOTE,
    REFERENCES,
    ROUGE_NOTE,
    Table,
    about_table,
    baseline_table,
    check_table,
    cost_settings,
    cost_table,
    fidelity_table,
    format_value,
    full_label,
    greedy_table,
    headline,
    jump_sentence,
    layer_table,
    lowest_agreement_first,
    rouge_table,
    router_sentence,
    router_table,
    verdict_table,
    visible,
    when,
)

# Dots of a plot: more are no easier to see and make a page that opens slowly.
MAX_DOTS = 4000
# Bars of a plot, the lowest agreements first.
MAX_BARS = 20
# Samples whose texts stand on the page.
MAX_SAMPLES = 200
# KL below this is rounding of float64 and drawn at the bottom.
KL_FLOOR = 1e-12
ERROR_FLOOR = 1e-9
MEDIAN_BINS = 48

STYLE = """
:root { color-scheme: light dark; --text: #1c2128; --soft: #59636e; --page: #ffffff; --panel: #f6f8fa; --edge: #d1d9e0;
  --s0: #0969da; --s1: #bc4c00; --s2: #1a7f37; --s3: #8250df; --passed: #1a7f37; --failed: #cf222e;
  --undecided: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --soft: #9198a1; --page: #0d1117; --panel: #151b23;
  --edge: #3d444d; --s0: #58a6ff; --s1: #f0883e; --s2: #3fb950; --s3: #a371f7; --passed: #3fb950; --failed: #f85149;
  --undecided: #d29922; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 70rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.4rem; border-left: .4rem solid var(--soft); padding: .4rem .8rem; background: var(--panel); }
h1.passed { border-color: var(--passed); } h1.failed { border-color: var(--failed); }
h1.undecided { border-color: var(--undecided); }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; } h3 { font-size: 1rem; margin: 0 0 .2rem; }
p { max-width: 46rem; margin: .5rem 0; } .soft { color: var(--soft); }
.wide { overflow-x: auto; margin: .5rem 0 1rem; } table { border-collapse: collapse; font-size: .9rem; }
td, th { text-align: left; vertical-align: top; padding: .3rem .7rem; border-bottom: 1px solid var(--edge); }
td:last-child { overflow-wrap: anywhere; } th { color: var(--soft); font-weight: 600; }
@media (max-width: 40rem) { thead { display: none; } table, tbody, tr, td { display: block; }
  tr { border-bottom: 1px solid var(--edge); padding: .3rem 0; } td { border: 0; padding: .1rem 0; }
  td:first-child { font-weight: 600; } td:not(:first-child)[data-head]::before { content: attr(data-head) ": ";
  color: var(--soft); } }
pre, code { background: var(--panel); border-radius: 4px; font-family: ui-monospace, monospace; font-size: .85rem; }
pre { padding: .7rem; white-space: pre-wrap; margin: .3rem 0 .8rem; } code { padding: .1rem .3rem; }
mark { background: var(--s1); color: var(--page); border-radius: 2px; }
details { border: 1px solid var(--edge); border-radius: 6px; padding: .4rem .8rem; margin: .4rem 0; }
summary { cursor: pointer; }
.plots { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; padding: .8rem; background: var(--panel); border-radius: 6px; }
figcaption { color: var(--soft); font-size: .85rem; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--text); font: 13px system-ui, sans-serif; paint-order: stroke;
  stroke: var(--panel); stroke-width: 3px; }
.axis { stroke: var(--soft); } .grid { stroke: var(--edge); stroke-width: .6; }
.guide { stroke: var(--soft); stroke-dasharray: 5 4; }
.s0 { --series: var(--s0); } .s1 { --series: var(--s1); } .s2 { --series: var(--s2); } .s3 { --series: var(--s3); }
.dots { stroke: var(--series); stroke-width: 3; stroke-linecap: round; opacity: .5; fill: none; }
.line { stroke: var(--series); stroke-width: 2; fill: none; } .bar { fill: var(--series); }
.ring { stroke: var(--failed); stroke-width: 2; fill: none; }
.key { color: var(--series); font-weight: 600; }
"""


def to_html(report: Report) -> str:
    """The whole page; every text of a document or model is escaped."""
    content = "\n".join(_sections(report))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(headline(report))}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{content}\n</body>\n</html>\n"
    )


def _sections(report: Report) -> Iterator[str]:
    yield f'<h1 class="{report.outcome.split()[0]}">{html.escape(headline(report))}</h1>'
    yield _paragraph(", ".join(f"{name}: {value}" for name, value in about_table(report).rows[1:4]), "soft")
    if report.verdicts:
        yield _table(verdict_table(report.verdicts))
    if report.checks:
        yield _table(check_table(report))
    yield from _baseline(report)
    if (fidelity := fidelity_table(report)).rows:
        yield "<h2>Fidelity</h2>" + _paragraph(FIDELITY_NOTE) + _table(fidelity)
    if plots := "".join(_plots(report)):
        yield f'<div class="plots">{plots}</div>'
    if report.worst is not None:
        yield _worst(report.worst)
    if (routers := router_table(report)).rows:
        yield "<h2>Routers</h2>" + _paragraph(router_sentence(report)) + _details("Every layer", _table(routers))
    if report.layers:
        yield "<h2>Where it comes from</h2>" + _paragraph(jump_sentence(report.layers))
        yield _details("Every output of a layer or sub-block", _table(layer_table(report.layers)))
    quality = [table for table in (rouge_table(report), greedy_table(report)) if table.rows]
    if quality:
        yield "<h2>Text quality</h2>" + _paragraph(ROUGE_NOTE) + "".join(map(_table, quality))
    if report.costs:
        yield "<h2>Cost</h2>" + _table(cost_table(report)) + _paragraph(cost_settings(report), "soft")
    if report.samples:
        yield "<h2>Samples</h2>" + "".join(_samples(report.samples))
    yield "<h2>About</h2>" + _table(about_table(report))


def _baseline(report: Report) -> Iterator[str]:
    baseline = report.baseline
    if baseline is None:
        return
    yield "<h2>" + html.escape(f"Compared with {baseline.engine} of {when(baseline.created)}") + "</h2>"
    yield from (_paragraph(f"⚠️ Not on equal terms: {caveat}.") for caveat in baseline.caveats)
    changes = baseline_table(report)
    yield _table(changes) if changes.rows else _paragraph("No metric changed.")


def _plots(report: Report) -> Iterator[str]:
    samples = [sample for sample in report.samples if sample.kl]
    if samples:
        yield _kl_by_position(samples)
        yield _agreement_by_sample(samples)
    if report.logits is not None and report.logits.reference:
        yield _logit_scatter(report.logits)
    for reference in REFERENCES:
        layers = [layer for layer in report.layers if layer.reference == reference]
        if any(_layer_number(layer.name) is not None for layer in layers):
            yield _error_by_layer(layers, reference)


def _kl_by_position(samples: Sequence[SampleResult]) -> str:
    points = [(float(position), kl) for sample in samples for position, kl in enumerate(sample.kl)]
    x = svg.x_axis("position (tokens from the start)", 0, max(position for position, _ in points))
    y = svg.log_y_axis("KL divergence (nats)", [kl for _, kl in points], KL_FLOOR)
    shown = points[:: math.ceil(len(points) / MAX_DOTS)]
    marks = svg.dots(shown, x, y), svg.line(medians_of_ranges(points), x, y, 1)
    caption = (
        f"{_key(0, 'Dots')}: {len(shown):,} of {len(points):,} positions of {len(samples)} samples. "
        f"{_key(1, 'Line')}: median. Level is good; a rise with the position is an error that builds up in the cache."
    )
    return _figure("KL by position: lower is better", svg.plot("KL divergence by position", x, y, *marks), caption)


def medians_of_ranges(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The median of each of some equal ranges of positions, at their middle."""
    width = math.ceil((max(position for position, _ in points) + 1) / MEDIAN_BINS)
    bins: dict[int, list[float]] = {}
    for position, value in points:
        if math.isfinite(value):
            bins.setdefault(int(position) // width, []).append(value)
    return [((i + 0.5) * width - 0.5, statistics.median(values)) for i, values in sorted(bins.items())]


def _agreement_by_sample(samples: Sequence[SampleResult]) -> str:
    lowest = lowest_agreement_first(samples)[:MAX_BARS]
    rows = [(sample.id, sample.top1, format_value(sample.top1, "share")) for sample in lowest]
    drawing = svg.bars(
        "Share of positions with the same first choice, by sample", rows, "positions with the same first choice (%)"
    )
    caption = f"{len(lowest)} of {len(samples)} samples, the lowest first: where both sides rank the same token first."
    return _figure("Agreement by sample: longer is better", drawing, caption)


def _logit_scatter(logits: LogitPairs) -> str:
    pairs = list(zip(logits.reference, logits.engine, strict=True))
    shown = pairs[:: math.ceil(len(pairs) / MAX_DOTS)]
    finite = [value for pair in shown for value in pair if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    x, y = svg.x_axis("logit of the reference", low, high), svg.y_axis("logit of the engine", low, high)
    marks = svg.guide(x, y, (low, low), (high, high)), svg.dots(shown, x, y)
    caption = f"{len(shown):,} logits of both sides. A shift or a slope is an error of its own, a cloud is rounding."
    return _figure("Logits: on the line is good", svg.plot("Logits of engine and reference", x, y, *marks), caption)


# What readers call the sub-blocks of a layer; others go by their own names.
BLOCK_WORDS = {"self_attn": "attention", "mlp": "MLP"}


def _drawn_parts(layers: Sequence[LayerError]) -> dict[str, str]:
    """What is drawn of a layer -> its words, by what follows the layer's number: its sub-blocks, then itself ("").

    A sub-block is what something inside is known of.
    """
    blocks = [match[1] for layer in layers if (match := re.search(r"\blayers\.\d+\.(\w+)\.", layer.name))]
    return {f".{name}": BLOCK_WORDS.get(name, name) for name in blocks} | {"": "whole layer"}


def _layer_number(name: str) -> int | None:
    """The layer that an output belongs to; None of one outside of all layers.

    >>> _layer_number("model.layers.3.mlp"), _layer_number("model.norm")
    (3, None)
    """
    found = re.search(r"\blayers\.(\d+)", name)
    return int(found[1]) if found else None


def _error_by_layer(layers: Sequence[LayerError], reference: str) -> str:
    places = [(float(number), layer) for layer in layers if (number := _layer_number(layer.name)) is not None]
    x = svg.x_axis("layer", 0, max(at for at, _ in places))
    y = svg.log_y_axis("relative error (rms)", [layer.relative_rms for _, layer in places], ERROR_FLOOR)
    marks, parts = [], _drawn_parts(layers)
    for series, part in enumerate(parts):
        ending = re.compile(rf"layers\.\d+{re.escape(part)}$")
        points = [(at, layer.relative_rms) for at, layer in places if ending.search(layer.name)]
        marks += [svg.line(points, x, y, series), svg.dots(points, x, y, series)]
    for at, layer in places:
        if layer.jumps and math.isfinite(layer.relative_rms):
            marks.append(svg.ring(x, y, (at, layer.relative_rms), layer.name.removeprefix("model.")))
    keys = ", ".join(_key(series, words) for series, words in enumerate(parts.values()))
    title = f"Error by layer, against {REFERENCES[reference]}: lower is better"
    caption = f"{keys}. 0.01: the output is off by 1 % of its size. A circle marks a jump."
    return _figure(title, svg.plot(title, x, y, *marks), caption)


def _worst(worst: WorstPosition) -> str:
    rows = (
        ("Where", f"{worst.sample}, position {worst.position}"),
        ("KL divergence", format_value(worst.kl, "nats")),
        ("The text goes on with", visible(worst.following)),
        ("First choice of the reference", visible(worst.reference_choice)),
        ("First choice of the engine", visible(worst.engine_choice)),
    )
    before, following, after = map(html.escape, (worst.before, worst.following, worst.after))
    text = f"<pre>{before}<mark>{following}</mark>{after}</pre>"
    return f"<h2>Worst position</h2>{text}{_table(Table(('', ''), rows))}"


def _samples(samples: Sequence[SampleResult]) -> Iterator[str]:
    for sample in lowest_agreement_first(samples)[:MAX_SAMPLES]:
        kl = format_value(statistics.fmean(sample.kl), "nats") if sample.kl else "–"
        agreement = format_value(sample.top1, "share")
        title = f"{sample.id}: same first choice at {agreement} of {len(sample.kl)} positions, mean KL {kl}"
        yield _details(title, "".join(_texts(sample)) or _paragraph("Plain text: nothing was generated."))
    if (left_out := len(samples) - MAX_SAMPLES) > 0:
        yield _paragraph(f"{left_out} more samples, which agree better, are in report.json.", "soft")


def _texts(sample: SampleResult) -> Iterator[str]:
    texts = {"Engine": sample.engine_text, "Reference": sample.reference_text, "Written by a person": sample.summary}
    for side, text in texts.items():
        if text is not None:
            yield f"<h3>{side}</h3><pre>{html.escape(text)}</pre>"
    if sample.first_divergence is not None:
        yield _paragraph(f"The answers differ from token {sample.first_divergence} on, counted from 0.", "soft")
    if sample.rouge:
        yield _paragraph("; ".join(f"{full_label(name)}: {value:.3f}" for name, value in sample.rouge.items()), "soft")


def _table(table: Table) -> str:
    """A table that becomes a list of cards on a phone, where every cell says what it is (``data-head``)."""
    heads = [html.escape(cell) for cell in table.head]
    names = [f' data-head="{head}"' if head else "" for head in heads]
    head = f"<thead><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr></thead>" if any(heads) else ""
    rows = (
        "".join(f"<td{name}>{html.escape(cell)}</td>" for name, cell in zip(names, row, strict=True))
        for row in table.rows
    )
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<div class=wide><table>{head}<tbody>{body}</tbody></table></div>"


def _figure(title: str, drawing: str, caption: str) -> str:
    return f"<figure><h3>{html.escape(title)}</h3>{drawing}<figcaption>{caption}</figcaption></figure>"


def _key(series: int, words: str) -> str:
    return f'<span class="key s{series}">{words}</span>'


def _details(title: str, content: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def _paragraph(text: str, kind: str = "") -> str:
    return f"<p{f' class={kind}' if kind else ''}>{html.escape(text)}</p>"
