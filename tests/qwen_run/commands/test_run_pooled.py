"""qwen-run with engines that write no text: what LLM says, as lines of JSON; what cannot be is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cases.pooled import add_words, write_pooled, write_sentence_files
from cases.run_command import Terminal, run_command
from qwen_engine.errors import EngineError
from qwen_run import LLM, PoolingParams
from qwen_run.api.pooled import PooledLLM
from qwen_run.commands import run_pooled

TEXTS = ["Who wrote it?", "A cat.", "Der Fluss fließt"]


@pytest.fixture(scope="module")
def engines(tmp_path_factory, build_engine):
    """An engine for each task, by its name."""
    folder = tmp_path_factory.mktemp("pooled")
    write_pooled(folder / "embed", "Qwen3ForCausalLM", tie_word_embeddings=True)
    write_sentence_files(folder / "embed")
    write_pooled(folder / "classify", "Qwen3ForSequenceClassification", id2label={0: "good", 1: "bad"})
    write_pooled(folder / "score", "Qwen3ForCausalLM")
    add_words(folder / "score", "yes", "no")
    return {
        name: build_engine(folder / name, quant="int8", **({} if name == "classify" else {"task": name}))
        for name in ("embed", "classify", "score")
    }


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("\n".join(TEXTS), "utf-8")


def lines_of(result):
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_embeddings_are_those_of_the_class_to_the_last_bit(engines):
    with LLM(engines["embed"]) as llm:
        expected = llm.embed(TEXTS)
        (query,) = llm.embed(TEXTS[0], PoolingParams(dimensions=9), instruction="find it")
    found = lines_of(run_command("--engine", engines["embed"], "--embed", "--input-file", "texts.txt"))
    assert [record["line"] for record in found] == [1, 2, 3]
    for record, result in zip(found, expected, strict=True):
        assert np.array_equal(np.float32(record["embedding"]), np.float32(result.outputs.embedding))
        assert record["input_tokens"] == len(result.prompt_token_ids)
    options = ("--embed", "--dimensions", 9, "--instruction", "find it")
    (alone,) = lines_of(run_command("--engine", engines["embed"], *options, TEXTS[0]))
    assert list(alone) == ["embedding", "input_tokens"]
    assert np.array_equal(np.float32(alone["embedding"]), np.float32(query.outputs.embedding))


@pytest.mark.parametrize("task", ["score", "embed"])
def test_scores_are_those_of_the_class(task, engines):
    with LLM(engines[task]) as llm:
        expected = [each.outputs.score for each in llm.score("who?", TEXTS)]
    found = lines_of(run_command("--engine", engines[task], "--score", "who?", "--input-file", "texts.txt"))
    assert [record["score"] for record in found] == expected
    (piped,) = lines_of(run_command("--engine", engines[task], "--score", "who?", stdin=TEXTS[1]))
    assert piped["score"] == expected[1]


def test_classes_are_those_of_the_class(engines):
    with LLM(engines["classify"]) as llm:
        (expected,) = llm.classify(TEXTS[1])
    result = run_command("--engine", engines["classify"], "--classify", "--json", TEXTS[1])
    (found,) = lines_of(result)
    assert (found["label"], found["probs"]) == (expected.outputs.label, expected.outputs.probs)
    assert found["engine"]["directory"] == str(engines["classify"])
    assert found["peak_memory_bytes"] > 0


RECORDS = """{"prompt": "A cat.", "id": 7}
{"prompt": ""}
{"prompt": "%s"}
{"messages": []}
{"prompt": "x", "max_tokens": 3}
broken
{"prompt": "x"}""" % ("x" * 600)


def test_a_line_that_cannot_be_read_is_an_error_of_its_own(engines):
    Path("q.jsonl").write_text(RECORDS)
    asked = ("--engine", engines["embed"], "--embed", "--input-file", "q.jsonl", "--output-file", "a.jsonl")
    result = run_command(*asked)
    records = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    assert result.exit_code == 1
    assert "5 of 7 texts could not be read, see their records" in result.stderr
    beginnings = [
        "",
        "the text is empty",
        "the text has 601",
        '"messages" are',
        '"max_tokens" are',
        "not JSON: Exp",
        "",
    ]
    for record, beginning in zip(records, beginnings, strict=True):
        assert record.get("error", "").startswith(beginning)
        assert ("error" in record) == bool(beginning)
    assert records[0]["id"] == 7
    assert len(records[0]["embedding"]) == 80


def test_an_interrupted_run_goes_on_where_it_stopped(engines, monkeypatch):
    monkeypatch.setattr(run_pooled, "TEXTS_AT_A_TIME", 1)
    asked = ("--engine", engines["embed"], "--embed", "--input-file", "texts.txt", "--output-file", "a.jsonl")
    embed, calls = PooledLLM.embed, []

    def stopping(self, texts, *rest, **named):
        calls.append(texts)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embed(self, texts, *rest, **named)

    monkeypatch.setattr(PooledLLM, "embed", stopping)
    assert run_command(*asked).exit_code == 130
    assert len(Path("a.jsonl").read_text().splitlines()) == 2
    result = run_command(*asked)
    assert result.exit_code == 0
    assert "2 of 3 texts are done already" in result.stderr
    assert calls[3:] == [[TEXTS[2]]]
    assert len(Path("a.jsonl").read_text().splitlines()) == 3


def test_a_text_whose_numbers_overflow_is_an_error_of_its_own(engines, monkeypatch):
    embed = PooledLLM.embed

    def broken(self, texts, *rest, **named):
        if TEXTS[1] in texts:
            raise EngineError("the outputs hold nan, expected numbers")
        return embed(self, texts, *rest, **named)

    monkeypatch.setattr(PooledLLM, "embed", broken)
    result = run_command("--engine", engines["embed"], "--embed", "--input-file", "texts.txt")
    assert result.exit_code == 1
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert ["error" in record for record in records] == [False, True, False]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--embed", "--classify", "x"], "--embed, --score and --classify exclude each other."),
        (["--embed", "--dimensions", "0", "x"], "0 is not in the range x>=1"),
        (["--classify", "--dimensions", "3", "x"], "--dimensions is for --embed."),
        (["--instruction", "find", "x"], "--instruction is for --embed and --score."),
        (["--classify", "--instruction", "find", "x"], "--instruction is for --embed and --score."),
        (["--embed", "-n", "2", "--raw", "x"], "--embed writes no answer; leave out --raw and -n."),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments, says):
    result = run_command(*arguments)
    assert result.exit_code == 2
    assert says in " ".join(result.stderr.split())


def test_a_terminal_is_asked_for_a_text(monkeypatch):
    monkeypatch.setattr("sys.stdin", Terminal())
    from qwen_run.commands.run import main

    with pytest.raises(SystemExit) as ended:
        main(["--embed"])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("task", "options", "says"),
    [
        ("embed", ["--classify"], "expected one that classifies texts; ask this one with LLM.embed, qwen-run --embed"),
        ("classify", ["--score", "q"], "the engine classifies texts, expected one that judges documents"),
        ("score", ["--embed"], "the engine judges documents, expected one that makes embeddings"),
        ("embed", ["--embed", "--dimensions", "81"], "dimensions is 81, expected at most the model's 80"),
        ("embed", ["--embed", "--output-file", "absent/x"], "choose another --output-file"),
    ],
)
def test_what_an_engine_cannot_say_is_one_line(task, options, says, engines):
    result = run_command("--engine", engines[task], *options, "hi")
    assert result.exit_code == 1
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_engine_that_writes_text_is_named(chat_engine):
    result = run_command("--engine", chat_engine, "--embed", "hi")
    assert (result.exit_code, "the engine writes text, expected one that makes embeddings" in result.stderr) == (
        1,
        True,
    )
