"""Ten times as many clients as a server takes, for a minute: who is not let in is told so at once.

    qwen-serve ENGINE --max-batch-size 4 --max-queue 4 --no-access-log &
    PYTHONPATH=tests python -m fuzz.overload --url http://127.0.0.1:8000 --places 8

Prints how many were answered and refused, and in which time; while that goes on, how long ``/health`` and ``/metrics``
take. Those times are the clients' as well: run it where the cores have nothing else to do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import defaultdict

from cases.processes import PATIENCE_S
from fuzz.answers import CHAT
from qwen_run.bench.http_client import Address

TIMES_TOO_MANY = 10
PROBES = ("/health", "/metrics")
LONG = "word " * 200_000  # a megabyte, which is tokenized before it is refused


async def exchange(address: Address, method: str, path: str, body: object = None) -> tuple[int, float]:
    """The status of an answer that is read to its end, and the milliseconds until its first line."""
    data = b"" if body is None else json.dumps(body).encode()
    head = [f"{method} {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Connection: close"]
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        writer.write("\r\n".join([*head, f"Content-Length: {len(data)}", "", ""]).encode() + data)
        line = await reader.readline()
        took_ms = 1000 * (time.perf_counter() - began)
        while await reader.read(1 << 16):
            pass
        return int(line.split()[1]), took_ms
    finally:
        writer.close()


async def overload(url: str, places: int, seconds: float, num_long: int = 0) -> dict[str, list[float]]:
    """Milliseconds until the first line of each answer, by status; and of each probe, by its path.

    Args:
        places: answers that the server makes or lets wait.
        num_long: clients that send a megabyte to be tokenized, besides.
    """
    address, took = Address.of(url), defaultdict[str, list[float]](list)
    until = time.monotonic() + seconds

    async def client(number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < until:
            asked = [{"role": "user", "content": f"{number} " + "x" * rng.randint(1, 100)}]
            body = {"messages": asked, "max_tokens": 40, "stream": rng.random() < 0.5}
            status, ms = await exchange(address, "POST", CHAT, body)
            took[str(status)].append(ms)
            await asyncio.sleep(rng.random() if status == 429 else 0)

    async def long_client() -> None:
        while time.monotonic() < until:
            took["tokenized"].append((await exchange(address, "POST", "/tokenize", {"prompt": LONG}))[1])

    async def probe() -> None:
        while time.monotonic() < until:
            for path in PROBES:
                status, ms = await exchange(address, "GET", path)
                took[path if status == 200 else f"{path} {status}"].append(ms)
            await asyncio.sleep(0.1)

    clients = [client(number) for number in range(TIMES_TOO_MANY * places)]
    await asyncio.gather(probe(), *clients, *(long_client() for _ in range(num_long)))
    return dict(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--places", type=int, default=8, help="--max-batch-size and --max-queue together (default 8)")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--long", type=int, default=0, help="clients that let a megabyte be tokenized, besides")
    given = parser.parse_args()
    took = asyncio.run(
        asyncio.wait_for(overload(given.url, given.places, given.seconds, given.long), given.seconds + PATIENCE_S)
    )
    print("status or path: how many, ms to the first line: median, 99 of 100, longest")
    for name, times in sorted(took.items()):
        times.sort()
        middle, late = times[len(times) // 2], times[len(times) * 99 // 100]
        print(f"{name}: {len(times)}, {middle:.1f}, {late:.1f}, {times[-1]:.1f}")


if __name__ == "__main__":
    main()
