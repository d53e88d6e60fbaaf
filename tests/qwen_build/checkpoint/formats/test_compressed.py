"""compressed-tensors: what its own library writes is read as that library reads it, and kept where it fits."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from cases.formats import QuantisedCheckpoint, assert_read_alike, in_groups, quantised
from cases.tiny import hf_logits, run_alone
from qwen_build import build
from qwen_build.checkpoint.formats import compressed
from qwen_build.checkpoint.locate import resolve_checkpoint
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.engine_build import plan_build
from qwen_build.plan.options import BuildOptions
from qwen_engine.errors import QwenError
from qwen_run.accuracy.weight_checks import compare_weights
from qwen_run.runtime.engine import Engine

pytest.importorskip("compressed_tensors")

TOKENS = np.random.default_rng(5).integers(0, 131, 40).tolist()


def group(strategy: str, bits: int = 4, symmetric: bool = True, kind: str = "int", size: int | None = None, **more):
    weights = {"num_bits": bits, "type": kind, "symmetric": symmetric, "strategy": strategy, "group_size": size} | more
    return {"targets": ["Linear"], "weights": weights, "input_activations": None}


TOKEN = {"input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}}
# name -> (format, what config_groups hold)
CASES = {
    "w4a16 g32": ("pack-quantized", group("group", size=32)),
    "w4a16 asymmetric": ("pack-quantized", group("group", symmetric=False, size=32)),
    "w4a16 channel": ("pack-quantized", group("channel")),
    "w8a16 g64": ("pack-quantized", group("group", bits=8, size=64)),
    "w8a8": ("int-quantized", group("channel", bits=8) | TOKEN),
    "w8a8 asymmetric": ("int-quantized", group("channel", bits=8, symmetric=False) | TOKEN),
    "w8 tensor": ("int-quantized", group("tensor", bits=8)),
    "fp8 channel": ("float-quantized", group("channel", bits=8, kind="float")),
    "fp8 block": ("float-quantized", group("block", bits=8, kind="float", block_structure=[32, 48])),
}
EXACT = [name for name in CASES if not name.startswith("fp8")]


def config_of(name: str, **changes):
    layout, one = CASES[name]
    config = {"quant_method": "compressed-tensors", "format": layout, "ignore": ["lm_head"]}
    return config | {"quantization_status": "compressed", "config_groups": {"group_0": copy.deepcopy(one)}} | changes


def library(name: str, scale_dtype=torch.bfloat16):
    """What ``compressed_tensors`` makes of a weight in the case ``name``, and what it reads of that."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    layout, one = CASES[name]
    scheme, args = QuantizationScheme(**one), one["weights"]
    compressor = BaseCompressor.get_value_from_registry(layout)

    def quantise(linear, weight):
        if linear == "lm_head":
            return None
        rows, columns = weight.shape
        size = args["group_size"]
        shape = {
            "group": (rows, -(-columns // (size or 1))),
            "channel": (rows, 1),
            "tensor": (1,),
            "block": (-(-rows // 32), -(-columns // 48)),
        }[args["strategy"]]
        scale = (torch.rand(shape) * 0.5 + 0.75).mul(0.5 / (7 if args["num_bits"] == 4 else 127)).to(scale_dtype)
        state = {"weight": weight.to(scale_dtype), "weight_scale": scale}
        if not args["symmetric"]:
            state["weight_zero_point"] = torch.randint(-3, 4, shape, dtype=torch.int8)
        packed = compressor.compress(state, scheme)
        exact = packed | {"weight_scale": packed["weight_scale"].float()}
        return packed, compressor.decompress(exact, scheme)["weight"]

    return quantise


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return in_groups(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def compress(tiny, tmp_path):
    """Makes ``compress(case, scale_dtype=torch.bfloat16)``."""

    def make(name: str, scale_dtype=torch.bfloat16) -> QuantisedCheckpoint:
        torch.manual_seed(0)
        return quantised(tiny, tmp_path / "compressed", config_of(name), library(name, scale_dtype))

    return make


def plan(path: Path, **options):
    with Checkpoint.open(path) as weights:
        return plan_build(weights, resolve_checkpoint(str(path)), BuildOptions(**options))


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_that_the_library_reads(name, compress):
    found = compress(name)
    assert found.weights
    with Checkpoint.open(found.path) as weights:
        for linear, expected in found.weights.items():
            assert np.array_equal(weights.read(f"{linear}.weight"), expected), linear
            assert np.array_equal(weights.read(f"{linear}.weight", 3, 13), expected[3:13]), linear
        assert set(weights.packed) == ({f"{linear}.weight" for linear in found.weights} if name in EXACT else set())
    assert_read_alike(found.path, found.weights)


@pytest.mark.parametrize("name", EXACT)
def test_what_fits_the_grids_is_stored_bit_for_bit(name, compress, build_engine):
    found = compress(name)
    linears = {part.name: linear for linear in plan(found.path).linears for part in linear.parts}
    assert {linears[linear].quantization.method for linear in found.weights} == {"imported"}
    assert compare_weights(build_engine(found.path), found.path).passed
    scales = {(linears[n].quantization.weight_scales, linears[n].quantization.activation_scales) for n in found.weights}
    expected = {"w8a8": ("channel", "token"), "w8a8 asymmetric": ("group", "token")}.get(name, ("group", "group"))
    assert scales == {expected}


@pytest.mark.parametrize("name", ["w4a16 asymmetric", "w8a8", "fp8 block"])
def test_an_engine_equals_transformers_with_these_weights(name, compress, build_engine):
    found = compress(name)
    exact = {"quant": "none"} if name not in EXACT else {"activations": "float32", "activation_scales": "group"}
    engine = Engine.load(build_engine(found.path, embedding_quant="none", kv_cache_dtype="float32", **exact), threads=1)
    # the same weights on both sides: what is left is float32 rounding
    np.testing.assert_allclose(run_alone(engine, TOKENS), hf_logits(found.model, TOKENS), rtol=3e-4, atol=3e-4)


def test_scales_that_float16_does_not_hold_are_rounded_to_it_and_named(compress):
    found = compress("w4a16 g32", scale_dtype=torch.float32)
    assert any(
        "more have scales that float16 does not hold: they are rounded to it" in n for n in plan(found.path).notes
    )
    with Checkpoint.open(found.path) as weights:
        for linear, expected in found.weights.items():
            # half of a step of float16
            np.testing.assert_allclose(weights.read(f"{linear}.weight"), expected, rtol=2**-11)


def test_groups_are_found_by_name_before_what_a_linear_is(compress):
    found = compress("w4a16 g32")
    groups = {
        "all": CASES["w8a16 g64"][1],
        "down": CASES["w4a16 g32"][1] | {"targets": ["re:.*layers.[12].*", "model.layers.0.self_attn.o_proj"]},
        "rest": CASES["w4a16 g32"][1]
        | {"targets": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]},
    }
    found.configure(config_groups=groups)
    with Checkpoint.open(found.path) as weights:
        assert all(np.array_equal(weights.read(f"{n}.weight"), expected) for n, expected in found.weights.items())


@pytest.mark.parametrize(
    ("changes", "weights", "message"),
    [
        ({"format": "nvfp4-pack-quantized"}, {}, "has format 'nvfp4-pack-quantized', expected one of dense, pack-"),
        ({"format": "marlin-24"}, {}, "has format 'marlin-24'"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, {}, "has sparsity_config, which is not read"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, {}, "has transform_config, which is not read"),
        ({"config_groups": {}}, {}, "has no config_groups"),
        ({"config_groups": [1]}, {}, "config_groups of quantization_config is [1], expected an object"),
        ({"ignore": ["re:.*layers.0.*"], "config_groups": {"g": {"targets": ["x"]}}}, {}, "has num_bits None in"),
        ({}, {"num_bits": 3}, "has num_bits 3 in config_groups.group_0, expected 4 or 8"),
        ({}, {"strategy": "tensor_group"}, "has strategy 'tensor_group' in config_groups.group_0"),
        ({}, {"group_size": 16}, "has group_size 16 in config_groups.group_0, expected multiples of 32"),
        ({}, {"group_size": 64}, "weight_scale is BF16"),
        ({}, {"symmetric": False}, "the checkpoint lacks model.layers"),
        ({}, {"type": "complex"}, "has type 'complex' in config_groups.group_0, expected int or float"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_by_name(changes, weights, message, tmp_path, compress):
    found = compress("w4a16 g32")
    config = config_of("w4a16 g32", **changes)
    if weights:
        config["config_groups"]["group_0"]["weights"] |= weights
    found.configure(**config)
    with pytest.raises(QwenError) as error:
        plan(found.path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_linear_that_no_group_targets_is_named(compress):
    found = compress("w4a16 g32")
    groups = {"g": CASES["w4a16 g32"][1] | {"targets": ["re:.*layers.[12].*"]}}
    found.configure(config_groups=groups, ignore=["re:.*layers.0.self_attn.*"])
    with pytest.raises(QwenError, match=r"layers.0.*is quantised, and ignore lists it"):
        plan(found.path)


def test_the_gate_sees_a_builder_that_reads_other_numbers(compress, monkeypatch, tmp_path):
    found, scales = compress("w4a16 asymmetric"), compressed.IntegerWeight.scales
    monkeypatch.setattr(compressed.IntegerWeight, "scales", lambda *rows: scales(*rows) * np.float32(2))
    check = compare_weights(build(found.path, tmp_path / "engine"), found.path)
    assert "model.layers.0.self_attn.q_proj (not equal to the bit)" in check.message
    assert not check.passed
