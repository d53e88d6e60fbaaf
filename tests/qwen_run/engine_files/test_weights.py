"""Weights of engines whose graph or files are not what the manifest says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_engine.errors import EngineError
from qwen_run.engine_files.onnx_file import Tensor
from qwen_run.engine_files.weights import EngineWeights, _values

FILE = np.zeros(100, np.uint8)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (Tensor("w", "type 99", (2,), b"12"), "w is no array of 'type 99'"),
        (Tensor("w", "float32", (2,), b"12345"), r"w is no array of 'float32' \(2,\)"),
        (Tensor("w", "float32", (2, 2), b"1234" * 3), "w is no array of"),
        (Tensor("w", "float32", (2,), offset=-8), "w lies beyond the end"),
        (Tensor("w", "float32", (2,), offset=96), "w lies beyond the end"),
        (Tensor("w", "float32", (2**62, 2**62), offset=0), "w lies beyond the end"),
        (Tensor("w", "float32", (-4,), offset=32), "w lies beyond the end"),
    ],
)
def test_a_tensor_that_is_none_is_an_error_that_names_it(tensor: Tensor, message: str) -> None:
    with pytest.raises(EngineError, match=f"^{message}.*; build the engine again$"):
        _values(tensor, FILE)


def test_a_linear_without_one_of_its_tensors_is_an_error_that_names_it(
    tiny_checkpoint: Callable[..., Any], build_engine: Callable[..., Path], tmp_path: Path
) -> None:
    engine = shutil.copytree(build_engine(tiny_checkpoint("qwen2").path, quant="int8"), tmp_path / "engine")
    weights = EngineWeights(Path(engine))
    (name, part), *_ = weights.parts.items()
    stored = weights.linears[part.owner]
    assert sum(values.size for _, values in weights.pieces(name)) > 0
    for tensors in ({}, {kind: array[:0] for kind, array in stored.tensors.items()}):
        weights.linears[part.owner] = replace(stored, tensors=tensors)
        with pytest.raises(
            EngineError, match=f"^{part.owner} is not stored as engine.json says; build the engine again"
        ):
            list(weights.pieces(name))
