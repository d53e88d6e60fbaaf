"""What is done to a cluster, inside the namespace of ``cases/ray_cluster.py``: a job and a server under kills."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cases.processes import PATIENCE_S, start
from cases.ray_cluster import replica_processes, serving, wait_for
from cases.streams import bodies, read_all

RUN = (sys.executable, "-c", "from qwen_run.commands.run import main; main()")


@contextmanager
def head() -> Iterator[str]:
    """A cluster that outlives its drivers; its address."""
    ray = (sys.executable, "-m", "ray.scripts.scripts")
    address = "127.0.0.1:6399"
    options = ("--node-ip-address", "127.0.0.1", "--port", "6399", "--num-cpus", "2", "--include-dashboard", "false")
    subprocess.run([*ray, "start", "--head", *options], check=True, timeout=PATIENCE_S, stdout=subprocess.DEVNULL)
    try:
        yield address
    finally:
        subprocess.run([*ray, "stop", "--force"], check=True, timeout=PATIENCE_S, stdout=subprocess.DEVNULL)


@contextmanager
def killing_replicas(every_s: float) -> Iterator[list[int]]:
    """While the block runs, SIGKILL a replica now and then; those that were killed."""
    ends, killed, choice = threading.Event(), list[int](), random.Random(0)

    def kill() -> None:
        while not ends.wait(every_s):
            if found := replica_processes():
                killed.append(choice.choice(found))
                os.kill(killed[-1], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        ends.set()
        thread.join(PATIENCE_S)


def _read(*arguments: Any) -> list[Any]:
    """What ``read_all`` reads, in good time."""
    return asyncio.run(asyncio.wait_for(read_all(*arguments), 100 * PATIENCE_S))


def write_prompts(path: Path, count: int) -> None:
    """So many lines that differ in prompt, length and sampling; one of them cannot be read."""
    lines = [
        {"id": index, "prompt": f"Question {index}: {'why? ' * (index % 7)}", "max_tokens": 8 + index % 25}
        | ({"temperature": 0.9, "seed": index} if index % 3 else {})
        for index in range(count - 1)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"prompt": 3}\n', "utf-8")


def interrupted_job(engine: str, folder: Path, count: int, every_s: float) -> str:
    """Answer ``count`` lines while replicas are killed, and the driver once; what happened.

    Raises:
        AssertionError: the answers are not those of one process that nobody disturbs, or a line was lost.
    """
    prompts, alone, out = folder / "prompts.jsonl", folder / "alone.jsonl", folder / "answers.jsonl"
    write_prompts(prompts, count)
    command = [*RUN, "--engine", engine, "--input-file", str(prompts), "--max-seq-len", "256", "--draft-tokens", "0"]
    by_one = [*command, "--output-file", str(alone)]
    undisturbed = subprocess.run(by_one, capture_output=True, text=True, timeout=100 * PATIENCE_S)
    assert undisturbed.returncode == 1, undisturbed.stderr  # for the line that cannot be read
    with head() as address, killing_replicas(every_s) as killed:
        command += ["--output-file", str(out), "--ray", address, "--replicas", "2"]
        driver = start(command, 100 * PATIENCE_S, stderr=subprocess.DEVNULL)

        def answered() -> int:
            return len(out.read_bytes().splitlines()) if out.exists() else 0

        wait_for(lambda: answered() >= count * 2 // 5 or driver.poll() is not None, 100)
        assert driver.poll() is None, "the driver has ended by itself"
        driver.kill()
        driver.wait(PATIENCE_S)
        kept = answered()
        again = subprocess.run(command, capture_output=True, text=True, timeout=100 * PATIENCE_S)
    assert again.returncode == 1, again.stderr
    assert f"{kept} of {count} prompts are answered already" in again.stderr, again.stderr
    assert out.read_bytes() == alone.read_bytes()
    keys = [json.loads(line)["key"] for line in out.read_text("utf-8").splitlines()]
    assert len({*keys}) == count
    return (
        f"{count} unique answers, equal to one process's; {len(killed)} replicas killed, the driver after {kept}; "
        f"{again.stderr.strip().splitlines()[-2]}"
    )


def killed_under_streams(engine: str, count: int, max_tokens: int, num_kills: int) -> str:
    """Kill replicas while ``count`` streams are read; what happened.

    Raises:
        AssertionError: a stream broke, or got another text than without the kills.
    """
    requests, killed = bodies(count, max_tokens), list[int]()
    options = ("--kv-cache-memory", "256", "--max-seq-len", "512", "--max-batch-size", "32")
    with serving(engine, 2, *options) as url:
        started = time.monotonic()
        undisturbed = _read(url, requests)
        calm_s = time.monotonic() - started
        total = sum(each.num_chunks for each in undisturbed)
        assert all(each.error is None and each.text for each in undisturbed), undisturbed
        moments = {total * (index + 1) // (num_kills + 2) for index in range(num_kills)}

        def kill(num_chunks: int) -> None:
            if num_chunks in moments and (found := replica_processes()):
                killed.append(found[0])
                os.kill(found[0], signal.SIGKILL)

        started = time.monotonic()
        disturbed = _read(url, requests, kill)
        disturbed_s = time.monotonic() - started
        assert [each.error for each in disturbed] == [None] * count
        assert disturbed == undisturbed
        assert killed
    return (
        f"{count} streams, {total} chunks, {len(killed)} replicas killed: none broken, texts equal; {calm_s:.1f} s "
        f"undisturbed, {disturbed_s:.1f} s disturbed"
    )
