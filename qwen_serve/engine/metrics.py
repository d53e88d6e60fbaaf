"""What ``/metrics`` tells Prometheus; the names behind the prefix are vLLM's, so that its dashboards work."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.utils import floatToGoString

from qwen_run.api.outputs import RequestOutput
from qwen_run.cluster.fleet_statistics import FleetStatistics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)

# name, what it counts
_COUNTERS = {
    "prompt_tokens": "Tokens of prompts.",
    "prompt_tokens_cached": "Tokens of prompts that were found in the cache.",
    "generation_tokens": "Tokens of answers.",
    "prefix_cache_queries": "Tokens of prompts that were looked for in the cache.",
    "prefix_cache_hits": "Tokens of prompts that were found there.",
    "admission_rejections": "Requests that found no room.",
}
# name, what it measures, its buckets
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From a request's arrival to its first token.", _SECONDS),
    "request_time_per_output_token_seconds": ("A token of a request, after its first.", _SECONDS),
    "e2e_request_latency_seconds": ("From a request's arrival to its end.", _SECONDS),
    "request_queue_time_seconds": ("From a request's arrival until its prompt is read.", _SECONDS),
    "request_prefill_time_seconds": ("From then to its first token.", _SECONDS),
    "request_decode_time_seconds": ("From its first token to its last.", _SECONDS),
    "request_prompt_tokens": ("Tokens of a prompt.", _TOKENS),
    "request_generation_tokens": ("Tokens of a request's answers.", _TOKENS),
}
_GAPS = ("inter_token_latency_seconds", "Between two tokens of an answer.")
# name, what it says, how it is read from the engine's statistics
_GAUGES: dict[str, tuple[str, Callable[[Any], float]]] = {
    "num_requests_running": ("Answers that take part in steps.", lambda found: found.num_running),
    "num_requests_waiting": ("Answers that wait for a place.", lambda found: found.num_waiting),
    "kv_cache_usage_perc": (
        "The part of the cache's blocks in use; 1 is all.",
        lambda found: 1 - found.num_free_blocks / max(1, found.num_blocks),
    ),
}
_ENGINE_COUNTERS: dict[str, tuple[str, Callable[[Any], float]]] = {
    "num_preemptions": ("How often an answer has lost its blocks.", lambda found: found.num_preempted),
    "spec_decode_num_draft_tokens": ("Guessed tokens that were verified.", lambda found: found.num_drafts),
    "spec_decode_num_accepted_tokens": ("Guessed tokens that were right.", lambda found: found.num_accepted),
}
# the same of several replicas
_FLEET_GAUGES: dict[str, tuple[str, Callable[[Any], float]]] = {
    "replicas": ("Places for replicas.", lambda found: found.num_replicas),
    "replicas_ready": ("Replicas that answer.", lambda found: found.num_ready),
}
_FLEET_COUNTERS: dict[str, tuple[str, Callable[[Any], float]]] = {
    "replica_deaths": ("Replicas that have ended or fallen silent.", lambda found: found.num_deaths),
    "requests_moved": ("Answers that another replica had to begin again.", lambda found: found.num_moved),
}


class Tally:
    """A histogram for what happens at every token: prometheus_client's takes a lock for each value.

    Args:
        bounds: of its buckets, ascending.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """Count ``value``; the thread of the event loop alone does."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def metric(self, name: str, about: str, labels: dict[str, str]) -> Metric:
        """As Prometheus takes it."""
        family = HistogramMetricFamily(name, about, labels=list(labels))
        ends = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = list(zip(ends, accumulate(self._counts), strict=True))
        family.add_metric(list(labels.values()), buckets, self._sum)
        return family


class Metrics:
    """The figures of one server.

    Args:
        prefix: of every name.
        model: the label ``model_name``.
        statistics: the engine's, None while there is none.
    """

    def __init__(self, prefix: str, model: str, statistics: Callable[[], Any]) -> None:
        self._registry, self._prefix, self._model = CollectorRegistry(), prefix, model
        self._statistics = statistics
        shared: dict[str, Any] = {"labelnames": ["model_name"], "registry": self._registry}
        self._counters = {
            name: Counter(prefix + name, about, **shared).labels(model) for name, about in _COUNTERS.items()
        }
        self._histograms = {
            name: Histogram(prefix + name, about, buckets=buckets, **shared).labels(model)
            for name, (about, buckets) in _HISTOGRAMS.items()
        }
        self._gaps = Tally(_SECONDS)
        self._ends = Counter(
            f"{prefix}request_success",
            "Answers that have ended.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """The time between tokens, and what the engine says at this moment."""
        yield self._gaps.metric(self._prefix + _GAPS[0], _GAPS[1], {"model_name": self._model})
        found = self._statistics()
        if found is None:
            return
        tables = [(GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _ENGINE_COUNTERS)]
        if isinstance(found, FleetStatistics):
            tables += [(GaugeMetricFamily, _FLEET_GAUGES), (CounterMetricFamily, _FLEET_COUNTERS)]
        for kind, table in tables:
            for name, (about, read) in table.items():
                family = kind(self._prefix + name, about, labels=["model_name"])
                family.add_metric([self._model], read(found))
                yield family

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        text: bytes = generate_latest(self._registry)
        return text

    def refuse(self) -> None:
        """A request found no room."""
        self._counters["admission_rejections"].inc()

    def token_after(self, seconds: float) -> None:
        """A token came so long after the one before."""
        self._gaps.add(seconds)

    def end(self, output: RequestOutput, num_tokens: int) -> None:
        """A request has ended with so many tokens of answers."""
        num_prompt, cached = len(output.prompt_token_ids), output.num_cached_tokens or 0
        for name, value in (
            ("prompt_tokens", num_prompt),
            ("prompt_tokens_cached", cached),
            ("generation_tokens", num_tokens),
            ("prefix_cache_queries", num_prompt),
            ("prefix_cache_hits", cached),
        ):
            self._counters[name].inc(value)
        for answer in output.outputs:
            self._ends.labels(self._model, answer.finish_reason or "abort").inc()
        self._observe("request_prompt_tokens", num_prompt)
        self._observe("request_generation_tokens", num_tokens)
        self._times(output, num_tokens)

    def _times(self, output: RequestOutput, num_tokens: int) -> None:
        times = output.metrics
        if times is None:
            return
        arrival, began, first, last = (
            times.arrival_time,
            times.first_scheduled_time,
            times.first_token_time,
            times.last_token_time,
        )
        if times.finished_time is not None:
            self._observe("e2e_request_latency_seconds", times.finished_time - arrival)
        if began is not None:
            self._observe("request_queue_time_seconds", began - arrival)
        if first is None or last is None:
            return
        self._observe("time_to_first_token_seconds", first - arrival)
        self._observe("request_decode_time_seconds", last - first)
        if began is not None:
            self._observe("request_prefill_time_seconds", first - began)
        if num_tokens > 1:
            self._observe("request_time_per_output_token_seconds", (last - first) / (num_tokens - 1))

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)
