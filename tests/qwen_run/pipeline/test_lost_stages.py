"""Stages that are killed or stopped, and a driver that is: no answer changes, none is lost, nothing is left behind."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cases.processes import PATIENCE_S, start_python, wait_until_gone
from qwen_engine.errors import EngineError
from qwen_run import LLM
from qwen_run.pipeline import local
from qwen_run.pipeline.local import LocalStages
from qwen_run.pipeline.stage_process import Chain, _compute
from qwen_run.pipeline.staged_engine import StagedEngine, open_engine
from qwen_run.pipeline.wire import Kind, Message, batch_arrays, closed, receive, send
from qwen_run.runtime.engine import Batch, Engine
from qwen_run.runtime.stage import Stage

OPTIONS: dict[str, Any] = {"keep_logits": True, "max_batch_size": 6, "max_batch_tokens": 64, "max_drafts": 2}
Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def expected(engine: Path, ask: Ask) -> Any:
    """The answers of one process."""
    return ask(LLM(Engine.load(engine, threads=1, num_blocks=200), **OPTIONS))


def staged(engine: Path, num_stages: int) -> tuple[StagedEngine, LLM]:
    opened = open_engine(engine, 1, num_blocks=40, pipeline_parallel_size=num_stages)
    assert isinstance(opened, StagedEngine)
    return opened, LLM(opened, **OPTIONS)


def pids_of(engine: StagedEngine) -> list[int]:
    assert isinstance(engine.executor, LocalStages)
    return engine.executor.pids


@pytest.mark.parametrize("seed", range(3))
def test_killed_stages_change_no_answer(engine: Path, ask: Ask, expected: Any, seed: int) -> None:
    """Any stage, several times, at steps that chance says."""
    rng = random.Random(seed)
    opened, llm = staged(engine, 3)
    kills = {step: rng.randrange(2) for step in rng.sample(range(5, 200), 3)}

    def kill(step: int) -> None:
        if step in kills:
            os.kill(pids_of(opened)[kills[step]], signal.SIGKILL)

    assert ask(llm, kill) == expected
    assert opened.cache.num_free == opened.cache.num_blocks
    assert 1 <= llm.core.statistics.num_lost_stages <= 3
    opened.close()


def test_all_stages_killed_at_once_and_again_while_they_start(engine: Path, ask: Ask, expected: Any) -> None:
    opened, llm = staged(engine, 3)
    seen: set[int] = set()

    def kill(step: int) -> None:
        if step == 20:
            seen.update(pids_of(opened))
            for pid in pids_of(opened):
                os.kill(pid, signal.SIGKILL)
            threading.Thread(target=kill_the_next).start()

    def kill_the_next() -> None:
        ends = time.monotonic() + PATIENCE_S
        while not (new := set(pids_of(opened)) - seen) and time.monotonic() < ends:
            time.sleep(0.01)
        os.kill(new.pop(), signal.SIGKILL)

    assert ask(llm, kill) == expected
    assert llm.core.statistics.num_lost_stages >= 1
    opened.close()


def test_a_stopped_stage_is_noticed(engine: Path, ask: Ask, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is closed, as of a machine whose plug was pulled."""
    monkeypatch.setattr(local, "SILENCE_S", 2.0)
    opened, llm = staged(engine, 3)
    stopped: list[int] = []

    def stop(step: int) -> None:
        if step == 30:
            stopped.append(pids_of(opened)[1])
            os.kill(stopped[0], signal.SIGSTOP)

    assert ask(llm, stop) == expected
    assert llm.core.statistics.num_lost_stages == 1
    assert stopped[0] not in pids_of(opened)
    assert not Path(f"/proc/{stopped[0]}").exists()
    opened.close()


def test_stages_that_cannot_be_put_up_again_are_an_error(
    engine: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a hang."""
    opened, llm = staged(engine, 2)

    def kill(step: int) -> None:
        if step == 10:
            monkeypatch.setattr(sys, "executable", "/bin/false")
            os.kill(pids_of(opened)[0], signal.SIGKILL)

    with pytest.raises(EngineError, match=r"^stage 0 \(layers 0 to 2\) is gone.*, 3 times in a row; look at"):
        ask(llm, kill)
    assert opened.cache.num_free == opened.cache.num_blocks
    opened.close()


DRIVER = """
import sys
from qwen_run import LLM, SamplingParams
llm = LLM(sys.argv[1], threads=1, num_blocks=40, pipeline_parallel_size=3)
params = SamplingParams(temperature=0, max_tokens=700, ignore_eos=True)
for index, _ in enumerate(llm.stream(["one", "two"], params)):
    if index == 5:
        print(*llm.core.engine.executor.pids, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stages_end_with_their_driver(engine: Path, number: signal.Signals) -> None:
    driver = start_python(DRIVER, engine, stderr=subprocess.DEVNULL)
    assert driver.stdout is not None
    pids = [int(pid) for pid in driver.stdout.readline().split()]
    assert len(pids) == 2
    driver.send_signal(number)
    driver.wait(PATIENCE_S)
    driver.stdout.close()
    wait_until_gone(*pids)


def test_a_batch_of_another_generation_is_not_computed(engine: Path) -> None:
    """Its past is in no cache of this process: what came of it would be wrong, in silence."""
    stage = Stage.load(engine, range(2), 8, threads=1)
    ours, upstream = socket.socketpair()
    downstream, theirs = socket.socketpair()
    theirs.settimeout(PATIENCE_S)
    chain = Chain(7, upstream, downstream)
    computing = threading.Thread(target=lambda: (_compute(stage, chain), closed([upstream, downstream])))
    computing.start()
    counts = [np.array(each, np.int32) for each in ([0, 1], [0], [[1]])]
    batch = Batch(np.array([3]), *counts, np.array([0]))
    send(ours, Message(Kind.BATCH, 7, 1, batch_arrays(batch, [], None)))
    found = receive(theirs)
    assert found is not None
    assert found.kind == Kind.BATCH
    send(ours, Message(Kind.BATCH, 6, 2, batch_arrays(batch, [], None)))
    assert receive(theirs) is None
    computing.join(PATIENCE_S)
    closed([ours, theirs])
