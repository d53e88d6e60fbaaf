"""Qwen of 2023 (``model_type`` qwen): the spelling of its config, the names of its weights, its chat template.

A Qwen-1 computes what a Qwen2 of the same weights does, as long as no text has more than ``seq_length`` tokens. Nothing
of the checkpoint's own code is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from qwen_build.checkpoint.safetensors_file import TensorInfo
from qwen_engine.errors import CheckpointError, UnsupportedModel

MODEL_TYPE = "qwen"

# the key that other families have -> Qwen-1's spellings of it, of August 2023 the last
_SPELLINGS = {
    "vocab_size": ("padded_vocab_size", "vocab_size"),
    "hidden_size": ("hidden_size", "n_embd"),
    "intermediate_size": ("intermediate_size", "ffn_hidden_size"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "head_dim": ("kv_channels",),
    "max_position_embeddings": ("seq_length",),
    "rms_norm_eps": ("layer_norm_epsilon",),
    "rope_theta": ("rotary_emb_base",),
}
# key -> the value that is computed
_ONLY = {
    "rotary_pct": 1,
    "no_bias": True,
    "scale_attn_weights": True,
    "apply_residual_connection_post_layernorm": False,
    "activation": "swiglu",
    "pos_emb": "rotary",
}
# how it is trained and run there; use_dynamic_ntk and use_logn_attn count beyond seq_length alone
_WITHOUT_EFFECT = frozenset(
    [
        "attn_dropout_prob",
        "attn_pdrop",
        "bf16",
        "bias_dropout_fusion",
        "emb_dropout_prob",
        "embd_pdrop",
        "fp16",
        "fp32",
        "max_position_embeddings",
        "n_positions",
        "onnx_safe",
        "params_dtype",
        "resid_pdrop",
        "softmax_in_fp32",
        "tokenizer_type",
        "use_cache_kernel",
        "use_cache_quantization",
        "use_dynamic_ntk",
        "use_flash_attn",
        "use_logn_attn",
    ]
)

# inside a layer: Qwen-1's module -> Qwen2's
_MODULES = {
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.up_proj",
    "mlp.w2": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
}
_OUTSIDE = {"transformer.wte.": "model.embed_tokens.", "transformer.ln_f.": "model.norm."}
_LAYER = re.compile(r"transformer\.h\.(\d{1,9})\.(.+)\.([^.]+)")
_FUSED, _PARTS = "attn.c_attn", ("q_proj", "k_proj", "v_proj")
_BY_COLUMN = ("qweight", "qzeros", "scales")  # of GPTQ, where a column is an output

# What its make_context writes; a conversation without a system message gets one. trim_blocks eats bare line breaks.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def as_other_families(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a Qwen-1 in the keys of other families; what nobody knows keeps its name.

    Raises:
        CheckpointError: it has no width of the MLP that can be halved.
        UnsupportedModel: it asks for what a Qwen2 does not compute.
    """
    for key, supported in _ONLY.items():
        if hf.get(key) is not None and hf[key] != supported:
            raise UnsupportedModel(f"config.json: {key} {hf[key]!r} is not supported, only {supported!r} is")
    spelled = {name for names in _SPELLINGS.values() for name in names}
    known = spelled | _ONLY.keys() | _WITHOUT_EFFECT
    found = {key: value for key, value in hf.items() if key not in known}
    for key, names in _SPELLINGS.items():
        if (value := next((hf[name] for name in names if hf.get(name) is not None), None)) is not None:
            found[key] = value
    both = found.get("intermediate_size")  # of w1 and w2 together
    if type(both) is not int or both % 2:
        raise CheckpointError(f"config.json: intermediate_size is {both!r}, expected an even number in a Qwen-1")
    return found | {"intermediate_size": both // 2}


def is_qwen1(names: Mapping[str, object]) -> bool:
    """Whether tensors have the names of a Qwen-1."""
    return any(name.startswith("transformer.h.0.mlp.w1.") for name in names)


def renamed(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of a Qwen-1 by Qwen2's names; query, key and value out of the tensors that hold all three."""
    return dict(pair for name, info in tensors.items() for pair in _renamed(name, info))


def _renamed(name: str, info: TensorInfo) -> Iterator[tuple[str, TensorInfo]]:
    match = _LAYER.fullmatch(name)
    if match and match[2] == _FUSED:
        for i, part in enumerate(_PARTS):
            yield f"model.layers.{match[1]}.self_attn.{part}.{match[3]}", _third(info, i, match[3])
    elif match and match[2] in _MODULES:
        yield f"model.layers.{match[1]}.{_MODULES[match[2]]}.{match[3]}", info
    else:
        old = next((old for old in _OUTSIDE if name.startswith(old)), "")
        yield (_OUTSIDE[old] + name.removeprefix(old) if old else name), info


def _third(info: TensorInfo, i: int, kind: str) -> TensorInfo:
    """The part of query, key or value of a tensor that has them one after the other."""
    if kind == "g_idx":
        return info  # of their common inputs
    axis = 1 if kind in _BY_COLUMN else 0
    if len(info.shape) <= axis or info.shape[axis] % 3:
        raise CheckpointError(f"{info.name} has shape {info.shape}, expected query, key and value of one size in it")
    size = info.shape[axis] // 3
    if axis:
        return replace(info, shape=(info.shape[0], size), columns=(i * size, info.shape[1]))
    part_bytes = info.size_bytes // 3
    shape = (size, *info.shape[1:])
    return replace(info, shape=shape, offset=info.offset + i * part_bytes, size_bytes=part_bytes)
