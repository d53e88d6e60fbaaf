"""Whether an engine is close enough to its references: thresholds, and the verdict of each."""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen_engine.errors import RequestError
from qwen_engine.manifest import Manifest
from qwen_engine.regular_files import read_regular
from qwen_run.accuracy.metrics import METRIC_NAMES, Metric

Kind = Literal["at_most", "at_least"]
Outcome = Literal["passed", "failed", "undecided"]

SIGNS: dict[Kind, str] = {"at_most": "<=", "at_least": ">="}

# Fewer documents decide nothing: n of them straddle the median with probability 1 - 2^(1 - n), which is 94 % at five.
MIN_DOCUMENTS = 5

# Metrics that are at most 1: where all of something is asked for, one counterexample decides.
_SHARES = (".top1", ".top5", ".identical", ".same_experts")

EXIT_PASSED, EXIT_FAILED, EXIT_UNDECIDED = 0, 3, 4


@dataclass(frozen=True)
class Threshold:
    """The largest (``at_most``) or smallest (``at_least``) value of a metric that is good enough, and why."""

    metric: str
    bound: float
    kind: Kind
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.metric} {SIGNS[self.kind]} {self.bound:.6g}"

    def holds(self, value: float) -> bool:
        """Whether ``value`` is good enough; NaN never is."""
        return value <= self.bound if self.kind == "at_most" else value >= self.bound


@dataclass(frozen=True)
class Verdict:
    """What a threshold says of a metric (None where it was not measured), in one line.

    ``why``: of one that is undecided, why, and what would decide it.
    """

    threshold: Threshold
    metric: Metric | None
    outcome: Outcome
    message: str
    why: str = ""


def at_most(metric: str, bound: float, reason: str) -> Threshold:
    return Threshold(metric, bound, "at_most", reason)


def at_least(metric: str, bound: float, reason: str) -> Threshold:
    return Threshold(metric, bound, "at_least", reason)


_AS_BUILT = (
    at_most("as_built.kl_mean", 1e-5, "measured 2e-7, one layer's scales off by 5 % cost 1e-4"),
    at_least("as_built.top1", 0.995, "measured 0.9995: what a float16 cache changes"),
    at_most("as_built.perplexity_ratio", 1.001, "measured within 2e-5 of 1"),
    at_least("as_built.perplexity_ratio", 0.999, "measured within 2e-5 of 1"),
)

# Of engines that round nothing, neither weights nor keys and values.
_FLOAT = (
    at_most("original.kl_mean", 1e-8, "float32 sums in another order cost 1e-11, measured"),
    at_least("original.top1", 1.0, "nothing is rounded, so first choices differ only where they tie"),
    at_most("original.perplexity_ratio", 1 + 1e-5, "nothing is rounded; measured within 1e-7 of 1"),
    at_least("original.perplexity_ratio", 1 - 1e-5, "nothing is rounded; measured within 1e-7 of 1"),
)
# Of float weights beside rounded keys and values.
_FLOAT_WEIGHTS = (
    at_most("original.kl_mean", 2e-3, "measured 4e-7 with a cache in float16, 7e-4 in int8"),
    at_least("original.top1", 0.97, "measured 0.9995 with a cache in float16"),
    at_most("original.perplexity_ratio", 1.01, "measured within 1e-3 of 1"),
    at_least("original.perplexity_ratio", 0.99, "measured within 1e-3 of 1"),
)
# Of rounded weights: what is healthy depends on the model, and the reference that rounds alike has it.
_ROUNDED_WEIGHTS = (
    at_most("original.kl_mean", 1.5, "a model that is so far away is another one"),
    at_most("original.kl_ratio", 1.2, "the reference that rounds alike has 1; measured 0.95 to 1.03"),
    at_least("original.kl_ratio", 0.85, "the reference that rounds alike has 1; measured 0.95 to 1.03"),
)
# Of products whose inputs are rounded.
_ROUNDED_INPUTS = (
    at_most("rounding.kl_ratio", 1.25, "the reference that rounds alike has 1; measured 0.97 to 1.07"),
    at_least("rounding.kl_ratio", 0.8, "the reference that rounds alike has 1; measured 0.97 to 1.07"),
    at_most("rounding.perplexity_ratio", 1.03, "the reference that rounds alike has 1; measured within 0.8 %"),
    at_least("rounding.perplexity_ratio", 0.97, "the reference that rounds alike has 1; measured within 0.8 %"),
)


def healthy_thresholds(manifest: Manifest) -> tuple[Threshold, ...]:
    """The bounds that every healthy engine keeps that rounds what the engine of ``manifest`` rounds."""
    stored = [linear.quantization for linear in manifest.linears]
    if not any(one.group_size for one in stored):
        return (*(_FLOAT if manifest.cache.dtype == "float32" else _FLOAT_WEIGHTS), *_AS_BUILT)
    rounds_inputs = any(one.activations != "float32" for one in stored)
    return (*_ROUNDED_WEIGHTS, *(_ROUNDED_INPUTS if rounds_inputs else ()), *_AS_BUILT)


def judge(metrics: Iterable[Metric], thresholds: Iterable[Threshold]) -> list[Verdict]:
    """Hold metrics against thresholds, one verdict a threshold.

    A metric with an interval fails when all of it is beyond the bound, passes when all of it is within, and is
    undecided otherwise. One of fewer than 5 documents is undecided, as is one that was not measured. One that was not
    sampled (``n`` 0) is judged by its value. NaN fails.
    """
    measured = {metric.name: metric for metric in metrics}
    return [_judge(threshold, measured.get(threshold.metric)) for threshold in thresholds]


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """3 where one failed, else 4 where one is undecided, else 0."""
    outcomes = {verdict.outcome for verdict in verdicts}
    return EXIT_FAILED if "failed" in outcomes else EXIT_UNDECIDED if "undecided" in outcomes else EXIT_PASSED


def _judge(threshold: Threshold, metric: Metric | None) -> Verdict:
    if metric is None:
        why = f"{threshold.metric} was not measured"
        return Verdict(threshold, None, "undecided", f"{threshold} cannot be judged: {why}", why)
    low, high = (metric.value if end is None else end for end in (metric.low, metric.high))
    sampled = metric.low is not None and low != high
    found = f"{metric.value:.6g}" + (f" [{low:.6g}, {high:.6g}]" if sampled else "")
    found = f"{metric.name} is {found}, bound {SIGNS[threshold.kind]} {threshold.bound:.6g}"
    if any(math.isnan(number) for number in (metric.value, low, high)):
        return Verdict(threshold, metric, "failed", found)
    if threshold.kind == "at_least" and threshold.bound == 1 > metric.value and threshold.metric.endswith(_SHARES):
        return Verdict(threshold, metric, "failed", found)  # what never may happen has happened
    if 0 < metric.n < MIN_DOCUMENTS:
        few = f"{metric.n} document{'s decide' if metric.n > 1 else ' decides'} nothing, give at least {MIN_DOCUMENTS}"
        return _undecided(threshold, metric, found, few)
    within = threshold.holds(low), threshold.holds(high)
    if any(within) and not all(within):
        return _undecided(threshold, metric, found, f"the bound is inside the interval; {_remedy(threshold, metric)}")
    return Verdict(threshold, metric, "passed" if all(within) else "failed", found)


def _undecided(threshold: Threshold, metric: Metric, found: str, why: str) -> Verdict:
    return Verdict(threshold, metric, "undecided", f"{found}; {why}", why)


def _remedy(threshold: Threshold, metric: Metric) -> str:
    """How many documents would move the bound out of the interval, whose width falls with their square root."""
    assert metric.low is not None
    assert metric.high is not None
    distance = abs(threshold.bound - metric.value)
    reach = metric.high - metric.value if threshold.bound > metric.value else metric.value - metric.low
    documents = 1.05 * metric.n * (reach / distance) ** 2 if distance else math.inf
    if documents > 100 * metric.n:
        return "more documents would hardly decide"
    return f"about {float(f'{documents:.2g}'):.0f} documents would decide"


def parse_threshold(text: str) -> Threshold:
    """Read ``metric<=bound`` or ``metric>=bound``.

    >>> parse_threshold("original.kl_mean <= 0.01").bound
    0.01

    Raises:
        RequestError: ``text`` is not of that form, or names no metric.
    """
    found = re.fullmatch(r"\s*([A-Za-z_][\w.]*)\s*(<=|>=)\s*(\S+)\s*", text)
    bound = _number(found[3]) if found else None
    if found is None or bound is None:
        raise RequestError(f"threshold {text!r} is not METRIC<=NUMBER or METRIC>=NUMBER, as original.kl_mean<=0.01")
    _check_metric(found[1], f"threshold {text!r}")
    return Threshold(found[1], bound, "at_most" if found[2] == "<=" else "at_least", "given on the command line")


def load_thresholds(path: Path) -> tuple[Threshold, ...]:
    """Read thresholds from a TOML file: metrics by name, each with a bound or two, and a reason if you like.

    ::

        [original]
        kl_mean = { at_most = 0.01, reason = "what our product needs" }
        perplexity_ratio = { at_least = 0.98, at_most = 1.02 }

    Raises:
        RequestError: the file cannot be read, is not TOML, holds no threshold, or something that is none, or one of a
            metric that does not exist.
    """
    try:
        document = tomllib.loads(read_regular(path, _MOST_BYTES).decode())
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}; choose another --thresholds") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} is not TOML: {error}") from error
    thresholds = tuple(_thresholds("", document, str(path)))
    if not thresholds:
        raise RequestError(f"{path} holds no threshold; write one as {_EXAMPLE}")
    return thresholds


_MOST_BYTES = 1 << 20  # of a file of thresholds
_EXAMPLE = '"original.kl_mean" = { at_most = 0.01, reason = "why" }'


def _thresholds(metric: str, value: object, where: str) -> Iterator[Threshold]:
    """The thresholds in one table, or those in the tables inside it; ``metric`` is its name."""
    if not isinstance(value, dict):
        raise RequestError(f"{where}: {metric} is {value!r}, expected a table as {_EXAMPLE}")
    bounds = [kind for kind in SIGNS if kind in value]
    if not bounds:
        for name, inner in value.items():
            yield from _thresholds(f"{metric}.{name}".lstrip("."), inner, where)
        return
    reason = value.get("reason", "")
    if unknown := value.keys() - {*SIGNS, "reason"}:
        raise RequestError(f"{where}: {metric} has unknown {', '.join(sorted(unknown))}; expected {_EXAMPLE}")
    if not isinstance(reason, str):
        raise RequestError(f"{where}: the reason of {metric} is {reason!r}, expected text")
    for kind in bounds:
        bound = value[kind]
        if isinstance(bound, bool) or not isinstance(bound, int | float) or not math.isfinite(bound):
            raise RequestError(f"{where}: {kind} of {metric} is {bound!r}, expected a number")
        _check_metric(metric, where)
        yield Threshold(metric, float(bound), kind, reason)


def _check_metric(name: str, where: str) -> None:
    """Refuse a metric that is never measured, before anything is."""
    if name not in METRIC_NAMES:
        near = difflib.get_close_matches(name, METRIC_NAMES, n=1)
        expected = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(METRIC_NAMES)}"
        raise RequestError(f"{where}: there is no metric {name}; {expected}")


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
