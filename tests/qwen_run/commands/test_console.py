"""The interactive chat: what each line does, with a scripted engine, and once on a real terminal."""

import doctest
import fcntl
import itertools
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time

import pytest

import qwen_run.commands.console
from cases import ROOT
from cases.processes import PATIENCE_S
from cases.scripted import poison, scripted_model, shout, write_text_files
from qwen_run import LLM
from qwen_run.commands.console import Console, changed, completions
from qwen_run.sampling.params import SamplingParams


class Chat:
    """A console over a scripted engine; ``say`` returns what a line shows."""

    def __init__(self, directory, reply=shout, max_seq_len=300, **options):
        self.model, self.script = scripted_model(write_text_files(directory, do_sample=True), reply, max_seq_len)
        self.shown = []
        self.console = Console(LLM(self.model), self.model.defaults, write=self.shown.append, **options)

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
    assert chat.say(":conf") == (
        "temperature=1.0 top_p=1.0 top_k=50 min_p=0.0 repetition_penalty=1.0 presence_penalty=0.0 "
        "frequency_penalty=0.0 seed=drawn max_new_tokens=512\n"
    )
    assert chat.say(":conf temperature=0.5 max_new_tokens=2").startswith("temperature=0.5 top_p=1.0")
    assert chat.say(":seed 9") == chat.say(":seed") == "seed=9\n"
    assert chat.say("x") == "«\n(cut at 2 tokens; :conf max_new_tokens=N sets another limit)\n"
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


def test_an_answer_that_cannot_go_on_is_an_error(tmp_path):
    chat = Chat(tmp_path)
    poison(chat.script, "Paris")
    assert re.fullmatch("Error: [^\n]*hold nan, expected numbers[^\n]*\n", chat.say("Paris"))
    assert chat.say("x") == "«X» 你🤗\n"


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
    assert chat.script.is_idle


def test_an_answer_cannot_drive_the_terminal(tmp_path):
    assert Chat(tmp_path, reply=lambda prompt: "\x1b[2J\r\x07a\tb\n").say("x") == "␛[2J␍␇a\tb\n\n"


TERMINAL = """if True:
    import dataclasses, sys, time
    from pathlib import Path
    from cases.scripted import scripted_model, write_text_files
    from qwen_run import LLM, SamplingParams
    from qwen_run.commands import run as cli
    from qwen_run.text.text_model import TextModel

    def reply(prompt):
        return "answer " * 1000 if "slow" in prompt else "answer"

    def run(self, requests):
        try:
            for output in original(self, requests):
                time.sleep(0.002)
                yield output
        finally:
            print("[closed]", flush=True)

    original, LLM.run = LLM.run, run
    model, script = scripted_model(write_text_files(Path(sys.argv.pop())), reply, max_seq_len=20000)
    model = dataclasses.replace(model, defaults=SamplingParams(0, max_tokens=9000))
    TextModel.load = lambda *_: model
    cli.main(["--engine", "tiny"])
"""


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, code, *arguments):
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "TERM": "xterm"}
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [sys.executable, "-c", code, *arguments], environment)
        fcntl.ioctl(self.file, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        self.seen = ""

    def send(self, text):
        os.write(self.file, text.encode())

    def expect(self, pattern, timeout_s=PATIENCE_S):
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

    def exit_code(self, timeout_s=PATIENCE_S):
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
    terminal.expect(r"Chat with tiny\.")
    terminal.expect(">")
    terminal.send("hi\r")
    terminal.expect(r"\[closed\]\s+answer")  # whose last word waits for its end
    terminal.expect(">")
    terminal.send("slow\r")
    terminal.expect("answer answer answer")
    terminal.send("\x03")  # Ctrl-C: the answer ends, the chat goes on
    terminal.expect(r"\[closed\]\s+\w*\s*\(stopped\)")
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
    assert terminal.exit_code() == 0


def test_doctests():
    assert doctest.testmod(qwen_run.commands.console).failed == 0
