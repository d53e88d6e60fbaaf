"""Stages as processes of this machine, joined by socket pairs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from qwen_engine.errors import EngineError
from qwen_run.pipeline.executor import Executor, StagePlan
from qwen_run.pipeline.stage_process import BEAT_S, start_of
from qwen_run.pipeline.wire import Kind, Message, WireError, batch_arrays, closed, receive, send
from qwen_run.runtime.engine import Batch
from qwen_run.runtime.flights import StageLost
from qwen_run.runtime.kv_cache import Edit

# A stage that is not heard of for so long is lost: it is stopped, or its machine thrashes. One that computes tells.
SILENCE_S = 5.0
START_S = 180.0  # the same of one that has not been heard of at all: Python and its libraries are read from a disk
# A batch that takes so long has met a stage that lives and does not work.
STEP_S = 900.0
# How often lost stages are put up again before the engine is given up.
_MOST_STARTS = 3
_END_S = 3.0  # that a process has to end by itself
_PACKAGES = Path(__file__).parents[2]  # where a stage finds what runs here


class LocalStages(Executor):
    """Processes that are started here, and end with this one."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards what threads write: all that follows, and each process
        self._processes: list[_Process] = []
        self._results: deque[Message] = deque()
        self._generation = 0
        self._is_broken = False  # the chain of this generation
        self._number = 0
        self._first: socket.socket | None = None  # to the first stage
        self._last: socket.socket | None = None  # from the last one here
        self._is_closed = False

    def start(self, plans: Sequence[StagePlan]) -> None:
        self._processes = [_Process(index, plan, self._changed) for index, plan in enumerate(plans)]

    def connect(self) -> list[dict[str, Any]]:
        try:
            self._connect()
        except StageLost as lost:
            raise EngineError(f"{lost}; look at what it wrote, and at the memory that is free") from lost
        return [process.facts for process in self._processes]

    def send(self, batch: Batch, edits: Sequence[Edit]) -> None:
        self._check_open()
        self._number += 1
        assert self._first is not None
        message = Message(Kind.BATCH, self._generation, self._number, batch_arrays(batch, edits, None))
        try:
            send(self._first, message)
        except OSError as error:  # also where it does not read
            raise StageLost(f"stage 0 takes no batch: {error.strerror or error}") from error

    def receive(self) -> np.ndarray | str:
        self._wait(lambda: bool(self._results), "a batch")
        message = self._results.popleft()
        if message.kind == Kind.REFUSED:
            return message.text
        hidden = message.arrays[-1]
        assert hidden is not None
        return hidden

    def recover(self) -> None:
        for _ in range(_MOST_STARTS):
            try:
                self._connect()
            except StageLost as lost:
                last = lost
            else:
                return
        raise EngineError(f"{last}, {_MOST_STARTS} times in a row; look at what it wrote, and at the memory") from last

    def close(self) -> None:
        with self._changed:
            processes, self._processes, self._is_closed = self._processes, [], True
            self._changed.notify_all()
        self._disconnect()
        for process in processes:
            process.let_end()
        for process in processes:
            process.end()

    @property
    def pids(self) -> list[int]:
        """Of the processes, in the order of the stages."""
        return [process.pid for process in self._processes]

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineError("the engine's stages have been ended; load it again")

    def _connect(self) -> None:
        """Start again what is lost, and join all in a new chain.

        Raises:
            StageLost: one is lost in the meantime.
            EngineError: one cannot be loaded.
        """
        self._check_open()
        self._disconnect()
        for index, process in enumerate(self._processes):
            if process.is_lost:
                process.end()
                self._processes[index] = _Process(index, process.plan, self._changed)
        self._wait(lambda: all(process.facts for process in self._processes), "to be loaded")
        pairs = [socket.socketpair() for _ in range(len(self._processes) + 1)]
        with self._changed:
            self._generation += 1
            generation, self._is_broken = self._generation, False
            self._results.clear()
        self._first, self._last = pairs[0][0], pairs[-1][1]
        self._first.settimeout(SILENCE_S)
        for process, (_, upstream), (downstream, _) in zip(self._processes, pairs, pairs[1:], strict=False):
            process.tell(Message(Kind.CHAIN, generation), [upstream.fileno(), downstream.fileno()])
            upstream.close()
            downstream.close()
        threading.Thread(target=self._take, args=(self._last, generation), name="qwen-results", daemon=True).start()
        self._wait(lambda: all(each.generation == generation for each in self._processes), "to join the others")

    def _disconnect(self) -> None:
        closed(each for each in (self._first, self._last) if each is not None)
        self._first = self._last = None

    def _take(self, connection: socket.socket, generation: int) -> None:
        """In a thread: take results as they come."""
        with suppress(OSError, WireError):
            while (message := receive(connection)) is not None:
                with self._changed:
                    if self._generation == generation == message.generation:
                        self._results.append(message)
                    self._changed.notify_all()
        with self._changed:
            self._is_broken = self._is_broken or self._generation == generation
            self._changed.notify_all()

    def _wait(self, is_there: Callable[[], bool], what: str) -> None:
        """Wait for what other threads bring.

        Time is counted in pieces, so that a stop of this very process is no silence of others.

        Raises:
            StageLost: a stage is gone, silent, or takes too long.
            EngineError: a stage cannot be loaded, or all are closed.
        """
        waited_s = 0.0
        with self._changed:
            for process in self._processes:
                process.silent_s = 0.0
            while not is_there():
                self._check_open()
                for process in self._processes:
                    process.check()
                if self._is_broken and self._last is not None:
                    waited_s = max(waited_s, STEP_S - SILENCE_S)  # somebody has gone: soon it is known who
                started = time.monotonic()
                self._changed.wait(BEAT_S)
                passed_s = min(time.monotonic() - started, 2 * BEAT_S)
                waited_s += passed_s
                for process in self._processes:
                    process.silent_s += passed_s
                if waited_s > STEP_S:
                    for process in self._processes:
                        process.is_lost = True
                    raise StageLost(f"the stages have not come {what} for {STEP_S:.0f} s")


class _Process:
    """A process of a stage, as far as the driver knows it.

    Attributes:
        facts: what it tells of itself; empty until it is loaded.
        generation: of the chain it has joined.
        silent_s: seconds of waiting in which nothing has been heard of it.
        is_lost: another has to take its place.
    """

    def __init__(self, index: int, plan: StagePlan, changed: threading.Condition) -> None:
        self.plan = plan
        self.facts: dict[str, Any] = {}
        self.generation = 0
        self.silent_s = 0.0
        self.is_lost = False
        self._name = f"stage {index} (layers {plan.layers.start} to {plan.layers[-1]})"
        self._failure: str | None = None
        self._has_spoken = False
        self._changed = changed
        self._control, theirs = socket.socketpair()
        paths = [str(_PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [sys.executable, "-P", "-m", "qwen_run.pipeline.stage_process", str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
        self._control.settimeout(None)
        threading.Thread(target=self._listen, name=f"qwen-stage-{index}", daemon=True).start()
        self.tell(Message(Kind.START, text=start_of(plan.engine, plan.layers, plan.num_blocks, plan.threads)))

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send it ``message``; one that does not take it is found to be gone by who waits for it."""
        with suppress(OSError):
            send(self._control, message, descriptors)

    def check(self) -> None:
        """
        Raises:
            EngineError: it cannot be loaded.
            StageLost: it is gone or silent.
        """
        if self._failure is not None:
            raise EngineError(f"{self._name}: {self._failure}")
        most_s = SILENCE_S if self._has_spoken else START_S
        if self.silent_s > most_s:
            self.is_lost = True
            raise StageLost(f"{self._name} has not been heard of for {most_s:.0f} s")
        if self.is_lost:
            code = self._process.poll()
            raise StageLost(f"{self._name} is gone" + (f" with exit code {code}" if code is not None else ""))

    def let_end(self) -> None:
        """Tell it to end."""
        closed([self._control])

    def end(self) -> None:
        """See that it ends."""
        if self.silent_s <= SILENCE_S:
            self.let_end()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
        self._process.kill()  # also one that is stopped
        self.let_end()
        self._process.wait()

    def _listen(self) -> None:
        """In a thread: note what it tells."""
        with suppress(OSError, WireError):
            while (message := receive(self._control)) is not None:
                with self._changed:
                    self.silent_s, self._has_spoken = 0.0, True
                    if message.kind == Kind.READY:
                        self.facts = json.loads(message.text)
                    elif message.kind == Kind.FAILED:
                        self._failure = message.text
                    elif message.kind == Kind.JOINED:
                        self.generation = message.generation
                    if message.kind != Kind.BEAT:
                        self._changed.notify_all()
        with self._changed:
            self.is_lost = True
            self._changed.notify_all()
