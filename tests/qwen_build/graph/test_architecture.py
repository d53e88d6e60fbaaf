"""The description of a layer: what the tables that are derived from it say of Qwen's layers and of made-up ones."""

from __future__ import annotations

import dataclasses

import pytest

from cases.configs import PUBLISHED
from cases.made_up import add_made_up
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.graph.architecture import (
    LAYER_KINDS,
    LayerKind,
    LinearSpec,
    ModuleParts,
    distinct_kinds,
    layer_kind,
    linear_names,
    module_parts,
)
from qwen_build.graph.layers import MLP, Schemes, linears_reading
from qwen_build.graph.model import BLOCK_MODULES
from qwen_build.quantization.schemes import Float32
from qwen_engine.errors import UnsupportedModel
from qwen_engine.graph_io import cache_inputs
from qwen_engine.manifest import LinearPart

CONFIG = ModelConfig.from_json(PUBLISHED)


@pytest.fixture
def made_up(monkeypatch) -> ModelConfig:
    add_made_up(monkeypatch)
    return ModelConfig.from_json({**PUBLISHED, "model_type": "made_up", "num_hidden_layers": 4})


def test_every_description_is_whole():
    for kind in LAYER_KINDS.values():
        modules = {block.norm for block in kind.blocks} | {linear.name for linear in kind.linears}
        for block in kind.blocks:
            assert block.computes in BLOCK_MODULES
            assert all(linear.name.startswith(f"{block.name}.") for linear in block.linears)
        for name, read in kind.inputs.items():
            assert name == read.name
            assert name in modules or name.removesuffix(".input") in modules  # how the layers graph names it
            assert read.producer is None or read.producer in modules
        for linears in kind.fused.values():
            assert len({linear.reads for linear in linears}) == 1
            assert len({linear.bias(CONFIG) for linear in linears}) == 1


def test_the_layers_of_qwen():
    kind = layer_kind(CONFIG, 23)
    assert distinct_kinds(CONFIG) == [kind]
    assert kind.shapes(CONFIG) == {
        "self_attn.q_proj": (896, 896), "self_attn.k_proj": (128, 896), "self_attn.v_proj": (128, 896),
        "self_attn.o_proj": (896, 896),
        "mlp.gate_proj": (4864, 896), "mlp.up_proj": (4864, 896), "mlp.down_proj": (896, 4864),
    }  # fmt: skip
    assert kind.reader_names["input_layernorm"] == ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert kind.states(CONFIG, 7, 64, "int8") == cache_inputs([7], 2, 64, 64, "int8")
    qwen3 = ModelConfig.from_json({**PUBLISHED, "model_type": "qwen3"})
    assert set(kind.plain(CONFIG)) - set(kind.plain(qwen3)) == {f"self_attn.{x}_proj.bias" for x in "qkv"}
    assert set(kind.plain(qwen3)) - set(kind.plain(CONFIG)) == {f"self_attn.{x}_norm.weight" for x in "qk"}


def test_a_module_of_the_graph_is_the_linears_of_its_own_layers_kind(made_up):
    name = "mlp.gate_up_proj"
    halves = LinearPart("model.layers.2.mlp.gate_proj", 4864), LinearPart("model.layers.2.mlp.up_proj", 4864)
    assert module_parts(f"model.layers.2.{name}", 9728, made_up) == ModuleParts(halves)
    for own in (f"model.layers.1.{name}", "lm_head"):  # a mixer has none
        assert module_parts(own, 7, made_up) == ModuleParts((LinearPart(own, 7),))


def test_kinds_come_by_turns_or_as_the_config_says(made_up):
    kinds = LAYER_KINDS["full_attention"], LAYER_KINDS["mixer"]
    assert [layer_kind(made_up, layer) for layer in range(4)] == [*kinds, *kinds]
    names = linear_names(made_up)
    assert names[7:11] == ["model.layers.0.mlp.down_proj", "model.layers.1.mixer.in_proj",
                           "model.layers.1.mixer.out_proj", "model.layers.2.self_attn.q_proj"]  # fmt: skip
    hf = {**PUBLISHED, "model_type": "made_up", "num_hidden_layers": 3}
    said = ModelConfig.from_json(hf | {"layer_types": ["mixer", "mixer", "full_attention"]})
    assert [layer_kind(said, layer) for layer in range(3)] == [kinds[1], kinds[1], kinds[0]]
    by_turns = ModelConfig.from_json(hf | {"layer_types": ["full_attention", "mixer", "full_attention"]})
    assert by_turns == ModelConfig.from_json(hf)
    with pytest.raises(UnsupportedModel, match=r"layer_types 'delta' are not supported, only full_attention and mixer"):
        ModelConfig.from_json(hf | {"layer_types": ["mixer", "delta", "full_attention"]})


def test_a_model_of_any_number_of_layers_costs_nothing_to_describe():
    assert layer_kind(dataclasses.replace(CONFIG, num_hidden_layers=2**31 - 1), 2**31 - 2) is layer_kind(CONFIG, 0)


def test_another_reader_of_an_input_is_no_part_of_what_is_fused(monkeypatch):
    kind = LAYER_KINDS["full_attention"]
    attention, mlp = kind.blocks
    reads = mlp.linears[0].reads
    scorer = LinearSpec("mlp.scorer", lambda config: 5, reads)
    monkeypatch.setitem(
        LAYER_KINDS,
        "full_attention",
        LayerKind((attention, dataclasses.replace(mlp, linears=(*mlp.linears, scorer)))),
    )
    schemes = Schemes(Float32(), Float32())
    assert [linear.shape for linear in MLP(CONFIG, 0, schemes, mlp).gate_up] == [(9728, 896)]
    assert "scorer" in linears_reading(CONFIG, 0, schemes, reads.name)
