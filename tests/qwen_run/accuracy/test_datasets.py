"""Built-in samples and files of documents, and what is wrong with them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cases import ROOT
from qwen_engine.errors import RequestError
from qwen_run.accuracy.datasets import (
    BUILT_IN,
    Document,
    built_in_documents,
    half_of,
    load_dataset,
    overlap,
)

BENCHMARK_TEXT = ROOT / "benchmarks" / "data" / "wikitext2-evaluation.jsonl"


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_name_loads_without_a_network_or_a_setting(name: str) -> None:
    dataset = load_dataset(name)
    assert len(dataset.documents) >= 15
    assert len({document.id for document in dataset.documents}) == len(dataset.documents)
    assert all(len(document.document) > 100 for document in dataset.documents)
    assert all(half_of(document.document) == "evaluation" for document in dataset.documents)


def test_only_papers_have_a_summary() -> None:
    assert all(document.summary for document in load_dataset("scitldr").documents)
    assert not any(document.summary for document in load_dataset("wikitext2").documents)


def test_the_first_few_of_the_default_are_of_both_kinds() -> None:
    kinds = [document.summary is None for document in load_dataset("default", max_samples=4).documents]
    assert kinds == [False, True, False, True]


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_evaluates_never_calibrates(name: str) -> None:
    evaluation, calibration = built_in_documents(name), built_in_documents(name, "calibration")
    assert min(len(evaluation), len(calibration)) >= 12
    assert overlap(evaluation, calibration) == ()
    assert not {document.id for document in evaluation} & {document.id for document in calibration}


@pytest.mark.parametrize(
    ("name", "sha256"),
    [
        ("scitldr", "b13c45109786436c318d86431cb8cbe45e43ce5b065a21b4364318fbc5479575"),
        ("wikitext2", "41d08cf227149b763114456d09a690d7b2d3cfb7cd6da37b55ef7a1c663ba8cb"),
        ("default", "7f3bb4e761ee7f805ca9624b8d75fa9fb1584f7cb1f91bf64c53375502c31f83"),
    ],
)
def test_what_reports_were_made_with_does_not_change(name: str, sha256: str) -> None:
    assert load_dataset(name).sha256 == sha256


def test_an_article_is_in_one_half_with_all_its_parts() -> None:
    further = load_dataset(str(BENCHMARK_TEXT)).documents
    assert all(half_of(document.document) == "evaluation" for document in further)
    evaluation = (*built_in_documents("wikitext2"), *further)
    calibration = built_in_documents("wikitext2", "calibration")
    articles = [{document.id.removesuffix("-continued") for document in half} for half in (evaluation, calibration)]
    assert not articles[0] & articles[1]
    assert len(articles[0]) == len(evaluation)
    paragraphs = [
        {line for one in half for line in one.document.split("\n") if len(line) > 99}
        for half in (evaluation, calibration)
    ]
    assert not paragraphs[0] & paragraphs[1]


def test_there_is_text_enough_to_calibrate() -> None:
    documents = built_in_documents("default", "calibration")
    assert sum(len(document.document) for document in documents) > 400_000


def test_overlap_sees_through_case_and_white_space() -> None:
    a = [Document("1", "A  text\nof two lines. ", None), Document("2", "another", "with a summary")]
    assert overlap(a, [Document("9", "a text of TWO lines.", "other summary")]) == ("1",)
    assert overlap(a, [Document("9", "a text of two", None)]) == ()


def write(directory: Path, *records: object) -> str:
    path = directory / "texts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_json_lines_with_fields_of_any_name(tmp_path: Path) -> None:
    path = write(
        tmp_path, {"article": "One. Two.", "tldr": "Few."}, {"id": 7, "article": ["a", "b"], "tldr": ["s", "t"]}
    )
    dataset = load_dataset(path, "article", "tldr")
    assert dataset.documents == (Document("1", "One. Two.", "Few."), Document("7", "a b", "s"))


def test_lines_without_summaries_are_plain_texts(tmp_path: Path) -> None:
    assert load_dataset(write(tmp_path, {"document": "x"})).documents == (Document("1", "x", None),)
    path = write(tmp_path, {"document": "x", "summary": None}, {"document": "y", "summary": "s"})
    assert [document.summary for document in load_dataset(path).documents] == [None, "s"]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "essay.txt"
    path.write_text("\ufeffFirst.\n\nSecond {not JSON}.\n", encoding="utf-8")
    assert load_dataset(str(path)).documents == (Document("essay", "First.\n\nSecond {not JSON}.\n", None),)


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    first = load_dataset(write(tmp_path, {"document": "x", "summary": "s"}, {"document": "y", "summary": "t"}))
    shorter = load_dataset(
        write(tmp_path, {"document": "x", "summary": "s"}, {"document": "y", "summary": "t"}), max_samples=1
    )
    renamed = load_dataset(write(tmp_path, {"d": "x", "s": "s"}, {"d": "y", "s": "t"}), "d", "s")
    changed = load_dataset(write(tmp_path, {"document": "x", "summary": "s"}, {"document": "y", "summary": "u"}))
    assert first.sha256 == renamed.sha256
    assert len({first.sha256, shorter.sha256, changed.sha256}) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty, expected JSON Lines or a text"),
        (b" \n\n", "is empty, expected JSON Lines or a text"),
        (b'{"document": "x"}\n\n{"document": ', "line 3 is not JSON"),
        (b'{"document": "x"}\n[1]', "line 2 holds list, expected an object"),
        (b'{"documnet": "x", "b": 1}', "line 1 has no field 'document', only 'documnet', 'b'"),
        (b'{"document": "x", "summary": "s"}\n{"document": "y"}', "line 2 has no field 'summary', only 'document'"),
        (b'{"document": 3}', "'document' is int, expected text"),
        (b'{"document": "a \\ud800"}', "'document' has '\\ud800' at character 2, which stands for nothing alone"),
        (b'{"document": " "}', "'document' is empty"),
        (b'{"document": "x", "summary": {}}', "'summary' is dict, expected text"),
        (b'{"id": 1, "document": "x"}\n{"id": "1", "document": "y"}', "line 2 has the id '1' of an earlier line"),
        (b"caf\xe9", "byte 3 (0xe9) is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=re.escape(message)) as refusal:
        load_dataset(str(path))
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_summary_field_that_was_asked_for_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="has no field 'tldr', only 'document'"):
        load_dataset(write(tmp_path, {"document": "x"}), summary_field="tldr")


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(
        RequestError, match="scitlrd is neither a file nor one of the data sets default, scitldr, wikitext2"
    ):
        load_dataset("scitlrd")


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read: Is a directory"):
        load_dataset(str(tmp_path))
