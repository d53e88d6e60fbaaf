"""Random inputs of qwen::QuantLinear, and sessions of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from cases.plugin_session import make_model, make_session
from qwen_plugin.layout import BLOCK_BITS, pack_panels, round_block_scales, round_scales
from qwen_plugin.reference_linear import QuantLinearAttributes

OPTIONAL = ("bias", "norm_weight", "residual", "permutation")


INPUTS = ("x", "weight", *OPTIONAL, "input_scale")


ELEMENT_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float64): TensorProto.DOUBLE,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int64): TensorProto.INT64,
}


ACTIVATION_SCALES = ("group", "block", "token", "static")


def activation_scales(bits: int, group_size: int) -> tuple[str, ...]:
    """Those of ``ACTIVATION_SCALES`` that the operator has then."""
    has_blocks = bits in BLOCK_BITS and group_size < 128
    return ACTIVATION_SCALES if has_blocks else tuple(one for one in ACTIVATION_SCALES if one != "block")


def new_session(
    operator: str, attributes: dict[str, Any], types: dict[str, int], outputs: Sequence[str], isa: str, threads: int = 1
) -> ort.InferenceSession:
    """A session of one node with the inputs in ``types`` (element types); "" leaves an input or output out."""
    names = list(INPUTS if operator == "QuantLinear" else types)
    while names[-1] not in types:
        names.pop()
    model = make_model(
        [helper.make_node(operator, [n if n in types else "" for n in names], outputs, domain="qwen", **attributes)],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in types.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs if name],
    )
    return make_session(model, isa, threads)


@cache
def cached_session(
    attributes: QuantLinearAttributes, types: tuple[tuple[str, int], ...], outputs: tuple[str, ...], isa: str, n: int
) -> ort.InferenceSession:
    return new_session("QuantLinear", dataclasses.asdict(attributes), dict(types), outputs, isa, n)


def run(
    attributes: QuantLinearAttributes, feeds: dict[str, np.ndarray], isa: str, threads: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """y and the product's input."""
    types = tuple((name, ELEMENT_TYPES[x.dtype]) for name, x in feeds.items())
    y, product_input = cached_session(attributes, types, ("y", "input"), isa, threads).run(None, feeds)
    return y, product_input


def draw_weight(a: QuantLinearAttributes, rng: np.random.Generator, scale: float = 1e-2) -> np.ndarray:
    groups = -(-a.K // a.group_size)
    q = rng.integers(0, 2**a.bits, (a.N, a.K)).astype(np.uint8)
    scales = (scale * rng.uniform(0.01, 1, (a.N, groups))).astype(np.float32)
    zero_points = None if a.symmetric else rng.integers(0, 2**a.bits, (a.N, groups)).astype(np.uint8)
    blocks = a.activation_scales == "block"
    scales = round_block_scales(scales, a.bits, a.group_size, zero_points) if blocks else round_scales(scales)
    return pack_panels(q, scales, zero_points, a.bits, a.group_size, blocks)


def draw_feeds(
    a: QuantLinearAttributes, rows: int, optional: Sequence[str] = (), seed: int = 0, scale: float = 1e-2
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    every = {
        "x": rng.standard_normal((rows, a.K)).astype(np.float32),
        "weight": draw_weight(a, rng, scale),
        "bias": rng.standard_normal(a.N).astype(np.float32),
        "norm_weight": rng.standard_normal(a.K).astype(np.float32),
        "residual": rng.standard_normal((rows, a.N)).astype(np.float32),
        "permutation": rng.permutation(a.K).astype(np.int32),
        "input_scale": np.float32([2 / 127]),  # columns beyond 2 are clipped
    }
    always = ("x", "weight", "input_scale") if a.activation_scales == "static" else ("x", "weight")
    return {name: x for name, x in every.items() if name in (*always, *optional)}
