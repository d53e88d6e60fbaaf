"""config.json in all its spellings, and what the graph does not have refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cases.configs import PUBLISHED
from qwen_build.architectures import ARCHITECTURES
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.config_keys import unknown_keys
from qwen_engine.errors import CheckpointError, UnsupportedModel

# which has no class for a Qwen-1
OF_TRANSFORMERS = [model_type for model_type in ARCHITECTURES if model_type != "qwen"]


def test_a_published_config():
    config = ModelConfig.from_json(PUBLISHED)
    assert (config.head_dim, config.rope_theta, config.rms_norm_eps) == (64, 1e6, 1e-6)
    assert config.tie_word_embeddings
    assert (config.qkv_bias, config.o_bias) == (True, False)
    assert config.eos_token_ids == (151645,)


def test_old_and_new_spellings_say_the_same():
    new = {k: v for k, v in PUBLISHED.items() if k not in ("rope_theta", "torch_dtype")}
    new |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "dtype": "bfloat16"}
    new |= {"layer_types": ["full_attention"] * 24}
    old = PUBLISHED | {"rope_scaling": None}
    assert ModelConfig.from_json(new) == ModelConfig.from_json(old)


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_theta_is_found_wherever_transformers_keeps_it(key):
    hf = {k: v for k, v in PUBLISHED.items() if k != "rope_theta"}
    for rope in ({"rope_theta": 5000}, {"type": "default", "rope_theta": 5000.0, "factor": None}):
        assert ModelConfig.from_json(hf | {key: rope}).rope_theta == 5000.0


def test_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    qwen3 = PUBLISHED | {"model_type": "qwen3", "head_dim": None}
    for hf in (PUBLISHED, qwen3):
        hf = {k: v for k, v in hf.items() if k not in ("rope_theta", "rms_norm_eps", "head_dim", "tie_word_embeddings")}
        theirs = transformers.AutoConfig.for_model(**hf)
        ours = ModelConfig.from_json(hf)
        head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
        assert ours.head_dim == head_dim
        assert ours.rms_norm_eps == theirs.rms_norm_eps
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.tie_word_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "mamba"},
            "model_type 'mamba' is not one of qwen2, qwen3, qwen2_moe, qwen3_moe, qwen, llama, mistral",
        ),
        ({"model_type": "mixtral"}, r"model_type 'mixtral' \(a mixture of experts\) is not one of qwen2"),
        ({"model_type": "deepseek_v3"}, r"model_type 'deepseek_v3' \(multi-head latent attention\) is not one of"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias True is not supported, only False is"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu' is"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4.0}}}, "only one for all"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "rope_scaling asks for rope type 'mrope'"),
        ({"rope_scaling": {"type": [1]}}, r"rope type \[1\]"),
        ({"model_type": []}, r"model_type \[\] is not one of"),
        ({"max_position_embeddings": 2**31}, "max_position_embeddings is 2147483648, expected at most 16777216"),
        ({"num_hidden_layers": 10**30}, "expected at most 2147483647"),
        ({"layer_types": ["chunked_attention"]}, "layer_types 'chunked_attention' are not supported"),
        ({"mlp_bias": True}, "mlp_bias True is not supported, only False is"),
        ({"is_causal": False}, "is_causal False is not supported, only True is"),
        ({"chunk_size_feed_forward": False}, "chunk_size_feed_forward False is not supported, only 0 is"),
        ({"per_layer_config": {"3": {"head_dim": 32}}}, "per_layer_config .* is not supported"),
        ({"quantization": {"bits": 4}}, "config.json has quantization: .* by mlx, which cannot be read"),
        ({"head_dim": 260}, "head_dim 260 is not a multiple of 8 up to 256"),
    ],
)
def test_what_the_graph_lacks_is_refused_by_name(change, message):
    with pytest.raises(UnsupportedModel, match=message):
        ModelConfig.from_json(PUBLISHED | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "896"}, "hidden_size is '896', expected a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a positive integer"),
        ({"vocab_size": None}, "vocab_size is None, expected a positive integer"),
        ({"rope_theta": -1}, "rope_theta is -1, expected a positive number"),
        ({"rope_theta": float("nan")}, "rope_theta is nan, expected a positive number"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf, expected a positive number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"rope_scaling": {"rope_theta": 5000.0}}, "has rope_theta 5000.0 and 1000000.0; keep the right one"),
        ({"rope_scaling": {"rope_type": "default", "type": "yarn"}}, "rope_type 'default' and 'yarn'; keep the right"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4}, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling and rope_parameters has rope_type 'yarn' and 'default'; keep the right one",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor is None, expected a positive number"),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "rope_scaling.factor is '4', expected a positive number"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "truncate": 1}}, "rope_scaling.truncate is 1, expected true"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": "x"}},
            "original_max_position_embeddings is 'x', expected a number of tokens",
        ),
        (
            {"rope_scaling": {"type": "llama3", "factor": 4, "low_freq_factor": 4, "high_freq_factor": 4}},
            "low_freq_factor is 4.0, expected less than 4.0",
        ),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1, 0]}}, "short_factor is .*, expected a list of pos"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}, "rope_theta": 1}, "rope_theta is 1.0, expected more than 1"),
        ({"dual_chunk_attention_config": 5}, "dual_chunk_attention_config is 5, expected an object"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', expected an object"),
        ({"rope_scaling": 0}, "rope_scaling is 0, expected an object"),
        ({"rope_parameters": [4]}, r"rope_parameters is \[4\], expected an object"),
        ({"layer_types": 5}, "layer_types is 5, expected a list"),
        ({"layer_types": ["full_attention"] * 23}, "23 layer_types, num_hidden_layers 24"),
        ({"layer_types": ["sliding_attention"] * 24}, "layer_types has sliding_attention, but use_sliding_window"),
        ({"use_sliding_window": "yes"}, "use_sliding_window is 'yes', expected true or false"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0, expected a positive integer or null"),
        ({"use_sliding_window": True, "max_window_layers": "all"}, "max_window_layers is 'all', expected an integer"),
        ({"model_type": "qwen3", "attention_bias": "no"}, "attention_bias is 'no', expected true or false"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or false"),
        ({"max_position_embeddings": 1e30}, r"max_position_embeddings is 1e\+30, expected a positive integer"),
        ({"eos_token_id": True}, "eos_token_id is True, expected an integer"),
        ({"eos_token_id": [1, False]}, r"eos_token_id is \[1, False\], expected an integer"),
        ({"num_key_value_heads": 4}, "num_attention_heads 14 is not a multiple of num_key_value_heads 4"),
        ({"eos_token_id": "<|im_end|>"}, "eos_token_id is '<|im_end|>', expected an integer or a list"),
    ],
)
def test_broken_configs_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message.replace("|", r"\|")):
        ModelConfig.from_json(PUBLISHED | change)


def test_every_architecture_can_be_read():
    for model_type in ARCHITECTURES:
        hf = PUBLISHED | {"model_type": model_type, "seq_length": 2048}
        assert ModelConfig.from_json(hf).model_type == model_type


def same_computation(change, model_type="qwen2"):
    """Whether a published config with ``change`` computes what it computes without."""
    before = ModelConfig.from_json(PUBLISHED | {"model_type": model_type})
    return replace(ModelConfig.from_json(PUBLISHED | {"model_type": model_type} | change), unknown=()) == before


WINDOWED = {"use_sliding_window": True, "sliding_window": 4096}


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "swish"},
        {"attention_bias": False},
        {"attention_bias": True},
        {"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}},
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
        {"sliding_window": 8, "max_window_layers": 0},
        WINDOWED | {"max_window_layers": 24},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 32768, "max_window_layers": 0},
        WINDOWED | {"max_window_layers": 0, "layer_types": ["full_attention"] * 24},
    ],
    ids=str,
)
def test_what_is_spelled_otherwise_and_computes_the_same_is_taken(change):
    assert same_computation(change)


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("change", "window", "kinds"),
    [
        (WINDOWED | {"max_window_layers": 21}, 4096, (*[FULL] * 21, *[SLIDING] * 3)),
        (WINDOWED | {"layer_types": [FULL] * 23 + [SLIDING]}, 4096, (*[FULL] * 23, SLIDING)),
        (WINDOWED | {"layer_types": [SLIDING] * 24, "max_window_layers": 24}, 4096, (SLIDING,)),
        (WINDOWED | {"max_window_layers": -1}, 4096, (SLIDING,)),
        (WINDOWED | {"max_window_layers": 24}, None, (FULL,)),
        (WINDOWED | {"max_window_layers": 0, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 4096, (SLIDING,)),
        ({"model_type": "mistral", "sliding_window": 4096}, 4096, (SLIDING,)),
        ({"model_type": "mistral", "sliding_window": None}, None, (FULL,)),
        ({"model_type": "llama", "sliding_window": 4096}, None, (FULL,)),
    ],
    ids=str,
)
def test_layers_with_a_window_are_a_kind_of_their_own(change, window, kinds):
    config = ModelConfig.from_json(PUBLISHED | change)
    assert (config.sliding_window, config.layer_kinds) == (window, kinds)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize("first", [0, 7, 23, 24])
def test_windows_are_those_of_transformers(model_type, first):
    transformers = pytest.importorskip("transformers")
    hf = PUBLISHED | WINDOWED | {"model_type": model_type, "max_window_layers": first}
    ours, theirs = ModelConfig.from_json(hf), transformers.AutoConfig.for_model(**hf)
    kinds = [ours.layer_kinds[layer % len(ours.layer_kinds)] for layer in range(24)]
    assert kinds == theirs.layer_types


def test_absent_keys_have_the_defaults_of_the_class():
    transformers = pytest.importorskip("transformers")
    for model_type in OF_TRANSFORMERS:
        theirs, ours = transformers.AutoConfig.for_model(model_type), ModelConfig.from_json({"model_type": model_type})
        sizes = {name: value for name, value in vars(ours).items() if hasattr(theirs, name)}
        assert len(sizes) >= 10
        assert sizes == {name: getattr(theirs, name) or None if name == "sliding_window" else getattr(theirs, name)
                         for name in sizes}  # fmt: skip
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    heads = PUBLISHED["num_attention_heads"]
    assert ModelConfig.from_json(PUBLISHED | {"num_key_value_heads": None}).num_key_value_heads == heads


@pytest.mark.parametrize("model_type", OF_TRANSFORMERS)
def test_every_key_of_the_class_of_transformers_is_known(model_type):
    transformers = pytest.importorskip("transformers")
    window = ARCHITECTURES[model_type].window
    foreign = {"use_sliding_window", "sliding_window", "max_window_layers"} - set(window.keys if window else ())
    own = {key: value for key, value in PUBLISHED.items() if key not in foreign | {"model_type"}}
    config = transformers.AutoConfig.for_model(model_type, **own)
    config.dtype = "bfloat16"
    saved = {name: "?" if value is None else value for name, value in config.to_dict().items()}
    assert unknown_keys(saved, ARCHITECTURES[model_type]) == ()


def test_unknown_keys_are_named_and_those_without_effect_are_not():
    change = {"use_foo": True, "mup": None, "_name_or_path": "x", "use_cache": False, "rope_scaling": {"beta": 1}}
    assert ModelConfig.from_json(PUBLISHED | change).unknown == ("use_foo", "rope_scaling.beta")


@pytest.mark.parametrize(
    ("change", "tokens"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}, 131072),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 131072),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 262144}, 1048576),
        (
            {
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
                "max_position_embeddings": 40960,
            },
            131072,
        ),  # the factor that is written wins over the ratio
        (
            {
                "rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 8192},
                "max_position_embeddings": 65536,
            },
            65536,
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 65536),
        ({"rope_scaling": {"type": "dynamic", "factor": 8.0}}, 32768),
        (
            {
                "rope_scaling": {
                    "type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 1,
                    "high_freq_factor": 4,
                    "original_max_position_embeddings": 8192,
                }
            },
            32768,
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1], "original_max_position_embeddings": 4096}},
            4096,
        ),
        (
            {
                "dual_chunk_attention_config": {
                    "chunk_size": 262144,
                    "local_size": 8192,
                    "original_max_position_embeddings": 262144,
                },
                "max_position_embeddings": 1010000,
            },
            262144,
        ),
    ],
    ids=str,
)
def test_the_longest_sequence_is_what_the_rotation_serves(change, tokens):
    assert ModelConfig.from_json(PUBLISHED | change).longest.tokens == tokens


def test_what_a_rotation_does_not_read_is_named():
    rope = {"rope_type": "linear", "factor": 2.0, "beta_fast": 32, "finetuned": True}
    unknown = ModelConfig.from_json(PUBLISHED | {"rope_scaling": rope}).unknown
    assert unknown == ("rope_scaling.beta_fast", "rope_scaling.finetuned")
