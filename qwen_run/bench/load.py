"""A server under load: any that speaks OpenAI's ``/v1/completions``, with the figures of vLLM's benchmark."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qwen_engine.errors import RequestError
from qwen_run.bench.figures import Timeline
from qwen_run.bench.http_client import Address, post
from qwen_run.bench.trace import Arrival
from qwen_run.reports.tables import Table

# words that are mostly one token each, so that a prompt has about as many tokens as words
_WORDS = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school",
    "state", "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week",
    "company", "system", "program", "question", "work", "government", "number", "night", "point", "home",
    "water", "room", "mother", "area", "money", "story", "fact", "month", "lot", "right", "study", "book",
    "eye", "job", "word", "business", "issue", "side", "kind", "head", "house", "service", "friend", "father",
    "power", "hour", "game", "line", "end", "member", "law", "car", "city", "community", "name",
]  # fmt: skip

# key of a time in the JSON, what a table calls it, and what it is
TIMES = {
    "ttft": ("first token", "from a request's start to its first token"),
    "tpot": ("token", "mean time of one request's tokens after the first"),
    "itl": ("between chunks", "time between two chunks of one answer"),
    "e2el": ("answer", "from a request's start to the end of its answer"),
}


@dataclass(frozen=True)
class Load:
    """What is asked of a server.

    Attributes:
        arrivals: the requests, and when each is sent where ``concurrency`` is None.
        concurrency: so many requests at once, each followed by the next; None to send them as time goes by.
        model: the name that requests carry.
        prompts: one for each arrival; None for random words.
        options: fields of every request beside those that a load has; one of the same name replaces it.
    """

    address: Address
    arrivals: Sequence[Arrival]
    concurrency: int | None
    model: str
    key: str | None = None
    seed: int = 0
    prompts: Sequence[str] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Sent:
    """One request that was sent.

    Attributes:
        timeline: when it was sent, and when each chunk of its answer came.
        output_tokens: as the server counts them.
        ended_s: when its answer was complete.
        error: why there is none.
    """

    timeline: Timeline
    output_tokens: int = 0
    ended_s: float = 0.0
    error: str | None = None

    @property
    def tpot_ms(self) -> float | None:
        """None for an answer of one token."""
        times = self.timeline.token_s
        if self.output_tokens < 2 or not times:
            return None
        return (times[-1] - times[0]) * 1e3 / (self.output_tokens - 1)


@dataclass
class LoadFigures:
    """What a load has shown."""

    sent: list[Sent]
    duration_s: float
    values: dict[str, list[float]] = field(init=False)

    def __post_init__(self) -> None:
        done = self.done
        self.values = {
            "ttft": [each.timeline.ttft_ms for each in done],
            "tpot": [each.tpot_ms for each in done if each.tpot_ms is not None],
            "itl": [gap for each in done for gap in each.timeline.gaps_ms],
            "e2el": [(each.ended_s - each.timeline.arrived_s) * 1e3 for each in done],
        }

    @property
    def done(self) -> list[Sent]:
        return [each for each in self.sent if each.error is None]

    def to_dict(self) -> dict[str, Any]:
        """vLLM's names."""
        inputs = sum(each.timeline.input_tokens for each in self.done)
        outputs = sum(each.output_tokens for each in self.done)
        found: dict[str, Any] = {
            "duration": self.duration_s,
            "completed": len(self.done),
            "failed": len(self.sent) - len(self.done),
            "total_input_tokens": inputs,
            "total_output_tokens": outputs,
            "request_throughput": len(self.done) / self.duration_s,
            "output_throughput": outputs / self.duration_s,
            "total_token_throughput": (inputs + outputs) / self.duration_s,
        }
        for name, values in self.values.items():
            found |= {f"{kind}_{name}_ms": value for kind, value in _summary(values).items()}
        return found

    def table(self) -> Table:
        """One row a time."""
        rows = []
        for name, (shown, _) in TIMES.items():
            summary = _summary(self.values[name])
            cells = ["-" if value is None else f"{value:.1f}" for value in summary.values()]
            rows.append((shown, cells[0], cells[1], cells[3]))
        return Table(("ms", "mean", "median", "p99"), tuple(rows))


def run_load(load: Load) -> LoadFigures:
    """Send everything, and wait for every answer.

    Raises:
        RequestError: no request was answered; says what the first was told.
    """
    return asyncio.run(_run(load))


async def _run(load: Load) -> LoadFigures:
    started = time.perf_counter()
    words = (_prompt(load.seed, index, each.input_tokens) for index, each in enumerate(load.arrivals))
    prompts = list(words) if load.prompts is None else load.prompts
    waiting = iter(list(zip(load.arrivals, prompts, strict=True)))
    sent: list[Sent] = []

    async def loop() -> None:
        for arrival, prompt in waiting:
            sent.append(await _ask(load, arrival, prompt, time.perf_counter()))

    async def at(arrival: Arrival, prompt: str) -> None:
        due = started + arrival.arrived_s
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        sent.append(await _ask(load, arrival, prompt, due))

    if load.concurrency is None:
        await asyncio.gather(*(at(arrival, prompt) for arrival, prompt in waiting))
    else:
        await asyncio.gather(*(loop() for _ in range(load.concurrency)))
    figures = LoadFigures(sent, time.perf_counter() - started)
    if not figures.done:
        raise RequestError(f"no request was answered; the first: {sent[0].error}")
    return figures


async def _ask(load: Load, arrival: Arrival, prompt: str, started: float) -> Sent:
    sent = Sent(Timeline(started, arrival.input_tokens))
    body = {
        "model": load.model,
        "prompt": prompt,
        "max_tokens": arrival.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **load.options,
    }
    try:
        async for line in post(load.address, "/v1/completions", body, load.key):
            if line.startswith("data: {"):
                _take(sent, json.loads(line.removeprefix("data: ")), time.perf_counter())
        if not sent.timeline.token_s:
            raise RequestError("the answer has no token")
    except (RequestError, ValueError) as error:
        sent.error = str(error)
    sent.ended_s = time.perf_counter()
    sent.output_tokens = sent.output_tokens or len(sent.timeline.token_s)
    return sent


def _take(sent: Sent, chunk: dict[str, Any], now: float) -> None:
    if "error" in chunk:
        raise RequestError(str(chunk["error"])[:300])
    if any(choice.get("text") for choice in chunk.get("choices") or ()):
        sent.timeline.token_s.append(now)
    if usage := chunk.get("usage"):
        sent.output_tokens = usage.get("completion_tokens", 0)
        sent.timeline.input_tokens = usage.get("prompt_tokens", sent.timeline.input_tokens)


def _prompt(seed: int, index: int, num_words: int) -> str:
    """Words without sense; no two prompts begin alike."""
    rng = random.Random(f"{seed} {index}")
    return " ".join(rng.choices(_WORDS, k=num_words))


def _summary(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return dict.fromkeys(("mean", "median", "std", "p99"))
    return {
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "std": float(np.std(values)),
        "p99": float(np.percentile(values, 99)),
    }
