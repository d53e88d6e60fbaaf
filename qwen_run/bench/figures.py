"""What a benchmark's clock says in figures people compare: pure functions of when each token came."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

# what a table and a JSON file call each figure, and what it is
DEFINITIONS = {
    "output_tokens_per_s": "output tokens of all requests over the time from the first arrival to the last token",
    "ttft_ms": "time to first token: from a request's arrival (waiting included) to its first token",
    "tpot_ms": "time per output token: mean of one request's times between tokens",
    "gap_ms": "time between two tokens of one request that follow each other",
    "latency_ms": "from a request's arrival to its last token",
    "decode_tokens_per_s": "output tokens a second while every request is decoding: none in its prompt, none finished",
    "decode_bytes_per_s": "what those steps must read: all weights once a step, cached keys and values once a token",
    "bandwidth_share": "those bytes a second over what the same threads get when they only read, in this run",
}


@dataclass
class Timeline:
    """One request: when it arrived and when each token came, in seconds of one clock."""

    arrived_s: float
    input_tokens: int
    token_s: list[float] = field(default_factory=list)

    @property
    def ttft_ms(self) -> float:
        return (self.token_s[0] - self.arrived_s) * 1e3

    @property
    def latency_ms(self) -> float:
        return (self.token_s[-1] - self.arrived_s) * 1e3

    @property
    def gaps_ms(self) -> list[float]:
        return [(b - a) * 1e3 for a, b in zip(self.token_s, self.token_s[1:], strict=False)]

    @property
    def tpot_ms(self) -> float | None:
        """None for an answer of one token."""
        return statistics.fmean(gaps) if (gaps := self.gaps_ms) else None


@dataclass(frozen=True)
class Reads:
    """What a decode step must read from memory."""

    weight_bytes: int  # once a step
    cache_bytes_per_token: int  # once for every token of context, each step

    def of_window(self, window: DecodeWindow) -> int:
        return window.steps * self.weight_bytes + window.context_tokens * self.cache_bytes_per_token


@dataclass(frozen=True)
class DecodeWindow:
    """The part of a run in which every request is decoding.

    Attributes:
        steps: runs of the model; tokens that came at the same time are of one run.
        context_tokens: tokens of context those runs read, summed over runs and requests.
    """

    seconds: float
    tokens: int
    steps: int
    context_tokens: int


@dataclass(frozen=True)
class Percentiles:
    """Half and 99 of 100 values are no larger (linear between two values)."""

    p50: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles | None:
        """None where there are no values.

        >>> Percentiles.of([3.0, 1.0, 2.0])
        Percentiles(p50=2.0, p99=2.98)
        """
        if not values:
            return None
        p50, p99 = np.percentile(values, [50, 99])
        return cls(float(p50), round(float(p99), 9))


@dataclass(frozen=True)
class Figures:
    """What :data:`DEFINITIONS` defines. Latencies are of all requests of all runs, rates medians over the runs."""

    runs: int
    requests: int
    input_tokens: int
    output_tokens: int
    seconds: float
    output_tokens_per_s: float
    ttft_ms: Percentiles
    tpot_ms: Percentiles | None
    gap_ms: Percentiles | None
    latency_ms: Percentiles
    decode_tokens_per_s: float | None
    decode_bytes_per_s: float | None

    @classmethod
    def of(cls, runs: Sequence[Sequence[Timeline]], reads: Reads) -> Figures:
        """Figures of at least one run of at least one request; counts are those of one run."""
        timelines = [timeline for run in runs for timeline in run]
        seconds = [run_seconds(run) for run in runs]
        output_tokens = sum(len(timeline.token_s) for timeline in runs[0])
        windows = [window for run in runs if (window := decode_window(run))]
        ttft = Percentiles.of([timeline.ttft_ms for timeline in timelines])
        latency = Percentiles.of([timeline.latency_ms for timeline in timelines])
        assert ttft is not None and latency is not None  # noqa: PT018 - for the type checker
        return cls(
            runs=len(runs),
            requests=len(runs[0]),
            input_tokens=sum(timeline.input_tokens for timeline in runs[0]),
            output_tokens=output_tokens,
            seconds=statistics.median(seconds),
            output_tokens_per_s=statistics.median(output_tokens / s for s in seconds),
            ttft_ms=ttft,
            tpot_ms=Percentiles.of([tpot for timeline in timelines if (tpot := timeline.tpot_ms) is not None]),
            gap_ms=Percentiles.of([gap for timeline in timelines for gap in timeline.gaps_ms]),
            latency_ms=latency,
            decode_tokens_per_s=median([window.tokens / window.seconds for window in windows]),
            decode_bytes_per_s=median([reads.of_window(window) / window.seconds for window in windows]),
        )


def run_seconds(run: Sequence[Timeline]) -> float:
    """From the first arrival to the last token."""
    return max(timeline.token_s[-1] for timeline in run) - min(timeline.arrived_s for timeline in run)


def decode_window(run: Sequence[Timeline]) -> DecodeWindow | None:
    """The window from the last first token to the first last token; None where they do not overlap."""
    start = max(timeline.token_s[0] for timeline in run)
    end = min(timeline.token_s[-1] for timeline in run)
    if end <= start:
        return None
    inside = [
        (moment, timeline.input_tokens + index)  # token `index` is sampled after reading all before it
        for timeline in run
        for index, moment in enumerate(timeline.token_s)
        if start < moment <= end
    ]
    return DecodeWindow(end - start, len(inside), len({moment for moment, _ in inside}), sum(c for _, c in inside))


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
