"""What ``serve`` measures of servers: streams, arrivals, the cost of HTTP and of a schema, a huge prompt, a start."""

from __future__ import annotations

import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_letters
from typing import Any

from benchmarks.command import say
from benchmarks.serve_sides import Server, first_answer_s
from qwen_engine.errors import RequestError
from qwen_run.api.llm import LLM
from qwen_run.bench.load import Load, LoadFigures, run_load
from qwen_run.bench.trace import Arrival, at_once, read_trace
from qwen_run.sampling.params import SamplingParams

PAUSE_S = 0.3  # until the threads of the side before no longer spin
HUGE_AFTER_S = PAUSE_S + 0.2  # from when the streams are asked for; then they are being answered
# Never complete within the tokens that are asked for: the mask is computed for every one of them.
SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "count": {"type": "integer"},
            "kind": {"enum": ["small", "medium", "large"]},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
        },
        "required": ["name", "count", "kind", "tags"],
        "additionalProperties": False,
    },
}
# what becomes of a huge prompt -> fields of its request, and the status of the answer
HUGE: dict[str, tuple[dict[str, Any], int]] = {
    "refused": ({}, 400),
    "read to its end": ({"truncate_prompt_tokens": 1}, 200),
}


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: of everything but the arrivals, the sides in turns.
        streams: requests at once.
        requests: of each stream, one after another.
        prompt, new: tokens of a prompt and of an answer.
        arrivals, rate: requests that come as time goes by, so many a second.
        divisor: lengths of the trace are divided by it.
        firsts: requests whose first token is timed through Python and through HTTP.
        huge_bytes: of the prompt that may disturb others.
        beside: (requests at once, tokens of each) that are disturbed.
    """

    rounds: int = 3
    streams: tuple[int, ...] = (1, 4, 16)
    requests: int = 2
    prompt: int = 128
    new: int = 64
    arrivals: int = 20
    rate: float = 0.3
    divisor: int = 1
    firsts: int = 10
    huge_bytes: int = 1_000_000
    beside: tuple[int, int] = (4, 150)


QUICK = Plan(1, (1, 4, 16), 1, 16, 8, 6, 4.0, 10, 2, 1_000_000, (4, 40))


@dataclass
class Found:
    """What was measured: times of a load by its name and side, other values by theirs."""

    loads: dict[str, dict[str, list[LoadFigures]]] = field(default_factory=dict)
    values: dict[str, list[float]] = field(default_factory=dict)

    def note(self, load: str, side: str, figures: LoadFigures) -> None:
        self.loads.setdefault(load, {}).setdefault(side, []).append(figures)

    def add(self, name: str, value: float) -> None:
        say(f"{name}: {value:.4g}")
        self.values.setdefault(name, []).append(value)


def texts(seed: str, lengths: Sequence[int]) -> list[str]:
    """Prompts of so many letters, each a token of a tokenizer of bytes; those of another seed begin otherwise."""
    rng = random.Random(seed)
    return ["".join(rng.choices(ascii_letters, k=length)) for length in lengths]


def asked(
    server: Server, arrivals: Sequence[Arrival], concurrency: int | None, seed: str, **options: Any
) -> LoadFigures:
    """The figures of a load with new prompts.

    Raises:
        RequestError: a request failed, or an answer has another number of tokens than was asked for.
    """
    time.sleep(PAUSE_S)
    prompts = texts(seed, [each.input_tokens for each in arrivals])
    figures = run_load(Load(server.address, arrivals, concurrency, "any", prompts=prompts, options=options))
    for each in figures.sent:
        if each.error is not None:
            raise RequestError(f"{server.name}: {each.error}")
    expected = sorted(each.output_tokens for each in arrivals)
    found = sorted(each.output_tokens for each in figures.sent)
    if found != expected:
        raise RequestError(f"{server.name} answers with {found} tokens, expected {expected}")
    say(f"{server.name}: {len(arrivals)} requests, {rate_of(figures):.1f} output tokens/s")
    return figures


def rate_of(figures: LoadFigures) -> float:
    """Output tokens a second."""
    return float(figures.to_dict()["output_throughput"])


def measure_streams(found: Found, servers: Sequence[Server], plan: Plan) -> None:
    """So many streams at once, each with one request after another; the first round is shorter and not counted."""
    for server in servers:
        asked(server, at_once(max(plan.streams), plan.prompt, 4), max(plan.streams), "warm")
    for count in plan.streams:
        for round_number in range(plan.rounds):
            for server in servers:
                arrivals = at_once(max(count * plan.requests, 2), plan.prompt, plan.new)
                figures = asked(server, arrivals, count, f"streams {count} {round_number}")
                found.note(f"{count} at once", server.name, figures)


def poisson(trace: Path, plan: Plan, longest: int) -> list[Arrival]:
    """Requests with lengths of a trace, drawn and divided, that arrive independently of each other.

    Args:
        longest: tokens of a prompt and its answer; those of the trace that are longer are not drawn.
    """
    rng = random.Random(0)
    lengths = [
        (max(1, each.input_tokens // plan.divisor), max(2, each.output_tokens // plan.divisor))
        for each in read_trace(trace)
    ]
    fitting = [each for each in lengths if sum(each) < longest]
    moment, arrivals = 0.0, []
    for input_tokens, output_tokens in rng.choices(fitting, k=plan.arrivals):
        arrivals.append(Arrival(moment, input_tokens, output_tokens))
        moment += rng.expovariate(plan.rate)
    return arrivals


def measure_python(found: Found, server: Server, engine: Path, threads: int, plan: Plan) -> None:
    """The same work through ``LLM.generate`` in this process and through HTTP, in turns. Both schedule alike."""
    count = max(plan.streams)
    llm = LLM(engine, threads=threads, max_batch_size=count, max_seq_len=4 * (plan.prompt + plan.new), max_drafts=0)
    with llm:
        _python_s(llm, texts("warm python", [plan.prompt] * count), 2)
        for round_number in range(plan.rounds):
            prompts = texts(f"python {round_number}", [plan.prompt] * count)
            time.sleep(PAUSE_S)
            found.add("python, tok/s", count * plan.new / _python_s(llm, prompts, plan.new))
            cpu_s, client_s = server.main_thread_cpu_s(), time.process_time()
            figures = asked(server, at_once(count, plan.prompt, plan.new), count, f"http {round_number}")
            found.add("http, tok/s", rate_of(figures))
            chunks = sum(len(each.timeline.token_s) for each in figures.sent)
            found.add("main thread, µs a chunk", 1e6 * (server.main_thread_cpu_s() - cpu_s) / chunks)
            found.add("client, µs a chunk", 1e6 * (time.process_time() - client_s) / chunks)
        for number in range(plan.firsts):
            time.sleep(PAUSE_S)
            found.add("python, ms to the first token", 1e3 * _python_s(llm, texts(f"first {number}", [plan.prompt]), 1))
            figures = asked(server, at_once(1, plan.prompt, 2), 1, f"first over http {number}")
            found.add("http, ms to the first token", figures.values["ttft"][0])


def _python_s(llm: LLM, prompts: list[str], new: int) -> float:
    """Seconds in which all are answered."""
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    if any(len(each.outputs[0].token_ids) != new for each in outputs):
        raise RequestError(f"LLM.generate answers with another number of tokens than {new}")
    return seconds


def measure_schema(found: Found, server: Server, plan: Plan) -> None:
    """Tokens a second of an answer after its first token, free and with a schema, in turns."""
    schema = {"structured_outputs": {"json": SCHEMA}, "ignore_eos": False}
    asked(server, at_once(1, plan.prompt, 4), 1, "warm schema", **schema)
    for count in sorted({1, max(plan.streams)}):
        for round_number in range(plan.rounds):
            for name, options in (("free", {}), ("schema", schema)):
                seed = f"{name} {count} {round_number}"
                figures = asked(server, at_once(count, plan.prompt, plan.new), count, seed, **options)
                found.add(f"{name}, tok/s of {count} at once", decode_rate(figures))


def decode_rate(figures: LoadFigures) -> float:
    """Tokens a second of all requests after the first of each, which are answered at the same time."""
    return sum((each.output_tokens - 1) / (each.ended_s - each.timeline.token_s[0]) for each in figures.done)


def measure_huge(found: Found, server: Server, plan: Plan) -> None:
    """The longest gap between two chunks of streams, alone and while a huge prompt of words comes."""
    count, new = plan.beside
    rng = random.Random(1)
    words = ("the", "river", "stone", "of", "answer", "seven", "blue", "and", "a", "window")
    text = " ".join(rng.choices(words, k=plan.huge_bytes // 5))[: plan.huge_bytes]
    asked(server, at_once(count, 16, 8), count, "warm huge")
    for round_number in range(2 * plan.rounds - 1):
        for name, case in {"alone": None, **HUGE}.items():
            statuses: list[int] = []
            sender = None
            if case is not None:
                body = json.dumps({"prompt": f"{round_number} {text}", "max_tokens": 1, **case[0]}).encode()
                sender = threading.Timer(HUGE_AFTER_S, lambda body=body, to=statuses: to.append(_status(server, body)))
                sender.start()
            figures = asked(server, at_once(count, 16, new), count, f"beside huge {name} {round_number}")
            if sender is not None and case is not None:
                sender.join()
                if statuses != [case[1]]:
                    raise RequestError(f"a huge prompt that is {name} has status {statuses}, expected {case[1]}")
            found.add(f"longest gap {name}, ms", max(figures.values["itl"]))


def _status(server: Server, body: bytes) -> int:
    """Send a request, and wait for its answer or its refusal."""
    url = f"http://127.0.0.1:{server.port}/v1/completions"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            answer.read()
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def measure_start(found: Found, command: Sequence[str], plan: Plan, log: Path) -> None:
    """From the start of a server's process to its whole answer; the first time reads the files and is not counted."""
    body: Mapping[str, Any] = {
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 8,
        "temperature": 0,
    }
    for round_number in range(plan.rounds + 1):
        seconds = first_answer_s(command, dict(body), log)
        if round_number:
            found.add("start to the first answer, s", seconds)
