"""How far one ``qwen-serve --ray`` and one ``qwen-run --ray`` reach: a table on paper, of constants measured here.

    unshare -rn sh -c 'ip link set lo up; python -m benchmarks.growth ENGINE'

Measured: processor time of the server for a request, for a token of a stream and for a step of a replica (three loads
of two replicas, three unknowns); processor time of the driver for a line of a file (two files, the start subtracted);
time of the router for a request among so many replicas. Processor time does not depend on what else the machine does.

On paper: each machine answers ``--batch`` requests at once with a token each in ``--step-ms``; requests have 512 tokens
of prompt and ``--answer-tokens`` of answer. A machine is lost once in ``--years`` years. Not in the table: Ray's head,
whose limits were not measured here, and the network.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.command import paragraph, run, say
from qwen_engine.errors import EngineError
from qwen_run.cluster.ray_nodes import require_ray
from qwen_run.cluster.routing import Router, block_keys

MACHINES = (1, 4, 16, 64, 250, 1000)
LOADS = ((2, 200), (32, 100), (64, 1))  # requests at once, tokens of each
LINES = (50, 450)
PROMPT = 512  # tokens, of which half are a beginning that others have
_RUN = "from qwen_run.commands.run import main; main()"


@dataclass(frozen=True)
class Costs:
    """Microseconds of one processor."""

    request: float
    token: float
    step: float
    line: float
    routing: dict[int, float]


@contextmanager
def server(engine: Path) -> Iterator[tuple[int, int]]:
    """A server of two replicas of one thread; its process and port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "qwen_serve.cli", str(engine), "--ray", "local", "--replicas", "2"]
    options = ["--threads", "1", "--port", str(port), "--no-access-log", "--draft-tokens", "0"]
    process = subprocess.Popen([*command, *options, "--max-batch-size", "32", "--max-seq-len", "1024"])
    try:
        while not _is_ready(port):
            if process.poll() is not None:
                raise EngineError("the server has ended before it was ready; read what it says above")
            time.sleep(0.2)
        yield process.pid, port
    finally:
        process.terminate()
        process.wait()


def _is_ready(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False


def read_stream(port: int, index: int, num_tokens: int) -> None:
    """One streamed answer of so many tokens, to its end."""
    content = f"Question {index}: what is a river?"
    body = {"messages": [{"role": "user", "content": content}], "stream": True, "max_tokens": num_tokens}
    connection = http.client.HTTPConnection("127.0.0.1", port)
    options = {"ignore_eos": True, "temperature": 1.0, "seed": index}
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body | options), headers)
    if b"[DONE]" not in connection.getresponse().read():
        raise EngineError("a stream has ended early; read what the server says above")


def cpu_s(pid: int) -> float:
    """Processor seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def server_costs(engine: Path) -> tuple[float, float, float]:
    """Of a request, a token and a step."""
    rows, seconds = [], []
    with server(engine) as (pid, port):
        for count, num_tokens in LOADS:
            rounds = max(1, 800 // (count * num_tokens))
            before = cpu_s(pid)
            with ThreadPoolExecutor(count) as pool:
                for _ in range(rounds):
                    list(pool.map(partial(read_stream, port, num_tokens=num_tokens), range(count)))
            seconds.append(cpu_s(pid) - before)
            rows.append([rounds * count, rounds * count * num_tokens, rounds * 2 * num_tokens])
            say(f"{count} streams of {num_tokens} tokens, {rounds} times: {seconds[-1]:.2f} s of a processor")
    found = np.linalg.solve(np.array(rows, float), np.array(seconds))
    request, token, step = (1e6 * float(each) for each in found)
    return request, token, step


def line_cost(engine: Path) -> float:
    """Of a line of a file, prompt and answer of a few words."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for count in LINES:
            source = Path(folder) / f"{count}.txt"
            source.write_text("".join(f"Question {index}: what is a river?\n" for index in range(count)))
            command = [sys.executable, "-c", _RUN, "--engine", str(engine), "--input-file", str(source)]
            options = ["--output-file", f"{source}.out", "--max-new-tokens", "4", "--ray", "local", "--replicas", "2"]
            process = subprocess.Popen([*command, *options, "--threads", "1"])
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise EngineError("qwen-run has failed; read what it says above")
            seconds.append(usage.ru_utime + usage.ru_stime)
            say(f"{count} lines: {seconds[-1]:.2f} s of a processor")
    return 1e6 * (seconds[1] - seconds[0]) / (LINES[1] - LINES[0])


def routing_cost(num_replicas: int, count: int = 200) -> float:
    """Of a request among so many replicas: the keys of its prompt, and the choice."""
    draw, router = random.Random(0), Router(4)
    loads = dict.fromkeys(range(num_replicas), 0)
    beginnings = [[draw.randrange(150_000) for _ in range(PROMPT // 2)] for _ in range(20)]
    prompts = [draw.choice(beginnings) + [draw.randrange(150_000) for _ in range(PROMPT // 2)] for _ in range(count)]
    started = time.process_time()
    for prompt in prompts:
        loads[router.choose(loads, block_keys(prompt))] += 1
    return 1e6 * (time.process_time() - started) / count


def measured(engine: Path) -> Costs:
    """The constants, as this machine has them.

    Raises:
        EngineError: ray is not installed, or something cannot run.
    """
    require_ray()
    routing = {count: routing_cost(count) for count in MACHINES}
    return Costs(*server_costs(engine), line_cost(engine), routing)


def table(costs: Costs, batch: int, step_ms: float, answer_tokens: int, years: float) -> Iterator[str]:
    """The growth on paper, as Markdown."""
    yield (
        "| machines | tokens/s | requests/s | server, processors | of it the router | driver of a file, processors "
        "| machines lost a day | answers moved a day |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for machines in MACHINES:
        steps = machines * 1000 / step_ms
        tokens = steps * batch
        requests = tokens / answer_tokens
        router = requests * costs.routing[machines] / 1e6
        busy = (requests * costs.request + tokens * costs.token + steps * costs.step) / 1e6 + router
        lost = machines / (365 * years)
        driver = requests * costs.line / 1e6
        cells = [f"{tokens:,.0f}", f"{requests:,.1f}", f"{busy:.2f}", f"{router:.3f}", f"{driver:.3f}"]
        yield f"| {machines:,} | {' | '.join(cells)} | {lost:.2g} | {lost * batch:.2g} |"


def report(costs: Costs, batch: int, step_ms: float, answer_tokens: int, years: float) -> Iterator[str]:
    """The constants, the table, and what it says."""
    yield f"{processor()}; {time.strftime('%Y-%m-%d')}; `python -m benchmarks.growth`"
    yield ""
    yield "| measured | microseconds of a processor |"
    yield "|---|---|"
    for name, cost in (("a request", costs.request), ("a token of a stream", costs.token)):
        yield f"| the server, {name} | {cost:,.0f} |"
    yield f"| the server, a step of a replica | {costs.step:,.0f} |"
    yield f"| the driver, a line of a file | {costs.line:,.0f} |"
    for count, cost in costs.routing.items():
        yield f"| the router, a request among {count:,} replicas | {cost:,.0f} |"
    yield ""
    yield (
        f"On paper: a machine answers {batch} requests at once, a token each in {step_ms:g} ms; answers have "
        f"{answer_tokens} tokens."
    )
    yield ""
    yield from table(costs, batch, step_ms, answer_tokens, years)
    yield ""
    per_machine = 1000 / step_ms * (batch * costs.token + costs.step + batch / answer_tokens * costs.request) / 1e6
    driver = 1000 / step_ms * batch / answer_tokens * costs.line / 1e6
    yield paragraph(
        f"One server, whose work Python does on one processor, is busy with {1 / per_machine:,.0f} machines, one "
        f"driver of a file with {1 / driver:,.0f}. Beyond that several servers stand side by side, each with replicas "
        "of its own, and files are divided."
    )


def processor() -> str:
    """What the machine calls its processor."""
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{found[1] if found else 'unknown processor'}, {os.cpu_count()} cores"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--step-ms", type=float, default=137.0, help="a 7B of int4 on a machine with 100 GB/s")
    parser.add_argument("--answer-tokens", type=int, default=256)
    parser.add_argument("--years", type=float, default=1.0)
    asked = parser.parse_args(arguments)
    costs = measured(asked.engine)
    print("\n".join(report(costs, asked.batch, asked.step_ms, asked.answer_tokens, asked.years)))


if __name__ == "__main__":
    run(main)
