"""What is either so or not when an engine runs: the same bits in every step, its full length, its answers.

Bounds are those of healthy engines, in the words of ``gate.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qwen_engine.manifest import Manifest
from qwen_run.accuracy.findings import Findings
from qwen_run.accuracy.metrics import Metric
from qwen_run.accuracy.report import Check
from qwen_run.accuracy.step_checks import Difference, promises_bits

# KL to the weights as built. Nothing is rounded: sums in another order. Keys and values are: a sum that differs in its
# last bit rounds one of them the other way now and then; measured 2e-7.
_FLOAT_KL, _CACHED_KL = 1e-8, 1e-5
# Of a stretch of so many positions in a long sequence, the mean may be so many times larger.
_STRETCH, _STRETCH_FACTOR = 8, 10.0


def is_float(manifest: Manifest) -> bool:
    """Whether an engine rounds nothing, so that it writes what the original model writes."""
    rounded = any(linear.quantization.group_size for linear in manifest.linears)
    return not rounded and manifest.cache.dtype == "float32"


def checks(found: Findings, manifest: Manifest, metrics: Sequence[Metric]) -> Iterator[Check]:
    """Every check for which something was found."""
    promised = promises_bits(manifest)
    most_kl = _FLOAT_KL if is_float(manifest) else _CACHED_KL
    rounding = next((metric.value for metric in metrics if metric.name == "rounding.kl_mean"), 0.0)
    for name, difference in found.ways.items():
        yield _way(name, difference, 0.0 if promised else max(most_kl, rounding))
    if found.window is not None:
        yield _window(found.window, manifest.limits.max_seq_len, most_kl)
    if found.together and promised:
        yield _same("answers together", found.together, found.answers, "alone")
    if found.answers and is_float(manifest):
        yield _same("greedy answers", found.answers, [one.continuation for one in found.continued], "by the reference")


def _way(name: str, difference: Difference, most_kl: float) -> Check:
    """``most_kl`` 0: every bit has to be the same."""
    where = f"{difference.differing} of {difference.positions} positions"
    if not difference.differing:
        return Check(name, True, f"the bits of one run, at {difference.positions} positions")
    far = f"{where} differ from one run, by up to {difference.largest:.3g}, mean KL {difference.kl:.2g}"
    if not most_kl:
        return Check(name, False, f"{far}; the bits should be the same")
    return Check(name, difference.kl <= most_kl, f"{far}, bound {most_kl:.2g}")


def _window(window: Mapping[str, Any], max_seq_len: int, most_kl: float) -> Check:
    kl = np.array(window["kl"], np.float64)
    means = np.add.reduceat(kl, starts := np.arange(0, len(kl), _STRETCH)) / np.diff([*starts, len(kl)])
    passed = bool(kl.mean() <= most_kl and means.max() <= _STRETCH_FACTOR * most_kl)
    tokens, worst = window["tokens"], int(np.argmax(means))
    at = round(worst * _STRETCH * tokens / len(kl))
    length = f"{tokens} of {max_seq_len} tokens ({window['bounded']})"
    found = f"KL {kl.mean():.2g} to the weights as built, at most {means.max():.2g}, near token {at}"
    return Check("full length", passed, f"{length}: {found}; bounds {most_kl:.2g} and {_STRETCH_FACTOR * most_kl:.2g}")


def _same(name: str, answers: Sequence[Sequence[int]], others: Sequence[Sequence[int]], words: str) -> Check:
    differing = [n for n, (ours, theirs) in enumerate(zip(answers, others, strict=True)) if list(ours) != list(theirs)]
    if not differing:
        return Check(name, True, f"all {len(answers)} are those that are given {words}")
    return Check(name, False, f"{len(differing)} of {len(answers)} are not those that are given {words}")
