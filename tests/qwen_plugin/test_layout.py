"""Weights in panels: each byte where the operators look for it, and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_plugin.layout import (
    BITS,
    BLOCK_BITS,
    GROUP_SIZES,
    PANEL,
    block_units,
    gated_order,
    gated_places,
    pack_panels,
    panel_bytes,
    round_block_scales,
    round_scales,
    unpack_panels,
)


def draw(  # type: ignore[no-untyped-def]
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    seed: int = 0,
    blocks: bool = False,
):
    rng = np.random.default_rng(seed)
    groups = -(-in_features // group_size)
    q = rng.integers(0, 2**bits, (out_features, in_features)).astype(np.uint8)
    scales = rng.uniform(1e-4, 1e-1, (out_features, groups)).astype(np.float32)
    zero_points = None if symmetric else rng.integers(0, 2**bits, (out_features, groups)).astype(np.uint8)
    scales = round_block_scales(scales, bits, group_size, zero_points) if blocks else round_scales(scales)
    return q, scales, zero_points


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "blocks", "expected"),
    [
        (4, 32, True, False, 3 * (64 + 8 * 64)),  # 70 columns are 3 groups
        (4, 64, True, False, 2 * (64 + 16 * 64)),
        (8, 32, True, False, 3 * (64 + 8 * 128)),
        (4, 32, False, False, 64 + 3 * (64 + 8 * 64)),  # 3 x 16 bytes of zero points
        (8, 32, False, False, 128 + 3 * (64 + 8 * 128)),  # 3 x 32
        (4, 32, True, True, 64 + 64 + 3 * 8 * 64),
        (4, 32, False, True, 64 + 2 * 64 + 3 * 8 * 64),
        (4, 64, True, True, 64 + 64 + 2 * 16 * 64),  # 2 x 16 bytes of multiples
        (4, 64, False, True, 64 + 64 + 2 * 16 * 64),  # and as many of zero points
        (5, 32, True, False, 3 * (64 + 8 * 80)),
        (6, 32, False, False, 128 + 3 * (64 + 8 * 96)),  # 3 x 32 bytes of zero points
        (5, 32, False, True, 64 + 2 * 64 + 3 * 8 * 80),
        (6, 64, False, True, 64 + 64 + 2 * 16 * 96),
    ],
)
def test_the_size_of_a_panel(bits: int, group_size: int, symmetric: bool, blocks: bool, expected: int) -> None:
    assert panel_bytes(70, bits, group_size, symmetric, blocks) == expected


def test_every_byte_at_four_bits() -> None:
    q, scales, zero_points = draw(40, 100, 4, 64, symmetric=False)
    panels = pack_panels(q, scales, zero_points, 4, 64)
    assert panels.shape == (2, 64 + 2 * (64 + 16 * 64))
    block = panels[0, 64 + 64 + 16 * 64 :]  # of the second group
    assert np.array_equal(block[:64].view(np.float16), (scales[:32, 1] * 1024).astype(np.float16))
    step = block[64 + 5 * 64 :]  # columns 64 + 20 to 64 + 23
    assert step[4 * 7 + 2] == q[7, 86] | q[16 + 7, 86] << 4
    assert panels[0, 16 + 7] == zero_points[7, 1] | zero_points[16 + 7, 1] << 4
    # Padding: columns hold the zero point, outputs have scale 0.
    assert block[64 + 15 * 64 + 4 * 7 + 3] == zero_points[7, 1] | zero_points[16 + 7, 1] << 4
    assert not panels[1, 64 : 64 + 64].view(np.float16)[8:].any()
    assert panels[1, 64 : 64 + 64].view(np.float16)[:8].all()


def largest_multiples(zero_points, bits=4):
    """Of each one the largest multiple, of 16, 8 or 4, that leaves all products less it in -128 to 127."""
    products = (np.arange(2**bits) - zero_points[..., None].astype(int))[..., None] * np.arange(1, 2 ** (8 - bits) + 1)
    return ((products >= -128) & (products <= 127)).all(axis=-2).sum(axis=-1)


def test_every_byte_of_blocks() -> None:
    q, scales, zero_points = draw(40, 300, 4, 32, symmetric=False, blocks=True)
    panels = pack_panels(q, scales, zero_points, 4, 32, blocks=True)
    header = 64 + 2 * 64
    assert panels.shape == (2, 3 * header + 10 * 8 * 64)  # of 10 groups the last block has 2
    block = panels[0, header + 4 * 8 * 64 :]  # the second one
    units = (scales / largest_multiples(zero_points))[:32, 4:8].max(axis=1)
    assert np.array_equal(block[:64].view(np.float16), (units * 1024).astype(np.float16))
    multiples, zero_bytes = block[64 + 2 * 16 :], block[128 + 2 * 16 :]  # of group 6
    assert multiples[7] == round(scales[7, 6] / units[7]) - 1 | round(scales[23, 6] / units[23]) - 1 << 4
    assert zero_bytes[7] == zero_points[7, 6] | zero_points[16 + 7, 6] << 4
    step = block[header + 2 * 8 * 64 + 5 * 64 :]  # columns 192 + 20 to 192 + 23
    assert step[4 * 7 + 2] == q[7, 214] | q[16 + 7, 214] << 4
    last = panels[1, 2 * (header + 4 * 8 * 64) :]
    assert last[:64].view(np.float16)[:8].all()
    assert not last[:64].view(np.float16)[8:].any()
    assert not last[64 + 2 * 16 : 128].any()  # groups that are not there
    assert last[header + 8 * 64 + 2 * 64 + 4 * 7 + 1] == q[39, 297]


def test_every_byte_at_eight_bits() -> None:
    q, scales, zero_points = draw(32, 64, 8, 32, symmetric=False)
    panels = pack_panels(q, scales, zero_points, 8, 32)
    assert panels.shape == (1, 64 + 2 * (64 + 8 * 128))
    block = panels[0, 64 + 64 + 8 * 128 :]  # of the second group
    assert np.array_equal(block[:64].view(np.float16), (scales[:, 1] * 1024).astype(np.float16))
    step = block[64 + 5 * 128 :]  # columns 32 + 20 to 32 + 23
    assert step[4 * 7 + 2] == q[7, 54]
    assert step[64 + 4 * 7 + 2] == q[16 + 7, 54]
    assert np.array_equal(panels[0, 32:64], zero_points[:, 1])


def test_every_bit_of_a_unit_of_five_bits() -> None:
    q, scales, zero_points = draw(40, 128, 5, 64, symmetric=False)
    panels = pack_panels(q, scales, zero_points, 5, 64)
    assert panels.shape == (2, 64 + 2 * (64 + 16 * 80))
    block = panels[0, 64 + 64 + 16 * 80 :]  # of the second group
    assert np.array_equal(block[:64].view(np.float16), (scales[:32, 1] * 1024).astype(np.float16))
    assert np.array_equal(panels[0, 32:64], zero_points[:32, 1])
    unit = block[64 + 2 * 5 * 64 :][: 5 * 64].reshape(5, 64)[:, 4 * 7 + 2]  # steps 8 to 11, columns 64 + 4 * 8 + 2, ...
    first, second = q[7, 98:112:4], q[16 + 7, 98:112:4]
    assert np.array_equal(unit[:4] & 31, first)
    assert unit[4] >> 3 == second[0]
    assert unit[0] >> 5 << 2 | unit[1] >> 6 == second[1]
    assert unit[2] >> 5 << 2 | unit[3] >> 6 == second[2]
    assert (unit[4] & 7) << 2 | (unit[1] >> 5 & 1) << 1 | unit[3] >> 5 & 1 == second[3]


def test_every_bit_of_a_unit_of_six_bits() -> None:
    q, scales, zero_points = draw(40, 128, 6, 64, symmetric=False)
    panels = pack_panels(q, scales, zero_points, 6, 64)
    unit = panels[0, 64 + 64 + 3 * 3 * 64 :][: 3 * 64].reshape(3, 64)[:, 4 * 7 + 2]  # steps 6 and 7 of the first group
    first, second = q[7, 26:32:4], q[16 + 7, 26:32:4]
    assert np.array_equal(unit[:2] & 63, first)
    assert unit[2] >> 2 == second[0]
    assert unit[0] >> 6 << 4 | (unit[2] & 3) << 2 | unit[1] >> 6 == second[1]


@pytest.mark.parametrize("bits", [5, 6])
def test_the_upper_bits_of_a_zero_point_lie_above_the_multiple(bits: int) -> None:
    q, scales, zero_points = draw(32, 256, bits, 32, symmetric=False, blocks=True)
    panels = pack_panels(q, scales, zero_points, bits, 32, blocks=True)
    block = panels[0, 64 + 2 * 64 + 4 * 8 * 16 * bits :]  # the second one
    units, _ = block_units(scales, bits, 32, zero_points)
    numbers, low = block[64 + 2 * 16 :], block[128 + 2 * 16 :]  # of group 6
    for output, shift in ((7, 0), (23, 4)):
        multiple = round(scales[output, 6] / units[output, 6])
        assert numbers[7] >> shift & 15 == multiple - 1 | (zero_points[output, 6] >> 4) << (8 - bits)
        assert low[7] >> shift & 15 == zero_points[output, 6] & 15


@given(
    out_features=st.integers(1, 100),
    in_features=st.integers(1, 300),
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from(GROUP_SIZES),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
    blocks=st.booleans(),
)
def test_unpacking_is_the_inverse(
    out_features: int, in_features: int, bits: int, group_size: int, symmetric: bool, seed: int, blocks: bool
) -> None:
    blocks = blocks and bits in BLOCK_BITS and group_size < 128
    q, scales, zero_points = draw(out_features, in_features, bits, group_size, symmetric, seed, blocks)
    panels = pack_panels(q, scales, zero_points, bits, group_size, blocks)
    expected_bytes = panel_bytes(in_features, bits, group_size, symmetric, blocks)
    assert panels.shape == (-(-out_features // PANEL), expected_bytes)
    assert expected_bytes % 64 == 0
    assert panels.flags.c_contiguous
    found = unpack_panels(panels, out_features, in_features, bits, group_size, symmetric, blocks)
    assert np.array_equal(found[0], q)
    assert np.array_equal(found[1], scales)
    assert (found[2] is None) == symmetric
    assert symmetric or np.array_equal(found[2], zero_points)


def test_scales_are_rounded_to_float16_of_1024_times_their_value() -> None:
    scales = np.float32([0.01, 3e-8, 63.9, 64.0, 0, -0.01])
    rounded = round_scales(scales)
    assert rounded.dtype == np.float32
    assert np.allclose(rounded[[0, 2, 5]], scales[[0, 2, 5]], rtol=2**-11, atol=0)
    assert abs(rounded[1] - scales[1]) <= 2.0**-35  # half a step of float16's subnormals, over 1024
    assert np.isinf(rounded[3])
    assert rounded[4] == 0
    assert np.array_equal(round_scales(rounded), rounded)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("bits", BLOCK_BITS)
@pytest.mark.parametrize("size", [1e-11, 1e-6, 1e-2, 30])
def test_the_scales_of_a_block_are_whole_multiples_of_its_unit(size, bits, group_size, symmetric):
    together = 128 // group_size
    rng = np.random.default_rng(0)
    scales = (size * rng.uniform(1e-3, 1, (99, 4 * together - 1))).astype(np.float32)
    scales[0, 0] = 0
    zero_points = rng.integers(0, 2**bits, scales.shape).astype(np.uint8)
    given = None if symmetric else zero_points
    rounded = round_block_scales(scales, bits, group_size, given)
    assert np.array_equal(round_scales(rounded), rounded)
    assert np.array_equal(round_block_scales(rounded, bits, group_size, given), rounded)
    units, most = block_units(rounded, bits, group_size, given)
    multiples = rounded / units
    assert np.array_equal(multiples, np.rint(multiples))
    assert multiples.min() >= 1
    zero_points = np.full_like(zero_points, 2 ** (bits - 1)) if symmetric else zero_points
    largest_products = [(q - zero_points.astype(int)) * multiples for q in (0, 2**bits - 1)]
    assert np.min(largest_products) >= -128
    assert np.max(largest_products) <= 127
    assert np.array_equal(most / units, largest_multiples(zero_points, bits))
    for i in range(0, scales.shape[1], together):
        block, found, unit, limit = (x[:, i : i + together] for x in (scales, rounded, units, most))
        assert np.all(unit == unit[:, :1])
        assert np.all((found == limit).any(axis=1))
        others = (block > unit) & (found < limit)  # neither too small for a multiple nor what the unit comes from
        assert np.all((np.abs(found - block) <= 0.501 * unit)[others])
        if size > 1e-3:  # smaller ones have fewer bits
            largest = (block / limit * unit).max(axis=1)
            assert np.allclose(unit[:, 0], largest, rtol=2**-7, atol=0)


def test_scales_of_a_block_that_are_too_large_become_infinite():
    rounded = round_block_scales(np.array([[64.0, 1], [63.9, 1]], np.float32), 4, 32)
    assert np.isinf(rounded[0, 0])
    assert np.array_equal(rounded[1], [63.5, 63.5 / 16])
    rounded = round_block_scales(np.array([[32.0, 1], [31.9, 1]], np.float32), 4, 32, np.zeros((2, 2), np.uint8))
    assert np.isinf(rounded[0, 0])
    assert np.array_equal(rounded[1], [31.75, 31.75 / 8])


@given(st.integers(1, 9), st.data())
def test_gated_panels_have_sixteen_gates_and_what_they_gate_in_turns(panels, data):  # type: ignore[no-untyped-def]
    outputs = panels * PANEL
    order, places = gated_order(0, outputs, outputs), gated_places(0, outputs, outputs)
    halves = order.reshape(panels, 2, 16)
    assert np.array_equal(halves[:, 0].ravel(), np.arange(outputs // 2))
    assert np.array_equal(halves[:, 1], halves[:, 0] + outputs // 2)
    assert np.array_equal(order[places], np.arange(outputs))
    first, last = sorted(data.draw(st.tuples(st.integers(0, outputs), st.integers(0, outputs))))
    assert np.array_equal(gated_order(first, last, outputs), order[first:last])
    assert np.array_equal(gated_places(first, last, outputs), places[first:last])
