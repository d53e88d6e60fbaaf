"""qwen-run and files of prompts: lines in, records out, what goes on after an interruption or a correction."""

import fcntl
import io
import json
import re
import signal
from pathlib import Path

import pytest

from cases.processes import run_python
from cases.run_command import ASK, Terminal, run_command, stop_after
from cases.scripted import poison, scripted_model, shout
from qwen_run.api.llm import LLM
from qwen_run.commands import answer_file
from qwen_run.commands.command import printable
from qwen_run.sampling.params import SamplingParams


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


def records(path="a.jsonl"):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


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


def test_a_prompt_that_is_refused_leaves_the_output_file_alone(script):
    Path("kept.txt").write_text("old")
    assert run_command("--input-text", "x" * 400, "--output-file", "kept.txt").exit_code == 1
    assert run_command("--input-text", "x", "--temperature", "-1", "--output-file", "kept.txt").exit_code == 2
    assert Path("kept.txt").read_text() == "old"
    assert len(script.loaded) == 1


def test_no_bar_where_answers_are_read(script, monkeypatch):
    hidden = []
    bar = answer_file.tqdm.tqdm
    monkeypatch.setattr(answer_file.tqdm, "tqdm", lambda **options: hidden.append(options["disable"]) or bar(**options))
    monkeypatch.setattr(answer_file.tqdm.tqdm, "write", bar.write, raising=False)
    llm = LLM(scripted_model(Path("engines/tiny"), shout)[0])
    for answers in (answer_file.AnswerStream(Terminal(), []), answer_file.AnswerStream(io.StringIO(), [])):
        answer_file.answer_all(llm, [], None, answers)
    assert hidden == [True, None]


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
