"""Clients that go: in the queue, in the prompt, in a stream, before a whole answer. Nothing of them is to stay.

    PYTHONPATH=tests python -m fuzz.leave --clients 1000

Prints the memory after every tenth; exit code 1 where a block of the cache or a place is lost, or memory has grown by
more than 5 % since the first half.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter, deque
from pathlib import Path

from cases.processes import PATIENCE_S
from cases.scripted import Script, scripted_model, write_text_files
from cases.serving import Running, running
from fuzz.answers import CHAT, COMPLETIONS
from fuzz.soak import resident_mib

AT_ONCE, BATCH = 12, 4
MOST_GROWTH = 0.05
LONGEST_S = 0.25  # that a client stays


async def leave(server: Running, count: int) -> tuple[Counter[str], list[float]]:
    """Let ``count`` clients come and go: when they went, and the memory after each tenth, MiB."""
    went: Counter[str] = Counter()
    memory: list[float] = []
    numbers = iter(range(count))

    async def client() -> None:
        for number in numbers:
            went[await _one(server, random.Random(number))] += 1
            if (number + 1) % max(1, count // 10) == 0:
                memory.append(resident_mib())

    await asyncio.gather(*(client() for _ in range(AT_ONCE)))
    return went, memory


async def _one(server: Running, rng: random.Random) -> str:
    text = "x" * rng.choice([20, 100, 900])
    chat = {"messages": [{"role": "user", "content": text}], "n": rng.choice([1, 1, 3])}
    path, body = rng.choice([(CHAT, chat), (COMPLETIONS, {"prompt": [text, "y"], "max_tokens": 900})])
    streamed = rng.random() < 0.5
    data = json.dumps({**body, "stream": streamed, "ignore_eos": True}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    cut = rng.random() < 0.1  # goes while it sends
    writer.write(head.encode() + b"\r\n\r\n" + (data[: len(data) // 2] if cut else data))
    num_events = 0
    try:
        async with asyncio.timeout(LONGEST_S * rng.random()):
            while num_events < 6:  # the first ones come before the answer begins
                await reader.readuntil(b"data: ")
                num_events += 1
    except (TimeoutError, asyncio.IncompleteReadError):
        pass
    writer.transport.abort() if rng.random() < 0.5 else writer.close()
    when = "while it sent" if cut else "in the answer" if num_events > 3 else "before it"
    return f"{'streamed' if streamed else 'whole'}, {when}"


def findings(directory: Path, count: int, run_s: float = 0.002) -> tuple[Counter[str], list[float], list[str]]:
    """As :func:`leave`, of a server of its own; and what is wrong afterwards.

    Args:
        run_s: how long a run of the model takes at least, so that there is a time to go.
    """
    model, script = scripted_model(write_text_files(directory), str.upper, max_seq_len=3000)
    script.seen = deque(maxlen=4 * AT_ONCE)
    run = script.run
    script.run = lambda batch: (time.sleep(run_s), run(batch))[1]  # type: ignore[method-assign]
    assert isinstance(script, Script)
    with running(model, options={"max_batch_size": BATCH, "max_batch_tokens": 64}, max_queue=1000) as server:
        server.log = deque(maxlen=100)  # type: ignore[assignment]
        went, memory = asyncio.run(asyncio.wait_for(leave(server, count), PATIENCE_S + count))
        server.wait_until_idle()
        answer = server.post(COMPLETIONS, {"prompt": "hi"}).json()
        complaints = [] if answer["choices"][0]["text"] == "HI" else [f"afterwards: {answer}"]
    first = max(memory[: len(memory) // 2 + 1])
    if memory[-1] > first * (1 + MOST_GROWTH):
        complaints.append(f"memory has grown from {first:.1f} to {memory[-1]:.1f} MiB")
    return went, memory, complaints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="leave") as directory:
        went, memory, complaints = findings(Path(directory), given.clients)
    print("MiB after each tenth:", *(f"{each:.1f}" for each in memory))
    print(", ".join(f"{count} {when}" for when, count in sorted(went.items())))
    print(*complaints or ["every block and every place is free"], sep="\n")
    sys.exit(1 if complaints else 0)


if __name__ == "__main__":
    main()
