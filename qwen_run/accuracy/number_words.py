"""Numbers as people read them, in every table and sentence."""

from __future__ import annotations

import math


def format_value(value: float, unit: str = "") -> str:
    """A number as people read it: four digits, shares in per cent, bytes in binary multiples; near 1 the distance to 1.

    >>> format_value(0.98765, "share"), format_value(1 + 2e-6), format_value(1536, "bytes"), format_value(0.01, "nats")
    ('98.77 %', '1 + 2e−6', '1.5 KiB', '0.01 nats')
    """
    if not math.isfinite(value):
        return str(value)
    if unit == "bytes":
        return format_bytes(value)
    if 0 < abs(value - 1) < 5e-4:
        return f"1 {'+' if value > 1 else '−'} {_digits(abs(value - 1), 2)}"
    if unit == "share":
        return f"{_digits(100 * value, 4)} %"
    return f"{_digits(value, 4)} {unit}".strip()


def format_bytes(size: float) -> str:
    units = ("bytes", "KiB", "MiB", "GiB")
    power = min(int(math.log(max(size, 1), 1024)), 3)
    return f"{size / 1024**power:.4g} {units[power]}"


def _digits(value: float, digits: int) -> str:
    if not 0 < abs(value) < 1e-3:
        return f"{value:.{digits}g}".replace("e+", "e")
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e-")
    return f"{float(mantissa):g}e−{int(exponent)}"  # a hyphen would let a line end there
