"""Names and shapes agree both ways before any weight is read."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cases.configs import PUBLISHED
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.safetensors_file import write_safetensors
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.graph.weight_map import check_agreement, check_layers, map_weights, source
from qwen_engine.errors import CheckpointError, WeightMismatch

CONFIG = ModelConfig.from_json(PUBLISHED | {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8})


def test_a_fused_weight_is_its_parts_one_after_the_other(tmp_path):
    rng = np.random.default_rng(0)
    parts = {
        f"model.layers.0.self_attn.{p}.weight": rng.normal(size=(rows, 5)).astype(np.float32)
        for p, rows in {"q_proj": 24, "k_proj": 8, "v_proj": 8}.items()
    }
    write_safetensors(tmp_path / "model.safetensors", parts, "float32")
    fused = source("model.layers.0.self_attn.qkv_proj.weight", (40, 5), CONFIG)
    expected = np.concatenate(list(parts.values()))
    with Checkpoint.open(tmp_path) as checkpoint:
        for start, stop in [(0, 40), (0, 24), (23, 25), (10, 36), (24, 32), (39, 40)]:
            assert np.array_equal(fused.read(checkpoint, start, stop), expected[start:stop])


def test_a_graph_name_is_the_checkpoints_but_for_the_fused_ones():
    assert source("model.norm.weight", (896,), CONFIG).shapes == (("model.norm.weight", (896,)),)
    assert source("model.layers.7.mlp.gate_up_proj.weight", (9728, 896), CONFIG).shapes == (
        ("model.layers.7.mlp.gate_proj.weight", (4864, 896)),
        ("model.layers.7.mlp.up_proj.weight", (4864, 896)),
    )
    assert source("lm_head.weight", (151936, 896), CONFIG).shapes[0][0] == "model.embed_tokens.weight"  # tied


@pytest.mark.parametrize(("layers", "missing"), [((0, 1, 3), 2), ((1,), 0), ((0, 1, 2), None), (range(9), None)])
def test_a_layer_that_is_missing_is_named_before_a_graph_is_made(tmp_path, layers, missing):
    tensors = {f"model.layers.{layer}.mlp.up_proj.weight": np.ones(1, np.float32) for layer in layers}
    write_safetensors(tmp_path / "model.safetensors", tensors, "float32")
    config = dataclasses.replace(CONFIG, num_hidden_layers=3)
    with Checkpoint.open(tmp_path) as checkpoint:
        if missing is None:
            check_layers(config, checkpoint)
        else:
            with pytest.raises(WeightMismatch, match=rf"lacks model\.layers\.{missing}$"):
                check_layers(config, checkpoint)


def test_all_offenders_are_named_at_once():
    needed = {"a": (2, 3), "b": (4,), "c": (5,)}
    present = {"b": (4,), "c": (6,), "d": (1,), "e": (1,)}
    with pytest.raises(WeightMismatch) as error:
        check_agreement(needed, present)
    assert (
        str(error.value)
        == "the checkpoint lacks a; the graph has no place for d, e; c: graph expects (5,), checkpoint has (6,)"
    )
    with pytest.raises(WeightMismatch, match=r"no place for d, e; .* left out, as with --ignore-tensors d$"):
        check_agreement({}, {"d": (1,), "e": (1,)})


@pytest.mark.parametrize("row", [0, 70, 4095, 4096, 9000])
def test_a_tied_head_is_compared_to_its_last_row(tmp_path, row):
    embedding = np.arange(9001 * 2, dtype=np.float32).reshape(9001, 2)
    head = embedding.copy()
    head[row, 1] += 1
    tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    write_safetensors(tmp_path / "model.safetensors", tensors, "float32")
    with (
        Checkpoint.open(tmp_path) as checkpoint,
        pytest.raises(CheckpointError, match=r"lm_head.weight differs from model.embed_tokens.weight"),
    ):
        map_weights(dict.fromkeys(tensors, (9001, 2)), checkpoint, CONFIG)


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_head_that_is_stored_must_be_the_embedding(tmp_path, equal):
    embedding = np.arange(20, dtype=np.float32).reshape(5, 4)
    head = embedding if equal else embedding + 1
    tensors = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": head,
        "rotary_emb.inv_freq": np.ones(3, np.float32),
    }
    write_safetensors(tmp_path / "model.safetensors", tensors, "float32")
    shapes = {"model.embed_tokens.weight": (5, 4), "lm_head.weight": (5, 4)}
    with Checkpoint.open(tmp_path) as checkpoint:
        if equal:
            sources = map_weights(shapes, checkpoint, CONFIG).sources
            assert sources["lm_head.weight"] == sources["model.embed_tokens.weight"]  # so it is stored once
        else:
            with pytest.raises(CheckpointError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
                map_weights(shapes, checkpoint, CONFIG)
