"""Plain questions: what counts as the same first sentence, and what the report says of it."""

from __future__ import annotations

import doctest
import shlex

import pytest

from benchmarks import questions
from benchmarks.questions import FLOAT, QUESTIONS, SCHEMES, answers, equal_sentences, first_sentence, report_lines
from qwen_build.cli import main as qwen_build
from qwen_engine.errors import QwenError


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("The capital of France is Paris.", "The capital of France is Paris."),
        ("  Paris!  It is large.", "Paris!"),
        ("It is 3.14 and more. Yes.", "It is 3.14 and more."),
        ("A list:\n\n1. one", "A list:"),
        ("cut off by the number of", "cut off by the number of"),
        ("", ""),
    ],
)
def test_a_sentence_ends_at_a_mark_or_a_line(answer, words):
    assert first_sentence(answer) == words.split()


def test_words_count_and_white_space_does_not():
    assert equal_sentences(["A b. C."], ["A  b. D."]) == [True]
    assert equal_sentences(["A b."], ["A c."]) == [False]
    assert equal_sentences(["A b."], ["A b, c."]) == [False]


def test_the_report_counts_and_names_who_differs():
    same = ["It is so. And so on."] * len(QUESTIONS)
    found = {FLOAT: same, "int8": ["It is so. Or not.", *same[1:]], "int4": [*same[:-1], "It is not so."]}
    lines = list(report_lines("head", found))
    assert f"| int8 | {len(QUESTIONS)} | {len(QUESTIONS) - 1} |" in lines
    assert f"| int4 | {len(QUESTIONS) - 1} | {len(QUESTIONS) - 1} |" in lines
    assert lines[-1] == f"| {QUESTIONS[-1]} | It is so. | int4 |"
    assert lines[-2] == f"| {QUESTIONS[-2]} | It is so. |  |"


def test_there_are_forty_different_questions():
    assert len(set(QUESTIONS)) == 40


@pytest.mark.parametrize("options", SCHEMES.values())
def test_qwen_build_knows_the_options(options):
    assert qwen_build.make_context("qwen-build", shlex.split(options)).params["quant"] in options


def test_an_engine_that_does_not_answer_is_named(tmp_path):
    with pytest.raises(QwenError, match=r"none"):
        answers(tmp_path / "none")


def test_examples_in_docstrings():
    assert doctest.testmod(questions).failed == 0
