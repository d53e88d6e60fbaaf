"""Many mixed requests over HTTP, a fifth of them left by their clients, on a cache that is too small for all at once.

    PYTHONPATH=tests python -m fuzz.soak --requests 100000             # a model that follows a script
    PYTHONPATH=tests python -m fuzz.soak --requests 5000 --real        # a tiny random engine
    PYTHONPATH=tests python -m fuzz.soak --requests 5000 --engine DIR

Every answer, streamed or whole, is to be the one that its request had alone. Prints the memory after every tenth of
the requests; exit code 1 where an answer was another, or none, or where something was left behind.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from cases.processes import PATIENCE_S
from cases.scripted import Script, scripted_model, write_text_files
from cases.serving import Running, running
from fuzz.answers import Ask, answer, make_ask, scripted_reply
from qwen_engine.errors import RequestError
from qwen_engine.graph_io import TensorSpec
from qwen_run.bench.http_client import Address
from qwen_run.runtime.kv_cache import KVCache

AT_ONCE, BATCH, LEFT = 24, 8, 0.2
LEFT_WITHIN_S = 0.3
LONGEST_S = 10 * 3600  # of 100,000 requests on a slow machine


@dataclass
class Found:
    """What became of the requests.

    Attributes:
        ends: how many ended how.
        wrong: a line for each that was answered otherwise than alone, or not at all.
    """

    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def scripted(directory: Path) -> Any:
    """The scripted model, with a cache of a little more than its longest sequence."""
    model, script = scripted_model(write_text_files(directory, "qwen3"), scripted_reply, max_seq_len=1000)
    pool = TensorSpec("tokens", "paged_state", "int32", ("num_blocks", Script.BLOCK_SIZE))
    script.cache = KVCache([pool], Script.BLOCK_SIZE, 36)
    script.answer_to = lru_cache(4096)(script.answer_to)  # type: ignore[method-assign]
    script.seen = deque(maxlen=4 * AT_ONCE)  # it looks at all of them for every token
    return model


async def soak(url: str, asks: Sequence[Ask], count: int, tell: Callable[[int], object] = lambda done: None) -> Found:
    """Send ``count`` requests out of ``asks``, after each of them alone.

    Args:
        tell: is called with the number of those that have begun, at each tenth.
    """
    address, found, numbers = Address.of(url), Found(), iter(range(count))
    alone = [await asyncio.wait_for(answer(address, ask, False), PATIENCE_S) for ask in asks]
    found.wrong += [
        f"{ask}: alone: {said}"
        for ask, said in zip(asks, alone, strict=True)
        if ask.expected is not None and json.dumps(ask.expected)[1:-1] not in json.dumps(said)
    ]

    async def client() -> None:
        for number in numbers:
            if number % max(1, count // 10) == 0:
                tell(number)
            rng = random.Random(number)
            index = rng.randrange(len(asks))
            said = await _one(address, asks[index], alone[index], rng)
            found.ends[said.partition(":")[0]] += 1
            found.wrong += [f"{number}: {asks[index]}: {said}"] if ":" in said else []

    await asyncio.gather(*(client() for _ in range(AT_ONCE)))
    tell(count)
    return found


async def _one(address: Address, ask: Ask, alone: list[Any], rng: random.Random) -> str:
    """How a request ends: answered, left, or a complaint with a colon in it."""
    leaves = rng.random() < LEFT
    work = answer(address, ask, rng.random() < 0.5)
    try:
        said = await asyncio.wait_for(work, LEFT_WITHIN_S * rng.random() if leaves else PATIENCE_S)
    except TimeoutError:
        return "left" if leaves else f"hung: no end after {PATIENCE_S:g} s"
    except RequestError as error:
        return f"error: {error}"
    return "answered" if said == alone else f"another: {json.dumps(said)}, alone: {json.dumps(alone)}"


def resident_mib() -> float:
    """Memory of this process, MiB (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def what_is_left(server: Running) -> list[str]:
    """Complaints about what the requests have left behind, or have not tried."""
    server.wait_until_idle()
    statistics, statuses = server.serving.opened.statistics, {record["status"] for record in server.log}
    complaints = [] if statistics.num_preempted else ["nothing was preempted: the cache is too large for this"]
    return complaints + ([f"statuses {statuses - {200, 499}}"] if statuses - {200, 499} else [])


def _served(given: argparse.Namespace, directory: Path) -> tuple[Any, dict[str, Any]]:
    """The model, and the options of a server for it."""
    if given.engine is None and not given.real:
        return scripted(directory), {"max_batch_size": BATCH}
    engine = given.engine
    if engine is None:
        from fuzz.checkpoint import write_checkpoint
        from qwen_build.cli import main as build

        engine = directory / "engine"
        checkpoint = write_checkpoint(directory / "tiny", "qwen3", max_position_embeddings=1024)
        build([str(checkpoint), "--output", str(engine), "--quant", "int8"], standalone_mode=False)
    return engine, {"max_batch_size": BATCH, "max_seq_len": 1000, "cache_bytes": given.cache_kib << 10, "threads": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--distinct", type=int, default=300, help="requests that differ (default 300)")
    parser.add_argument("--real", action="store_true", help="ask a tiny random engine")
    parser.add_argument("--engine", type=Path, help="ask this one")
    parser.add_argument("--cache-kib", type=int, default=300, help="of an engine (default 300, for the tiny one)")
    given = parser.parse_args()
    asks = [make_ask(random.Random(f"ask {index}"), index) for index in range(given.distinct)]
    if given.real or given.engine is not None:
        asks = [replace(ask, expected=None) for ask in asks]
    with tempfile.TemporaryDirectory(prefix="soak") as directory:
        model, options = _served(given, Path(directory))
        with running(model, LONGEST_S, options=options, max_queue=1000) as server:
            server.log = deque(maxlen=1000)  # type: ignore[assignment]
            begun = time.monotonic()

            def tell(done: int) -> None:
                print(f"{done} requests, {time.monotonic() - begun:.0f} s, {resident_mib():.1f} MiB", flush=True)

            found = asyncio.run(
                asyncio.wait_for(soak(server.url, asks, given.requests, tell), PATIENCE_S + given.requests)
            )
            left = what_is_left(server)
            print(server.serving.opened.statistics)
    print(*found.wrong[:20], *left, sep="\n")
    print(", ".join(f"{count} {end}" for end, count in sorted(found.ends.items())))
    print("every block is free" if not left else "something is left")
    sys.exit(1 if found.wrong or left or found.ends.total() != given.requests else 0)


if __name__ == "__main__":
    main()
