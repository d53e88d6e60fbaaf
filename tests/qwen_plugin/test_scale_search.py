"""The search for scales: the reference's numbers to the bit on every instruction set, and grids that lose little."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cases.plugin_session import ISAS
from qwen_engine.errors import EngineError
from qwen_plugin import reference_scale_search
from qwen_plugin.layout import BITS, BLOCK_BITS, GROUP_SIZES, round_block_scales
from qwen_plugin.scale_search import Search, search_scales

# bits, group_size, symmetric, blocks
CASES = [
    (bits, group_size, symmetric, blocks)
    for bits in BITS
    for group_size in GROUP_SIZES
    for symmetric in (True, False)
    for blocks in (True, False)
    if not blocks or (bits in BLOCK_BITS and group_size < 128)
]


def weight_of(outputs: int, columns: int, seed: int = 0) -> np.ndarray:
    """With heavy tails, a row and a group of zeros, and a row so small that blocks have no unit for it."""
    weight = np.random.default_rng(seed).standard_t(4, (outputs, columns)).astype(np.float32)
    weight[1], weight[2, :128], weight[3] = 0, 0, weight[3] * 1e-12
    return weight


def error_of(weight: np.ndarray, scales: np.ndarray, zeros: np.ndarray, most: int) -> np.ndarray:
    """Squared error of each group, in float64."""
    groups, zeros = weight.reshape(*scales.shape, -1).astype(np.float64), zeros[..., None].astype(np.float64)
    q = np.clip(np.rint(groups / scales[..., None]), -zeros, most - zeros)
    return np.square(q * scales[..., None] - groups).sum(axis=-1)


@pytest.mark.parametrize("flatness", [math.inf, 1.0])
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa in ("plain", "avx2", "avx512")])
@pytest.mark.parametrize(("bits", "group_size", "symmetric", "blocks"), CASES)
def test_every_instruction_set_finds_what_the_reference_finds(
    bits: int,
    group_size: int,
    symmetric: bool,
    blocks: bool,
    isa: str,
    flatness: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QWEN_PLUGIN_ISA", isa)
    weight, importance = weight_of(37, 5 * 128 + group_size), np.ones(5 * 128 + group_size, np.float32)
    importance[::3] = 7
    search = Search(bits, group_size, symmetric, blocks, flatness)
    expected = reference_scale_search.search_scales(weight, importance, search)
    found = search_scales(weight, importance, search)
    for ours, reference in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, reference)


@pytest.mark.parametrize("bits", BLOCK_BITS)
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_of_blocks_are_ones_that_the_layout_holds(symmetric: bool, group_size: int, bits: int) -> None:
    weight = weight_of(200, 448)
    scales, zeros = search_scales(weight, np.ones(448, np.float32), Search(bits, group_size, symmetric, blocks=True))
    np.testing.assert_array_equal(round_block_scales(scales, bits, group_size, zeros), scales)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_found_grid_is_nearly_the_best_of_all(symmetric: bool) -> None:
    weight = np.random.default_rng(1).normal(size=(50, 32)).astype(np.float32)
    scales, zeros = search_scales(weight, np.ones(32, np.float32), Search(4, 32, symmetric))
    found = error_of(weight, scales, zeros, 15).sum()
    reach = np.abs(weight).max(axis=1, keepdims=True)
    best = np.full((50, 1), np.inf)
    for zero in [8] if symmetric else range(16):
        for part in np.linspace(0.05, 0.3, 120):
            best = np.minimum(best, error_of(weight, part * reach, np.full((50, 1), zero), 15))
    assert best.sum() <= found * 1.001
    assert found < best.sum() * 1.03


def test_symmetric_grids_use_the_lowest_integer() -> None:
    weight = np.tile(np.arange(-8, 8, dtype=np.float32), (16, 2))
    scales, _ = search_scales(weight, np.ones(32, np.float32), Search(4, 32, symmetric=True))
    np.testing.assert_array_equal(scales, 1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_column_without_importance_costs_the_others_less(symmetric: bool) -> None:
    weight = np.random.default_rng(2).uniform(-1, 1, (16, 32)).astype(np.float32)
    weight[:, 5] = 1.9
    importance = np.ones(32, np.float32)
    others = []
    for importance[5] in (1, 0):
        scales, zeros = search_scales(weight, importance, Search(4, 32, symmetric))
        q = np.clip(np.rint(weight / scales), -zeros.astype(int), 15 - zeros.astype(int))
        others.append(np.square(np.delete(q * scales - weight, 5, axis=1)).sum())
    assert others[1] < 0.9 * others[0]


def test_an_unknown_instruction_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_PLUGIN_ISA", "sse9")
    with pytest.raises(EngineError, match="QWEN_PLUGIN_ISA names no instruction set"):
        search_scales(np.ones((1, 32), np.float32), np.ones(32, np.float32), Search(4, 32, symmetric=True))
