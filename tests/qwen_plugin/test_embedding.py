"""qwen::QuantEmbedding: rows of the dequantised weight, and what is refused."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto

from cases.linear import (
    ELEMENT_TYPES,
    draw_weight,
    new_session,
)
from qwen_plugin.layout import BITS, BLOCK_BITS, GROUP_SIZES
from qwen_plugin.reference_linear import QuantLinearAttributes, quant_embedding

# ---- The embedding


@cache
def embedding_session(a: QuantLinearAttributes, threads: int = 1) -> ort.InferenceSession:
    attributes = {name: getattr(a, name) for name in ("N", "K", "bits", "group_size", "symmetric")}
    attributes["blocks"] = int(a.activation_scales == "block")
    types = {"token_ids": TensorProto.INT64, "weight": TensorProto.UINT8}
    return new_session("QuantEmbedding", attributes, types, ["rows"], "", threads)


@pytest.mark.parametrize("symmetric", [0, 1])
@pytest.mark.parametrize(
    ("bits", "group_size", "scales"),
    [
        *((bits, size, "block") for bits in BLOCK_BITS for size in (32, 64)),
        *((bits, size, "group") for bits in BITS for size in GROUP_SIZES),
    ],
)
def test_embedding_rows_are_those_of_the_dequantised_weight(
    bits: int, group_size: int, scales: str, symmetric: int
) -> None:
    attributes = QuantLinearAttributes(75, 301, bits, group_size, symmetric, activation_scales=scales)
    weight = draw_weight(attributes, np.random.default_rng(0))
    ids = np.random.default_rng(1).permutation(75)[:50].astype(np.int64)
    for threads in (1, 2):
        (rows,) = embedding_session(attributes, threads).run(None, {"token_ids": ids, "weight": weight})
        assert np.array_equal(rows, quant_embedding(attributes, ids, weight))
    (none,) = embedding_session(attributes).run(None, {"token_ids": ids[:0], "weight": weight})
    assert none.shape == (0, 301)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"token_ids\[1\] is 75, expected 0 to 74", {"token_ids": np.int64([3, 75])}),
        (r"token_ids\[0\] is -1, expected 0 to 74", {"token_ids": np.int64([-1])}),
        (r"token_ids has shape \(1, 1\), expected \(T\)", {"token_ids": np.int64([[1]])}),
        (r"weight has shape \(2, 2880\), expected \(3, 2880\)", {"weight": np.zeros((2, 2880), np.uint8)}),
    ],
)
def test_a_bad_input_of_the_embedding_is_an_error(message: str, change: dict[str, np.ndarray]) -> None:
    attributes = QuantLinearAttributes(75, 150, 4, 32, 1)
    feeds = {"token_ids": np.int64([1]), "weight": draw_weight(attributes, np.random.default_rng(0))}
    with pytest.raises(Exception, match="qwen::QuantEmbedding: " + message):
        embedding_session(attributes).run(None, feeds | change)


def test_embedding_inputs_of_another_type_are_errors() -> None:
    attributes = {"N": 75, "K": 150, "bits": 4, "group_size": 32, "symmetric": 1}
    weight = np.zeros((3, 2880), np.uint8)
    for feeds, message in (
        ({"token_ids": np.int32([1]), "weight": weight}, "token_ids has element type 6"),
        ({"token_ids": np.int64([1]), "weight": weight.view(np.int8)}, "weight has element type 3"),
        ({"token_ids": np.int64([1])}, "weight is missing"),
    ):
        kinds = {name: ELEMENT_TYPES[x.dtype] for name, x in feeds.items()}
        session = new_session("QuantEmbedding", attributes, kinds, ["rows"], "")
        with pytest.raises(Exception, match=f"qwen::QuantEmbedding: {message}"):
            session.run(None, feeds)
