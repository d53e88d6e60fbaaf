"""Rounds of random input: each in a child process that may do anything, and is told from one that behaves."""

from __future__ import annotations

import argparse
import importlib
import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEMORY_BYTES = 8 << 30
ROUND_S = 300.0  # of a machine that has other work too
# How a round may end; any other word is a finding.
GOOD = ("answered", "refused")


@dataclass(frozen=True)
class Attempt:
    """One round: what was made, in words, and what is tried with it.

    Attributes:
        work: returns one of ``GOOD`` and what was said, or a complaint.
    """

    note: str
    work: Callable[[], str]


# Makes the attempt of a round from what was prepared, random numbers and an empty folder.
Maker = Callable[[Any, random.Random, Path], Attempt]


def in_child(work: Callable[[], str], seconds: float = ROUND_S) -> str:
    """What ``work`` returns in a child process; or "signal 11", "hang" or "traceback ..." if it does not return."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _be_the_child(work, writer)
    os.close(writer)
    said, deadline = b"", time.monotonic() + seconds
    while select.select([reader], [], [], max(0, deadline - time.monotonic()))[0]:
        piece = os.read(reader, 1 << 16)
        if not piece:
            break
        said += piece
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(reader)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == -signal.SIGKILL and time.monotonic() >= deadline:
        return f"hang: no end after {seconds:g} s"
    return said.decode("utf-8", "replace") if code == 0 else f"signal {-code}" if code < 0 else f"exit code {code}"


def _be_the_child(work: Callable[[], str], writer: int) -> None:
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if "LD_PRELOAD" not in os.environ:  # a sanitizer maps terabytes
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 2)  # native code writes there
        try:
            said = work()
        except BaseException:
            said = "traceback:\n" + traceback.format_exc()
        os.write(writer, said.encode("utf-8", "backslashreplace")[:60_000])
        os._exit(0)
    finally:
        os._exit(99)


def preload(*modules: str) -> None:
    """Import once what every child would import."""
    for module in modules:
        importlib.import_module(module)


def run_command(command: Any, *arguments: object) -> str:
    """What a command line says to ``arguments``: an answer, a refusal of one line, or a complaint about it."""
    from click.testing import CliRunner

    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return "traceback:\n" + "".join(traceback.format_exception(result.exception))
    if result.exit_code == 0:
        return "answered"
    lines = result.stderr.strip().splitlines()
    if result.exit_code not in (1, 2) or not lines or not lines[-1].startswith("Error: ") or "Traceback" in lines:
        return f"exit code {result.exit_code}, and no line that says why: {result.stderr[-500:]!r}"
    return f"refused: {lines[-1]}"


def main(doc: str, prepare: Callable[[Path], Any], make: Maker) -> None:
    """The command line of a fuzzer: exit code 1 and a line for each round that found something."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--seconds", type=float, default=60, help="begin no round after this time (default 60)")
    parser.add_argument("--rounds", type=int, default=10**9, help="at most so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--verbose", action="store_true", help="print every round")
    given = parser.parse_args()
    ends: Counter[str] = Counter()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz") as directory:
        prepared = prepare(Path(directory))
        for number in range(given.first, given.first + given.rounds):
            if time.monotonic() > begun + given.seconds:
                break
            with tempfile.TemporaryDirectory(dir=directory) as folder:
                attempt = make(prepared, random.Random(f"{given.seed}-{number}"), Path(folder))
                said = in_child(attempt.work)
            kind = said.partition(":")[0]
            ends[kind if kind in GOOD else "wrong"] += 1
            if given.verbose or kind not in GOOD:
                print(f"round {number} of seed {given.seed}: {attempt.note}: {said}", flush=True)
    print(", ".join(f"{ends[kind]} {kind}" for kind in (*GOOD, "wrong")))
    sys.exit(1 if ends["wrong"] else 0)
