"""A short run of every fuzzer, and that a fuzzer sees what it looks for."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from types import ModuleType

import click
import pytest

from cases.processes import PATIENCE_S, run_python
from fuzz import checkpoints, engines, operators, traffic
from fuzz.rounds import in_child, run_command
from qwen_engine.errors import EngineError
from qwen_run.commands.command import Command

ROUNDS = {checkpoints: 25, engines: 25, operators: 8, traffic: 40}


@pytest.mark.slow
@pytest.mark.parametrize("fuzzer", ROUNDS, ids=lambda fuzzer: fuzzer.__name__)
def test_a_short_run_finds_nothing(fuzzer: ModuleType) -> None:
    code = "import runpy, sys; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
    done = run_python(code, fuzzer.__name__, "--rounds", ROUNDS[fuzzer], "--seconds", PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    answered, refused, wrong = map(int, re.findall(r"\d+", done.stdout.splitlines()[-1]))
    assert (answered + refused, wrong) == (ROUNDS[fuzzer], 0)
    assert answered >= ROUNDS[fuzzer] / 5  # else nothing gets as far as the code that is to be tried
    assert refused >= ROUNDS[fuzzer] / 5 or fuzzer is operators  # whose rounds are many calls


def crash() -> str:
    faulthandler.disable()  # pytest's
    os.kill(os.getpid(), signal.SIGSEGV)
    return "answered"


def fail() -> str:
    raise ValueError("planted")


def hang() -> str:
    time.sleep(PATIENCE_S)
    return "answered"


def leave() -> str:
    os._exit(3)


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda: "answered", "answered"),
        (lambda: "x" * 50_000, "x" * 50_000),
        (crash, "signal 11"),
        (fail, "traceback:.*ValueError: planted"),
        (hang, "hang: no end after 1 s"),
        (leave, "exit code 3"),
        (lambda: sys.exit(0), "traceback:.*SystemExit"),
    ],
)
def test_however_a_child_ends_is_told(work: Callable[[], str], said: str) -> None:
    assert re.match(said, in_child(work, 1 if work is hang else PATIENCE_S), re.DOTALL)


def answer() -> None:
    print("4")


def refuse() -> None:
    raise EngineError("what, found, expected")


def leave_silently() -> None:
    sys.exit(1)


def leave_oddly() -> None:
    click.echo("Error: x", err=True)
    sys.exit(5)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (answer, "answered$"),
        (refuse, "refused: Error: what, found, expected$"),
        (fail, "traceback:.*ValueError: planted"),
        (leave_silently, "exit code 1, and no line that says why"),
        (leave_oddly, "exit code 5"),
    ],
)
def test_a_command_that_misbehaves_is_told_from_one_that_refuses(body: Callable[[], None], said: str) -> None:
    assert re.match(said, run_command(click.command(cls=Command)(body)), re.DOTALL)
