"""An engine of one small graph, which no builder made: an embedding, a head, and what it adds up of its cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qwen_engine.graph_io import BATCH_INPUTS, TensorSpec, cache_inputs
from qwen_engine.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    CacheLayout,
    Limits,
    Manifest,
    Origin,
)
from qwen_engine.sizes import ModelSizes
from qwen_engine.tasks import GENERATE, output_of
from qwen_run.engine_files.checksums import measure_part
from qwen_run.runtime.engine import Batch

VOCAB_SIZE, HIDDEN_SIZE, MAX_SEQ_LEN, BLOCK_SIZE = 13, 6, 100, 32
STATES = cache_inputs(layers=(0, 1), kv_heads=2, head_dim=8, block_size=BLOCK_SIZE, dtype="float32")
MODEL = ModelSizes("qwen2", VOCAB_SIZE, HIDDEN_SIZE, 7, 2, 4, 2, 8, 1e-6, 10000.0, "default", 1.0, False, None)
RNG = np.random.default_rng(5)
EMBEDDING = RNG.normal(size=(VOCAB_SIZE, HIDDEN_SIZE)).astype(np.float32)
HEAD = RNG.normal(size=(HIDDEN_SIZE, VOCAB_SIZE)).astype(np.float32)


def write_graph(path: Path, outputs: list[str], specs: Sequence[TensorSpec] = (*BATCH_INPUTS, *STATES)) -> None:
    """``logits`` = embedding of the selected tokens times the head; ``hidden`` the embeddings of all tokens.

    ``cached`` is the sum of one cache pool, to see which memory the session reads.
    """
    types = {"int64": TensorProto.INT64, "int32": TensorProto.INT32, "float32": TensorProto.FLOAT}
    inputs = [helper.make_tensor_value_info(spec.name, types[spec.dtype], spec.shape) for spec in specs]
    infos = {
        "logits": helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["L", VOCAB_SIZE]),
        "hidden": helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["T", HIDDEN_SIZE]),
        "cached": helper.make_tensor_value_info("cached", TensorProto.FLOAT, []),
    }
    summed = [helper.make_node("ReduceSum", ["value_cache.1"], ["cached"], keepdims=0)] if "cached" in outputs else []
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["embedding", "input_ids"], ["hidden"]),
            helper.make_node("Gather", ["hidden", "logits_indices"], ["selected"]),
            helper.make_node("MatMul", ["selected", "head"], ["logits"]),
            *summed,
        ],
        "two matrices",
        inputs,
        [infos[name] for name in outputs],
        [numpy_helper.from_array(EMBEDDING, "embedding"), numpy_helper.from_array(HEAD, "head")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location=WEIGHTS_FILE, size_threshold=0)


def write_manifest(directory: Path, **changes: Any) -> None:
    """A manifest that fits the directory's files, with fields of it replaced by ``changes``."""
    fields: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "name": "two-matrices",
        "model": MODEL,
        "limits": Limits(MAX_SEQ_LEN),
        "cache": CacheLayout(BLOCK_SIZE, "float32", 2 * 2 * 2 * 8 * 4),
        "inputs": (*BATCH_INPUTS, *STATES),
        "outputs": (output_of(GENERATE, VOCAB_SIZE),),
        "linears": (),
        "operators": (),
        "eos_token_ids": (0,),
        "parts": {path.name: measure_part(path) for path in sorted(directory.iterdir()) if path.name != MANIFEST_FILE},
        "origin": Origin("made by a test", None, "float32", {}, None, (), "0", ""),
    }
    (directory / MANIFEST_FILE).write_text(Manifest(**{**fields, **changes}).to_json(), encoding="utf-8")


def make_batch(lengths: list[int], logits_indices: list[int], seed: int = 0) -> Batch:
    """Random tokens for sequences of these lengths, each in blocks of its own."""
    return Batch(
        input_ids=np.random.default_rng(seed).integers(0, VOCAB_SIZE, sum(lengths)),
        cumulative_lengths=np.cumsum([0, *lengths]).astype(np.int32),
        past_lengths=np.zeros(len(lengths), np.int32),
        block_table=np.arange(len(lengths), dtype=np.int32)[:, None],
        logits_indices=np.array(logits_indices, np.int64),
    )


def expected_logits(batch: Batch) -> np.ndarray:
    return EMBEDDING[batch.input_ids[batch.logits_indices]] @ HEAD
