"""One stage in a process of its own: ``python -m qwen_run.pipeline.stage_process DESCRIPTOR``.

The descriptor is one end of a socket pair; whoever has the other end says which layers of which engine this is, and
gives two more sockets: batches come from the one and go to the other. The process ends when that end is closed, by
whatever: it is never left behind. Meanwhile a thread of its own tells that it lives.
"""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

from qwen_engine.errors import EngineError, QwenError
from qwen_run.pipeline.alike import facts
from qwen_run.pipeline.wire import Kind, Message, WireError, batch_arrays, batch_of, closed, interrupted, receive, send
from qwen_run.runtime.stage import Stage

BEAT_S = 0.5  # between two signs of life
_ENDED, _BROKEN = 0, 1  # exit codes: the driver is gone; this process cannot go on


class Chain(NamedTuple):
    """Where batches come from and go, until the next chain."""

    generation: int
    upstream: socket.socket
    downstream: socket.socket


class StageServer:
    """A stage that computes what comes to it."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._sending = threading.Lock()
        self._chains: queue.SimpleQueue[Chain] = queue.SimpleQueue()
        self._chain: Chain | None = None  # the newest
        self._parent = os.getppid()

    def serve(self) -> None:
        """Load the stage, and compute until the driver is gone."""
        start = receive(self._control)
        if start is None or start.kind != Kind.START:
            return
        threading.Thread(target=self._listen, name="qwen-stage-control", daemon=True).start()
        try:
            stage = load(json.loads(start.text))
        except QwenError as error:
            self._tell(Message(Kind.FAILED, text=str(error)))
            return
        self._tell(Message(Kind.READY, text=json.dumps(facts(stage))))
        while True:
            chain = self._chains.get()
            if chain is self._chain:  # else there is a newer one already
                self._tell(Message(Kind.JOINED, chain.generation))
                _compute(stage, chain)
            closed([chain.upstream, chain.downstream])

    def _tell(self, message: Message) -> None:
        with self._sending:
            send(self._control, message)

    def _listen(self) -> None:
        """In a thread: tell that the stage lives, take new chains, and end the process with the driver."""
        try:
            while True:
                if not select.select([self._control], [], [], BEAT_S)[0]:
                    self._tell(Message(Kind.BEAT))
                    if os.getppid() != self._parent:
                        break
                    continue
                descriptors: list[int] = []
                message = receive(self._control, descriptors)
                if message is None:
                    break
                if message.kind == Kind.CHAIN and len(descriptors) == 2:
                    old, up, down = self._chain, *(socket.socket(fileno=each) for each in descriptors)
                    self._chain = Chain(message.generation, up, down)
                    if old is not None:
                        interrupted(old.upstream)
                        interrupted(old.downstream)
                    self._chains.put(self._chain)
        except (OSError, WireError):
            pass  # the driver is gone, or nobody that this process knows
        os._exit(_ENDED)  # whatever the other threads do


def load(start: dict[str, Any]) -> Stage:
    """The stage that ``start`` describes: what ``start_of`` made.

    Raises:
        EngineError: it cannot be loaded.
    """
    first, last = start["layers"]
    return Stage.load(Path(start["engine"]), range(first, last), start["num_blocks"], start["threads"])


def start_of(engine: Path, layers: range, num_blocks: int, threads: int) -> str:
    """What a stage has to know, JSON."""
    about = {"engine": str(engine), "layers": [layers.start, layers.stop], "num_blocks": num_blocks, "threads": threads}
    return json.dumps(about)


def _compute(stage: Stage, chain: Chain) -> None:
    """Compute what comes, until one of the sides is gone or there is a newer chain."""
    arrived: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
    # Read at once: who sends never waits for who computes, so that no circle of senders waits for itself.
    threading.Thread(target=_read, args=(chain.upstream, arrived), daemon=True).start()
    while (message := arrived.get()) is not None:
        if message.generation != chain.generation:
            return  # its past is in no cache of this process
        try:
            send(chain.downstream, answer(stage, message))
        except (OSError, WireError):
            return


def answer(stage: Stage, message: Message) -> Message:
    """What ``stage`` makes of a batch. One that is refused goes on, so that the edits in it reach every stage.

    Raises:
        WireError: it is no batch.
    """
    batch, edits, hidden = batch_of(message)
    stage.apply(edits)
    kind, text = message.kind, message.text
    if kind == Kind.BATCH:
        try:
            hidden = stage.run(batch, hidden)
        except EngineError as error:
            kind, text, hidden = Kind.REFUSED, str(error), None
    return Message(kind, message.generation, message.number, batch_arrays(batch, edits, hidden), text)


def _read(connection: socket.socket, arrived: queue.SimpleQueue[Message | None]) -> None:
    try:
        while (message := receive(connection)) is not None:
            arrived.put(message)
    except (OSError, WireError):
        pass  # as if it were closed
    arrived.put(None)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides when it ends
    control = socket.socket(fileno=int(sys.argv[1]))
    try:
        StageServer(control).serve()
    except OSError:
        os._exit(_ENDED)  # the driver is gone
    closed([control])


if __name__ == "__main__":
    main()
