"""qwen-run: where prompts come from and answers go, exit codes, and the interactive chat, with a scripted engine."""

import dataclasses
import doctest
import fcntl
import io
import json
import os
import re
import signal
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import qwen_engine.json_output
import qwen_run.commands.command
import qwen_run.commands.console
import qwen_run.commands.prompt_file
from cases.processes import PATIENCE_S, run_python
from cases.scripted import IM_END, Script, poison, scripted_model, shout, write_text_files
from qwen_engine.errors import EngineError
from qwen_run.api.llm import LLM
from qwen_run.commands import answer_file, one_answer, run_files
from qwen_run.commands import run as cli
from qwen_run.commands.command import printable
from qwen_run.sampling.params import SamplingParams
from qwen_run.text.text_model import TextModel


@pytest.fixture
def script(tmp_path, monkeypatch):
    """An engine under engines/ whose answers are the questions in capitals; its requests are in ``.seen``."""
    monkeypatch.chdir(tmp_path)
    directory = write_text_files(tmp_path / "engines" / "tiny", do_sample=True, temperature=0.7, top_k=20)
    (directory / "engine.json").write_text("{}")
    model, script = scripted_model(directory, shout, max_seq_len=300)
    raw_model, _ = scripted_model(directory, str.upper, raw=True)
    script.loaded, script.warning = [], None

    def load(engine, threads=None, raw=False, cache_bytes=None, max_seq_len=None):
        script.loaded.append((str(engine), threads, raw, cache_bytes, max_seq_len))
        if script.warning:
            warnings.warn(script.warning, stacklevel=1)
        return raw_model if raw else model

    monkeypatch.setattr(TextModel, "load", load)
    return script


def run_command(*arguments, stdin=None):
    return CliRunner().invoke(cli.main, arguments, input=stdin, catch_exceptions=False)


def test_one_answer(script):
    result = run_command("--input-text", "hello")
    assert (result.exit_code, result.stdout) == (0, "«HELLO» 你🤗\n")
    assert re.fullmatch(
        r"\d+ input tokens, 17 output tokens; first after \d+ ms, then [\d.]+ tokens/s; peak memory \d+ MiB\n",
        result.stderr,
    )
    assert script.loaded == [("engines/tiny", None, False, None, None)]
    assert script.seen[0].params == SamplingParams(0.7, 1.0, 20)
    assert IM_END in script.seen[0].stop_token_ids
    assert script.is_idle


def test_options_reach_the_request(script):
    options = "--max-new-tokens 3 --temperature 0.5 --top-p 0.9 --top-k 5 --repetition-penalty 1.1 --seed 4 --threads 2"
    options += " --kv-cache-memory 64 --max-seq-len 99"
    result = run_command("--input-text", "x", "--engine", "e", "--system", "Be brief.", *options.split())
    assert result.stdout == "«X\n"
    assert script.loaded == [("e", 2, False, 64 << 20, 99)]
    assert script.seen[0].params == SamplingParams(0.5, 0.9, 5, 1.1, 4, 3)
    assert "system\nBe brief.<|im_end|>" in script.tokenizer.decode(script.seen[0].prompt, False)


def test_a_warning_is_a_note_to_the_user(script):
    script.warning = "a request may have up to 96 tokens"
    result = run_command("--input-text", "hello")
    assert result.stdout == "«HELLO» 你🤗\n"
    assert result.stderr.startswith("Note: a request may have up to 96 tokens\n")


def test_a_pipe_is_one_prompt(script):
    assert run_command(stdin="two\nlines\n").stdout == "«TWO\nLINES» 你🤗\n"


def test_a_prompt_may_be_an_argument(script):
    assert (
        run_command("What is it?").stdout == run_command("--input-text", "What is it?").stdout == "«WHAT IS IT?» 你🤗\n"
    )


@pytest.mark.parametrize("option", [[], ["--input-text"]])
def test_what_comes_through_a_pipe_stands_below_the_prompt(script, option):
    assert (
        run_command(*option, "Shout:", stdin="a report\nof two lines\n").stdout
        == "«SHOUT:\n\nA REPORT\nOF TWO LINES» 你🤗\n"
    )
    assert run_command(*option, "Shout:", stdin=" \n").stdout == "«SHOUT:» 你🤗\n"


def test_a_real_pipe_is_read_and_a_device_is_not(monkeypatch, capsys):
    reader, writer = os.pipe()
    monkeypatch.setattr(run_files, "SILENCE_S", 0.01)
    with os.fdopen(reader, encoding="utf-8") as stdin, os.fdopen(writer, "w") as out:
        monkeypatch.setattr(sys, "stdin", stdin)
        timer = threading.Timer(0.2, lambda: (out.write("late"), out.close()))
        timer.start()
        assert run_files._piped() == b"late"
        timer.join(PATIENCE_S)
    assert "Waiting for the end of standard input" in capsys.readouterr().err
    with open("/dev/zero", encoding="utf-8") as stdin:  # has no end
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run_files._piped() == b""


def test_raw(script):
    assert run_command("--raw", "--input-text", "abc").stdout == "ABC\n"


def test_one_poisonous_line_gets_an_error_record_and_all_others_answers(script):
    poison(script, "Paris")
    prompts = ["one", "I love Paris now", "three"]
    Path("in.jsonl").write_text("".join(json.dumps({"prompt": p, "id": p}) + "\n" for p in prompts), "utf-8")
    result = run_command("--input-file", "in.jsonl", "--output-file", "out.jsonl")
    records = [json.loads(line) for line in Path("out.jsonl").read_text("utf-8").splitlines()]
    assert [record["id"] for record in records] == prompts
    assert [record.get("text") for record in records] == ["«ONE» 你🤗", None, "«THREE» 你🤗"]
    assert "hold nan, expected numbers" in records[1]["error"]
    assert (result.exit_code, result.stderr.splitlines()[0][:7]) == (1, "Line 2:")
    assert "1 of 3 prompts could not be answered" in result.stderr


def test_a_lone_poisonous_prompt_is_an_error(script):
    poison(script, "Paris")
    result = run_command("--input-text", "Paris")
    assert (result.exit_code, result.stderr[:7]) == (1, "Error: ")
    assert "hold nan, expected numbers" in result.stderr


def test_json(script):
    result = json.loads(run_command("--json", "--input-text", "x").stdout)
    assert result["text"] == "«X» 你🤗"
    assert (result["finish_reason"], result["output_tokens"]) == ("stop", len(result["token_ids"]))
    assert result["ttft_ms"] >= 0
    assert list(result)[:4] == ["schema_version", "command", "created", "engine"]
    assert result["engine"] == {"name": "tiny", "directory": "engines/tiny"}
    assert result["peak_memory_bytes"] > 10 << 20


def test_output_logits(script):
    result = run_command("--input-text", "x", "--output-logits", "l.npy", "--output-file", "answer.txt")
    assert (result.exit_code, result.stdout) == (0, "")
    logits = np.load("l.npy")
    assert (logits.dtype, logits[-1].argmax()) == (np.float32, IM_END)
    assert Path("answer.txt").read_text("utf-8") == "«X» 你🤗\n"


def test_logits_that_cannot_be_written_are_refused_before_an_answer(script):
    assert run_command("--input-text", "x", "--output-logits", "absent/l.npy").exit_code == 1
    assert script.loaded
    assert script.num_runs == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_disk_leaves_no_piece_of_the_logits(script, monkeypatch):
    result = run_command("--input-text", "x", "--output-logits", "/dev/full")
    assert result.exit_code == 1
    assert re.fullmatch("Error: /dev/full cannot be written: (?!None)[^\n]+; choose another[^\n]+\n", result.stderr)
    assert Path("/dev/full").exists()

    def full(file, array):
        file.write(b"a piece")
        raise OSError("9 requested and 7 written")  # as NumPy says it

    monkeypatch.setattr(np, "save", full)
    result = run_command("--input-text", "x", "--output-logits", "l.npy")
    assert result.stderr.startswith("Error: l.npy cannot be written: 9 requested and 7 written; choose another")
    assert not Path("l.npy").exists()


def test_prompts_on_standard_input_are_not_overwritten(script):
    Path("q.txt").write_text("precious")
    code = "import sys; from qwen_run.commands.run import main; main(sys.argv[1:])"
    with open("q.txt") as stdin:
        result = run_python(code, "--engine", "engines/tiny", "--output-file", "q.txt", stdin=stdin, cwd=".")
    assert result.returncode == 1
    assert "q.txt is a file of the prompts; choose another --output-file" in result.stderr
    assert Path("q.txt").read_text() == "precious"


def test_null_stands_for_an_option_that_is_absent(script):
    absent = dict.fromkeys([*SamplingParams.__dataclass_fields__, "id", "tools", "messages"])
    Path("in.jsonl").write_text(json.dumps({**absent, "prompt": "a"}) + "\n" + json.dumps({"prompt": "b"}), "utf-8")
    result = run_command("--input-file", "in.jsonl")
    assert (result.exit_code, result.stderr[:1]) == (0, "2")
    first, second = (request.params for request in script.seen)
    assert first == second


def test_what_looks_like_an_array_may_be_text(script):
    Path("in.txt").write_text("[INST] hi\n[1, 2]")
    assert len(run_command("--input-file", "in.txt").stdout.splitlines()) == 2
    Path("in.txt").write_text("[1, 2, 3]")
    assert json.loads(run_command("--input-file", "in.txt").stdout)["text"] == "«[1, 2, 3]» 你🤗"


JSON_LINES = """\ufeff{"prompt": "a\u2028b", "tools": null}

{"prompt": 3}
{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "longer than the others"}]}
{broken
{"prompt": "c", "messages": []}
{"messages": [{"role": "user"}]}
{"messages": []}
{"prompt": ""}
{"prompt": null}
{"prompt": "x", "temper\\u001bature": 5}
{"prompt": "%s"}
{"messages": [{"role": "user", "content": "d"}]}""" % ("x" * 400)


def test_json_lines_in_input_order(script):
    Path("in.jsonl").write_text(JSON_LINES, "utf-8")
    result = run_command("--input-file", "in.jsonl", "--system", "T")
    records = [json.loads(line) for line in result.stdout.split("\n") if line]
    assert [record["line"] for record in records] == [1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    texts = {record["line"]: record["text"] for record in records if "text" in record}
    assert texts == {1: "«A\u2028B» 你🤗", 4: "«LONGER THAN THE OTHERS» 你🤗", 13: "«D» 你🤗"}
    errors = {record["line"]: record["error"] for record in records if "error" in record}
    for line, says in {
        3: '"prompt" is int',
        5: "not JSON",
        6: "either",
        7: "content is null",
        8: "empty",
        9: "empty",
        10: "either",
        11: 'unknown "temper\x1bature", expected prompt, messages, tools, id or one of temperature, top_p',
        12: "tokens",
    }.items():
        assert says in errors[line]
        assert f"Line {line}: {printable(errors[line])}\n" in result.stderr
    assert "\x1b" not in result.stderr
    assert result.exit_code == 1
    assert result.stderr.endswith("Error: 9 of 12 prompts could not be answered, see their records\n")
    prompts = [script.tokenizer.decode(request.prompt, False) for request in script.seen]
    assert ["system\nT<" in prompts[0], "system\nS<" in prompts[1], "T<" in prompts[1]] == [True, True, False]


def test_text_lines_run_together(script):
    Path("in.txt").write_text("one\r\n\ntwo three\nfour", "utf-8")
    result = run_command("--input-file", "in.txt", "--output-file", "out.jsonl")
    records = [json.loads(line) for line in Path("out.jsonl").read_text("utf-8").splitlines()]
    assert [(r["line"], r["text"][1:-4]) for r in records] == [(1, "ONE"), (3, "TWO THREE"), (4, "FOUR")]
    assert re.fullmatch(
        r"3 answers, \d+ output tokens in [\d.]+ s, [\d.]+ tokens/s; peak memory \d+ MiB\n", result.stderr
    )
    assert len(script.seen) == 3


def test_prompts_from_standard_input(script):
    assert json.loads(run_command("--input-file", "-", stdin="one").stdout)["text"] == "«ONE» 你🤗"


QUESTIONS = "".join(f'{{"prompt": "{"long " * 9 if i == 2 else "short"} {i}", "id": "q{i}"}}\n' for i in range(40))
ASK = ("--input-file", "q.jsonl", "--output-file", "a.jsonl", "--seed", "0")


def records(path="a.jsonl"):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def stop_after(monkeypatch, num_runs, error=KeyboardInterrupt):
    """Let the engine fail after some runs: once where a user interrupts it, else for good."""
    original = Script.run

    def run_command(self, batch):
        if self.num_runs == num_runs:
            if error is KeyboardInterrupt:
                monkeypatch.setattr(Script, "run", original)
            raise error
        return original(self, batch)

    monkeypatch.setattr(Script, "run", run_command)


def test_lines_have_ids_and_options_of_their_own(script):
    Path("q.jsonl").write_text(
        '{"prompt": "abcdef", "id": 7, "max_tokens": 3}\n{"prompt": "abcdef", "stop": ["CD"]}\n'
        '{"prompt": "x", "id": {"a": [1]}, "top_p": 2}\n{"prompt": "x", "logprobs": 1, "n": 2, "temperature": 1}'
    )
    result = run_command(*ASK)
    assert result.stderr.endswith("Error: 1 of 4 prompts could not be answered, see their records\n")
    first, second, third, fourth = records()
    assert (first["id"], first["text"], first["finish_reason"]) == (7, "«A", "length")
    assert ("id" in second, second["text"], second["finish_reason"]) == (False, "«AB", "stop")
    assert (third["id"], third["error"]) == ({"a": [1]}, "top_p is 2, expected a number from 0 to 1")
    assert [answer["text"] for answer in fourth["answers"]] == ["«X» 你🤗"] * 2
    second_half = fourth["answers"][1]["logprobs"][1]
    assert (second_half["token"], second_half["logprob"], second_half["rank"]) == ("\ufffd", 0.0, 1)
    assert [top["token_id"] for top in second_half["top"]] == [second_half["token_id"]]


def test_answers_come_as_they_are_known_or_in_order(script):
    Path("q.jsonl").write_text(QUESTIONS)
    order = [
        json.loads(line)["line"] for line in run_command("--input-file", "q.jsonl", "--as-finished").stdout.splitlines()
    ]
    assert (sorted(order), order.index(3) > 15) == (list(range(1, 41)), True)
    order = [json.loads(line)["line"] for line in run_command("--input-file", "q.jsonl").stdout.splitlines()]
    assert order == list(range(1, 41))
    run_command(*ASK)
    assert [record["line"] for record in records()] == list(range(1, 41))


def test_an_interrupted_run_goes_on_where_it_stopped(script, monkeypatch):
    Path("q.jsonl").write_text(QUESTIONS)
    assert run_command(*ASK).exit_code == 0
    expected = Path("a.jsonl").read_bytes()
    Path("a.jsonl").unlink()
    stop_after(monkeypatch, script.num_runs + 30)
    assert run_command(*ASK).exit_code == 130
    kept = records()
    assert 3 not in [record["line"] for record in kept]
    assert 10 < len(kept) < 40
    script.seen.clear()
    result = run_command(*ASK)
    assert (result.exit_code, len(script.seen)) == (0, 40 - len(kept))
    assert result.stderr.startswith(f"{len(kept)} of 40 prompts are answered already\n{40 - len(kept)} answers, ")
    assert Path("a.jsonl").read_bytes() == expected
    script.seen.clear()
    assert (run_command(*ASK).exit_code, script.seen) == (0, [])
    assert Path("a.jsonl").read_bytes() == expected


def test_a_torn_last_line_is_answered_again(script):
    Path("q.jsonl").write_text(QUESTIONS)
    run_command(*ASK)
    expected = Path("a.jsonl").read_bytes()
    end_of_third = [i for i, byte in enumerate(expected) if byte == 10][2] + 1
    for length in (0, 1, 4, 11, 60, end_of_third - 1, end_of_third, end_of_third + 1, len(expected) - 1):
        Path("a.jsonl").write_bytes(expected[:length])
        script.seen.clear()
        assert run_command(*ASK).exit_code == 0
        assert len(script.seen) == 40 - expected[:length].count(b"\n")
        assert Path("a.jsonl").read_bytes() == expected


def test_a_bad_line_is_told_once_more_and_not_tried_again(script):
    Path("q.jsonl").write_text('{"prompt": "one"}\n{broken\n{"prompt": "two", "id": "\\ud800"}\n')
    for answered in (0, 3):
        script.seen.clear()
        result = run_command(*ASK)
        assert (result.exit_code, len(script.seen)) == (1, 2 if answered == 0 else 0)
        assert result.stderr.endswith("Error: 1 of 3 prompts could not be answered, see their records\n")
        assert [("error" in record, record.get("id")) for record in records()] == [
            (False, None), (True, None), (False, "\ud800"),
        ]  # fmt: skip


@pytest.mark.parametrize("change", ["option", "prompts", "foreign", "no newline", "JSON", "a line of JSON", "nested"])
def test_a_file_with_other_answers_is_refused_and_left_alone(script, change):
    Path("q.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    run_command(*ASK)
    options = ("--seed", "3") if change == "option" else ()
    if change == "prompts":
        Path("q.jsonl").write_text('{"prompt": "ONE"}\n{"prompt": "TWO"}\n')
    content = {
        "foreign": "notes\n",
        "no newline": "notes",
        "JSON": '{"line": 1, "text": "precious"}',
        "a line of JSON": '{"line": 1, "text": "precious"}\n',
        "nested": "[" * 100_000,
    }
    Path("a.jsonl").write_text(content.get(change, Path("a.jsonl").read_text("utf-8")), "utf-8")
    before = Path("a.jsonl").read_bytes()
    result = run_command(*ASK, *options)
    assert (result.exit_code, Path("a.jsonl").read_bytes()) == (1, before)
    assert re.fullmatch(
        r"Error: a.jsonl(: line 1 is no answer of qwen-run| answers none of these prompts with these options); "
        "remove the file or choose another --output-file\n",
        result.stderr,
    )


def test_a_corrected_file_of_prompts_goes_on(script):
    """Answers are found by their own key wherever they stand; what has none is asked, the rest is left out."""
    Path("q.jsonl").write_text('{"prompt": "one"}\n{broken\n{"prompt": "three"}\n{"prompt": "old"}\n')
    assert run_command(*ASK).exit_code == 1
    script.seen.clear()
    lines = ['{"prompt": "zero"}', '{"prompt": "one"}', '{"prompt": "mended"}', "", '{"prompt": "three"}']
    Path("q.jsonl").write_text("\n".join(lines))
    result = run_command(*ASK)
    assert (result.exit_code, len(script.seen)) == (0, 2)
    assert result.stderr.startswith(
        "2 of 4 prompts are answered already\n2 records answer none of these prompts and will be left out\n2 answers, "
    )
    found = [(record["line"], record["text"][1:-4]) for record in records()]
    assert found == [(1, "ZERO"), (2, "ONE"), (3, "MENDED"), (5, "THREE")]
    script.seen.clear()
    assert (run_command(*ASK).exit_code, script.seen) == (0, [])


def test_the_only_line_may_be_the_corrected_one(script):
    Path("q.jsonl").write_text('{"prompt": 1}')
    assert run_command(*ASK).exit_code == 1
    Path("q.jsonl").write_text('{"prompt": "1"}')
    assert run_command(*ASK).exit_code == 0
    assert [record["text"] for record in records()] == ["«1» 你🤗"]


def test_equal_prompts_have_an_answer_each(script):
    Path("q.jsonl").write_text('{"prompt": "one"}\n' * 3)
    run_command(*ASK)
    Path("q.jsonl").write_text('{"prompt": "two"}\n' + '{"prompt": "one"}\n' * 4)
    script.seen.clear()
    run_command(*ASK)
    assert [record["line"] for record in records()] == [1, 2, 3, 4, 5]
    assert len(script.seen) == 2
    content = Path("a.jsonl").read_bytes()
    Path("a.jsonl").write_bytes(content * 2)
    assert "5 records answer none" in run_command(*ASK).stderr
    assert Path("a.jsonl").read_bytes() == content


@pytest.mark.parametrize("interrupted", [False, True])
def test_failed_prompts_are_asked_again_when_wanted(script, monkeypatch, interrupted):
    Path("q.jsonl").write_text('{"prompt": "%s"}\n{"prompt": "two"}\n{"prompt": "three"}\n' % ("x" * 400))
    assert run_command(*ASK).exit_code == 1
    assert ["error" in record for record in records()] == [True, False, False]
    monkeypatch.setattr(script.manifest.limits, "max_seq_len", 600)
    script.seen.clear()
    assert (run_command(*ASK).exit_code, script.seen) == (1, [])
    if interrupted:
        stop_after(monkeypatch, script.num_runs + 3)
        assert run_command(*ASK, "--retry-errors").exit_code == 130
        assert len(records()) == 3
        script.seen.clear()
    assert (run_command(*ASK, "--retry-errors").exit_code, len(script.seen)) == (0, 1)
    assert [(record["line"], "error" in record) for record in records()] == [(1, False), (2, False), (3, False)]


def test_an_answer_counts_and_not_the_error_before_it(script):
    key = {"line": 1, "key": "k"}
    assert answer_file.assign([{**key, "error": "x"}, {**key, "text": "y"}], {1: "k"}) == {1: {**key, "text": "y"}}


def test_a_file_that_another_process_writes_is_left_alone(script):
    Path("q.jsonl").write_text(QUESTIONS)
    with open("a.jsonl", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        result = run_command(*ASK)
    assert (result.exit_code, script.seen) == (1, [])
    assert result.stderr == "Error: a.jsonl is being written by another qwen-run; wait for it to end\n"
    assert run_command(*ASK).exit_code == 0


def test_several_answers_to_one_prompt(script):
    result = run_command("--input-text", "x", "-n", "2", "--temperature", "1")
    assert result.stdout == "Answer 1 of 2:\n«X» 你🤗\n\nAnswer 2 of 2:\n«X» 你🤗\n"
    result = run_command("--input-text", "x", "-n", "2", "--temperature", "1", "--max-new-tokens", "2")
    assert result.stdout.startswith("Answer 1 of 2 (cut at 2 tokens; set another limit with --max-new-tokens):\n«")
    result = json.loads(run_command("--input-text", "x", "--num-beams", "2", "--temperature", "0", "--json").stdout)
    assert result["text"] == "«X» 你🤗"


def test_guessing_ahead_takes_fewer_runs_to_the_same_answer(script):
    text = "ab" * 30
    expected = run_command("--input-text", text, "--draft-tokens", "0").stdout
    num_runs = script.num_runs
    assert run_command("--input-text", text).stdout == expected
    assert script.num_runs - num_runs < num_runs


def test_a_stop_text_ends_the_answer(script):
    result = run_command("--input-text", "abcdef", "--stop", "DE", "--stop", "»", "--json")
    assert json.loads(result.stdout)["text"] == "«ABC"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--input-text", ""], "the prompt is empty"),
        (["--input-text", " \n"], "the prompt is empty"),
        ([], "the prompt is empty"),
        (["--input-text", "x" * 400], r"the prompt has \d+ tokens, the engine takes 299"),
        (["--input-file", "absent"], "absent cannot be read: No such file"),
        (["--input-file", "latin1.txt"], r"latin1.txt: byte 5 \(0xe9\) is not UTF-8"),
        (["--input-file", "empty.txt"], "the prompt is empty"),
        (["--input-text", "x", "--output-file", "absent/a"], "absent/a cannot be written: No such file"),
        (["--input-text", "x", "--output-logits", "absent/a"], "absent/a cannot be written: No such file"),
        (["--input-text", "a\udcff"], r"--input-text: byte 1 \(0xff\) is not UTF-8; convert it to"),
        (["--input-file", "array.json"], "the prompts are a JSON array, expected one prompt a line"),
        (["--input-file", "texts.json"], "the prompts are a JSON array"),
        (["--input-file", "array.json", "--output-file", "array.json"], "array.json is a file of the prompts"),
        (["--input-file", "array.json", "--output-file", "linked"], "linked is a file of the prompts"),
        (["--input-text", "x", "--output-file", "engines/tiny/new"], "new is inside the engine engines/tiny"),
        (["--input-text", "x", "--output-logits", "engines/tiny/engine.json"], "choose another --output-logits"),
        (["--input-text", "x", "--output-file", "hard"], "hard is a file of the engine engines/tiny"),
        (["--input-text", "x", "--output-file", "a", "--output-logits", "./a"], "are both a; choose another"),
    ],
)
def test_mistakes_are_one_line_and_exit_1(script, arguments, says):
    Path("latin1.txt").write_bytes("ok\ncaf\u00e9".encode("latin-1")[0:5] + b"\xe9\n")
    Path("empty.txt").touch()
    Path("array.json").write_text('\n[{"prompt": "one"},\n{"prompt": "two"}]')
    Path("texts.json").write_text('["one",\n"two"]')
    Path("linked").symlink_to("array.json")
    Path("hard").hardlink_to("engines/tiny/tokenizer.json")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    result = run_command(*arguments)
    assert result.exit_code == 1
    assert re.fullmatch(f"Error: .*{says}[^\n]*\n", result.stderr)
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["--input-text", "x", "--input-file", "y"],
        ["--input-file", "y", "--json"],
        ["--input-file", "y", "--output-logits", "z"],
        ["--input-text", "x", "--as-finished"],
        ["--input-text", "x", "--logprobs", "1"],
        ["--input-text", "x", "--output-logits", "z", "-n", "2"],
        ["--input-text", "x", "--raw", "--system", "y"],
        ["--temperature", "hot"],
        ["--threads", "0"],
        ["--threads", "1025"],
        ["x", "--input-text", "y"],
        ["x", "--input-file", "y"],
        ["engines/tiny"],
        ["x", "--retry-errors"],
        ["--input-file", "x", "--retry-errors"],
        ["x", "--temperature", "-1"],
        ["x", "--top-p", "2"],
        ["x", "--max-new-tokens", "0"],
        ["x", "-n", "0"],
        ["x", "--num-beams", "1000"],
        ["x", "--seed", "-1"],
        ["--nothing"],
    ],
)
def test_misuse_exits_2(script, arguments):
    assert run_command(*arguments).exit_code == 2
    assert script.loaded == []


def test_arguments_that_the_locale_could_not_decode(script):
    assert run_command("--input-text", "é".encode().decode("ascii", "surrogateescape")).stdout == "«É» 你🤗\n"


def test_newest_engine_and_none(script, tmp_path):
    older = write_text_files(tmp_path / "engines" / "older")
    (older / "engine.json").write_text("{}")
    os.utime(older / "engine.json", (1, 1))
    run_command("--input-text", "x")
    assert script.loaded == [("engines/tiny", None, False, None, None)]
    for path in (tmp_path / "engines").glob("*/engine.json"):
        path.unlink()
    result = run_command("--input-text", "x")
    assert (result.exit_code, "qwen-build" in result.stderr) == (1, True)


@pytest.mark.parametrize(("option", "thought"), [([], ""), (["--no-thinking"], "<think>\n\n</think>\n\n")])
def test_thinking_is_the_templates_unless_switched_off(script, monkeypatch, option, thought):
    model, script = scripted_model(write_text_files(Path("qwen3"), "qwen3"), shout)
    monkeypatch.setattr(TextModel, "load", lambda *_: model)
    run_command("--input-text", "x", *option)
    assert script.tokenizer.decode(script.seen[0].prompt, False).endswith(f"<|im_start|>assistant\n{thought}")


def test_a_prompt_that_is_refused_leaves_the_output_file_alone(script):
    Path("kept.txt").write_text("old")
    assert run_command("--input-text", "x" * 400, "--output-file", "kept.txt").exit_code == 1
    assert run_command("--input-text", "x", "--temperature", "-1", "--output-file", "kept.txt").exit_code == 2
    assert Path("kept.txt").read_text() == "old"
    assert len(script.loaded) == 1


def test_options_without_effect_are_told(script, monkeypatch):
    greedy, _ = scripted_model(write_text_files(Path("greedy")), shout)
    monkeypatch.setattr(TextModel, "load", lambda *_: greedy)
    assert (
        "--top-p and --seed without effect" in run_command("--input-text", "x", "--top-p", "0.5", "--seed", "1").stderr
    )
    assert "without effect" not in run_command("--input-text", "x", "--top-p", "0.5", "--temperature", "1").stderr


@pytest.mark.parametrize("error", [KeyboardInterrupt, EngineError("broken")])
def test_an_answer_cut_short(script, monkeypatch, error):
    stop_after(monkeypatch, 3, error)
    result = run_command("--input-text", "x")
    code, message = (130, "") if error is KeyboardInterrupt else (1, "Error: broken\n")
    assert (result.exit_code, result.stdout, result.stderr) == (code, "«X\n", message)
    assert script.is_idle


def test_an_answer_cut_at_a_limit_says_so(script):
    result = run_command("x", "--max-new-tokens", "2")
    assert result.stderr.startswith("The answer is cut at 2 tokens; set another limit with --max-new-tokens\n")
    assert "cut" not in run_command("x").stderr
    result = run_command("x" * 160, "--max-new-tokens", "400")
    assert "The answer is cut at" in result.stderr
    assert "where the engine's room for prompt and answer ends" in result.stderr
    Path("q.jsonl").write_text('{"prompt": "x"}\n{"prompt": "y", "max_tokens": 2}\n')
    assert "2 answers (1 cut at a limit: finish_reason length), " in run_command(*ASK).stderr


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_what_a_model_writes_does_not_drive_the_terminal(tmp_path):
    model, _ = scripted_model(write_text_files(tmp_path), lambda prompt: "a\x1b[2J\x9b2Jb " + "word " * 30)
    llm, params = LLM(model), SamplingParams()
    for several in (1, 2):
        out = Terminal()
        one_answer.answer_one(llm, llm.prepare("x", dataclasses.replace(params, temperature=1.0, n=several)), out)
        assert "a␛[2J\ufffd2Jb" in out.getvalue()
        assert not set(out.getvalue()) & {"\x1b", "\x9b"}
        assert max(map(len, out.getvalue().splitlines())) <= 80
    out = Terminal()
    one_answer.answer_one(llm, llm.prepare("x", params), out, json_head={})
    assert json.loads(out.getvalue())["text"].startswith("a\x1b[2J\x9b2Jb")
    assert not set(out.getvalue()) & {"\x1b", "\x9b"}


def test_no_bar_where_answers_are_read(script, monkeypatch):
    hidden = []
    bar = answer_file.tqdm.tqdm
    monkeypatch.setattr(answer_file.tqdm, "tqdm", lambda **options: hidden.append(options["disable"]) or bar(**options))
    monkeypatch.setattr(answer_file.tqdm.tqdm, "write", bar.write, raising=False)
    llm = LLM(scripted_model(Path("engines/tiny"), shout)[0])
    for answers in (answer_file.AnswerStream(Terminal(), []), answer_file.AnswerStream(io.StringIO(), [])):
        answer_file.answer_all(llm, [], None, answers)
    assert hidden == [True, None]


# -- what only a fresh interpreter shows

FORBIDDEN = ("torch", "transformers", "onnx", "huggingface_hub", "onnx_ir", "onnxscript", "qwen_build")
HEAVY = ("numpy", "onnxruntime", "tokenizers", "jinja2", "prompt_toolkit", "tqdm")


def test_help_is_quick_and_imports_nothing_heavy():
    code = "import sys, atexit; from qwen_run.commands.run import main\n"
    code += "atexit.register(lambda: print(*sys.modules)); main()"
    started = os.times()
    result = run_python(code, "--help")
    ended = os.times()
    assert result.returncode == 0
    assert not {*FORBIDDEN, *HEAVY} & set(result.stdout.split("Examples:")[1].split())
    spent_s = ended.children_user + ended.children_system - started.children_user - started.children_system
    assert spent_s < 0.5


def test_nothing_of_the_builder_is_imported():
    modules = ["commands.run", "commands.console", "text.text_model", "text.chat_template", "sampling.sample"]
    imports = "; ".join(f"import qwen_run.{module}" for module in modules)
    result = run_python(f"import sys; {imports}; print(*sys.modules)")
    assert result.returncode == 0, result.stderr
    assert not set(FORBIDDEN) & set(result.stdout.split())


def test_loading_begins_with_the_manifest(tmp_path):
    with pytest.raises(EngineError, match="absent does not exist; make an engine with qwen-build"):
        TextModel.load(tmp_path / "absent")


@pytest.mark.parametrize("module", [qwen_run.commands.prompt_file, answer_file, qwen_engine.json_output])
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


ORDERS = """if True:
    import os, signal, sys
    from pathlib import Path
    from qwen_run.commands.answer_file import AnswerFile
    answers = AnswerFile(Path(sys.argv[1]), {1: "a", 2: "b"}, True)
    if not answers.answered:
        answers.write({"line": 2, "text": "two"})
        answers.write({"line": 1, "text": "one"})
    if sys.argv[2] == "kill":
        os.fchmod = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    answers.close()
"""


def test_a_kill_while_answers_are_put_in_order_leaves_nothing_for_good(tmp_path):
    path = tmp_path / "a.jsonl"
    assert run_python(ORDERS, path, "kill").returncode == -signal.SIGKILL
    assert [record["line"] for record in records(path)] == [2, 1]
    assert len(list(tmp_path.iterdir())) == 2
    assert run_python(ORDERS, path, "").returncode == 0
    assert [record["line"] for record in records(path)] == [1, 2]
    assert list(tmp_path.iterdir()) == [path]


def test_a_planted_link_is_not_followed(tmp_path):
    path, precious = tmp_path / "a.jsonl", tmp_path / "precious"
    precious.write_text("precious")
    planted = tmp_path / ".a.jsonl.aaaaaaaa.partial"
    planted.symlink_to(precious)
    assert run_python(ORDERS, path, "").returncode == 0
    assert [record["line"] for record in records(path)] == [1, 2]
    assert (precious.read_text(), planted.is_symlink()) == ("precious", True)
