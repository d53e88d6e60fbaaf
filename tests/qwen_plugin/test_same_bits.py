"""The operators' results as every machine computes them, bit for bit: x86 with any instruction set, ARM in an emulator.

The digests were made with plain kernels; a change of arithmetic changes them, and has to be meant.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable

import numpy as np
import pytest

from cases.linear import activation_scales, run
from cases.moe import OUTPUTS, rows_of
from cases.moe import run as run_moe
from cases.plugin_session import ISAS
from qwen_plugin.layout import BITS, pack_panels, round_block_scales, round_scales
from qwen_plugin.reference_linear import QuantLinearAttributes
from qwen_plugin.reference_moe import MoEAttributes

DIGESTS = {
    ("int8", 4): "acc32519d205881d",
    ("int8", 5): "0c18cf3b093fcc31",
    ("int8", 6): "382426fd3099bb95",
    ("int8", 8): "e7fdc02575607846",
    ("int8x2", 4): "d907aa51f7c84032",
    ("int8x2", 5): "d15acab0c38e5e55",
    ("int8x2", 6): "4ff438d1732d1647",
    ("int8x2", 8): "cc5ef02679460ba5",
    ("float32", 4): "497a2650fe70a752",
    ("float32", 5): "712402c9359e7f36",
    ("float32", 6): "d683d92cdbf0b68f",
    ("float32", 8): "a01c7cc4fe233242",
}


def fractions(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Numbers between -4 and 4 that no library's arithmetic went into."""
    return (rng.integers(-(2**22), 2**22, shape) / 2**20).astype(np.float32)


def digest(arrays: Iterable[np.ndarray]) -> str:
    hashed = hashlib.sha256()
    for array in arrays:
        hashed.update(np.ascontiguousarray(array, "<f4").tobytes())
    return hashed.hexdigest()[:16]


def products(precision: str, bits: int, isa: str) -> Iterable[np.ndarray]:
    for group_size, symmetric, swiglu in ((32, 0, 1), (64, 1, 0), (128, 0, 0)):
        scales = "block" if "block" in activation_scales(bits, group_size) else "group"
        a = QuantLinearAttributes(96, 300, bits, group_size, symmetric, precision, scales, swiglu)
        rng = np.random.default_rng(bits)
        groups = -(-a.K // group_size)
        q = rng.integers(0, 2**bits, (a.N, a.K)).astype(np.uint8)
        zero_points = None if symmetric else rng.integers(0, 2**bits, (a.N, groups)).astype(np.uint8)
        sizes = (rng.integers(1, 2**10, (a.N, groups)) / 2**14).astype(np.float32)
        blocks = scales == "block"
        stored = round_block_scales(sizes, bits, group_size, zero_points) if blocks else round_scales(sizes)
        feeds = {
            "x": fractions(rng, 21, a.K),
            "weight": pack_panels(q, stored, zero_points, bits, group_size, blocks),
            "bias": fractions(rng, a.N),
            "norm_weight": fractions(rng, a.K),
        }
        yield run(a, feeds, isa)[0]
        yield run(a, feeds | {"x": feeds["x"][:2]}, isa)[0]


MIXTURES = {
    ("int8", 4): "85ea478d8ea4d6f5",
    ("int8x2", 8): "807935d8df22845d",
    ("float32", 6): "c25ccfbe11e14fb6",
    (None, 32): "825d90c1ba5005d8",
}


def mixtures(precision: str | None, bits: int, isa: str) -> Iterable[np.ndarray]:
    """All outputs of qwen::MoE with 11 tokens and with one."""
    rng = np.random.default_rng(bits)
    for norm_topk_prob, optional in ((0, ("shared",)), (1, ("norm_weight", "residual", "shared", "shared_gate"))):
        a = MoEAttributes(9, 4, 160, 112, norm_topk_prob)
        for name in ("gate_up", "down"):
            scheme = (bits, *((64, 0, precision, "token") if precision else [None] * 4))
            kinds = ("bits", "group_size", "symmetric", "precision", "activation_scales")
            a = dataclasses.replace(a, **{f"{name}_{kind}": x for kind, x in zip(kinds, scheme, strict=True)})
        feeds = {"x": fractions(rng, 11, 160), "router": fractions(rng, 9, 160) / 8}
        for name, rows, columns in (("gate_up", 9 * 224, 160), ("down", 9 * 160, 112)):
            if precision is None:
                feeds[name] = fractions(rng, rows, columns) / 16
                continue
            q, groups = rng.integers(0, 2**bits, (rows, columns)).astype(np.uint8), -(-columns // 64)
            zero_points = rng.integers(0, 2**bits, (rows, groups)).astype(np.uint8)
            scales = round_scales((rng.integers(1, 2**10, (rows, groups)) / 2**16).astype(np.float32))
            feeds[name] = pack_panels(q, scales, zero_points, bits, 64)
        shapes = {"norm_weight": (160,), "residual": (11, 160), "shared": (11, 160), "shared_gate": (160,)}
        feeds |= {name: fractions(rng, *shapes[name]) for name in optional}
        for some in (feeds, rows_of(feeds, slice(4, 5))):
            own = run_moe(a, some, isa)
            assert np.isfinite(own.y).all()
            yield from (getattr(own, name) for name in OUTPUTS)


@pytest.mark.parametrize(("precision", "bits"), MIXTURES)
@pytest.mark.parametrize("isa", ISAS)
def test_mixtures(isa: str, precision: str | None, bits: int) -> None:
    assert digest(mixtures(precision, bits, isa)) == MIXTURES[precision, bits]


@pytest.mark.parametrize(("precision", "bits"), DIGESTS)
@pytest.mark.parametrize("isa", ISAS)
def test_products(isa: str, precision: str, bits: int) -> None:
    assert digest(products(precision, bits, isa)) == DIGESTS[precision, bits]


def test_every_kind_of_product_is_here() -> None:
    assert DIGESTS.keys() == {(precision, bits) for precision in ("int8", "int8x2", "float32") for bits in BITS}
