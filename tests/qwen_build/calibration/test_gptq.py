"""Rounding with feedback: its factorisation, the order of columns, and that it is GPTQ to the last integer."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_build.calibration import gptq
from qwen_build.calibration.gptq import Gptq, factorise, permute, round_with_feedback
from qwen_build.calibration.input_statistics import InputStatistics
from qwen_build.calibration.method import InputReaders
from qwen_build.calibration.scale_search import search_scales
from qwen_build.quantization.grid import Grid
from qwen_build.quantization.scheme_table import make_scheme

K = 83


@pytest.fixture(params=["blocks", "whole"])
def blocks(request, monkeypatch):
    """Constants so small that every halving and loop has several turns, the last one shorter; and those of real use."""
    if request.param == "blocks":
        for name, value in (("_FACTOR_COLUMNS", 16), ("_COLUMNS", 7), ("_ELEMENTS", 1000), ("_PANEL_ROWS", 10)):
            monkeypatch.setattr(gptq, name, value)


def inputs(random: np.random.Generator, tokens: int = 400) -> np.ndarray:
    """Correlated, and some much larger than others."""
    return (random.normal(size=(tokens, K)) @ random.normal(size=(K, K)) * random.lognormal(size=K)).astype(np.float32)


def rounded_by_gptq(weights, statistics, schemes):
    """What the method makes of linears that share an input; nothing of it depends on the model around them."""
    return Gptq().round(InputReaders(None, "x", statistics, weights, schemes))


def statistics_of(x: np.ndarray) -> InputStatistics:
    moment = (x.T @ x / len(x)).astype(np.float32)
    return InputStatistics(len(x), np.abs(x).max(axis=0), moment.diagonal().copy(), x[:512], moment)


def test_permute(blocks):
    random = np.random.default_rng(0)
    matrix, order = random.normal(size=(K, K)), random.permutation(K)
    expected = matrix[order][:, order]
    permute(matrix, order)
    np.testing.assert_array_equal(matrix, expected)


def test_factorise(blocks):
    x = inputs(np.random.default_rng(0))
    matrix = x.T @ x / len(x)
    expected = matrix.astype(np.float64)
    matrix[np.triu_indices(K, 1)] = np.nan  # what is above the diagonal is not read
    diagonal = factorise(matrix)
    lower = np.tril(matrix, -1).astype(np.float64) + np.eye(K)
    np.testing.assert_allclose(lower * diagonal @ lower.T, expected, atol=1e-5 * expected.max())


def gptq_of_the_paper(weight, hessian, order, grid, scales):
    """arXiv 2210.17323, algorithm 1, without blocks, float64: by the inverse, each error over the columns to come."""
    inverse = np.linalg.inv(hessian[order][:, order])
    upper = np.linalg.cholesky(inverse, upper=True)
    weight = weight.astype(np.float64)[:, order].copy()
    zero_points = np.full(scales.scales.shape, grid.middle) if scales.zero_points is None else scales.zero_points
    q = np.empty(weight.shape, np.uint8)
    for i, column in enumerate(order):
        scale, zero = scales.scales[:, column // grid.group_size], zero_points[:, column // grid.group_size].astype(int)
        q[:, i] = np.clip(np.rint(weight[:, i] / scale) + zero, 0, grid.most)
        error = (weight[:, i] - (q[:, i] - zero) * scale) / upper[i, i]
        weight[:, i:] -= np.outer(error, upper[i, i:])
    return q[:, np.argsort(order)]


@pytest.mark.parametrize("symmetric", [True, False])
def test_feedback_is_gptq_of_the_paper(symmetric, blocks):
    random = np.random.default_rng(1)
    weight, x = random.normal(size=(29, K)).astype(np.float32), inputs(random)
    hessian = x.T @ x / len(x)
    hessian[np.diag_indices(K)] += 0.05 * hessian.diagonal().mean()
    order = np.argsort(hessian.diagonal())
    grid = Grid(4, 32, symmetric)
    scales = grid.round(weight)
    factor = hessian[order][:, order].copy()
    factorise(factor)
    found = round_with_feedback(weight, factor, order, grid, scales)
    expected = gptq_of_the_paper(weight, hessian.astype(np.float64), order[::-1], grid, scales)
    differing = found.q.reshape(29, -1)[:, :K] != expected
    # a tie that float32 breaks the other way changes what follows it in its row
    assert differing.any(axis=1).mean() < 0.1
    np.testing.assert_array_equal(found.scales, scales.scales)
    zero = grid.middle if symmetric else scales.zero_points[:, -1:]
    assert (found.q.reshape(29, -1)[:, K:] == zero).all(), "what fills up the last group is 0"


@pytest.mark.parametrize("kernels", ["native", "stock"])
@pytest.mark.parametrize("quant", ["int4", "int8"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_output_error_falls_on_other_tokens_too(quant, symmetric, kernels):
    random = np.random.default_rng(2)
    x = inputs(random, 3000)
    weights = {name: random.normal(size=(40, K)).astype(np.float32) for name in ("a", "b")}
    scheme = make_scheme(quant, 32, symmetric, None, kernels)
    found = rounded_by_gptq(weights, statistics_of(x[:2000]), dict.fromkeys(weights, scheme))
    unseen = statistics_of(x[2000:])
    for name, weight in weights.items():
        before = unseen.output_error(weight, scheme.grid.values(scheme.round(weight), K))
        after = unseen.output_error(weight, scheme.grid.values(found[name], K))
        assert after < 0.5 * before
        scheme.store(found[name])


def test_linears_that_share_an_input_are_rounded_as_if_alone():
    random = np.random.default_rng(3)
    x = inputs(random)
    weights = {name: random.normal(size=(rows, K)).astype(np.float32) for name, rows in (("a", 3), ("b", 50))}
    schemes = {"a": make_scheme("int4", 32, None, None, "native"), "b": make_scheme("int8", 64, True, None, "stock")}
    both = rounded_by_gptq(weights, statistics_of(x), schemes)
    for name, weight in weights.items():
        alone = rounded_by_gptq({name: weight}, statistics_of(x), {name: schemes[name]})
        np.testing.assert_array_equal(both[name].q, alone[name].q)


def test_inputs_that_are_always_zero():
    random = np.random.default_rng(4)
    weight = random.normal(size=(5, K)).astype(np.float32)
    scheme = make_scheme("int4", 32, None, None, "native")
    x = inputs(random)
    x[:, ::2] = 0
    for tokens in (x, 0 * x, x[:20]):  # and fewer tokens than inputs
        rounded = rounded_by_gptq({"a": weight}, statistics_of(tokens), {"a": scheme})["a"]
        values = scheme.grid.values(rounded, K)
        step = rounded.scales.repeat(32, axis=1)[:, :K]
        silent = tokens.any(axis=0) == 0
        assert (np.abs(values - weight) <= 0.51 * step + 0.5 * np.abs(weight).max())[:, silent].all()


def test_where_inputs_do_not_correlate_only_scales_are_searched(blocks):
    random = np.random.default_rng(5)
    weight = random.normal(size=(20, K)).astype(np.float32) ** 3
    mean_square = random.lognormal(sigma=2, size=K).astype(np.float32)
    scheme = make_scheme("int4", 32, None, None, "native")
    statistics = InputStatistics(1, mean_square, mean_square, np.zeros((1, K), np.float32), np.diag(mean_square))
    found = rounded_by_gptq({"a": weight}, statistics, {"a": scheme})["a"]
    expected = search_scales(weight, mean_square, scheme)
    for part in ("q", "scales", "zero_points"):
        np.testing.assert_array_equal(getattr(found, part), getattr(expected, part))
