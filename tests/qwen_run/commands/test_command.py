"""What all commands share: messages, signals, closed and full streams; real processes where it takes one."""

import doctest
import importlib
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

import qwen_run.commands.command
import qwen_run.runtime.machine
from cases import ROOT
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
    with subprocess.Popen(
        [sys.executable, "-c", PRINTS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(10) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", PRINTS], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False
        )
    assert result.returncode == 1
    assert re.fullmatch("Error: no space is left[^\n]*\n", result.stderr)


def test_a_file_that_may_not_grow_is_one_line(tmp_path):
    limited = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n{PRINTS}"
    with open(tmp_path / "output", "w") as output:
        result = subprocess.run(
            [sys.executable, "-c", limited], stdout=output, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False
        )
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
    result = subprocess.run(
        [sys.executable, "-c", COMMAND, "fail"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (result.returncode, result.stderr) == (1, "Error: a\\x1b[2J\\nb \\udcff é\n")


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_closed_streams(closed):
    result = subprocess.run(
        [sys.executable, "-c", COMMAND, "read"], stdin=subprocess.DEVNULL, capture_output=True,
        text=True, check=False, cwd=ROOT, preexec_fn=lambda: os.close(closed),
    )  # fmt: skip
    assert result.returncode == 0
    assert (result.stdout, result.stderr) == (
        "" if closed == 1 else "False \n", "" if closed == 2 else "on stderr\ncleaned up"
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_cleaned_up_however_often_it_comes(number):
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, "wait"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, cwd=ROOT,
    ) as process:  # fmt: skip
        process.stdout.readline()
        process.send_signal(number)
        time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(10) == 128 + number
        assert process.stderr.read() == b"on stderr\ncleaned up"


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
        assert pool.submit(CliRunner().invoke, look).result().exit_code == 1
    assert seen[1] == before


def test_what_a_caller_ignores_stays_ignored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with qwen_run.commands.command._exit_on_signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_help_on_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", COMMAND, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            cwd=ROOT,
        )  # fmt: skip
    assert result.returncode == 1
    assert re.fullmatch("Error: no space is left[^\n]*\n", result.stderr)


def test_peak_memory_counts_what_is_given_back():
    before = qwen_run.runtime.machine.peak_memory_bytes()
    assert before > 10_000_000
    np.ones(before, np.uint8)
    assert qwen_run.runtime.machine.peak_memory_bytes() > 1.5 * before


def test_doctests():
    results = doctest.testmod(qwen_run.commands.command)
    assert results.attempted > 0
    assert results.failed == 0


SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]


def test_there_are_five_commands():
    assert sorted(SCRIPTS) == ["qwen-bench", "qwen-build", "qwen-inspect", "qwen-run", "qwen-summarize"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_command_says_its_version(name):
    module, function = SCRIPTS[name].split(":")
    command = getattr(importlib.import_module(module), function)
    result = CliRunner().invoke(command, ["--version"], prog_name=name)
    assert (result.exit_code, result.output) == (0, f"{name}, version {__version__}\n")
    assert CliRunner().invoke(command, ["-h"]).output.count("--version") == 1
