"""Prompts in folders and at addresses, answers in a folder at an address; with pyarrow's own local file system."""

import json
from pathlib import Path

import pytest

from cases.run_command import run_command, stop_after
from qwen_engine.errors import RequestError
from qwen_run.commands.answer_parts import AnswerParts
from qwen_run.commands.storage import Folder

pytest.importorskip("pyarrow")
KEYS = {1: "a", 2: "b", 3: "c"}


def lines(folder: Path) -> list[str]:
    return sorted(line for file in folder.iterdir() for line in file.read_text("utf-8").splitlines())


def write(folder: Path) -> Path:
    folder.mkdir()
    for name, count in (("b.jsonl", 3), ("a.jsonl", 5), (".hidden", 1), ("_left", 1)):
        text = "\n".join(json.dumps({"prompt": f"{name} {index} {'x' * 10 * index}"}) for index in range(count))
        (folder / name).write_text(text, "utf-8")  # no line end at its end
    return folder


@pytest.mark.parametrize("as_address", [False, True])
def test_a_folder_is_its_files_in_the_order_of_their_names(script, tmp_path, as_address):
    folder = write(tmp_path / "prompts")
    result = run_command("--input-file", folder.as_uri() if as_address else folder)
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [record["line"] for record in records] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [record["text"][1:8] for record in records] == ["A.JSONL"] * 5 + ["B.JSONL"] * 3


def test_answers_at_an_address_are_those_of_a_file_and_a_run_goes_on(script, tmp_path, monkeypatch):
    asked = ("--input-file", write(tmp_path / "prompts"), "--seed", "0")
    run_command(*asked, "--output-file", "a.jsonl")
    out = tmp_path / "answers"
    stop_after(monkeypatch, script.num_runs + 30)
    assert run_command(*asked, "--output-file", out.as_uri()).exit_code == 130
    kept = lines(out)
    assert 0 < len(kept) < 8
    result = run_command(*asked, "--output-file", out.as_uri())
    assert f"{len(kept)} of 8 prompts are answered already" in result.stderr
    assert lines(out) == sorted(Path("a.jsonl").read_text("utf-8").splitlines())


def test_what_answers_no_prompt_is_left_out_when_all_others_are_there(tmp_path):
    address = tmp_path.joinpath("answers").as_uri()
    first = AnswerParts(address, {1: "z", 2: "a", 3: "b"})
    for line in (1, 2, 3):
        first.write({"line": line, "text": str(line)})
    first.close()
    again = AnswerParts(address, KEYS)
    assert (again.num_left_out, sorted(again.answered)) == (1, [1, 2])
    again.write({"line": 3, "text": "new"})
    again.close()
    found = [json.loads(line) for line in lines(tmp_path / "answers")]
    assert sorted((each["line"], each["key"], each["text"]) for each in found) == [
        (1, "a", "2"),
        (2, "b", "3"),
        (3, "c", "new"),
    ]
    assert AnswerParts(address, KEYS).num_left_out == 0


def test_an_error_may_be_asked_again(tmp_path):
    address = tmp_path.joinpath("answers").as_uri()
    first = AnswerParts(address, {1: "a"})
    first.write({"line": 1, "error": "no"})
    first.close()
    assert 1 in AnswerParts(address, {1: "a"}).answered
    again = AnswerParts(address, {1: "a"}, retry_errors=True)
    assert not again.answered
    again.write({"line": 1, "text": "yes"})
    again.close()
    assert [json.loads(line)["text"] for line in lines(tmp_path / "answers")] == ["yes"]


@pytest.mark.parametrize("content", ["x", "[]", '{"line": "1", "key": "a"}', '{"line": 1}'])
def test_a_folder_of_something_else_is_not_written_to(tmp_path, content):
    (tmp_path / "other.txt").write_text(content)
    with pytest.raises(RequestError, match=r"other\.txt holds what is no answer of qwen-run; choose another"):
        AnswerParts(tmp_path.as_uri(), KEYS)
    (tmp_path / "other.txt").write_text('{"line": 9, "key": "zz", "text": ""}')
    with pytest.raises(RequestError, match="answers none of these prompts"):
        AnswerParts(tmp_path.as_uri(), KEYS)


def test_what_cannot_be_read_is_said(script, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no file; give another --input-file" in run_command("--input-file", tmp_path / "empty").stderr
    missing = run_command("--input-file", "file:///nowhere/at/all")
    assert "file:///nowhere/at/all holds no file" in missing.stderr
    assert "cannot be reached" in run_command("--input-file", "nothing://a/b").stderr
    with pytest.raises(RequestError, match="cannot be read"):
        Folder(tmp_path.as_uri()).read("none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--replicas", "2", "--input-file", "q"], "--replicas needs --ray."),
        (["--ray", "auto", "--input-text", "q"], "--ray is for --input-file."),
        (["--ray", "auto", "--input-file", "q", "--embed"], "--ray is for answers; leave it out."),
        (["--output-file", "s3://a/b", "--input-text", "q"], "is a folder, and for --input-file."),
        (["--output-file", "s3://a/b", "--input-file", "q", "--as-finished"], "--as-finished is what a folder"),
    ],
)
def test_options_that_do_not_go_together(script, options, message):
    result = run_command(*options)
    assert (result.exit_code, message in result.stderr) == (2, True)
