"""GPTQ and AWQ checkpoints: read bit for bit, and computed with as transformers computes with their weights."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from cases.packed import CASES, PackedCheckpoint, case_name, random_packed
from cases.tiny import hf_logits, run_alone
from qwen_build.checkpoint.formats.words import LAYOUTS, WordFormat, integers
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.engine_build import Plan
from qwen_build.plan.rules import Rule
from qwen_build.quantization.schemes import dequantize
from qwen_engine.errors import BuildError, CheckpointError, QwenError, UnsupportedModel, WeightMismatch
from qwen_run.accuracy.weight_checks import compare_weights
from qwen_run.runtime.engine import Engine

TOKENS = np.random.default_rng(5).integers(0, 131, 70).tolist()


def stored_weights(packed: PackedCheckpoint, plan: Plan) -> dict[str, np.ndarray]:
    """What the engine of ``plan`` computes with, by the names of the checkpoint, inputs in their order there."""
    found = {}
    with Checkpoint.open(packed.path) as checkpoint:
        for name, module in plan.graph.stored.items():
            source = plan.sources[name]
            if not source.packed:
                continue
            rows = source.read(checkpoint, 0, module.shape[0])
            weight = dequantize(module.scheme, module.scheme.store(rows), module.shape)
            if module.permutation is not None:
                weight = weight[:, np.argsort(module.permutation)]
            splits = np.cumsum([rows for _, (rows, _) in source.shapes])[:-1]
            names = [weight.removesuffix(".weight") for weight, _ in source.shapes]
            found |= dict(zip(names, np.split(weight, splits), strict=True))
    return found


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_every_packed_weight_is_stored_bit_for_bit(case, pack):
    packed = pack(case, "qwen3")
    stored = stored_weights(packed, packed.plan())
    assert stored.keys() == packed.weights.keys()
    for name, weight in packed.weights.items():
        assert np.array_equal(stored[name], weight), name


def test_every_format_has_a_case():
    assert {(case.method, case.version) for case in CASES} == LAYOUTS.keys()


EXACT = {"activations": "float32", "embedding_quant": "none", "kv_cache_dtype": "float32"}


@pytest.mark.parametrize("kernels", ["native", "stock"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3-tied"])
@pytest.mark.parametrize(
    "case", [CASES[0], CASES[7], *(case for case in CASES if case.order), CASES[-3], CASES[-2]], ids=case_name
)
def test_an_engine_equals_transformers_with_the_dequantised_weights(case, family, kernels, pack, build_engine):
    packed = pack(case, family)
    engine = Engine.load(build_engine(packed.path, kernels=kernels, **EXACT), threads=1)
    # the same weights on both sides: what is left is float32 rounding
    np.testing.assert_allclose(run_alone(engine, TOKENS), hf_logits(packed.model, TOKENS), rtol=3e-4, atol=3e-4)


def test_linears_that_differ_in_order_or_storage_are_separate(pack, build_engine):
    packed = pack(CASES[10], left_float=("model.layers.2.mlp.up_proj", "model.layers.2.mlp.down_proj"))
    linears = {linear.name: linear for linear in packed.plan().linears}
    assert {name.partition(".layers.")[2] for name in linears if ".layers." in name} == {
        *(f"0.{name}" for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")),
        *(f"{i}.self_attn.{part}_proj" for i in (1, 2) for part in "qkvo"),
        *(f"{i}.mlp.{part}_proj" for i in (1, 2) for part in ("gate", "up", "down")),
    }
    assert linears["model.layers.2.mlp.up_proj"].quantization.scheme == "none"
    assert linears["model.layers.2.mlp.gate_proj"].quantization.scheme == "int4"
    engine = Engine.load(build_engine(packed.path, **EXACT), threads=1)
    np.testing.assert_allclose(run_alone(engine, TOKENS), hf_logits(packed.model, TOKENS), rtol=3e-4, atol=3e-4)


def test_what_is_left_float_may_be_chosen_and_is_not_fused_with_what_is_packed(pack, build_engine):
    packed = pack(CASES[0], left_float=("model.layers.0.self_attn.k_proj",))
    rules = (Rule("rules.json", "*.0.*.k_proj", "int4", group_size=32, symmetric=False),)
    linears = {linear.name: linear.quantization for linear in packed.plan(quant_config=rules).linears}
    alike = dataclasses.replace(
        linears["model.layers.0.self_attn.q_proj"], method="rtn", activation_scales="block"
    )  # and not "imported", whose scales are whatever they are
    assert linears["model.layers.0.self_attn.k_proj"] == alike
    build_engine(packed.path, quant_config=rules)
    with pytest.raises(
        BuildError, match=r"'\*.0.\*' matches model.layers.0.self_attn.q_proj, which the checkpoint has"
    ):
        packed.plan(exclude=("*.0.*",))


def test_a_packed_head_is_read(pack, build_engine):
    packed = pack(CASES[1], head=True)
    linears = {linear.name: linear for linear in packed.plan().linears}
    assert linears["lm_head"].quantization.group_size == 64
    engine, tokens = Engine.load(build_engine(packed.path, **EXACT), threads=1), [token % 128 for token in TOKENS]
    np.testing.assert_allclose(run_alone(engine, tokens), hf_logits(packed.model, tokens), rtol=3e-4, atol=3e-4)


def test_outputs_that_do_not_fill_an_int32_are_refused():
    with pytest.raises(UnsupportedModel, match="lm_head: 131 outputs and 80 inputs do not fill whole int32 of 8"):
        WordFormat.from_json(CASES[0].config).tensors("lm_head", 131, 80)


def test_the_bias_of_zeros_that_autogptq_adds_is_no_weight(pack):
    packed = pack(CASES[0])
    packed.edit(model__layers__0__mlp__down_proj__bias=np.zeros(80, np.float16))
    packed.plan()
    packed.edit(model__layers__0__mlp__down_proj__bias=np.ones(80, np.float16))
    with pytest.raises(WeightMismatch, match=r"no place for model.layers.0.mlp.down_proj.bias"):
        packed.plan()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "aqlm"}, "(aqlm), only gptq, awq, auto-round"),
        ({"quant_method": ["gptq"]}, "only gptq, awq, auto-round"),
        ({"bits": 3}, "gptq has bits 3, expected 4 or 8"),
        ({"bits": 4.0}, "gptq has bits 4.0, expected 4 or 8"),
        ({"group_size": 16}, "has group_size 16, expected multiples of 32 or -1"),
        ({"group_size": 0}, "has group_size 0,"),
        ({"group_size": None}, "has group_size None,"),
        ({"checkpoint_format": "marlin"}, "has version 'marlin', expected gptq or gptq_v2"),
        ({"is_marlin_format": True}, "has is_marlin_format True, expected False"),
        ({"pack_dtype": "int16"}, "has pack_dtype 'int16', expected int32"),
        ({"quant_method": "awq"}, "model.layers.0.mlp.down_proj.qzeros is I32 (4, 10), expected I32 (1, 80)"),
        ({"quant_method": "awq", "version": "gemv"}, "has version 'gemv', expected gemm"),
        ({"quant_method": "awq", "version": "gemm", "backend": "llm-awq"}, "has version 'llm-awq', expected gemm"),
        ({"quant_method": "awq", "version": "GEMM", "bits": 8}, "awq has bits 8, expected 4"),
        ({"group_size": 64}, "q_proj.qzeros is I32 (3, 10), expected I32 (2, 10)"),
        ({"dynamic": {"+:.*down_proj": {"bits": 3}}}, "down_proj: '+:.*down_proj' of quantization_config: "),
        ({"dynamic": {".*up_proj": {"group_size": 64}}}, "up_proj.qzeros is I32 (3, 14), expected I32 (2, 14)"),
        ({"dynamic": {"(a+)+$": {"bits": 8}}}, "which may take for ever to match"),
        ({"dynamic": {"(": {"bits": 8}}}, "has '(', which is no pattern"),
        ({"dynamic": [1]}, "dynamic of quantization_config is [1], expected an object"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_by_name(changes, message, pack, build_engine):
    packed = pack(CASES[0])
    packed.configure(**changes)
    with pytest.raises(QwenError) as error:
        build_engine(packed.path, embedding_quant="none")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_dynamic_leaves_float_or_alike_is_read(pack):
    packed = pack(CASES[0], left_float=("model.layers.0.mlp.down_proj",))
    packed.configure(dynamic={"-:.*layers.0.mlp.down_proj": {}, "+:.*up_proj": {"bits": 4, "desc_act": True}})
    assert packed.plan().notes == ()


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("case", [CASES[8], CASES[9]], ids=case_name)
def test_zero_points_stored_as_they_are_under_the_older_name_are_read_so(case, sym, pack):
    packed = pack(dataclasses.replace(case, version="gptq_v2"))
    packed.configure(checkpoint_format="gptq", sym=sym)
    plan = packed.plan()
    middle = 2 ** (case.bits - 1)
    assert plan.notes == (f"all zero points are stored as {middle}: read as gptq_v2's, though config.json says gptq.",)
    stored = stored_weights(packed, plan)
    assert all(np.array_equal(stored[name], weight) for name, weight in packed.weights.items())


@pytest.mark.parametrize("case", [CASES[0], CASES[12]], ids=case_name)
def test_zero_points_count_where_the_config_calls_the_grid_symmetric(case, pack):
    packed = pack(case)
    packed.configure(sym=True)
    plan = packed.plan()
    assert plan.notes == ("config.json says that the grid is symmetric; the zero points differ, and count.",)
    assert {linear.quantization.symmetric for linear in plan.linears if ".layers." in linear.name} == {False}
    stored = stored_weights(packed, plan)
    assert all(np.array_equal(stored[name], weight) for name, weight in packed.weights.items())


def test_symmetric_awq_is_read_with_the_zero_points_it_stores(pack):
    case = dataclasses.replace(CASES[-5], symmetric=True)
    assert case.method == "awq"
    packed = pack(case)
    packed.configure(zero_point=False)
    plan = packed.plan()
    assert {linear.quantization.symmetric for linear in plan.linears if ".layers." in linear.name} == {True}
    stored = stored_weights(packed, plan)
    assert all(np.array_equal(stored[name], weight) for name, weight in packed.weights.items())


def test_packed_weights_that_the_config_says_nothing_of_are_named(pack):
    packed = pack(CASES[0])
    config = json.loads((packed.path / "config.json").read_text())
    del config["quantization_config"]
    (packed.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"qweight, and config.json no quantization_config .* add what "):
        packed.plan()


def test_a_packed_head_of_a_tied_model_is_named_and_read_when_the_advice_is_followed(pack):
    packed = pack(CASES[1], head=True)
    config = json.loads((packed.path / "config.json").read_text())
    for tied in (True, False):
        (packed.path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
        if tied:
            with pytest.raises(CheckpointError, match="a packed lm_head of its own; set tie_word_embeddings to false"):
                packed.plan()
    packed.plan()


def test_a_zero_point_that_programs_read_differently_is_refused(pack, build_engine):
    packed = pack(CASES[0])
    packed.edit(model__layers__1__mlp__down_proj__qzeros=np.full((4, 10), -1, np.int32))
    with pytest.raises(UnsupportedModel, match=r"model.layers.1.mlp.down_proj.qzeros has 15, .* 16 and some as 0"):
        build_engine(packed.path)


def test_a_scale_the_panels_cannot_hold_is_refused_and_fits_the_stock_kernels(pack, build_engine):
    packed = pack(CASES[0])
    packed.edit(model__layers__1__mlp__down_proj__scales=np.full((4, 80), 64, np.float16))
    with pytest.raises(
        CheckpointError, match=r"model.layers.1.mlp.down_proj.weight: .* hold the scale 64; use --kernels"
    ):
        build_engine(packed.path)
    build_engine(packed.path, kernels="stock")


def test_an_uneven_order_is_refused(pack):
    packed = pack(CASES[0])
    packed.edit(model__layers__1__mlp__down_proj__g_idx=np.zeros(112, np.int32))
    with pytest.raises(UnsupportedModel, match=r"down_proj.g_idx has not 32 inputs in every group"):
        packed.plan()
    packed.edit(model__layers__1__mlp__down_proj__g_idx=None)
    with pytest.raises(WeightMismatch, match=r"lacks model.layers.1.mlp.down_proj.g_idx"):
        packed.plan()


@pytest.mark.parametrize("options", [{"quant": "int8"}, {"group_size": 64}, {"symmetric": False}], ids=str)
def test_what_the_checkpoint_decided_cannot_be_chosen(options, pack):
    packed = pack(CASES[0])
    with pytest.raises(BuildError, match="cannot be chosen, the checkpoint is stored as gptq int4 already"):
        packed.plan(**options)


@pytest.mark.parametrize("case", [CASES[4], CASES[8], CASES[-5]], ids=case_name)
def test_any_slice_of_a_fused_weight_is_its_rows(case, pack):
    packed = pack(case)
    source = packed.plan().sources["model.layers.0.self_attn.qkv_proj.weight"]  # of 80, 16 and 16 outputs
    with Checkpoint.open(packed.path) as checkpoint:
        whole = source.read(checkpoint, 0, 112)
        for start, stop in [(0, 32), (32, 96), (64, 112), (80, 96), (3, 21), (79, 81)]:
            part = source.read(checkpoint, start, stop)
            assert np.array_equal(part.q, whole.q[start:stop])
            assert np.array_equal(part.scales, whole.scales[start:stop])
            if whole.zero_points is not None:
                assert np.array_equal(part.zero_points, whole.zero_points[start:stop])


def test_integers_of_an_int32_come_lowest_first():
    assert integers(np.array([[-2]], np.int32), 8).tolist() == [[[254, 255, 255, 255]]]
    assert integers(np.array([[-2]], np.int32), 4)[0, 0, 0] == 14


def test_a_group_of_many_is_several_of_ours():
    config = {"quant_method": "gptq", "bits": 8, "group_size": 96, "sym": False}
    assert WordFormat.from_json(config).grid.group_size == 32
    assert WordFormat.from_json(config | {"group_size": 1024}).grid.group_size == 128


def test_linears_have_the_bits_and_groups_that_a_rule_gives_them(pack, build_engine):
    packed = pack(CASES[0])
    name = "model.layers.1.mlp.down_proj"
    own, weight = random_packed(dataclasses.replace(CASES[0], bits=8, group_size=64), (80, 112), 1, 1)
    packed.edit(**{f"{name}.{suffix}": np.ascontiguousarray(tensor) for suffix, tensor in own.items()})
    packed.configure(dynamic={r"+:.*\.1\..*down_proj": {"bits": 8, "group_size": 64}, r".*down_proj": {"bits": 3}})
    with pytest.raises(UnsupportedModel, match=r"layers.0.mlp.down_proj: '.\*down_proj' .* has bits 3"):
        packed.plan()
    packed.configure(dynamic={r"+:.*\.1\..*down_proj": {"bits": 8, "group_size": 64}, r"-:.*up_proj": {"bits": 3}})
    plan = packed.plan()
    found = {linear.name: (linear.quantization.bits, linear.quantization.group_size) for linear in plan.linears}
    assert (found[name], found["model.layers.0.mlp.down_proj"], plan.options.quant) == ((8, 64), (4, 32), "int4")
    stored = stored_weights(packed, plan)
    assert all(np.array_equal(stored[other], weight if other == name else packed.weights[other]) for other in stored)
    assert compare_weights(build_engine(packed.path), packed.path).passed


@pytest.mark.parametrize("pattern", ["model.layers.1.mlp.down_proj", r"model\.layers\.1\..*down_proj"])
def test_autoround_keeps_what_is_otherwise_in_extra_config(pattern, pack, build_engine):
    case = next(case for case in CASES if case.version == "auto_round")
    packed = pack(case)
    name = "model.layers.1.mlp.down_proj"
    own, weight = random_packed(dataclasses.replace(case, bits=8, group_size=32), (80, 112), 1, 1)
    packed.edit(**{f"{name}.{suffix}": np.ascontiguousarray(tensor) for suffix, tensor in own.items()})
    packed.configure(extra_config={pattern: {"bits": 8, "group_size": 32, "sym": False}, "lm_head": {"bits": 16}})
    stored = stored_weights(packed, packed.plan())
    assert np.array_equal(stored[name], weight)
    assert all(np.array_equal(stored[other], packed.weights[other]) for other in stored if other != name)
    assert compare_weights(build_engine(packed.path), packed.path).passed
