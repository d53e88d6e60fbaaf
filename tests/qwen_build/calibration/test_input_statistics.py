"""Statistics of a linear's input: what numpy says of all tokens at once, whatever the batches."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_build.calibration import input_statistics as statistics
from qwen_build.calibration.input_statistics import Collector, InputStatistics


def collect(
    x: np.ndarray, cuts: list[int], second_moment: bool = True, held_out: np.ndarray | None = None
) -> InputStatistics:
    apart = np.zeros(len(x), bool) if held_out is None else held_out
    collector = Collector(x.shape[1], apart, second_moment)
    for batch in np.split(x, cuts):
        collector.add(batch)
    return collector.finish()


@pytest.mark.parametrize("cuts", [[], [1], [200, 201, 640]])
def test_batches_add_up(cuts, monkeypatch):
    monkeypatch.setattr(statistics, "_PANEL_ROWS", 5)
    x = np.random.default_rng(0).normal(size=(700, 13)).astype(np.float32)
    found = collect(x, cuts)
    assert found.tokens == 700
    np.testing.assert_array_equal(found.largest, np.abs(x).max(axis=0))
    np.testing.assert_allclose(found.mean_square, np.square(x).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.second_moment, x.T @ x / 700, atol=1e-5)
    assert found.sample.shape == (512, 13)
    np.testing.assert_array_equal(found.sample[[0, -1]], x[[0, -1]])
    assert len(np.unique(found.sample[:, 0])) == 512, "no token is taken twice"


def test_few_tokens_are_all_sampled_and_no_second_moment_is_made_unasked():
    x = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    found = collect(x, [2], second_moment=False)
    np.testing.assert_array_equal(found.sample, x)
    assert found.second_moment is None


@pytest.mark.parametrize("cuts", [[], [1, 60], [99, 100, 101, 350]])
def test_tokens_that_are_held_out_are_seen_nowhere_else(cuts):
    x = np.random.default_rng(0).normal(size=(400, 7)).astype(np.float32)
    apart = np.arange(400) // 100 % 2 == 1
    found, alone = collect(x, cuts, held_out=apart), collect(x[~apart], [])
    np.testing.assert_array_equal(found.held_out, x[apart])
    assert found.tokens == alone.tokens == 200
    for name in ("largest", "mean_square", "sample", "second_moment"):
        np.testing.assert_allclose(getattr(found, name), getattr(alone, name), rtol=1e-5, atol=1e-6, err_msg=name)
    assert alone.held_out is None


def test_divided_is_the_statistics_of_what_is_divided():
    random = np.random.default_rng(0)
    x, factors = random.normal(size=(50, 6)).astype(np.float32), random.uniform(0.1, 9, 6).astype(np.float32)
    apart = np.arange(50) % 5 == 0
    found, expected = collect(x, [], held_out=apart).divided(factors), collect(x / factors, [], held_out=apart)
    for name in ("largest", "mean_square", "sample", "second_moment", "held_out"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-7, err_msg=name)


def test_output_error_is_relative_to_the_output():
    x = np.array([[1, 0], [0, 2]], np.float32)
    weight = np.array([[3, 0], [0, 1]], np.float32)
    assert collect(x, []).output_error(weight, weight) == 0
    assert collect(x, []).output_error(weight, np.array([[3, 0], [0, 0]], np.float32)) == pytest.approx(4 / 13)
    assert collect(x, []).output_error(0 * weight, weight) == 0
