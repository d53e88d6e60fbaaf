"""How ``qwen::QuantLinear`` and ``qwen::QuantEmbedding`` want their weight: panels of 32 outputs, packed both ways.

With G groups of ``group_size`` input columns, a panel is a run of bytes::

    [zero points: G x 16 (4 bits) or 32 bytes (more bits), padded to 64; only if asymmetric]
    G x [32 float16 scales, times 2**10][group_size / 4 steps, of 16 bytes for each bit]

Step j holds the columns 4j to 4j+3 of its group. At 4 bits, byte 4i+c has column 4j+c of output i in its low nibble and
of output i+16 in its high one (byte i of the zero points alike). At 8 bits, byte 64h+4i+c has column 4j+c of output
16h+i (byte 16h+i of the zero points alike, with 5 and 6 bits too). A weight is (q - zero point) * scale, and the zero
point of symmetric weights is 2**(bits-1).

At 5 and 6 bits, a unit of U = 4 and 2 steps is U + 1 lines of 64 bytes. Byte 4i+c of line s has q of output i in step s
in its low bits. The q of output i+16, H0 to H(U-1), lie in what is left: H0 in the upper bits of the last line, and all
others in pieces, of which a shift of a line or none makes the upper bits of a byte. So they are multiplied as they are,
2**(8-bits) times as large. From the highest bit on::

    5 bits: line 0 has H1 >> 2; 1 has H1 & 3, H3 >> 1 & 1; 2 has H2 >> 2; 3 has H2 & 3, H3 & 1; 4 has H0, H3 >> 2
    6 bits: line 0 has H1 >> 4; 1 has H1 & 3; 2 has H0, H1 >> 2 & 3

Where ``activation_scales`` are of a "block", which is for less than 8 bits, scales are 1 to 16, 8 or 4 (at 4, 5 or 6
bits) times the unit of their block of 128 columns, and (q - zero point) times that multiple fits a byte with a sign,
whatever q is. With B groups in a block, a panel then is blocks, the last of which may have fewer groups::

    [32 float16 units, times 2**10][B x 16 bytes of multiples, less 1][B x 16 bytes of zero points if asymmetric]
    [padding to 64 bytes][groups of steps]

and byte i of the multiples and of the zero points has that of output i in its low nibble, that of output i+16 in its
high one. The upper bits of a zero point of 5 or 6 bits lie above the multiple, in its nibble.

Gated panels are of a weight whose outputs are two halves: 16 of the first, the gates, and the 16 of the second that
they gate, in turns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# Names of the layouts in the manifest.
PANELS, GATED_PANELS = "panels32", "panels32-gated"

PANEL = 32
GROUP_SIZES = (32, 64, 128)
BITS = (4, 5, 6, 8)
UNIT_STEPS = {4: 1, 5: 4, 6: 2}  # bits -> steps that share lines
ZERO_POINTS = {bits: 1 << (bits - 1) for bits in BITS}  # of symmetric weights
# Scales are stored as float16 times this, so that those of small weights are not subnormal.
SCALE_FACTOR = 2.0**10

# Columns of a block, and the bits of weights whose scales may be of blocks.
BLOCK_COLUMNS, BLOCK_BITS = 128, (4, 5, 6)
# bits -> the largest multiple of its unit that a scale in a block can be
MOST_UNITS = {bits: 256 >> bits for bits in BLOCK_BITS}
# The same by zero point: (q - zero point) * multiple stays between -128 and 127.
MOST_UNITS_AT = {
    bits: np.array(
        [min(128 // max(z, 1), 127 // max(2**bits - 1 - z, 1), MOST_UNITS[bits]) for z in range(2**bits)], np.float32
    )
    for bits in BLOCK_BITS
}
# Significant bits of a unit, of which float16 holds all multiples, and by bits the largest unit of that kind.
UNIT_BITS = 7
LARGEST_UNIT = {bits: 127 * 2.0 ** (bits + 1) / SCALE_FACTOR for bits in BLOCK_BITS}
# The least scale above 0 that can be stored, and the least unit.
LEAST_SCALE = 2.0**-24 / SCALE_FACTOR

_ALIGNMENT = 64


def panel_bytes(in_features: int, bits: int, group_size: int, symmetric: bool, blocks: bool = False) -> int:
    """Bytes of one panel, a multiple of 64."""
    groups = _ceil_div(in_features, group_size)
    if blocks:
        headers = _ceil_div(in_features, BLOCK_COLUMNS) * _header_bytes(group_size, symmetric)
        return headers + groups * _step_bytes(bits, group_size)
    return _zero_point_bytes(groups, bits, symmetric) + groups * (2 * PANEL + _step_bytes(bits, group_size))


def round_scales(scales: Floats) -> Floats:
    """The nearest scales that the layout can hold, of any shape; infinite where one is 64 or more."""
    with np.errstate(over="ignore"):
        stored = (scales * np.float32(SCALE_FACTOR)).astype(np.float16)
    return stored.astype(np.float32) / np.float32(SCALE_FACTOR)


def round_block_scales(scales: Floats, bits: int, group_size: int, zero_points: Bytes | None = None) -> Floats:
    """The nearest scales that go with ``activation_scales`` "block", as :func:`round_scales` has them too.

    Within each block they are whole multiples of its unit: one is the largest that its zero point allows, none is
    larger. Infinite where they are too large.

    Args:
        scales: (out_features, G); what is 0 becomes the least.
        zero_points: (out_features, G), below 2**bits; None: symmetric.

    >>> round_block_scales(np.array([[16.01, 8.6, 0.001, 0]], np.float32), 4, 32)
    array([[16.,  9.,  1.,  1.]], dtype=float32)
    """
    most = _most_units(bits, zero_points)
    needed = scales / most  # as the unit
    storable = np.isfinite(round_scales(needed * MOST_UNITS[bits]))
    needed = np.where(storable, needed, np.inf)
    largest = _largest_of_block(needed, group_size)
    finite = np.where(np.isfinite(largest), largest, 0)
    _, exponent = np.frexp(finite)
    step = np.ldexp(np.float32(1), exponent - UNIT_BITS).clip(min=LEAST_SCALE)
    unit = (np.rint(finite / step).clip(min=1) * step).clip(max=LARGEST_UNIT[bits])
    multiples = np.where(needed == largest, most, np.rint(np.where(storable, scales, 0) / unit).clip(1, most))
    return np.asarray(np.where(storable, multiples * unit, np.inf), np.float32)


def block_units(scales: Floats, bits: int, group_size: int, zero_points: Bytes | None) -> tuple[Floats, Floats]:
    """The unit of each of ``scales``, which :func:`round_block_scales` left, and the largest that it could be."""
    most = _most_units(bits, zero_points)
    units = _largest_of_block(scales / most, group_size)
    return units, units * most


def _most_units(bits: int, zero_points: Bytes | None) -> Floats | np.float32:
    return MOST_UNITS_AT[bits][ZERO_POINTS[bits] if zero_points is None else zero_points]


def _largest_of_block(scales: Floats, group_size: int) -> Floats:
    """``scales`` (out_features, G), each replaced by the largest of its block."""
    groups, together = scales.shape[1], BLOCK_COLUMNS // group_size
    blocks = np.pad(scales, ((0, 0), (0, -groups % together))).reshape(len(scales), -1, together)
    return np.asarray(blocks.max(axis=-1).repeat(together, axis=1)[:, :groups])


def pack_panels(
    q: Bytes, scales: Floats, zero_points: Bytes | None, bits: int, group_size: int, blocks: bool = False
) -> Bytes:
    """The weight as the operators read it; columns are padded to whole groups and outputs to whole panels.

    Args:
        q: (out_features, in_features), below 2**bits.
        scales: (out_features, G), each one that :func:`round_scales` leaves as it is; with blocks,
            :func:`round_block_scales`.
        zero_points: (out_features, G), below 2**bits; None: symmetric.
        bits: 4, 5, 6 or 8.
        group_size: 32, 64 or 128.
        blocks: whether the scales are those of blocks.

    Returns:
        (panels, panel_bytes).
    """
    out_features, in_features = q.shape
    groups, panels = _ceil_div(in_features, group_size), _ceil_div(out_features, PANEL)
    symmetric = zero_points is None
    if zero_points is None:
        zero_points = np.full(scales.shape, ZERO_POINTS[bits], np.uint8)
    assert scales.shape == zero_points.shape == (out_features, groups)
    rounded = round_block_scales(scales, bits, group_size, zero_points) if blocks else round_scales(scales)
    assert np.array_equal(rounded, scales)
    assert max(q.max(initial=0), zero_points.max(initial=0)) < 2**bits

    filling = zero_points[:, -1:].repeat(groups * group_size - in_features, axis=1)
    padded = _pad_rows(np.concatenate([q, filling], axis=1), panels)
    steps = padded.reshape(panels, 2, 16, groups, group_size // 4, 4).transpose(0, 3, 4, 1, 2, 5)  # (P, G, J, 2, 16, 4)
    steps = _join_steps(steps, bits).reshape(panels, groups, -1)

    if blocks:
        units, _ = block_units(scales, bits, group_size, zero_points)
        numbers: Bytes = (scales / units).astype(np.uint8) - 1
        if not symmetric:
            numbers |= zero_points >> 4 << (8 - bits)
        lanes = None if symmetric else _join_lanes(np.asarray(zero_points & 15, np.uint8), 4)
        return _pack_blocks(units, _join_lanes(numbers, 4), steps, lanes, group_size)
    packed = np.zeros((panels, panel_bytes(in_features, bits, group_size, symmetric)), np.uint8)
    parts = packed[:, _zero_point_bytes(groups, bits, symmetric) :].reshape(panels, groups, -1)
    parts[:, :, : 2 * PANEL] = _store_scales(scales)
    parts[:, :, 2 * PANEL :] = steps
    if not symmetric:
        lanes = _join_lanes(zero_points, bits).reshape(panels, -1)
        packed[:, : lanes.shape[1]] = lanes
    return packed


def unpack_panels(
    panels: Bytes,
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    blocks: bool = False,
) -> tuple[Bytes, Floats, Bytes | None]:
    """The inverse of :func:`pack_panels`: q, scales and zero points (None if symmetric)."""
    groups, count = _ceil_div(in_features, group_size), len(panels)
    size = panel_bytes(in_features, bits, group_size, symmetric, blocks)
    assert panels.shape == (_ceil_div(out_features, PANEL), size)
    if blocks:
        scales, steps, zero_points = _unpack_blocks(panels, groups, bits, group_size, symmetric)
    else:
        parts = panels[:, _zero_point_bytes(groups, bits, symmetric) :].reshape(count, groups, -1)
        scales, steps = _load_scales(parts[:, :, : 2 * PANEL]), parts[:, :, 2 * PANEL :]
        zero_points = None if symmetric else _split_lanes(panels, groups, bits)
    q = _split_steps(steps.reshape(count, groups, -1), bits)
    q = q.transpose(0, 3, 4, 1, 2, 5).reshape(count * PANEL, -1)[:out_features, :in_features]
    return np.ascontiguousarray(q), scales[:out_features], None if zero_points is None else zero_points[:out_features]


def _pack_blocks(units: Floats, multiples: Bytes, steps: Bytes, lanes: Bytes | None, group_size: int) -> Bytes:
    """Panels of blocks from units (N, G), steps (P, G, n) and, of multiples and zero points, lanes (P, G, 16)."""
    panels, groups, step_bytes = steps.shape
    together, header = BLOCK_COLUMNS // group_size, _header_bytes(group_size, lanes is None)

    def of_blocks(array: Bytes) -> Bytes:
        return np.pad(array, ((0, 0), (0, -groups % together), (0, 0))).reshape(panels, -1, together * array.shape[2])

    packed = np.zeros((panels, _ceil_div(groups, together), header + together * step_bytes), np.uint8)
    packed[:, :, : 2 * PANEL] = _store_scales(units[:, ::together])
    packed[:, :, 2 * PANEL :][:, :, : 16 * together] = of_blocks(multiples)
    if lanes is not None:
        packed[:, :, 2 * PANEL + 16 * together :][:, :, : 16 * together] = of_blocks(lanes)
    packed[:, :, header:] = of_blocks(steps)
    return np.ascontiguousarray(packed.reshape(panels, -1)[:, : packed[0].size - -groups % together * step_bytes])


def _unpack_blocks(
    panels: Bytes, groups: int, bits: int, group_size: int, symmetric: bool
) -> tuple[Floats, Bytes, Bytes | None]:
    """Scales (N, G), steps (P, G, n) and zero points (N, G) of what :func:`_pack_blocks` made."""
    together, header = BLOCK_COLUMNS // group_size, _header_bytes(group_size, symmetric)
    step_bytes = _step_bytes(bits, group_size)
    missing = -groups % together * step_bytes
    blocks = np.pad(panels, ((0, 0), (0, missing))).reshape(len(panels), -1, header + together * step_bytes)

    def of_groups(start: int, bytes_each: int) -> Bytes:
        part = blocks[:, :, start : start + together * bytes_each]
        return part.reshape(len(panels), -1, bytes_each)[:, :groups]

    numbers = _split_lanes(of_groups(2 * PANEL, 16), groups, 4)
    multiples = (numbers & (MOST_UNITS[bits] - 1)) + np.float32(1)
    units = _load_scales(blocks[:, :, : 2 * PANEL]).repeat(together, axis=1)[:, :groups]
    steps, zero_points = of_groups(header, step_bytes), None
    if not symmetric:
        zero_points = _split_lanes(of_groups(2 * PANEL + 16 * together, 16), groups, 4)
        zero_points |= numbers >> (8 - bits) << 4
    return multiples * units, steps, zero_points


def gated_order(first: int, last: int, out_features: int) -> NDArray[np.int64]:
    """Which outputs gated panels have at the places [first, last).

    >>> gated_order(14, 34, 96).tolist()
    [14, 15, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63, 16, 17]
    """
    panel, lane = np.divmod(np.arange(first, last), PANEL)
    second, row = np.divmod(lane, PANEL // 2)
    return np.asarray(second * (out_features // 2) + panel * (PANEL // 2) + row)


def gated_places(first: int, last: int, out_features: int) -> NDArray[np.int64]:
    """The inverse of :func:`gated_order`: the places of the outputs [first, last).

    >>> gated_places(48, 50, 96).tolist()
    [16, 17]
    """
    second, row = np.divmod(np.arange(first, last), out_features // 2)
    panel, lane = np.divmod(row, PANEL // 2)
    return np.asarray(panel * PANEL + second * (PANEL // 2) + lane)


def _join_steps(q: Bytes, bits: int) -> Bytes:
    """The steps of groups, (P, G, group_size / 4, 2, 16, 4), as they lie, (P, G, group_size * 4 * bits)."""
    panels, groups = q.shape[:2]
    if bits == 8:
        return q.reshape(panels, groups, -1)
    unit = q.reshape(panels, groups, -1, UNIT_STEPS[bits], 2, 64)
    low, h = unit[..., 0, :], np.moveaxis(unit[..., 1, :], 3, 0)  # (P, G, J, U, 64), (U, P, G, J, 64)
    if bits == 4:
        lines = [low[..., 0, :] | h[0] << 4]
    elif bits == 5:
        pieces = [h[1] >> 2, (h[1] & 3) << 1 | h[3] >> 1 & 1, h[2] >> 2, (h[2] & 3) << 1 | h[3] & 1]
        lines = [*(low[..., s, :] | piece << 5 for s, piece in enumerate(pieces)), h[0] << 3 | h[3] >> 2]
    else:
        pieces = [h[1] >> 4, h[1] & 3]
        lines = [*(low[..., s, :] | piece << 6 for s, piece in enumerate(pieces)), h[0] << 2 | h[1] >> 2 & 3]
    return np.asarray(np.stack(lines, axis=3), np.uint8).reshape(panels, groups, -1)


def _split_steps(steps: Bytes, bits: int) -> Bytes:
    """The inverse of :func:`_join_steps`."""
    panels, groups, _ = steps.shape
    if bits == 8:
        return steps.reshape(panels, groups, -1, 2, 16, 4)
    count = UNIT_STEPS[bits]
    lines = np.moveaxis(steps.reshape(panels, groups, -1, count + (bits > 4), 64), 3, 0)
    if bits == 4:
        h = [lines[0] >> 4]
    elif bits == 5:
        h = [
            lines[4] >> 3,
            lines[0] >> 5 << 2 | lines[1] >> 6,
            lines[2] >> 5 << 2 | lines[3] >> 6,
            (lines[4] & 7) << 2 | (lines[1] >> 5 & 1) << 1 | lines[3] >> 5 & 1,
        ]
    else:
        h = [lines[2] >> 2, lines[0] >> 6 << 4 | (lines[2] & 3) << 2 | lines[1] >> 6]
    halves = np.stack([lines[:count] & (2**bits - 1), np.stack(h)])  # (2, U, P, G, J, 64)
    return halves.transpose(2, 3, 4, 1, 0, 5).reshape(panels, groups, -1, 2, 16, 4)


def _join_lanes(numbers: Bytes, bits: int) -> Bytes:
    """One number of each output and group (N, G), as zero points lie: (P, G, 16 at 4 bits, else 32)."""
    panels, groups = _ceil_div(len(numbers), PANEL), numbers.shape[1]
    lanes = _pad_rows(numbers, panels).reshape(panels, 2, 16, groups).transpose(0, 3, 1, 2)  # (P, G, 2, 16)
    return lanes[:, :, 0] | lanes[:, :, 1] << 4 if bits == 4 else lanes.reshape(panels, groups, PANEL)


def _split_lanes(joined: Bytes, groups: int, bits: int) -> Bytes:
    """The inverse of :func:`_join_lanes`: (P * 32, G)."""
    size = 16 if bits == 4 else PANEL
    lanes = joined.reshape(len(joined), -1)[:, : groups * size].reshape(len(joined), groups, size)
    if bits == 4:
        lanes = np.concatenate([lanes & 15, lanes >> 4], axis=-1)
    return lanes.transpose(0, 2, 1).reshape(len(joined) * PANEL, groups)


def _store_scales(scales: Floats) -> Bytes:
    """Of scales (N, G) the bytes (P, G, 64)."""
    panels = _ceil_div(len(scales), PANEL)
    stored = _pad_rows(scales * np.float32(SCALE_FACTOR), panels).astype("<f2")
    return np.ascontiguousarray(stored.reshape(panels, PANEL, -1).swapaxes(1, 2)).view(np.uint8)


def _load_scales(stored: Bytes) -> Floats:
    """The inverse of :func:`_store_scales`: (P * 32, G)."""
    scales = np.ascontiguousarray(stored).view("<f2").swapaxes(1, 2)
    return scales.reshape(-1, stored.shape[1]).astype(np.float32) / np.float32(SCALE_FACTOR)


def _pad_rows(rows: NDArray[Any], panels: int) -> NDArray[Any]:
    return np.pad(rows, ((0, panels * PANEL - len(rows)), (0, 0)))


def _zero_point_bytes(groups: int, bits: int, symmetric: bool) -> int:
    return 0 if symmetric else _ceil_div(groups * (16 if bits == 4 else PANEL), _ALIGNMENT) * _ALIGNMENT


def _header_bytes(group_size: int, symmetric: bool) -> int:
    """Of a block, what precedes its groups."""
    numbers = BLOCK_COLUMNS // group_size * (16 if symmetric else 32)
    return 2 * PANEL + _ceil_div(numbers, _ALIGNMENT) * _ALIGNMENT


def _step_bytes(bits: int, group_size: int) -> int:
    return group_size * 4 * bits


def _ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)
