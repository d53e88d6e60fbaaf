"""qwen-run: where prompts come from and answers go, exit codes, and the interactive chat, with a scripted engine."""

import doctest
import fcntl
import itertools
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
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
from qwen_run.console import Console, changed, completions
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


JSON_LINES = """\ufeff{"prompt": "a\u2028b", "id": 7}

{"prompt": 3}
{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "longer than the others"}]}
{broken
{"prompt": "c", "messages": []}
{"messages": [{"role": "user"}]}
{"messages": []}
{"prompt": ""}
{"prompt": "%s"}
{"messages": [{"role": "user", "content": "d"}]}""" % ("x" * 400)


def test_json_lines_in_input_order(script):
    Path("in.jsonl").write_text(JSON_LINES, "utf-8")
    result = run("--input-file", "in.jsonl", "--system", "T")
    records = [json.loads(line) for line in result.stdout.split("\n") if line]
    assert [record["line"] for record in records] == [1, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    texts = {record["line"]: record["text"] for record in records if "text" in record}
    assert texts == {1: "«A\u2028B» 你🤗", 4: "«LONGER THAN THE OTHERS» 你🤗", 11: "«D» 你🤗"}
    errors = {record["line"]: record["error"] for record in records if "error" in record}
    for line, says in {
        3: '"prompt" is int',
        5: "not JSON",
        6: "either",
        7: "refuses",
        8: "empty",
        9: "empty",
        10: "tokens",
    }.items():
        assert says in errors[line]
        assert f"Line {line}: {errors[line]}\n" in result.stderr
    assert result.exit_code == 1
    assert result.stderr.endswith("Error: 7 of 10 prompts could not be answered, see above\n")
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
        (["--input-text", "x", "--temperature", "-1"], r"temperature is -1.0, expected 0"),
        (["--input-text", "x", "--max-new-tokens", "0"], r"max_new_tokens is 0, expected"),
        (["--input-file", "absent"], "absent cannot be read: No such file"),
        (["--input-file", "latin1.txt"], r"latin1.txt: byte 5 \(0xe9\) is not UTF-8"),
        (["--input-file", "empty.txt"], "the prompt is empty"),
        (["--input-text", "x", "--output-file", "absent/a"], "absent/a cannot be written: No such file"),
        (["--input-text", "x", "--output-logits", "absent/a"], "absent/a cannot be written: No such file"),
        (["--input-text", "a\udcff"], "not UTF-8"),
    ],
)
def test_mistakes_are_one_line_and_exit_1(script, arguments, says):
    Path("latin1.txt").write_bytes("ok\ncaf\u00e9".encode("latin-1")[0:5] + b"\xe9\n")
    Path("empty.txt").touch()
    result = run(*arguments)
    assert result.exit_code == 1
    assert re.fullmatch(f"Error: .*{says}[^\n]*\n", result.stderr)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--input-text", "x", "--input-file", "y"],
        ["--input-file", "y", "--json"],
        ["--input-file", "y", "--output-logits", "z"],
        ["--input-text", "x", "--raw", "--system", "y"],
        ["--temperature", "hot"],
        ["--threads", "0"],
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


PRINTS = """if True:
    import click
    from qwen_run.command import Command
    @click.command(cls=Command)
    def main():
        for _ in range(10000):
            print("x" * 1000)
    main()"""


def test_a_closed_pipe_ends_quietly():
    root = Path(__file__).parent.parent
    with subprocess.Popen(
        [sys.executable, "-c", PRINTS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root
    ) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(10) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_disk_is_one_line():
    root = Path(__file__).parent.parent
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", PRINTS], stdout=full, stderr=subprocess.PIPE, text=True, cwd=root, check=False
        )
    assert result.returncode == 1
    assert re.fullmatch("Error: no space is left[^\n]*\n", result.stderr)


def test_loading_begins_with_the_manifest(tmp_path):
    with pytest.raises(EngineError, match="absent does not exist; make an engine with qwen-build"):
        TextModel.load(tmp_path / "absent")


# -- the interactive chat


class Chat:
    """A console over a scripted engine; ``say`` returns what a line shows."""

    def __init__(self, directory, reply=shout, max_seq_len=300, **options):
        self.model, self.script = scripted_model(write_text_files(directory, do_sample=True), reply, max_seq_len)
        self.shown = []
        self.console = Console(self.model, self.model.defaults, write=self.shown.append, **options)

    def say(self, line, goes_on=True):
        self.shown.clear()
        assert self.console.handle(line) is goes_on
        return "".join(self.shown)


def test_chat_streams_and_remembers(tmp_path):
    chat = Chat(tmp_path, system="S")
    assert chat.say("one") == "«ONE» 你🤗\n"
    assert len(chat.shown) > 5
    assert chat.say(":)  two") == "«:)  TWO» 你🤗\n"
    prompt = chat.script.tokenizer.decode(chat.script.seen[1].prompt, False)
    assert re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", prompt) == [
        ("system", "S"), ("user", "one"), ("assistant", "«ONE» 你🤗"), ("user", ":)  two"),
    ]  # fmt: skip
    assert chat.say(":his") == "system: S\nuser: one\nassistant: «ONE» 你🤗\nuser: :)  two\nassistant: «:)  TWO» 你🤗\n"
    assert chat.say(":clear-history") == "(history cleared)\n"
    assert chat.say(":history") == "system: S\n"
    assert chat.say("  ") == ""


@pytest.mark.parametrize("line", [":exit", ":quit", ":q", " :q "])
def test_leaving(tmp_path, line):
    assert Chat(tmp_path).say(line, goes_on=False) == ""


def test_settings(tmp_path):
    chat = Chat(tmp_path)
    assert chat.say(":conf") == "temperature=1.0 top_p=1.0 top_k=50 repetition_penalty=1.0 seed=0 max_new_tokens=512\n"
    assert chat.say(":conf temperature=0.5 max_new_tokens=2").startswith("temperature=0.5 top_p=1.0")
    assert chat.say(":seed 9") == chat.say(":seed") == "seed=9\n"
    assert chat.say("x") == "«\n"
    assert chat.script.seen[-1].params == SamplingParams(0.5, top_k=50, seed=9, max_tokens=2)
    assert "temperature=1.0" in chat.say(":reset-conf")
    assert chat.console.params == chat.model.defaults


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (":nothing", "no command :nothing; :help lists"),
        (":quit now", ":quit takes nothing after it"),
        (":seed x", "seed is 'x', expected a whole number"),
        (":seed 1 2", "takes one number"),
        (":seed -1", "seed is -1, expected"),
        (":conf top_p=0.5 top_k=x", "top_k is 'x', expected a whole number"),
        (":conf top_p=0.5 temperature=-1", "temperature is -1.0, expected"),
        (":conf top_p=0.5 temperature=__import__('os').getpid()", "expected a number"),
        (":conf top_p", "expected KEY=VALUE with KEY one of temperature"),
        (":conf top_p=0.5 nothing=1", "found nothing=1"),
        ("x" * 400, "tokens, the engine takes 299"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(tmp_path, line, says):
    chat = Chat(tmp_path)
    chat.say("one")
    before = chat.console.params, list(chat.console.conversation.turns)
    shown = chat.say(line)
    assert re.fullmatch(f"Error: [^\n]*{re.escape(says)}[^\n]*\n", shown)
    assert (chat.console.params, chat.console.conversation.turns) == before


HELP_NAMES = ["help/h", "exit/quit/q", "clear/cl", "clear-history/clh", "history/his", "seed", "conf", "reset-conf"]


def test_help_and_completion(tmp_path):
    commands = {name for names in HELP_NAMES for name in names.split("/")}
    shown = Chat(tmp_path).say(":help")
    assert set(re.findall(r":([a-z-]+)", shown)) == commands
    assert sorted(completions(":")) == sorted(f":{name}" for name in commands)
    assert list(completions(":cl")) == [":clear", ":cl", ":clear-history", ":clh"]
    assert list(completions(":conf top_p=1 temp")) == ["temperature="]
    assert list(completions("hello :c")) == list(completions("cl")) == []
    assert changed(SamplingParams(), []) == SamplingParams()


def test_forgetting_the_oldest_turns_is_told(tmp_path):
    chat = Chat(tmp_path, max_seq_len=220, reply=lambda prompt: "y" * 20, system="S")
    chat.console.params = SamplingParams(max_tokens=25)
    shown = [chat.say(f"question {i}") for i in range(5)]
    assert shown[0] == "y" * 20 + "\n"
    assert shown[-1].startswith("(no room for the whole conversation: forgot its oldest 1 turns)\nyyy")
    roles = [message["role"] for message in chat.console.conversation.messages]
    assert roles == ["system", *["user", "assistant"] * ((len(roles) - 1) // 2)]


def test_ctrl_c_keeps_what_came(tmp_path):
    chat = Chat(tmp_path)
    write, counter = chat.shown.append, itertools.count()

    def interrupted(text):
        write(text)
        if next(counter) == 3:
            raise KeyboardInterrupt

    chat.console._write = interrupted
    assert chat.say("abcdef") == "«AB\n(stopped)\n"
    assert chat.console.conversation.turns[-1] == {"role": "assistant", "content": "«AB"}
    assert chat.script.open == 0


def test_an_answer_cannot_drive_the_terminal(tmp_path):
    assert Chat(tmp_path, reply=lambda prompt: "\x1b[2J\r\x07a\tb\n").say("x") == "␛[2J␍␇a\tb\n\n"


TERMINAL = """if True:
    import dataclasses, sys, time
    from pathlib import Path
    from scripted import scripted_model, write_text_files
    from qwen_run import cli
    from qwen_run.sampling import SamplingParams
    from qwen_run.text import TextModel

    def reply(prompt):
        return "answer " * 1000 if "slow" in prompt else "answer"

    def generate(requests, keep_logits):
        try:
            for token in script.generate(requests):
                time.sleep(0.002)
                yield token
        finally:
            print("[closed]", flush=True)

    model, script = scripted_model(write_text_files(Path(sys.argv.pop())), reply, max_seq_len=20000)
    model = dataclasses.replace(model, generate=generate, defaults=SamplingParams(0, max_tokens=9000))
    TextModel.load = lambda *_: model
    cli.main(["--engine", "tiny"])
"""


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, code, *arguments):
        root = Path(__file__).parent.parent
        environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}", "TERM": "xterm"}
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [sys.executable, "-c", code, *arguments], environment)
        fcntl.ioctl(self.file, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        self.seen = ""

    def send(self, text):
        os.write(self.file, text.encode())

    def expect(self, pattern, timeout_s=30):
        """Read until ``pattern`` is there; what was read up to its end is used up."""
        deadline = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < deadline, f"{pattern!r} not in {self.seen!r}"
            if select.select([self.file], [], [], 0.1)[0]:
                self.seen += os.read(self.file, 4096).decode("utf-8", "replace")
                if "\x1b[6n" in self.seen:  # it asks where the cursor is
                    self.seen = self.seen.replace("\x1b[6n", "")
                    self.send("\x1b[1;1R")
        self.seen = self.seen[found.end() :]

    def wait(self, timeout_s=10):
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError("still running")


def test_a_real_terminal(tmp_path):
    terminal = Terminal(TERMINAL, str(tmp_path / "engine"))
    terminal.expect(">")
    terminal.send("hi\r")
    terminal.expect(r"answer\[closed\]")
    terminal.expect(">")
    terminal.send("slow\r")
    terminal.expect("answer answer answer")
    terminal.send("\x03")  # Ctrl-C: the answer ends, the chat goes on
    terminal.expect(r"\[closed\]\s+\(stopped\)")
    terminal.expect(">")
    terminal.send(":se\t")
    terminal.expect("ed")  # Tab completes
    terminal.send(" 5\r")
    terminal.expect("seed=5")
    terminal.expect(">")
    terminal.send("\x03")
    terminal.expect("Ctrl-D leaves")
    terminal.expect(">")
    terminal.send("\x04")
    assert terminal.wait() == 0


@pytest.mark.parametrize("module", [qwen_run.console, qwen_run.prompts])
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


def test_peak_memory_counts_what_is_given_back():
    before = qwen_run.command.peak_memory_bytes()
    assert before > 10 * cli.MIB
    np.ones(before, np.uint8)
    assert qwen_run.command.peak_memory_bytes() > 1.5 * before
