"""What all commands share: messages, signals, closed and full streams; real processes where it takes one."""

import doctest
import importlib
import os
import re
import signal
import subprocess
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import qwen_run.commands.command
from cases import ROOT
from cases.processes import PATIENCE_S, run_python, start_python
from qwen_engine import __version__
from qwen_engine.errors import EngineError
from qwen_run.commands.command import Command

PRINTS = """if True:
    import click
    from qwen_run.commands.command import Command
    @click.command(cls=Command)
    def main():
        for _ in range(10000):
            print("x" * 1000)
    main()"""


def test_a_closed_pipe_ends_quietly():
    with start_python(PRINTS) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(PATIENCE_S) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        result = run_python(PRINTS, stdout=full, stderr=subprocess.PIPE)
    assert result.returncode == 1
    assert re.fullmatch("Error: no space is left[^\n]*\n", result.stderr)


def test_a_file_that_may_not_grow_is_one_line(tmp_path):
    limited = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n{PRINTS}"
    with open(tmp_path / "output", "w") as output:
        result = run_python(limited, stdout=output, stderr=subprocess.PIPE)
    assert result.returncode == 1
    assert re.fullmatch("Error: a file may not become larger[^\n]*\n", result.stderr)


COMMAND = """if True:
    import os, sys, time
    import click
    from qwen_engine.errors import EngineError
    from qwen_run.commands.command import Command
    @click.command(cls=Command)
    @click.argument("what")
    def main(what):
        if what == "fail":
            raise EngineError("a\\x1b[2J\\nb \\udcff é")
        try:
            print("on stderr", file=sys.stderr)
            print(sys.stdin.isatty(), sys.stdin.read(), flush=True)
            time.sleep(30 if what == "wait" else 0)
        finally:
            time.sleep(0.2)
            os.write(2, b"cleaned up")
    main()"""


def test_control_characters_of_an_error_are_shown_and_not_obeyed():
    result = run_python(COMMAND, "fail")
    assert (result.returncode, result.stderr) == (1, "Error: a\\x1b[2J\\nb \\udcff é\n")


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_closed_streams(closed):
    result = run_python(COMMAND, "read", stdin=subprocess.DEVNULL, preexec_fn=lambda: os.close(closed))
    assert result.returncode == 0
    assert (result.stdout, result.stderr) == (
        "" if closed == 1 else "False \n", "" if closed == 2 else "on stderr\ncleaned up"
    )  # fmt: skip


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_cleaned_up_however_often_it_comes(number):
    with start_python(COMMAND, "wait", stdin=subprocess.DEVNULL) as process:
        process.stdout.readline()
        process.send_signal(number)
        time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == 128 + number
        assert process.stderr.read() == "on stderr\ncleaned up"


@pytest.mark.usefixtures("ignored_hangup")
def test_a_command_outlives_a_hangup_that_its_caller_ignores():
    with start_python(COMMAND, "read", stdin=subprocess.PIPE) as process:
        assert process.stderr.readline() == "on stderr\n"
        process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
        assert process.communicate("to the end", timeout=PATIENCE_S) == ("False to the end\n", "cleaned up")
        assert process.returncode == 0


@pytest.mark.usefixtures("default_signals")
def test_handlers_are_there_only_while_a_command_runs():
    numbers = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]
    before, seen = [signal.getsignal(number) for number in numbers], []

    @click.command(cls=Command)
    def look() -> None:
        seen.append([signal.getsignal(number) for number in numbers])
        raise EngineError("x")

    assert CliRunner().invoke(look).exit_code == 1
    assert [now == then for now, then in zip(seen[0], before, strict=True)] == [False, False, True]
    assert [signal.getsignal(number) for number in numbers] == before
    with ThreadPoolExecutor(1) as pool:  # where Python takes no handlers
        assert pool.submit(CliRunner().invoke, look).result(PATIENCE_S).exit_code == 1
    assert seen[1] == before


@pytest.mark.usefixtures("default_signals", "ignored_hangup")
def test_what_a_caller_ignores_stays_ignored():
    seen = []

    @click.command(cls=Command)
    def look() -> None:
        seen.extend(signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM))

    assert CliRunner().invoke(look).exit_code == 0
    assert seen[0] == signal.SIG_IGN
    assert seen[1] != signal.SIG_DFL


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_help_on_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        result = run_python(COMMAND, "--help", stdout=full, stderr=subprocess.PIPE)
    assert result.returncode == 1
    assert re.fullmatch("Error: no space is left[^\n]*\n", result.stderr)


GIVEN_BACK = """
import numpy as np
from qwen_run.runtime.machine import peak_memory_bytes
before = peak_memory_bytes()
np.ones(before, np.uint8)
print(before, peak_memory_bytes())
"""


def test_peak_memory_counts_what_is_given_back():
    result = run_python(GIVEN_BACK)  # here, where other tests gave back more, it would not grow
    before, after = map(int, result.stdout.split())
    assert before > 10_000_000
    assert after > 1.5 * before


def test_doctests():
    results = doctest.testmod(qwen_run.commands.command)
    assert results.attempted > 0
    assert results.failed == 0


SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]


def test_these_are_the_commands():
    assert sorted(SCRIPTS) == ["qwen-bench", "qwen-build", "qwen-inspect", "qwen-run", "qwen-serve", "qwen-summarize"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_command_says_its_version(name):
    module, function = SCRIPTS[name].split(":")
    command = getattr(importlib.import_module(module), function)
    result = CliRunner().invoke(command, ["--version"], prog_name=name)
    assert (result.exit_code, result.output) == (0, f"{name}, version {__version__}\n")
    assert CliRunner().invoke(command, ["-h"]).output.count("--version") == 1
