"""qwen::QuantLinear with attributes and inputs that cannot be: each is named, and the session goes on."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from cases.linear import (
    INPUTS,
    OPTIONAL,
    draw_feeds,
    new_session,
    run,
)
from cases.plugin_session import ISAS
from qwen_plugin.reference_linear import QuantLinearAttributes

# ---- What is refused

GOOD = QuantLinearAttributes(70, 100, 4, 32, 0)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"attribute N is 0, expected 1 to", {"N": 0}),
        (r"attribute N is 0, expected 1 to", {"N": None}),
        (r"attribute N is of another type, expected an integer", {"N": 1.0}),
        (r"attribute K is -3, expected 1 to", {"K": -3}),
        (r"attribute K is 4611686018427387904, expected 1 to", {"K": 2**62}),
        (r"attribute bits is 7, expected 4, 5, 6 or 8", {"bits": 7}),
        (r"attribute bits is 3, expected 4 to 8", {"bits": 3}),
        (r"attribute bits is 0, expected 4 to 8", {"bits": None}),
        (r"attribute group_size is 48, expected 32, 64 or 128", {"group_size": 48}),
        (r"attribute group_size is 256, expected 32 to 128", {"group_size": 256}),
        (r"attribute symmetric is 2, expected 0 to 1", {"symmetric": 2}),
        (r"attribute symmetric is -1, expected 0 to 1", {"symmetric": None}),
        (r"attribute precision is 'int4', expected int8, int8x2 or float32", {"precision": "int4"}),
        (r"attribute precision is '', expected int8, int8x2 or float32", {"precision": None}),
        (r"attribute precision is of another type, expected a string", {"precision": 1}),
        (r"attribute activation_scales is 'row', expected group, block, token or static", {"activation_scales": "row"}),
        (
            r"attribute bits is 8, expected 4, 5 or 6, as scales are of blocks",
            {"activation_scales": "block", "bits": 8},
        ),
        (
            r"attribute group_size is 128, expected 32 or 64, as scales are of blocks",
            {"activation_scales": "block", "group_size": 128},
        ),
        (r"attribute activation_scales is of another type, expected a string", {"activation_scales": 1}),
        (r"attribute swiglu is 3, expected 0 to 1", {"swiglu": 3}),
        (r"attribute N is 40, expected a multiple of 32, as swiglu is 1", {"N": 40, "swiglu": 1}),
        (r"attribute epsilon is -1.0+, expected 0 or more", {"epsilon": -1.0}),
        (r"attribute epsilon is nan, expected 0 or more", {"epsilon": float("nan")}),
        (r"attribute epsilon is of another type, expected a float", {"epsilon": 1}),
    ],
)
def test_a_bad_attribute_is_an_error(message: str, change: dict[str, Any]) -> None:
    attributes = {name: x for name, x in (dataclasses.asdict(GOOD) | change).items() if x is not None}
    types = {"x": TensorProto.FLOAT, "weight": TensorProto.UINT8}
    with pytest.raises(Exception, match="qwen::QuantLinear: " + message):
        new_session("QuantLinear", attributes, types, ["y"], "")


@pytest.mark.parametrize("name", INPUTS)
def test_an_input_of_another_type_or_shape_is_an_error(name: str) -> None:
    attributes = dataclasses.replace(GOOD, activation_scales="static")
    feeds = draw_feeds(attributes, 3, OPTIONAL)
    for other in (feeds[name].astype(np.float64), feeds[name][:-1], feeds[name][..., :-1], feeds[name][None]):
        if name == "x" and other.shape == (2, 100):
            continue  # another number of rows is residual's mistake
        other = np.ascontiguousarray(other)
        expected = f"{name} has " + ("element type" if other.dtype != feeds[name].dtype else "shape")
        with pytest.raises(Exception, match=f"qwen::QuantLinear: {expected}"):
            run(attributes, feeds | {name: other}, "")


@pytest.mark.parametrize("scale", [0, -1, np.nan, np.inf])
def test_a_static_scale_that_is_not_positive_is_an_error(scale: float) -> None:
    attributes = dataclasses.replace(GOOD, activation_scales="static")
    feeds = draw_feeds(attributes, 3) | {"input_scale": np.float32([scale])}
    with pytest.raises(Exception, match=r"input_scale is -?(0\.0|1\.0|nan|inf)\w*, expected a positive number"):
        run(attributes, feeds, "")


def test_an_input_scale_is_given_if_and_only_if_it_is_static() -> None:
    static = dataclasses.replace(GOOD, activation_scales="static")
    feeds = draw_feeds(static, 3)
    with pytest.raises(Exception, match="input_scale is given, expected to be absent: activation_scales is not static"):
        run(GOOD, feeds, "")
    del feeds["input_scale"]
    with pytest.raises(Exception, match="input_scale is missing, activation_scales static needs it"):
        run(static, feeds, "")


@pytest.mark.parametrize("name", ["x", "weight"])
def test_a_missing_input_is_an_error(name: str) -> None:
    feeds = draw_feeds(GOOD, 3, ["bias"])
    del feeds[name]
    with pytest.raises(Exception, match=f"qwen::QuantLinear: {name} is missing"):
        run(GOOD, feeds, "")


def test_residual_and_swiglu_exclude_each_other() -> None:
    attributes = dataclasses.replace(GOOD, N=64, swiglu=1)
    feeds = draw_feeds(attributes, 3, ["residual"])
    with pytest.raises(Exception, match="residual is given, expected to be absent: swiglu is 1"):
        run(attributes, feeds, "")


@pytest.mark.parametrize("column", [-1, 100, 2**31 - 1])
def test_a_permutation_beyond_the_columns_is_an_error(column: int) -> None:
    feeds = draw_feeds(GOOD, 3, ["permutation"])
    feeds["permutation"][7] = column
    with pytest.raises(Exception, match=rf"permutation\[7\] is {column}, expected 0 to 99"):
        run(GOOD, feeds, "")


def test_after_an_error_the_session_still_works() -> None:
    feeds = draw_feeds(GOOD, 3)
    y, _ = run(GOOD, feeds, ISAS[-1])
    with pytest.raises(Exception, match="weight has shape"):
        run(GOOD, feeds | {"weight": feeds["weight"][:1]}, ISAS[-1])
    assert np.array_equal(run(GOOD, feeds, ISAS[-1])[0], y)
