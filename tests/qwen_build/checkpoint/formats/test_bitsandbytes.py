"""bitsandbytes with 4 bits: dequantised as its documentation says, row after row.

The layout was checked with bitsandbytes 0.50.2: what its ``quantize_4bit`` writes is read bit for bit as its
``dequantize_4bit`` reads it, nested or not.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cases.formats import assert_read_alike, quantised
from cases.tiny import hf_logits, run_alone
from qwen_build import build
from qwen_build.checkpoint.formats import bitsandbytes
from qwen_build.checkpoint.locate import resolve_checkpoint
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.engine_build import plan_build
from qwen_build.plan.options import BuildOptions
from qwen_engine.errors import QwenError
from qwen_run.accuracy.weight_checks import compare_weights
from qwen_run.runtime.engine import Engine

TOKENS = np.random.default_rng(5).integers(0, 131, 40).tolist()
CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BLOCK, NESTED = 64, 32


def four_bits(nested: bool):
    def quantise(name, weight):
        if name == "lm_head":
            return None
        codes = torch.randint(0, 16, (weight.numel(),))
        table = torch.linspace(-1, 1, 16)
        blocks = -(-weight.numel() // BLOCK)
        state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "float32", "shape": list(weight.shape)}
        parts = {"weight": (codes[0::2] << 4 | codes[1::2]).to(torch.uint8)[:, None], "weight.quant_map": table}
        if nested:
            state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": 0.25}
            largest_codes, larger = torch.randint(0, 256, (blocks,)), torch.rand(-(-blocks // NESTED)) * 0.1
            nested_table = torch.linspace(-1, 1, 256)
            largest = nested_table[largest_codes] * larger.repeat_interleave(NESTED)[:blocks] + 0.25
            parts |= {"weight.absmax": largest_codes.to(torch.uint8)}
            parts |= {"weight.nested_absmax": larger, "weight.nested_quant_map": nested_table}
        else:
            largest = torch.rand(blocks) * 0.5
            parts["weight.absmax"] = largest
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        parts["weight.quant_state.bitsandbytes__nf4"] = text
        whole = table[codes] * largest.repeat_interleave(BLOCK)[: weight.numel()]
        return parts, whole.reshape(weight.shape)

    return quantise


@pytest.fixture
def nf4(tiny_checkpoint, tmp_path):
    """Makes ``nf4(nested)``."""

    def make(nested: bool):
        torch.manual_seed(0)
        return quantised(tiny_checkpoint("qwen2", "bfloat16"), tmp_path / "nf4", CONFIG, four_bits(nested))

    return make


def plan(path: Path, **options):
    with Checkpoint.open(path) as weights:
        return plan_build(weights, resolve_checkpoint(str(path)), BuildOptions(**options))


@pytest.mark.parametrize("nested", [False, True])
def test_weights_are_bit_equal_whichever_rows_are_read(nested, nf4):
    found = nf4(nested)
    with Checkpoint.open(found.path) as weights:
        for name, expected in found.weights.items():
            assert np.array_equal(weights.read(f"{name}.weight"), expected), name
            for start, stop in ((1, 2), (3, 13), (7, 16)):
                assert np.array_equal(weights.read(f"{name}.weight", start, stop), expected[start:stop]), name
        assert weights.packed == {}
    assert_read_alike(found.path, found.weights)


def test_an_engine_is_rounded_as_quant_says(nf4, build_engine):
    found = nf4(True)
    assert {linear.quantization.method for linear in plan(found.path).linears} == {"rtn"}
    engine = Engine.load(build_engine(found.path, quant="none"), threads=1)
    # the same weights on both sides: what is left is float32 rounding
    np.testing.assert_allclose(run_alone(engine, TOKENS), hf_logits(found.model, TOKENS), rtol=3e-4, atol=3e-4)


def state_of(**changes):
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [112, 80]} | changes
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("config", "name", "tensor", "message"),
    [
        ({"load_in_8bit": True}, "absmax", None, "by bitsandbytes with 8 bits, only 4 bits are read"),
        ({}, "absmax", None, "the checkpoint lacks model.layers.1.mlp.up_proj.weight.absmax"),
        ({}, "quant_map", torch.zeros(8), "quant_map is F32 (8,), expected F32 or F16 or BF16 (16,)"),
        ({}, "state", state_of(shape=[112, 79]), "up_proj.weight is U8 (4480, 1), expected U8 (4424, 1)"),
        ({}, "state", state_of(shape=[112]), "__nf4 is damaged: shape (112,), blocksize 64"),
        ({}, "state", state_of(blocksize=0), "is damaged: shape (112, 80), blocksize 0"),
        ({}, "state", state_of(nested_offset="x", nested_blocksize=256), "is damaged: nested_blocksize 256"),
        ({}, "state", torch.tensor([91], dtype=torch.uint8), "is damaged: "),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_by_name(config, name, tensor, message, nf4):
    found = nf4(False)
    found.configure(**config)
    part = "quant_state.bitsandbytes__nf4" if name == "state" else name
    tensors = load_file(found.path / "model.safetensors")
    tensors[f"model.layers.1.mlp.up_proj.weight.{part}"] = tensor
    save_file({key: value for key, value in tensors.items() if value is not None}, found.path / "model.safetensors")
    with pytest.raises(QwenError) as error:
        plan(found.path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("nested", [False, True])
def test_the_gate_sees_a_builder_that_reads_other_numbers(nested, nf4, build_engine, monkeypatch, tmp_path):
    found, largest = nf4(nested), bitsandbytes.FourBitWeight._largest
    assert compare_weights(build_engine(found.path, quant="int8"), found.path).passed
    monkeypatch.setattr(bitsandbytes.FourBitWeight, "_largest", lambda *rows: largest(*rows) * np.float32(1.1))
    check = compare_weights(build(found.path, tmp_path / "engine", quant="int8"), found.path)
    assert "model.layers.0.self_attn.q_proj (" in check.message
    assert not check.passed
