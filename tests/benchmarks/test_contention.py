"""benchmarks.contention: which processes run beside the engines, and the table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import contention
from benchmarks.contention import LOADS, THREADS, Load, neighbours, on_cores, table


def test_neighbours_run_where_they_should_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contention, "PAUSE_S", 0)
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*arguments: object, **options: object) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **options))  # type: ignore[call-overload]
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    cores = os.sched_getaffinity(0)
    with neighbours(Load("", busy=2, cores=1)):
        assert len(started) == 2
        for process in started:
            assert process.poll() is None
            assert os.sched_getaffinity(process.pid) == {min(cores)}
            assert os.getsid(process.pid) != os.getsid(0)
    assert all(process.poll() is not None for process in started)
    assert os.sched_getaffinity(0) == cores


def test_what_is_started_on_one_core_stays_there() -> None:
    with on_cores(1):
        code = "import os; print(len(os.sched_getaffinity(0)))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "1\n"


def test_table() -> None:
    found = {
        ("quiet", side, threads, kind): [1.0, factor * threads, 90.0]
        for side, factor in (("before", 2.0), ("engine", 1.5))
        for threads in THREADS
        for kind in ("token", "prompt")
    }
    sides = [("before", Path()), ("engine", Path())]
    assert table(found, sides, ["quiet"]).splitlines() == [
        "| beside | ms for a | before: 1 thread | before: 2 threads | before: 2 over 1 "
        "| engine: 1 thread | engine: 2 threads | engine: 2 over 1 |",
        "|---|---|---|---|---|---|---|---|",
        "| nothing | token | 2.00 | 4.00 | 2.00 | 1.50 | 3.00 | 2.00 |",
        "| nothing | prompt | 2.00 | 4.00 | 2.00 | 1.50 | 3.00 | 2.00 |",
    ]
    assert LOADS["quiet"] == Load("nothing")
