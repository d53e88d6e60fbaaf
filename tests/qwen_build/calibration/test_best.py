"""The share of an error that is fed back: all where calibration saw what comes, none where it saw something else."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_build.calibration import best
from qwen_build.calibration.best import SHARES, Best
from qwen_build.calibration.gptq import Gptq
from qwen_build.calibration.input_statistics import Collector, InputStatistics
from qwen_build.calibration.method import InputReaders
from qwen_build.calibration.scale_search import search_scales
from qwen_build.quantization.scheme_table import make_scheme

K = 96
SCHEME = make_scheme("int4", 32, None, None, "native")


def statistics_of(x: np.ndarray, held_out: np.ndarray) -> InputStatistics:
    apart = np.arange(len(x) + len(held_out)) >= len(x)
    collector = Collector(K, apart, with_second_moment=True)
    collector.add(np.concatenate([x, held_out]))
    return collector.finish()


def correlated(random: np.random.Generator, mixing: np.ndarray, tokens: int) -> np.ndarray:
    return (random.normal(size=(tokens, 12)) @ mixing + 0.05 * random.normal(size=(tokens, K))).astype(np.float32)


def readers_of(weights: dict[str, np.ndarray], statistics: InputStatistics) -> InputReaders:
    return InputReaders(None, "x", statistics, weights, dict.fromkeys(weights, SCHEME))


@pytest.mark.parametrize("alike", [True, False])
def test_the_share_is_what_held_out_tokens_say(alike):
    random = np.random.default_rng(0)
    mixing, other = random.normal(size=(2, 12, K))
    x = correlated(random, mixing, 2000)
    held_out = correlated(random, mixing if alike else other, 500)
    weights = {"a": random.normal(size=(40, K)).astype(np.float32)}
    found = Best().round(readers_of(weights, statistics_of(x, held_out)))["a"]
    with_all = Gptq().round(readers_of(weights, statistics_of(x, held_out)))["a"]
    alone = search_scales(weights["a"], statistics_of(x, held_out).mean_square, SCHEME)
    assert np.array_equal(found.q, with_all.q) is alike
    if not alike:
        np.testing.assert_array_equal(found.q, alone.q)

    def error(rounded):
        return np.square(held_out @ (SCHEME.grid.values(rounded, K) - weights["a"]).T).sum()

    assert error(found) <= min(error(with_all), error(alone)) * 1.0001


def test_some_outputs_decide_for_all(monkeypatch):
    monkeypatch.setattr(best, "_OUTPUTS", 8)
    random = np.random.default_rng(1)
    x = correlated(random, random.normal(size=(12, K)), 1000)
    weights = {"a": random.normal(size=(80, K)).astype(np.float32)}
    found = Best().round(readers_of(weights, statistics_of(x[:800], x[800:])))["a"]
    assert found.q.shape == (80, 3, 32)
    SCHEME.store(found)
    assert SHARES[0] == 1
    assert SHARES[-1] == 0
