"""A report for continuous integration: Markdown for a pull request or step summary, JUnit XML for the test view."""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator

from qwen_run.accuracy.report import Report, SampleResult, WorstPosition
from qwen_run.reports.tables import (
    FIDELITY_NOTE,
    ROUGE_NOTE,
    Table,
    about_table,
    around_jumps,
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

# A pull request comment holds 65,536 characters: this many samples, of texts this long, leave room for the rest.
MARKDOWN_SAMPLES = 10
MARKDOWN_TEXT_CHARACTERS = 600


def to_markdown(report: Report) -> str:
    """GitHub-flavoured Markdown: verdict first, details folded; no text of a document or model is read as markup."""
    return "\n\n".join(_sections(report)) + "\n"


def _sections(report: Report) -> Iterator[str]:
    yield f"## {_plain(headline(report))}"
    for section in (_judged, _baseline, _fidelity, _routers, _layers, _quality, _cost, _samples):
        yield from section(report)
    yield _folded("What was compared, and how to do it again", _table(about_table(report)))


def _judged(report: Report) -> Iterator[str]:
    if report.verdicts:
        yield _table(verdict_table(report.verdicts))
    if report.checks:
        yield _table(check_table(report))


def _baseline(report: Report) -> Iterator[str]:
    if report.baseline is None:
        return
    yield f"### Compared with {_plain(report.baseline.engine)} of {_plain(when(report.baseline.created))}"
    yield from (f"⚠️ Not on equal terms: {_plain(caveat)}." for caveat in report.baseline.caveats)
    changes = baseline_table(report)
    yield _table(changes) if changes.rows else "No metric changed."


def _fidelity(report: Report) -> Iterator[str]:
    if (fidelity := fidelity_table(report)).rows:
        yield "### Fidelity"
        yield FIDELITY_NOTE
        yield _table(fidelity)
    if report.worst is not None:
        yield _worst(report.worst)


def _routers(report: Report) -> Iterator[str]:
    if (routers := router_table(report)).rows:
        yield "### Routers"
        yield router_sentence(report)
        yield _folded("Every layer", _table(routers))


def _layers(report: Report) -> Iterator[str]:
    if not report.layers:
        return
    yield f"### Where it comes from\n\n{_plain(jump_sentence(report.layers))}"
    if near := around_jumps(report.layers):
        yield _folded("Before and after the jump (all outputs are in report.html)", _table(layer_table(near)))


def _quality(report: Report) -> Iterator[str]:
    if quality := [table for table in (rouge_table(report), greedy_table(report)) if table.rows]:
        yield "### Text quality"
        yield ROUGE_NOTE
        yield from map(_table, quality)


def _cost(report: Report) -> Iterator[str]:
    if report.costs:
        yield "### Cost"
        yield _table(cost_table(report))
        yield cost_settings(report)


def _worst(worst: WorstPosition) -> str:
    tokens = {
        "the text goes on with": worst.following,
        "first choice of the reference": worst.reference_choice,
        "first choice of the engine": worst.engine_choice,
    }
    said = ", ".join(f"{words} {_code(visible(token))}" for words, token in tokens.items())
    before, after = worst.before[-MARKDOWN_TEXT_CHARACTERS:], worst.after[:MARKDOWN_TEXT_CHARACTERS]
    text = f"{_escape(before)}<b>{_escape(worst.following)}</b>{_escape(after)}"
    where = f"{_code(worst.sample)}, position {worst.position}, KL {format_value(worst.kl, 'nats')}"
    return f"**Worst position**: {where}: {said}.\n\n{_pre(text)}"


def _samples(report: Report) -> Iterator[str]:
    if report.samples:
        yield "### Samples"
    for sample in lowest_agreement_first(report.samples)[:MARKDOWN_SAMPLES]:
        kl = format_value(sum(sample.kl) / len(sample.kl)) if sample.kl else "–"
        agreement = format_value(sample.top1, "share")
        title = f"{_code(sample.id)}: same first choice at {agreement} of {len(sample.kl)} positions, mean KL {kl} nats"
        yield _folded(title, "\n\n".join(_texts(sample)) or "Plain text: nothing was generated.")
    if (left_out := len(report.samples) - MARKDOWN_SAMPLES) > 0:
        yield f"{left_out} more samples, which agree better, are in report.html."


def _texts(sample: SampleResult) -> Iterator[str]:
    if sample.rouge:
        yield _plain("; ".join(f"{full_label(name)}: {value:.3f}" for name, value in sample.rouge.items()))
    texts = {"Engine": sample.engine_text, "Reference": sample.reference_text, "Written by a person": sample.summary}
    for side, text in texts.items():
        if text is not None:
            cut = text if len(text) <= MARKDOWN_TEXT_CHARACTERS else text[:MARKDOWN_TEXT_CHARACTERS] + " …"
            yield f"{side}:\n\n{_pre(_escape(cut))}"


def _folded(title: str, content: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{content}\n\n</details>"


def _table(table: Table) -> str:
    head, *rows = (list(map(_plain, row)) for row in (table.head, *table.rows))
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _plain(text: str) -> str:
    """``text`` as itself in one line: nothing in it is markup, ends a table cell or starts a mention."""
    return re.sub(r"[\\`*_{}\[\]<>#|&~$]|@(?=\w)|://|(?<=www)\.", _entities, re.sub(r"[^\S\xa0]+", " ", text))


def _entities(match: re.Match[str]) -> str:
    # A zero-width word joiner: GitHub looks for mentions after entities have become characters again.
    joiner = "&#8288;" if match[0] == "@" else ""
    return "".join(f"&#{ord(character)};" for character in match[0]) + joiner


def _code(text: str) -> str:
    return f"<code>{_plain(text)}</code>"


def _escape(text: str) -> str:
    return html.escape(text, quote=False)


def _pre(escaped: str) -> str:
    """A block that keeps spaces and line breaks, and ends only at its own end tag."""
    return f"<pre>\n{escaped}\n</pre>"


def to_junit(report: Report) -> str:
    """JUnit XML: a test case for each check and threshold; failed is a failure, undecided is skipped."""
    checks = [(check.name, "passed" if check.passed else "failed", check.message) for check in report.checks]
    thresholds = [(str(verdict.threshold), verdict.outcome, verdict.message) for verdict in report.verdicts]
    # One run of both sides serves every test case, so its time stands at the suite.
    seconds = f"{report.total_seconds:.3f}"
    root = ET.Element("testsuites", _counts([*checks, *thresholds]) | {"name": "qwen-summarize", "time": seconds})
    suite = ET.SubElement(
        root,
        "testsuite",
        _counts([*checks, *thresholds])
        | {"name": _xml(f"accuracy of {report.engine.name}"), "time": seconds, "timestamp": report.created[:19]},
    )
    properties = ET.SubElement(suite, "properties")
    for name, value in about_table(report).rows:
        ET.SubElement(properties, "property", name=name, value=_xml(value))
    for kind, cases in (("check", checks), ("threshold", thresholds)):
        for name, outcome, message in cases:
            case = ET.SubElement(suite, "testcase", classname=f"qwen-summarize.{kind}", name=_xml(name), time="0")
            if outcome == "failed":
                ET.SubElement(case, "failure", type=kind, message=_xml(message)).text = _xml(message)
            elif outcome == "undecided":
                ET.SubElement(case, "skipped", message=_xml(message))
            else:
                ET.SubElement(case, "system-out").text = _xml(message)
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _counts(cases: list[tuple[str, str, str]]) -> dict[str, str]:
    outcomes = [outcome for _, outcome, _ in cases]
    counts = {"failures": outcomes.count("failed"), "errors": 0, "skipped": outcomes.count("undecided")}
    return {"tests": str(len(cases))} | {name: str(count) for name, count in counts.items()}


def _xml(text: str) -> str:
    """``text`` without the characters XML 1.0 has no way to write."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)
