"""Every key that a ``config.json`` may have: computed, refused where it asks for something else, or without effect.

What a key means is what transformers 5 makes of it; the keys that one family has and another has not are named in its
row of ``ARCHITECTURES``. A key that is nowhere is named in the build's output: nobody here knows what it asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_build.architectures import Architecture, WindowKeys
from qwen_build.checkpoint.rope import unknown_rope_keys
from qwen_engine.errors import CheckpointError, UnsupportedModel

# read by ``config.py`` and ``endings.py``
COMPUTED = frozenset(
    [
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "rope_parameters",
        "rope_scaling",
        "tie_word_embeddings",
        "original_max_position_embeddings",
        "dual_chunk_attention_config",
        "layer_types",
        "eos_token_id",
        "quantization_config",
        "compression_config",
        "architectures",
        "id2label",
        "num_labels",
        "problem_type",
        "classifier_from_token",
    ]
)

# key -> the values with which the graph computes what is asked for; null and an absent key are the first
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1,),
    "is_causal": (True,),
    "use_mrope": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),  # the same numbers in other pieces, and nothing but 0 was ever published
    "pruned_heads": ({},),
    "per_layer_config": ({},),
    "scoring_func": ("softmax",),  # how routers of other families choose experts
    "n_group": (1,),
    "topk_group": (1,),
    "routed_scaling_factor": (1,),
}

# of families that have mixtures of experts, read by ``experts.py``
EXPERT_KEYS = (
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
)

# how the model is trained, saved, loaded and shown, what generation_config.json has taken over, and keys that some
# families' classes have and others' leave unread
WITHOUT_EFFECT = frozenset(
    [
        "attention_bias",  # but where the family's row names it
        "attention_dropout",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "cls_token_id",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "dtype",
        "finetuning_task",
        "initializer_range",
        "is_decoder",
        "is_original_qwen3_reranker",
        "keys_to_ignore_at_inference",
        "label2id",
        "model_max_length",
        "model_name",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "return_dict",
        "router_aux_loss_coef",
        "sep_token_id",
        "task_specific_params",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tie_last_hidden_states",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
    ]
)

MOST_LAYERS = 2**16  # of a config that names them one by one

# keys of programs that store weights in a way of their own -> the program
FOREIGN_QUANTIZATION = {"quantization": "mlx"}


def check_only(hf: Mapping[str, Any], architecture: Architecture) -> None:
    """Raise :class:`UnsupportedModel` naming the first key that asks for what the graph does not have."""
    for key, supported in (ONLY | dict(architecture.only)).items():
        if hf.get(key) is not None and not any(_same(hf[key], value) for value in supported):
            raise UnsupportedModel(f"config.json: {key} {hf[key]!r} is not supported, only {supported[0]!r} is")
    for key, program in FOREIGN_QUANTIZATION.items():
        if hf.get(key):
            raise UnsupportedModel(
                f"config.json has {key}: the checkpoint is already quantised, by {program}, which cannot be read; "
                "give the float checkpoint it was made from"
            )


def sliding_layers(hf: Mapping[str, Any], keys: WindowKeys, window: int | None, count: int) -> tuple[str, ...]:
    """The kinds of ``count`` layers of which those that a config names attend to the last ``window`` tokens alone.

    Args:
        hf: the config, with the defaults of its family, and without layer_types.
        keys: how the family names them.
    """
    first = hf.get(keys.first_layer) if keys.first_layer else 0
    if type(first) is not int:
        raise CheckpointError(f"config.json: {keys.first_layer} is {first!r}, expected an integer")
    if window is None or first >= count:
        return ("full_attention",)
    if first <= 0:
        return ("sliding_attention",)
    if count > MOST_LAYERS:
        raise UnsupportedModel(f"config.json: num_hidden_layers is {count}, expected at most {MOST_LAYERS}")
    return (*["full_attention"] * first, *["sliding_attention"] * (count - first))


def read_window(hf: Mapping[str, Any], keys: WindowKeys | None) -> int | None:
    """The tokens that a layer with a window attends to, itself included; None: no layer has one."""
    if keys is None:
        return None
    used = hf.get(keys.switch) if keys.switch else True
    if used not in (None, False, True):
        raise CheckpointError(f"config.json: {keys.switch} is {used!r}, expected true or false")
    window = hf.get("sliding_window") if used else None
    if window is not None and (type(window) is not int or window < 1):
        raise CheckpointError(f"config.json: sliding_window is {window!r}, expected a positive integer or null")
    return window


def unknown_keys(hf: Mapping[str, Any], architecture: Architecture) -> tuple[str, ...]:
    """The keys of ``hf`` that nothing here reads or knows, those of its rope objects as ``rope_scaling.key``.

    Null asks for nothing, and what begins with an underscore is private to transformers.
    """
    known = COMPUTED | ONLY.keys() | WITHOUT_EFFECT | FOREIGN_QUANTIZATION.keys()
    known |= frozenset(architecture.window.keys if architecture.window else ())
    known |= frozenset((*architecture.only, *architecture.idle))
    known |= frozenset((*(EXPERT_KEYS if architecture.sparse else ()), architecture.qkv_bias_key or ""))
    own = (key for key, value in hf.items() if value is not None and key not in known and key[:1] != "_")
    return (*own, *unknown_rope_keys(hf))


def _same(found: Any, value: Any) -> bool:
    """Equal, where true is not 1."""
    return bool(found == value) and isinstance(found, bool) == isinstance(value, bool)
