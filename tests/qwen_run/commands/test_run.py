"""qwen-run: where a prompt comes from and its answer goes, options, exit codes; with a scripted engine."""

import dataclasses
import doctest
import json
import os
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import qwen_engine.json_output
import qwen_run.commands.command
import qwen_run.commands.console
import qwen_run.commands.prompt_file
from cases.processes import PATIENCE_S, run_python
from cases.run_command import ASK, Terminal, run_command, stop_after
from cases.scripted import IM_END, poison, scripted_model, shout, write_text_files
from qwen_engine.errors import EngineError
from qwen_run.api.llm import LLM
from qwen_run.commands import answer_file, one_answer, run_files
from qwen_run.sampling.params import SamplingParams
from qwen_run.text.text_model import TextModel


def test_one_answer(script):
    result = run_command("--input-text", "hello")
    assert (result.exit_code, result.stdout) == (0, "«HELLO» 你🤗\n")
    assert re.fullmatch(
        r"\d+ input tokens, 17 output tokens; first after \d+ ms, then [\d.]+ tokens/s; peak memory \d+ MiB\n",
        result.stderr,
    )
    assert script.loaded == [("engines/tiny", None, False, None, None, None)]
    assert script.seen[0].params == SamplingParams(0.7, 1.0, 20)
    assert IM_END in script.seen[0].stop_token_ids
    assert script.is_idle


def test_options_reach_the_request(script):
    options = "--max-new-tokens 3 --temperature 0.5 --top-p 0.9 --top-k 5 --repetition-penalty 1.1 --seed 4 --threads 2"
    options += " --kv-cache-memory 64 --max-seq-len 99 --pipeline-parallel-size 3"
    result = run_command("--input-text", "x", "--engine", "e", "--system", "Be brief.", *options.split())
    assert result.stdout == "«X\n"
    assert script.loaded == [("e", 2, False, 64 << 20, 99, 3)]
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
    assert script.loaded == [("engines/tiny", None, False, None, None, None)]
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
