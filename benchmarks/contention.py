"""What other work on the machine does to the speed, with one thread and with two.

    python -m benchmarks.contention                                  the demo
    python -m benchmarks.contention --before ../checkout-of-another-commit      beside another checkout

Milliseconds for a token (after 128, one request) and for a prompt of 512 tokens; medians over the rounds. In each row
the machine has other work: processes that compute without end, in a session of their own, as another user's are, or
in the engine's with a lower priority, or the engine may run on one core only. Engines take turns, each in a process
of its own. "2 over 1" is the time with two threads over that with one: above 1, the second thread does harm.
--before is another checkout of this project whose operators are compiled (``python -m qwen_plugin.compile``): it
builds and runs an engine of its own. The table goes to --output, with the machine and the date.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from benchmarks.command import run, say
from benchmarks.peer_environments import ROOT
from benchmarks.peer_match import BEFORE, CONTENDERS, PAUSE_S, Models, Worker
from benchmarks.peers import find_checkpoint, work_name
from qwen_engine.manifest import Manifest
from qwen_run.bench.measure import processor_name

THREADS = (1, 2)
PAST, TOKENS, PROMPT = 128, 48, 512
BUSY = "import os, sys\nos.nice(int(sys.argv[1]))\nwhile True: pass"


@dataclass(frozen=True)
class Load:
    """What a row's machine has to do beside the engine: ``busy`` processes, on ``cores`` of those there are."""

    title: str
    busy: int = 0
    nice: int = 0
    cores: int | None = None


LOADS = {
    "quiet": Load("nothing"),
    "busy-1": Load("1 busy process", busy=1),
    "busy-2": Load("2 busy processes", busy=2),
    "nice-2": Load("2 busy processes of low priority (nice 10)", busy=2, nice=10),
    "one-core": Load("nothing, taskset to one core", cores=1),
    "one-core-busy": Load("1 busy process, both taskset to one core", busy=1, cores=1),
}
KINDS = {
    "token": ({"do": "decode", "past": PAST, "count": TOKENS}, TOKENS),
    "prompt": ({"do": "prefill", "length": PROMPT}, 1),
}
Side = tuple[str, Path]  # a name and the checkout that it runs


@contextlib.contextmanager
def on_cores(count: int | None) -> Iterator[None]:
    """Processes started within may run on the first ``count`` of this process's cores."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@contextlib.contextmanager
def neighbours(load: Load) -> Iterator[None]:
    """The busy processes of ``load``, running."""
    command = [sys.executable, "-P", "-c", BUSY, str(load.nice)]
    with on_cores(load.cores):
        # Linux compares priorities within a session, and gives sessions equal parts (man 7 sched, autogroup).
        busy = [subprocess.Popen(command, start_new_session=load.nice == 0) for _ in range(load.busy)]
    try:
        time.sleep(PAUSE_S)
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


class Workers:
    """An engine for every side, count of threads and set of cores, started when it is first asked."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._vocab_size = Manifest.read(models.path("engine")).model.vocab_size
        self._workers: dict[tuple[str, int, int | None], Worker] = {}

    def of(self, side: Side, threads: int, cores: int | None) -> Worker:
        """A worker that has loaded its engine."""
        name, project = side
        if (name, threads, cores) not in self._workers:
            contender = CONTENDERS[BEFORE if name == BEFORE else "engine"]
            model = self._models.path(contender.model)
            with on_cores(cores):
                worker = Worker(Path(sys.executable), contender, model, threads, self._vocab_size, project)
                worker.ask(do="load", longest=PROMPT)
            self._workers[name, threads, cores] = worker
        return self._workers[name, threads, cores]

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()


Found = dict[tuple[str, str, int, str], list[float]]  # load, side, threads, kind -> milliseconds of each round


def measure(workers: Workers, sides: Sequence[Side], loads: Sequence[str], rounds: int) -> Found:
    """All in turns; the first round of the first load warms up and is not counted."""
    found: Found = {}
    for number in range(rounds + 1):
        for name in loads:
            load = LOADS[name]
            asked = [(side, threads, workers.of(side, threads, load.cores)) for threads in THREADS for side in sides]
            with neighbours(load):
                for (side, _), threads, worker in asked:
                    for kind, (command, amount) in KINDS.items():
                        ms = worker.ask(**command) * 1e3 / amount
                        if number:
                            found.setdefault((name, side, threads, kind), []).append(ms)
        say(f"round {number} of {rounds}")
    return found


def table(found: Found, sides: Sequence[Side], loads: Sequence[str]) -> str:
    """Rows of loads and kinds; three columns a side."""
    names = [name for name, _ in sides]
    columns = [f"{name}: {column}" for name in names for column in ("1 thread", "2 threads", "2 over 1")]
    lines = ["| beside | ms for a | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for load in loads:
        for kind in KINDS:
            cells = []
            for name in names:
                one, two = (statistics.median(found[load, name, threads, kind]) for threads in THREADS)
                cells += [f"{one:.2f}", f"{two:.2f}", f"{two / one:.2f}"]
            lines.append(f"| {LOADS[load].title} | {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, metavar="DIR", help="another checkout of this project, compiled")
    parser.add_argument("--checkpoint", default="demo", help="as benchmarks.peers has it (default: the demo)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", default=",".join(LOADS), help="which loads, with commas (default: all)")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "peers", help="where engines are built")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="where the table goes")
    arguments = parser.parse_args()
    loads = arguments.rows.split(",")
    if unknown := sorted(set(loads) - LOADS.keys()):
        parser.error(f"no rows {', '.join(unknown)}; there are {', '.join(LOADS)}")
    work = arguments.work / work_name(arguments.checkpoint)
    models = Models(find_checkpoint(arguments.checkpoint, work), work, "int8", None, arguments.before)
    sides: list[Side] = [*([(BEFORE, models.before)] if models.before else []), ("engine", ROOT)]
    workers = Workers(models)
    try:
        found = measure(workers, sides, loads, arguments.rounds)
    finally:
        workers.close()
    label = Path(arguments.checkpoint).name
    conditions = [
        f"`python -m benchmarks.contention`: {label}", f"{datetime.now(UTC):%Y-%m-%d}", processor_name(),
        f"{len(os.sched_getaffinity(0))} cores", f"onnxruntime {metadata.version('onnxruntime')}",
        f"median of {arguments.rounds} rounds",
    ]  # fmt: skip
    text = ", ".join(conditions) + "\n\n" + table(found, sides, loads) + "\n"
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / f"contention-{label}.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run(main)
