"""qwen::MoE with attributes and inputs that cannot be: each is named, and the session goes on."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from cases.moe import INPUTS, NO_SCHEME, OPTIONAL, draw_feeds, new_session, run
from cases.plugin_session import ISAS
from qwen_plugin.reference_moe import MoEAttributes

GOOD = MoEAttributes(num_experts=5, top_k=2, hidden_size=64, intermediate_size=48)
FLOATS = dataclasses.replace(GOOD, **NO_SCHEME | {"gate_up_bits": 32, "down_bits": 32})
TYPES = {name: TensorProto.UINT8 if name in ("gate_up", "down") else TensorProto.FLOAT for name in INPUTS[:4]}


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"num_experts is 0, expected 1 to 65536", {"num_experts": 0}),
        (r"num_experts is 0, expected 1 to 65536", {"num_experts": None}),
        (r"num_experts is of another type, expected an integer", {"num_experts": "5"}),
        (r"top_k is 6, expected 1 to 5", {"top_k": 6}),
        (r"top_k is 0, expected 1 to 5", {"top_k": None}),
        (r"hidden_size is 48, expected a multiple of 32", {"hidden_size": 48}),
        (r"hidden_size is 0, expected 1 to", {"hidden_size": None}),
        (r"hidden_size is 4611686018427387904, expected 1 to", {"hidden_size": 2**62}),
        (r"intermediate_size is 40, expected a multiple of 16", {"intermediate_size": 40}),
        (r"intermediate_size is -1, expected 1 to", {"intermediate_size": -1}),
        (r"norm_topk_prob is 2, expected 0 to 1", {"norm_topk_prob": 2}),
        (r"epsilon is nan, expected 0 or more", {"epsilon": float("nan")}),
        (r"epsilon is -1.0+, expected 0 or more", {"epsilon": -1.0}),
        (r"gate_up_bits is 0, expected 4 to 32", {"gate_up_bits": None}),
        (r"gate_up_bits is 7, expected 4, 5, 6 or 8", {"gate_up_bits": 7}),
        (r"down_bits is 16, expected 4, 5, 6, 8 or 32", {"down_bits": 16}),
        (r"gate_up_group_size is 48, expected 32, 64 or 128", {"gate_up_group_size": 48}),
        (r"down_group_size is 0, expected 32 to 128", {"down_group_size": None}),
        (r"down_symmetric is -1, expected 0 to 1", {"down_symmetric": None}),
        (r"gate_up_precision is 'int4', expected int8, int8x2 or float32", {"gate_up_precision": "int4"}),
        (r"down_activation_scales is 'row', expected group, block, token or static", {"down_activation_scales": "row"}),
        (r"down_activation_scales is 'static', expected group, block or token", {"down_activation_scales": "static"}),
        (
            r"gate_up_bits is 8, expected 4, 5 or 6, as scales are of blocks",
            {"gate_up_activation_scales": "block", "gate_up_bits": 8},
        ),
        (
            r"down_group_size is 128, expected 32 or 64, as scales are of blocks",
            {"down_activation_scales": "block", "down_group_size": 128},
        ),
    ],
)
def test_a_bad_attribute_is_an_error(message: str, change: dict[str, Any]) -> None:
    attributes = {name: x for name, x in (dataclasses.asdict(GOOD) | change).items() if x is not None}
    with pytest.raises(Exception, match="qwen::MoE: attribute " + message):
        new_session(attributes, TYPES)


@pytest.mark.parametrize("kind", ["group_size", "symmetric", "precision", "activation_scales"])
@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_float_rows_have_no_scheme(name: str, kind: str) -> None:
    attributes = FLOATS.of_node() | {f"{name}_{kind}": getattr(GOOD, f"{name}_{kind}")}
    expected = f"attribute {name}_{kind} is given, expected to be absent: {name}_bits is 32"
    with pytest.raises(Exception, match="qwen::MoE: " + expected):
        new_session(attributes, TYPES)


@pytest.mark.parametrize("a", [GOOD, FLOATS], ids=["panels", "rows"])
@pytest.mark.parametrize("name", INPUTS)
def test_an_input_of_another_type_or_shape_is_an_error(name: str, a: MoEAttributes) -> None:
    feeds = draw_feeds(a, 3, OPTIONAL)
    for other in (feeds[name].astype(np.float64), feeds[name][:-1], feeds[name][..., :-1], feeds[name][None]):
        if name == "x" and other.shape == (2, 64):
            continue  # another number of tokens is residual's mistake
        expected = f"{name} has " + ("element type" if other.dtype != feeds[name].dtype else "shape")
        with pytest.raises(Exception, match=f"qwen::MoE: {expected}"):
            run(a, feeds | {name: np.ascontiguousarray(other)})


@pytest.mark.parametrize("a", [GOOD, FLOATS], ids=["panels", "rows"])
@pytest.mark.parametrize("name", INPUTS[:4])
def test_a_missing_input_is_an_error(name: str, a: MoEAttributes) -> None:
    feeds = draw_feeds(a, 3, ["norm_weight"])
    del feeds[name]
    with pytest.raises(Exception, match=f"qwen::MoE: {name} is missing"):
        run(a, feeds)


def test_a_gate_of_nothing_is_an_error() -> None:
    feeds = draw_feeds(GOOD, 3, ["shared_gate"])
    del feeds["shared"]
    with pytest.raises(Exception, match="qwen::MoE: shared_gate is given, expected to be absent: shared is missing"):
        run(GOOD, feeds)


def test_after_an_error_the_session_still_works() -> None:
    feeds = draw_feeds(GOOD, 3)
    y = run(GOOD, feeds, ISAS[-1]).y
    with pytest.raises(Exception, match="down has shape"):
        run(GOOD, feeds | {"down": feeds["down"][:1]}, ISAS[-1])
    assert np.array_equal(run(GOOD, feeds, ISAS[-1]).y, y)
