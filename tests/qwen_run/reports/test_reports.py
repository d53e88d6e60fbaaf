"""Reports: kept exactly in JSON, shown without a text breaking out of its place, compared in the right direction.

More than 400 lines: one full report and an empty one go through every format.
"""

from __future__ import annotations

import doctest
import html.parser
import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
from click.testing import CliRunner

from qwen_engine import strict_json
from qwen_engine.errors import QwenError, RequestError
from qwen_run.accuracy import report as report_module
from qwen_run.accuracy.gate import Threshold, Verdict
from qwen_run.accuracy.metrics import Metric
from qwen_run.accuracy.report import (
    SCHEMA_VERSION,
    Baseline,
    Check,
    CheckpointInfo,
    Cost,
    DatasetInfo,
    EngineInfo,
    LayerError,
    LogitPairs,
    Report,
    RouterAgreement,
    SampleResult,
    WorstPosition,
    compare_baseline,
)
from qwen_run.commands.summarize import print_report
from qwen_run.reports import html_page as report_html
from qwen_run.reports import svg
from qwen_run.reports import tables as report_tables
from qwen_run.reports.ci import MARKDOWN_SAMPLES, to_junit, to_markdown
from qwen_run.reports.files import FILES, write_report
from qwen_run.reports.html_page import to_html

# Would break out of HTML, of a Markdown cell, of a <pre> and of a <summary>, link and mention, were it not escaped.
NASTY = "</pre></summary><script>alert(1)</script> a | b\n\n# *x* `y` [z](https://evil.example) @someone 👋 & \x00"

KL_THRESHOLD = Threshold("original.kl_mean", 0.02, "at_most", "twice what was measured")
TOP1_THRESHOLD = Threshold("original.top1", 0.9, "at_least", "three in a hundred less than measured")
ROUGE_THRESHOLD = Threshold("rouge.engine.rougeL", 0.1, "at_least", "no worse than chance")

EMPTY = Report(
    schema_version=SCHEMA_VERSION,
    engine=EngineInfo("demo-int4", "engines/demo-int4", "int4, groups of 32", 98_765_432, {"model.onnx": "e" * 64}),
    checkpoint=CheckpointInfo("SmolLM2-135M", {"model.safetensors": "c" * 64}),
    dataset=DatasetInfo("scitldr", "d" * 64, 2, 6),
    versions={"qwen-engine": "0.1.0", "onnxruntime": "1.31.1"},
    command="qwen-summarize --check",
    created="2025-11-21T00:30:00+00:00",
    seconds={"reference": 7.5, "engine": 2.5},
    metrics=(),
    checks=(),
    verdicts=(),
    samples=(),
    worst=None,
    logits=None,
    layers=(),
    routers=(),
    costs=(),
    baseline=None,
)

KL_MEAN = Metric("original.kl_mean", 0.0123456789012, 0.01, 0.015, 2, "nats")


def verdict(threshold: Threshold, outcome: str, metric: Metric | None = None) -> Verdict:
    return Verdict(threshold, metric, outcome, f"{threshold.metric} {NASTY}")  # type: ignore[arg-type]


def layer(name: str, relative_rms: float, jumps: bool = False) -> LayerError:
    return LayerError(name, "original", 0.1, 1.0, 0.5, 0.999, relative_rms, jumps)


FULL = replace(
    EMPTY,
    metrics=(
        KL_MEAN,
        Metric("as_built.kl_mean", 1.5e-7, unit="nats"),
        Metric("original.top1", 0.9123, 0.9, 0.92, 2),
        Metric("original.perplexity_ratio", 1.00002, 0.9999, 1.0001, 2),
        Metric("router.same_experts", 0.875, 0.85, 0.9, 2),
        Metric("greedy.identical", 0.5, n=2),
        Metric("rouge.engine.rougeL", 0.25, 0.2, 0.3, 2),
        Metric("rouge.reference.rougeL", 0.26, 0.2, 0.3, 2),
    ),
    checks=(Check("tokenizer", True, "equal"), Check("template", False, NASTY)),
    verdicts=(
        verdict(KL_THRESHOLD, "passed", KL_MEAN),
        verdict(TOP1_THRESHOLD, "failed", Metric("original.top1", 0.8)),
        verdict(ROUGE_THRESHOLD, "undecided"),
    ),
    samples=(
        SampleResult("plain", (1e-3, 0.0, 2.5e-2), 1.0, None, None, None, None, {}),
        SampleResult(NASTY, (math.nan, 1 / 3, math.inf), 2 / 3, NASTY, NASTY, NASTY, 4, {"rouge.engine.rougeL": 0.2}),
    ),
    worst=WorstPosition(NASTY, 1, 0.5, NASTY, " the", NASTY, NASTY, "\n"),
    logits=LogitPairs((-1.0, 0.0, 12.345678), (-1.1, 0.1, math.nan)),
    routers=(RouterAgreement("model.layers.0.mlp.gate", 0.9), RouterAgreement("model.layers.1.mlp.gate", 0.85)),
    layers=(layer("model.layers.0.self_attn", 0.01), layer("model.layers.0.mlp", 0.5, True), layer("model.norm", 0.4)),
    costs=(
        Cost("engine", 1, 2, 123.4, 45.6, 300 << 20, 98_765_432),
        Cost("reference", 1, 2, 567.8, 12.3, None, 538 << 20),
    ),
)


def test_json_round_trip_rounds_arrays_only() -> None:
    read = Report.from_json(FULL.to_json())
    assert read.samples[1].kl[1] == 0.333333
    assert math.isnan(read.samples[1].kl[0])
    assert read.samples[1].kl[2] == math.inf
    assert read.samples[1].top1 == 2 / 3
    assert read.to_json() == FULL.to_json()
    assert replace(read, samples=(), logits=None) == replace(FULL, samples=(), logits=None)


def test_json_has_no_words_that_json_lacks_and_one_line_an_array() -> None:
    def refuse(word: str) -> float:
        raise AssertionError(word)

    json.loads(FULL.to_json(), parse_constant=refuse)
    assert '"kl": [ 0.001, 0.0, 0.025 ]' in FULL.to_json()


def changed(edit: Callable[[dict[str, Any]], object]) -> str:
    data = json.loads(FULL.to_json())
    edit(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "report.json is not JSON"),
        ("[" * 100_000, "report.json is not JSON"),
        ("[]", "report.json has schema version None, this program reads 3"),
        (changed(lambda data: data.update(schema_version=1)), "schema version 1"),
        (changed(lambda data: data.pop("metrics")), "report.json lacks metrics; make the report again"),
        (changed(lambda data: data.update(extra=1)), "report.json has unknown extra"),
        (changed(lambda data: data["samples"][0].update(top1="1")), "samples[0]: top1 is '1', expected float"),
        (changed(lambda data: data["samples"][0].update(top1=True)), "samples[0]: top1 is True, expected float"),
        (changed(lambda data: data["verdicts"][2].update(outcome="fine")), "verdicts[2]: outcome is 'fine'"),
        (changed(lambda data: data["verdicts"][0]["metric"].pop("n")), "verdicts[0]: metric is {"),
        (changed(lambda data: data.update(layers={})), "layers is {}, expected tuple"),
    ],
)
def test_strict_reading(text: str, expected: str) -> None:
    with pytest.raises(RequestError, match=re.escape(expected)) as error:
        Report.from_json(text)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"report\.json cannot be read: No such file"):
        Report.read(tmp_path / "report.json")
    (tmp_path / "latin.json").write_bytes(b"\xff")
    with pytest.raises(RequestError, match="is not UTF-8"):
        Report.read(tmp_path / "latin.json")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_json_has_no_words_for(value: float) -> None:
    text = strict_json.dump(Metric("x", value))
    assert str(strict_json.parse(Metric, json.loads(text), "x").value) == str(value)


@pytest.mark.parametrize(
    ("outcomes", "checks", "expected"),
    [
        ((), (), "not judged"),
        (("passed",), (), "passed"),
        (("passed", "undecided"), (True,), "undecided"),
        (("undecided", "failed"), (), "failed"),
        (("passed", "undecided"), (True, False), "failed"),
        ((), (True,), "passed"),
    ],
)
def test_outcome(outcomes: tuple[str, ...], checks: tuple[bool, ...], expected: str) -> None:
    verdicts = tuple(verdict(KL_THRESHOLD, outcome) for outcome in outcomes)
    report = replace(EMPTY, verdicts=verdicts, checks=tuple(Check("x", passed, "") for passed in checks))
    assert report.outcome == expected
    assert expected in to_markdown(report).splitlines()[0].lower()


@pytest.mark.parametrize(
    ("name", "before", "after", "expected"),
    [
        ("original.kl_mean", 0.2, 0.1, "better"),
        ("original.kl_mean", 0.1, 0.2, "worse"),
        ("original.kl_mean", 0.1, math.nan, "worse"),
        ("original.kl_mean", math.nan, 0.1, "better"),
        ("original.top1", 0.9, 0.95, "better"),
        ("as_built.cosine_mean", 0.9, 0.8, "worse"),
        ("original.perplexity_ratio", 1.1, 0.99, "better"),
        ("original.perplexity_ratio", 1.01, 0.9, "worse"),
        ("original.perplexity", 10.0, 9.0, "neither"),
        ("original.perplexity", 10.0, 10.0, "same"),
        ("rouge.engine.rouge1", 0.2, 0.3, "better"),
        ("rouge.reference.rouge1", 0.2, 0.3, "neither"),
        ("new.metric", 1.0, 2.0, "neither"),
        ("original.kl_mean", 0.35, 0.35 * (1 + 1e-9), "same"),  # shown alike
        ("original.top1", 0.7, 0.7 + 1e-7, "same"),
        ("original.perplexity_ratio", 1.1, 1.1000001, "same"),
        ("cost.engine.size_bytes", 97e6, 97e6 + 1, "same"),
    ],
)
def test_baseline_direction(name: str, before: float, after: float, expected: str) -> None:
    old, new = (replace(EMPTY, metrics=(Metric(name, value),)) for value in (before, after))
    assert [change.change for change in compare_baseline(new, old).changes] == [expected]


def test_baseline_compares_what_both_have_and_says_what_is_unequal() -> None:
    faster = replace(FULL.costs[0], decode_tokens_per_s=50.0, threads=4)
    dataset = replace(FULL.dataset, sha256="0" * 64, name="other")
    new = replace(
        FULL, metrics=(replace(KL_MEAN, value=0.016, low=0.0155, high=0.017),), costs=(faster,), dataset=dataset
    )
    baseline = compare_baseline(new, FULL)
    changes = {change.metric: change for change in baseline.changes}
    assert changes["original.kl_mean"].change == "worse"
    assert not changes["original.kl_mean"].overlap
    assert changes["cost.engine.decode_tokens_per_s"].change == "better"
    assert "original.top1" not in changes
    assert len(baseline.caveats) == 2
    assert "scitldr" in baseline.caveats[0]
    assert "threads" in baseline.caveats[1]
    shown = to_markdown(replace(new, baseline=baseline))
    assert "▼ worse" in shown
    assert "▲ better" in shown
    assert "Not on equal terms" in shown


def test_baseline_intervals_that_overlap_may_be_chance() -> None:
    new = replace(FULL, metrics=(replace(KL_MEAN, value=0.014, low=0.0149, high=0.02),))
    assert compare_baseline(new, FULL).changes[0].overlap
    assert not compare_baseline(replace(new, metrics=(replace(KL_MEAN, low=None),)), FULL).changes[0].overlap


def test_an_unchanged_engine_has_no_changes() -> None:
    baseline = compare_baseline(FULL, FULL)
    assert {change.change for change in baseline.changes} == {"same"}
    assert baseline.caveats == ()
    assert "No metric changed" in to_markdown(replace(FULL, baseline=baseline))


def test_markdown_says_the_verdict_first_and_rouge_is_no_measure_of_fidelity() -> None:
    shown = to_markdown(FULL)
    assert shown.startswith("## ❌ FAILED: demo-int4 against SmolLM2-135M (2 failed, 1 undecided, 2 passed)\n")
    assert "It can rise when quality falls, so it is never the measure of fidelity" in shown
    assert "91.23 % (90 to 92)" in shown
    assert "the error jumps first at model.layers.0.mlp" in shown.replace("&#95;", "_")


def test_a_sample_that_is_nan_stands_before_the_lowest_agreement() -> None:
    samples = tuple(replace(FULL.samples[0], id=f"sample{top1}", top1=top1) for top1 in (0.9, 0.2, math.nan, 0.5))
    for shown in (
        to_markdown(replace(EMPTY, samples=samples)),
        to_html(replace(EMPTY, samples=samples)).split("<h2>")[1],
    ):
        order = re.findall(r"(sample[\w.]+)(?=</code>:|: )", shown)
        assert order == ["samplenan", "sample0.2", "sample0.5", "sample0.9"]


def test_time_is_that_of_the_whole_run_where_it_was_measured() -> None:
    report = replace(EMPTY, seconds={"engine": 2.0, "reference": 5.0, "all": 10.0})
    assert ET.fromstring(to_junit(report)).get("time") == "10.000"
    assert "10.0 s in all, engine 2.0 s (20 %), reference 5.0 s (50 %)" in to_markdown(report)


@pytest.mark.parametrize("name", ["model.layers.1.mlp", "model.layers.1.mlp.down_proj.input"])
def test_a_jump_is_circled_and_shown_with_its_neighbours(name: str) -> None:
    names = [f"model.layers.{i}.self_attn" for i in range(6)]
    names.insert(2, name)
    report = replace(EMPTY, layers=tuple(layer(each, 0.5, each == name) for each in names))
    assert to_html(report).count('<circle class="ring"') == 1
    shown = to_markdown(report)
    assert f"the error jumps first at {name}" in shown.replace("&#95;", "_")
    assert "layers.4" in shown
    assert "layers.5" not in shown


def test_without_a_jump_the_largest_error_is_named() -> None:
    report = replace(EMPTY, layers=(layer("model.layers.0.mlp", 0.1), layer("model.layers.1.mlp", 0.2)))
    assert "the error jumps nowhere; it is largest at model.layers.1.mlp, 0.2." in to_markdown(report)


class Tags(html.parser.HTMLParser):
    """The tags and the text of a page; fails where an end tag does not match."""

    VOID = frozenset({"meta", "path", "line", "circle", "rect"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_html_shows_texts_as_they_are_and_needs_nothing_else() -> None:
    page = to_html(replace(FULL, baseline=compare_baseline(FULL, EMPTY), command=NASTY))
    tags = Tags(page)
    assert not tags.seen & {"script", "link", "img", "iframe", "a"}
    assert NASTY.replace("\x00", "") in "".join(tags.words).replace("\x00", "")
    assert not re.search(r"https?://|url\(|@import|src=|href=", page.replace("https://evil.example", ""))
    assert "prefers-color-scheme: dark" in page
    assert page.count("<svg ") == 4


def test_markdown_texts_cannot_break_out() -> None:
    shown = to_markdown(replace(FULL, command=NASTY))
    outside = re.sub(r"<pre>\n.*?\n</pre>", "", shown, flags=re.DOTALL)
    tags = Tags(shown)
    assert tags.seen <= {"details", "summary", "pre", "code", "b"}
    assert "https://" not in outside
    assert not re.search("@|&#64;(?!&#8288;)", outside)
    assert "a | b" not in outside
    for table in re.findall(r"(?:^\|.*\n?)+", shown, flags=re.MULTILINE):
        assert len({row.count("|") for row in table.splitlines()}) == 1


def test_markdown_of_many_long_samples_fits_a_comment() -> None:
    samples = tuple(replace(FULL.samples[1], id=str(i), engine_text="x" * 5000) for i in range(100))
    shown = to_markdown(replace(FULL, samples=samples))
    assert len(shown) < 65_536
    assert f"{100 - MARKDOWN_SAMPLES} more samples" in shown


def test_junit_read_back() -> None:
    root = ET.fromstring(to_junit(FULL))
    suite = root.find("testsuite")
    assert suite is not None
    cases = suite.findall("testcase")
    for element in (root, suite):
        counts = [element.get(name) for name in ("tests", "failures", "errors", "skipped", "time")]
        assert counts == ["5", "2", "0", "1", "10.000"]
    assert len(cases) == 5
    assert len(root.findall(".//failure")) == 2
    skipped = root.find(".//skipped")
    assert skipped is not None
    assert "rouge.engine.rougeL" in (skipped.get("message") or "")
    assert [case.get("name") for case in cases][2:] == [
        "original.kl_mean <= 0.02",
        "original.top1 >= 0.9",
        "rouge.engine.rougeL >= 0.1",
    ]
    assert {case.get("classname") for case in cases} == {"qwen-summarize.check", "qwen-summarize.threshold"}
    assert "<script>" in "".join(failure.text or "" for failure in root.iter("failure"))
    assert suite.get("timestamp") == "2025-11-21T00:30:00"


def test_an_empty_report_is_a_report() -> None:
    assert Report.from_json(EMPTY.to_json()) == EMPTY
    assert to_markdown(EMPTY).startswith("## 📏 Not judged")
    assert "Text quality" not in to_markdown(EMPTY)
    assert ET.fromstring(to_junit(EMPTY)).get("tests") == "0"
    page = to_html(EMPTY)
    Tags(page)
    assert "<svg" not in page
    assert compare_baseline(EMPTY, FULL) == Baseline("demo-int4", EMPTY.created, (), ())


@pytest.mark.parametrize("kl", [(), (0.0,), (math.nan,), (1e-300, 1e300)])
def test_plots_of_odd_samples(kl: tuple[float, ...]) -> None:
    sample = replace(FULL.samples[0], kl=kl, top1=math.nan)
    page = to_html(
        replace(EMPTY, samples=(sample,), logits=LogitPairs((1.0,), (1.0,)), layers=(layer("model.layers.0", 0.0),))
    )
    Tags(page)
    assert "nan" not in " ".join(re.findall(r'(?:d|x|y|width|points)="[^"]*"', page))


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    written = write_report(FULL, tmp_path / "new" / "report")
    assert sorted(path.name for path in (tmp_path / "new" / "report").iterdir()) == sorted(FILES)
    assert [path.name for path in written] == list(FILES)
    assert Report.read(written[0]).to_json() == FULL.to_json()
    write_report(EMPTY, tmp_path / "new" / "report")
    assert Report.read(written[0]) == EMPTY
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match=r"the report cannot be written: .*; give another --report"):
        write_report(FULL, tmp_path / "file")


def test_a_report_that_cannot_be_renamed_leaves_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    with pytest.raises(QwenError):
        write_report(FULL, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_half_a_surrogate_pair_is_written_as_a_question_mark(tmp_path: Path) -> None:
    sample = replace(FULL.samples[1], engine_text="a\ud800b")
    write_report(replace(FULL, samples=(sample,)), tmp_path)
    assert Report.read(tmp_path / "report.json").samples[0].engine_text == "a?b"


def test_log_axis_covers_its_values_in_whole_decades() -> None:
    axis = svg.log_y_axis("KL", [3e-7, 0.02, math.nan], 1e-12)
    assert (axis.low, axis.high) == (1e-7, 0.1)
    assert axis.place(1e-7) == axis.start
    assert axis.place(0.1) == axis.end
    assert axis.place(1e-4) == pytest.approx((axis.start + axis.end) / 2, abs=0.1)


def test_median_line_is_the_median_of_each_range() -> None:
    points = [(float(i), value) for i in range(480) for value in (i // 10, i // 10, 1e9, math.nan)]
    medians = report_html.medians_of_ranges(points)
    assert medians[0] == (4.5, 0)
    assert medians[-1] == (474.5, 47)


@pytest.mark.parametrize("module", [report_module, report_tables, report_html, svg])
def test_doctests(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0


def test_every_report_says_why_a_verdict_is_undecided() -> None:
    why = "2 documents decide nothing, give at least 5"
    undecided = Verdict(KL_THRESHOLD, KL_MEAN, "undecided", f"found: {why}", why)
    report = replace(EMPTY, verdicts=(undecided, verdict(TOP1_THRESHOLD, "passed")))
    terminal = CliRunner().invoke(click.Command("x", callback=lambda: print_report(report, layers=False))).output
    for text in (to_markdown(report), to_html(report), to_junit(report), terminal):
        assert why in text
    assert "Why undecided" not in to_markdown(replace(EMPTY, verdicts=(verdict(TOP1_THRESHOLD, "passed"),)))


def test_routers_are_told_with_their_layers_and_where_there_are_none_nothing_is() -> None:
    sentence = "the engine has the experts that the original has in 87.5 % (85 to 90)"
    for text in (to_markdown(FULL), to_html(FULL)):
        assert sentence in text.replace("\n", " ")
        assert "model.layers.1.mlp.gate" in text
        assert "90 %" in text
    for text in (to_markdown(EMPTY), to_html(EMPTY)):
        assert "Routers" not in text
