"""FP8 checkpoints: dequantised to the last bit, and rounded as any float checkpoint is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cases.formats import QuantisedCheckpoint, assert_read_alike, quantised
from cases.tiny import hf_logits, run_alone
from qwen_build import build
from qwen_build.checkpoint.formats import scaled
from qwen_build.checkpoint.formats.scaled import E4M3
from qwen_build.checkpoint.locate import resolve_checkpoint
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.engine_build import plan_build
from qwen_build.plan.options import BuildOptions
from qwen_engine.errors import CheckpointError, QwenError
from qwen_run.accuracy.weight_checks import compare_weights
from qwen_run.runtime.engine import Engine

TOKENS = np.random.default_rng(5).integers(0, 131, 40).tolist()
BLOCK = [32, 48]  # divides none of the sizes
CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": BLOCK,
    "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.up_proj"],
}


def fp8_blocks(name, weight):
    """Blocks with a scale each, as Qwen's FP8 releases have them."""
    if name in CONFIG["modules_to_not_convert"]:
        return None
    rows, columns = (-(-size // block) for size, block in zip(weight.shape, BLOCK, strict=True))
    scales = (torch.rand(rows, columns) * 1e-3 + 1e-3).bfloat16()
    whole = scales.float().repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
    whole = whole[: weight.shape[0], : weight.shape[1]]
    stored = (weight / whole).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale_inv": scales}, stored.float() * whole


def fp8_tensor(name, weight):
    """One scale for a matrix, and one for its inputs."""
    scale = weight.abs().max() / 448
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scale, "input_scale": torch.tensor(0.5)}, stored.float() * scale


@pytest.fixture
def fp8(tiny_checkpoint, tmp_path) -> QuantisedCheckpoint:
    torch.manual_seed(0)
    return quantised(tiny_checkpoint("qwen3", "bfloat16"), tmp_path / "fp8", CONFIG, fp8_blocks)


def plan(path: Path, **options):
    with Checkpoint.open(path) as weights:
        return plan_build(weights, resolve_checkpoint(str(path)), BuildOptions(**options))


def test_every_byte_is_the_number_that_torch_reads():
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(E4M3, expected)


def test_weights_in_blocks_are_bit_equal(fp8):
    with Checkpoint.open(fp8.path) as weights:
        for name, expected in fp8.weights.items():
            assert np.array_equal(weights.read(f"{name}.weight"), expected), name
            assert np.array_equal(weights.read(f"{name}.weight", 13, 15), expected[13:15]), name
        assert weights.packed == {}
    assert_read_alike(fp8.path, fp8.weights)


def test_weights_with_one_scale_are_bit_equal(tiny_checkpoint, tmp_path):
    config = {"quant_method": "fp8", "activation_scheme": "static"}
    found = quantised(tiny_checkpoint("qwen2"), tmp_path / "fp8", config, fp8_tensor)
    with Checkpoint.open(found.path) as weights:
        for name, expected in found.weights.items():
            assert np.array_equal(weights.read(f"{name}.weight"), expected), name
    assert_read_alike(found.path, found.weights)
    assert any("input_scale and 21 more are left out" in note for note in plan(found.path).notes)


def test_an_engine_is_rounded_as_quant_says(fp8, build_engine):
    schemes = {linear.name: linear.quantization for linear in plan(fp8.path, quant="int8").linears}
    assert {schemes[name].method for name in schemes} == {"rtn"}
    engine = Engine.load(build_engine(fp8.path, quant="none"), threads=1)
    # the same weights on both sides: what is left is float32 rounding
    np.testing.assert_allclose(run_alone(engine, TOKENS), hf_logits(fp8.model, TOKENS), rtol=3e-4, atol=3e-4)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"fmt": "e5m2"}, {}, "quantization_config of fp8 has fmt 'e5m2', expected 'e4m3'"),
        ({"weight_block_size": [128]}, {}, "weight_block_size is [128], expected two sizes such as [128, 128]"),
        ({"weight_block_size": [16, 48]}, {}, "o_proj.weight_scale_inv is BF16 (3, 5), expected floats (5, 5)"),
        ({"modules_to_not_convert": 3}, {}, "modules_to_not_convert of quantization_config is 3, expected a list"),
        (
            {},
            {"model__layers__1__mlp__up_proj__weight_scale_inv": None},
            "lacks model.layers.1.mlp.up_proj.weight_",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_by_name(config, tensors, message, fp8):
    fp8.configure(**config)
    fp8.edit(**tensors)
    with pytest.raises(QwenError) as error:
        plan(fp8.path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_numbers_that_are_not_finite_are_refused(fp8):
    nan = torch.full((112, 80), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    fp8.edit(model__layers__1__mlp__up_proj__weight=nan)
    with Checkpoint.open(fp8.path) as weights, pytest.raises(CheckpointError, match="has 160 NaN or infinite values"):
        weights.read("model.layers.1.mlp.up_proj.weight", 3, 5)


def test_the_gate_sees_a_builder_that_reads_other_numbers(fp8, build_engine, monkeypatch, tmp_path):
    assert compare_weights(build_engine(fp8.path, quant="int8"), fp8.path).passed
    monkeypatch.setattr(scaled, "E4M3", np.where(np.arange(256) & 7 == 5, np.float32(1.1), np.float32(1)) * E4M3)
    check = compare_weights(build(fp8.path, tmp_path / "engine", quant="int8"), fp8.path)
    assert "model.layers.0.self_attn.q_proj (" in check.message
    assert not check.passed
