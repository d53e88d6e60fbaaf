"""qwen-run: where prompts come from and answers go, exit codes, and the interactive chat, with a scripted engine."""

import doctest
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scripted import IM_END, scripted_model, write_text_files

import qwen_run.command
import qwen_run.console
import qwen_run.prompts
from qwen_engine.errors import EngineError
from qwen_run import cli
from qwen_run.command import printable
from qwen_run.sampling import SamplingParams
from qwen_run.text import Answer, TextModel


def last_question(prompt: str) -> str:
    return re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", prompt, re.DOTALL)[-1]


def shout(prompt: str) -> str:
    return f"«{last_question(prompt).upper()}» 你🤗"


@pytest.fixture
def script(tmp_path, monkeypatch):
    """An engine under engines/ whose answers are the questions in capitals; its requests are in ``.seen``."""
    monkeypatch.chdir(tmp_path)
    directory = write_text_files(tmp_path / "engines" / "tiny", do_sample=True, temperature=0.7, top_k=20)
    (directory / "engine.json").write_text("{}")
    model, script = scripted_model(directory, shout, max_seq_len=300)
    raw_model, _ = scripted_model(directory, str.upper, raw=True)
    script.loaded = []

    def load(engine, threads=None, raw=False):
        script.loaded.append((str(engine), threads, raw))
        return raw_model if raw else model

    monkeypatch.setattr(TextModel, "load", load)
    return script


def run(*arguments, stdin=None):
    return CliRunner().invoke(cli.main, arguments, input=stdin, catch_exceptions=False)


def test_one_answer(script):
    result = run("--input-text", "hello")
    assert (result.exit_code, result.stdout) == (0, "«HELLO» 你🤗\n")
    assert re.fullmatch(
        r"\d+ prompt tokens, 17 output tokens; first after \d+ ms, then [\d.]+ tokens/s; peak memory \d+ MiB\n",
        result.stderr,
    )
    assert script.loaded == [("engines/tiny", None, False)]
    assert script.seen[0].params == SamplingParams(0.7, 1.0, 20)
    assert IM_END in script.seen[0].stop_token_ids
    assert script.open == 0


def test_options_reach_the_request(script):
    options = "--max-new-tokens 3 --temperature 0.5 --top-p 0.9 --top-k 5 --repetition-penalty 1.1 --seed 4 --threads 2"
    result = run("--input-text", "x", "--engine", "e", "--system", "Be brief.", *options.split())
    assert result.stdout == "«X\n"
    assert script.loaded == [("e", 2, False)]
    assert script.seen[0].params == SamplingParams(0.5, 0.9, 5, 1.1, 4, 3)
    assert "system\nBe brief.<|im_end|>" in script.tokenizer.decode(script.seen[0].prompt, False)


def test_a_pipe_is_one_prompt(script):
    assert run(stdin="two\nlines\n").stdout == "«TWO\nLINES» 你🤗\n"


def test_raw(script):
    assert run("--raw", "--input-text", "abc").stdout == "ABC\n"


def test_json(script):
    result = json.loads(run("--json", "--input-text", "x").stdout)
    assert result["text"] == "«X» 你🤗"
    assert (result["finish_reason"], result["output_tokens"]) == ("stop", len(result["token_ids"]))
    assert result["ttft_ms"] >= 0
    assert result["peak_memory_bytes"] > 10 * cli.MIB


def test_output_logits(script):
    result = run("--input-text", "x", "--output-logits", "l.npy", "--output-file", "answer.txt")
    assert (result.exit_code, result.stdout) == (0, "")
    logits = np.load("l.npy")
    assert (logits.dtype, logits[-1, 0]) == (np.float32, IM_END)
    assert Path("answer.txt").read_text("utf-8") == "«X» 你🤗\n"


def test_logits_that_cannot_be_written_are_refused_before_an_answer(script):
    assert run("--input-text", "x", "--output-logits", "absent/l.npy").exit_code == 1
    assert script.loaded
    assert not script.generators


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_disk_leaves_no_piece_of_the_logits(script, monkeypatch):
    result = run("--input-text", "x", "--output-logits", "/dev/full")
    assert result.exit_code == 1
    assert re.fullmatch("Error: /dev/full cannot be written: (?!None)[^\n]+; choose another[^\n]+\n", result.stderr)
    assert Path("/dev/full").exists()

    def full(file, array):
        file.write(b"a piece")
        raise OSError("9 requested and 7 written")  # as NumPy says it

    monkeypatch.setattr(np, "save", full)
    result = run("--input-text", "x", "--output-logits", "l.npy")
    assert result.stderr.startswith("Error: l.npy cannot be written: 9 requested and 7 written; choose another")
    assert not Path("l.npy").exists()


def test_prompts_on_standard_input_are_not_overwritten(script):
    Path("q.txt").write_text("precious")
    code = "import sys; from qwen_run.cli import main; main(sys.argv[1:])"
    with open("q.txt") as stdin:
        result = fresh(code, "--engine", "engines/tiny", "--output-file", "q.txt", stdin=stdin)
    assert result.returncode == 1
    assert "q.txt is a file of the prompts; choose another --output-file" in result.stderr
    assert Path("q.txt").read_text() == "precious"


def test_what_looks_like_an_array_may_be_text(script):
    Path("in.txt").write_text("[INST] hi\n[1, 2]")
    assert len(run("--input-file", "in.txt").stdout.splitlines()) == 2
    Path("in.txt").write_text("[1, 2, 3]")
    assert json.loads(run("--input-file", "in.txt").stdout)["text"] == "«[1, 2, 3]» 你🤗"


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
    result = run("--input-file", "in.jsonl", "--system", "T")
    records = [json.loads(line) for line in result.stdout.split("\n") if line]
    assert [record["line"] for record in records] == [1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    texts = {record["line"]: record["text"] for record in records if "text" in record}
    assert texts == {1: "«A\u2028B» 你🤗", 4: "«LONGER THAN THE OTHERS» 你🤗", 13: "«D» 你🤗"}
    errors = {record["line"]: record["error"] for record in records if "error" in record}
    for line, says in {
        3: '"prompt" is int',
        5: "not JSON",
        6: "either",
        7: "refuses",
        8: "empty",
        9: "empty",
        10: '"prompt" is null, expected text',
        11: 'unknown "temper\x1bature", expected only prompt, messages, tools',
        12: "tokens",
    }.items():
        assert says in errors[line]
        assert f"Line {line}: {printable(errors[line])}\n" in result.stderr
    assert "\x1b" not in result.stderr
    assert result.exit_code == 1
    assert result.stderr.endswith("Error: 9 of 12 prompts could not be answered, see above\n")
    prompts = [script.tokenizer.decode(request.prompt, False) for request in script.seen]
    assert ["system\nT<" in prompts[0], "system\nS<" in prompts[1], "T<" in prompts[1]] == [True, True, False]


def test_text_lines_run_together(script):
    Path("in.txt").write_text("one\r\n\ntwo three\nfour", "utf-8")
    result = run("--input-file", "in.txt", "--output-file", "out.jsonl")
    records = [json.loads(line) for line in Path("out.jsonl").read_text("utf-8").splitlines()]
    assert [(r["line"], r["text"][1:-4]) for r in records] == [(1, "ONE"), (3, "TWO THREE"), (4, "FOUR")]
    assert re.fullmatch(
        r"3 answers, \d+ output tokens in [\d.]+ s, [\d.]+ tokens/s; peak memory \d+ MiB\n", result.stderr
    )
    assert len(script.seen) == 3


def test_prompts_from_standard_input(script):
    assert json.loads(run("--input-file", "-", stdin="one").stdout)["text"] == "«ONE» 你🤗"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--input-text", ""], "the prompt is empty"),
        (["--input-text", " \n"], "the prompt is empty"),
        ([], "the prompt is empty"),
        (["--input-text", "x" * 400], r"the prompt has \d+ tokens, the engine takes 299"),
        (["--input-text", "x", "--temperature", "-1"], r"--temperature: temperature is -1.0, expected 0"),
        (["--input-text", "x", "--max-new-tokens", "0"], r"--max-new-tokens: max_new_tokens is 0, expected"),
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
    result = run(*arguments)
    assert result.exit_code == 1
    assert re.fullmatch(f"Error: .*{says}[^\n]*\n", result.stderr)
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["--input-text", "x", "--input-file", "y"],
        ["--input-file", "y", "--json"],
        ["--input-file", "y", "--output-logits", "z"],
        ["--input-text", "x", "--raw", "--system", "y"],
        ["--temperature", "hot"],
        ["--threads", "0"],
        ["--threads", "1025"],
        ["--nothing"],
    ],
)
def test_misuse_exits_2(script, arguments):
    assert run(*arguments).exit_code == 2
    assert script.loaded == []


def test_arguments_that_the_locale_could_not_decode(script):
    assert run("--input-text", "é".encode().decode("ascii", "surrogateescape")).stdout == "«É» 你🤗\n"


def test_newest_engine_and_none(script, tmp_path):
    older = write_text_files(tmp_path / "engines" / "older")
    (older / "engine.json").write_text("{}")
    os.utime(older / "engine.json", (1, 1))
    run("--input-text", "x")
    assert script.loaded == [("engines/tiny", None, False)]
    for path in (tmp_path / "engines").glob("*/engine.json"):
        path.unlink()
    result = run("--input-text", "x")
    assert (result.exit_code, "qwen-build" in result.stderr) == (1, True)


@pytest.mark.parametrize(("option", "thought"), [([], ""), (["--no-thinking"], "<think>\n\n</think>\n\n")])
def test_thinking_is_the_templates_unless_switched_off(script, monkeypatch, option, thought):
    model, script = scripted_model(write_text_files(Path("qwen3"), "qwen3"), shout)
    monkeypatch.setattr(TextModel, "load", lambda *_: model)
    run("--input-text", "x", *option)
    assert script.tokenizer.decode(script.seen[0].prompt, False).endswith(f"<|im_start|>assistant\n{thought}")


def test_a_prompt_that_is_refused_leaves_the_output_file_alone(script):
    Path("kept.txt").write_text("old")
    assert run("--input-text", "x" * 400, "--output-file", "kept.txt").exit_code == 1
    assert run("--input-text", "x", "--temperature", "-1", "--output-file", "kept.txt").exit_code == 1
    assert Path("kept.txt").read_text() == "old"
    assert len(script.loaded) == 1


def test_options_without_effect_are_told(script, monkeypatch):
    greedy, _ = scripted_model(write_text_files(Path("greedy")), shout)
    monkeypatch.setattr(TextModel, "load", lambda *_: greedy)
    assert "--top-p and --seed without effect" in run("--input-text", "x", "--top-p", "0.5", "--seed", "1").stderr
    assert "without effect" not in run("--input-text", "x", "--top-p", "0.5", "--temperature", "1").stderr


@pytest.mark.parametrize("error", [KeyboardInterrupt, EngineError("broken")])
def test_an_answer_cut_short(script, monkeypatch, error):
    original = Answer.add

    def add(self, piece):
        original(self, piece)
        if len(self.token_ids) == 2:
            raise error

    monkeypatch.setattr(Answer, "add", add)
    result = run("--input-text", "x")
    code, message = (130, "") if error is KeyboardInterrupt else (1, "Error: broken\n")
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", message)
    assert script.open == 0


# -- what only a fresh interpreter shows

FORBIDDEN = ("torch", "transformers", "onnx", "huggingface_hub", "onnx_ir", "onnxscript", "qwen_build")
HEAVY = ("numpy", "onnxruntime", "tokenizers", "jinja2", "prompt_toolkit", "tqdm")


def fresh(code, *arguments, **options):
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        **options,
    )


def test_help_is_quick_and_imports_nothing_heavy():
    code = "import sys, atexit; from qwen_run.cli import main; atexit.register(lambda: print(*sys.modules)); main()"
    started = os.times()
    result = fresh(code, "--help")
    ended = os.times()
    assert result.returncode == 0
    assert not {*FORBIDDEN, *HEAVY} & set(result.stdout.split("Examples:")[1].split())
    spent_s = ended.children_user + ended.children_system - started.children_user - started.children_system
    assert spent_s < 0.5


def test_nothing_of_the_builder_is_imported():
    modules = "cli, console, prompts, text, chat, sampling, tokenizer"
    result = fresh(f"import sys; from qwen_run import {modules}; print(*sys.modules)")
    assert result.returncode == 0, result.stderr
    assert not set(FORBIDDEN) & set(result.stdout.split())


def test_loading_begins_with_the_manifest(tmp_path):
    with pytest.raises(EngineError, match="absent does not exist; make an engine with qwen-build"):
        TextModel.load(tmp_path / "absent")


@pytest.mark.parametrize("module", [qwen_run.prompts])
def test_doctests(module):
    assert doctest.testmod(module).failed == 0
