"""Mixtures of experts in config.json, and both ways in which files hold their weights."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from cases.configs import MIXTURES, PUBLISHED
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.safetensors import Safetensors
from qwen_build.graph.architecture import layer_kind
from qwen_engine.errors import CheckpointError, UnsupportedModel
from qwen_engine.sizes import ExpertSizes

QWEN3 = MIXTURES["Qwen3-30B-A3B"]
SIZES = {
    "Qwen1.5-MoE-A2.7B": ExpertSizes(60, 4, 1408, 5632, False),
    "Qwen2-57B-A14B": ExpertSizes(64, 8, 2560, 20480, False),
    "Qwen3-30B-A3B": ExpertSizes(128, 8, 768, 0, True),
    "Qwen3-235B-A22B": ExpertSizes(128, 8, 1536, 0, True),
}


def with_experts(config: ModelConfig) -> list[int]:
    """The layers that are mixtures of experts."""
    return [
        layer
        for layer in range(config.num_hidden_layers)
        if any(block.computes.endswith("experts") for block in layer_kind(config, layer).blocks)
    ]


@pytest.mark.parametrize("name", MIXTURES)
def test_published_mixtures(name):
    config = ModelConfig.from_json(MIXTURES[name])
    assert config.experts == SIZES[name]
    assert with_experts(config) == list(range(config.num_hidden_layers))
    assert config.qkv_bias == (config.model_type == "qwen2_moe")
    assert not config.o_bias
    assert config.unknown == ()


def test_a_dense_model_has_no_experts():
    assert ModelConfig.from_json(PUBLISHED).experts is None


def test_the_number_of_experts_has_two_names():
    renamed = {key: value for key, value in QWEN3.items() if key != "num_experts"} | {"num_local_experts": 128}
    assert ModelConfig.from_json(renamed) == ModelConfig.from_json(QWEN3)
    assert ModelConfig.from_json(QWEN3 | {"num_local_experts": 128}) == ModelConfig.from_json(QWEN3)
    with pytest.raises(CheckpointError, match="num_experts is 128 and num_local_experts 64; keep the right one"):
        ModelConfig.from_json(QWEN3 | {"num_local_experts": 64})


@pytest.mark.parametrize("name", ["Qwen1.5-MoE-A2.7B", "Qwen3-30B-A3B"])
@pytest.mark.parametrize(
    "change",
    [
        {"mlp_only_layers": [0, 5]},
        {"mlp_only_layers": None},
        {"decoder_sparse_step": 2},
        {"decoder_sparse_step": 3, "mlp_only_layers": [2, 4, 11]},
        {"num_experts": 0},
    ],
    ids=str,
)
def test_the_same_layers_have_experts_as_in_transformers(name, change):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    hf = MIXTURES[name] | {"num_hidden_layers": 12} | change
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(**hf)
        model = transformers.AutoModelForCausalLM.from_config(config)
    expected = [layer for layer, module in enumerate(model.model.layers) if hasattr(module.mlp, "experts")]
    assert with_experts(ModelConfig.from_json(hf)) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window True is not supported, only False is"),
        ({"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' is not supported, only 'softmax' is"),
        ({"n_group": 8}, "n_group 8 is not supported, only 1 is"),
        ({"routed_scaling_factor": 2.5}, r"routed_scaling_factor 2\.5 is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"layer_types": ["sliding_attention"] * 48}, "layer_types 'sliding_attention' are not supported"),
        ({"hidden_size": 2064}, "hidden_size 2064 of a mixture of experts is not a multiple of 32"),
        ({"moe_intermediate_size": 776}, "moe_intermediate_size 776 of a mixture of experts is not a multiple of 16"),
    ],
)
def test_what_the_graph_lacks_is_refused_by_name(change, message):
    with pytest.raises(UnsupportedModel, match=message):
        ModelConfig.from_json(QWEN3 | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": -1}, "num_experts is -1, expected a number of experts"),
        ({"num_experts": "128"}, "num_experts is '128', expected a number of experts"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0, expected a positive integer"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok is 129, expected at most the 128 experts"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size is 0, expected a positive integer"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1, expected true or false"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0, expected a positive integer"),
        ({"mlp_only_layers": 3}, "mlp_only_layers is 3, expected a list of numbers of layers"),
        ({"mlp_only_layers": ["1"]}, r"mlp_only_layers is \['1'\], expected a list"),
    ],
)
def test_what_cannot_be_is_named(change, message):
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_json(QWEN3 | change)


def test_tensors_of_all_experts_are_read_as_those_of_each(tmp_path):
    rng, prefix = np.random.default_rng(0), "model.layers.3.mlp.experts"
    both, down = (rng.standard_normal(shape).astype(np.float16) for shape in ((3, 8, 5), (3, 5, 4)))
    save_file({f"{prefix}.gate_up_proj": both, f"{prefix}.down_proj": down}, tmp_path / "model.safetensors")
    files = Safetensors.open(tmp_path)
    assert len(files.tensors) == 9
    for expert in range(3):
        for name, weight in (("gate", both[expert, :4]), ("up", both[expert, 4:]), ("down", down[expert])):
            assert np.array_equal(files.read(f"{prefix}.{expert}.{name}_proj.weight"), weight)
            assert np.array_equal(files.read(f"{prefix}.{expert}.{name}_proj.weight", 1, 3), weight[1:3])
    files.close()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"gate_up_proj": (2, 7, 5)},
            "gate_up_proj has 7 rows for each expert, expected those of gate_proj and up_proj",
        ),
        (
            {"down_proj": (2, 5, 4), "1.down_proj.weight": (5, 4)},
            r"has both .*experts\.down_proj and .*experts\.1\.down_proj\.weight; remove one",
        ),
    ],
)
def test_tensors_that_are_not_those_of_experts_are_refused(tensors, message, tmp_path):
    named = {f"model.layers.0.mlp.experts.{name}": np.zeros(shape, np.float32) for name, shape in tensors.items()}
    save_file(named, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        Safetensors.open(tmp_path)
