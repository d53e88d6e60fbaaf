"""A Qwen of 2023 as the Qwen2 that computes the same, for a comparison; nothing of the builder is used.

transformers does not know ``model_type`` qwen, whose code came with each checkpoint: `modeling_qwen.py
<https://huggingface.co/Qwen/Qwen-7B/blob/main/modeling_qwen.py>`_ multiplies ``w1(x)`` with ``silu(w2(x))``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

# transformers' key -> the keys of September 2023 and of August
_CONFIG = {
    "vocab_size": ("padded_vocab_size", "vocab_size"),
    "hidden_size": ("hidden_size", "n_embd"),
    "intermediate_size": ("intermediate_size", "ffn_hidden_size"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "max_position_embeddings": ("seq_length",),
    "rms_norm_eps": ("layer_norm_epsilon",),
    "rope_theta": ("rotary_emb_base",),
}
_NAMES = [
    (r"transformer\.wte\.(.+)", r"model.embed_tokens.\1"),
    (r"transformer\.ln_f\.(.+)", r"model.norm.\1"),
    (r"transformer\.h\.(\d+)\.ln_1\.(.+)", r"model.layers.\1.input_layernorm.\2"),
    (r"transformer\.h\.(\d+)\.ln_2\.(.+)", r"model.layers.\1.post_attention_layernorm.\2"),
    (r"transformer\.h\.(\d+)\.attn\.c_proj\.(.+)", r"model.layers.\1.self_attn.o_proj.\2"),
    (r"transformer\.h\.(\d+)\.mlp\.w1\.(.+)", r"model.layers.\1.mlp.up_proj.\2"),
    (r"transformer\.h\.(\d+)\.mlp\.w2\.(.+)", r"model.layers.\1.mlp.gate_proj.\2"),
    (r"transformer\.h\.(\d+)\.mlp\.c_proj\.(.+)", r"model.layers.\1.mlp.down_proj.\2"),
]
_FUSED = re.compile(r"transformer\.h\.(\d+)\.attn\.c_attn\.(.+)")

Tensor = TypeVar("Tensor")


def config_of(checkpoint: Path, transformers: Any) -> tuple[Any, bool]:
    """transformers' configuration of ``checkpoint``, and whether transformers itself can read the weights.

    Raises:
        OSError, ValueError: there is no configuration that it knows.
    """
    hf = json.loads((checkpoint / "config.json").read_bytes())
    if hf.get("model_type") != "qwen":
        return transformers.AutoConfig.from_pretrained(checkpoint, local_files_only=True), True
    found = {ours: next(hf[each] for each in theirs if each in hf) for ours, theirs in _CONFIG.items()}
    theta, both_widths = found.pop("rope_theta"), found.pop("intermediate_size")
    config = transformers.Qwen2Config(
        **found,
        num_key_value_heads=found["num_attention_heads"],
        intermediate_size=both_widths // 2,  # of w1 and w2 together
        rope_parameters={"rope_type": "default", "rope_theta": float(theta)},
        tie_word_embeddings=False,
    )
    if "quantization_config" in hf:
        config.quantization_config = hf["quantization_config"]
    return config, False


def qwen2_tensors(
    tensors: Mapping[str, Tensor], third: Callable[[Tensor, int, int], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a Qwen-1 under Qwen2's name.

    Args:
        third: cuts one of three parts, by its number, out of a tensor along an axis.
    """
    for name, tensor in tensors.items():
        fused = _FUSED.fullmatch(name)
        if fused is None:
            yield next((re.sub(old, new, name) for old, new in _NAMES if re.fullmatch(old, name)), name), tensor
            continue
        axis = int(fused[2] in ("qweight", "qzeros", "scales"))  # GPTQ's have a column for each output
        for number, part in enumerate("qkv"):
            own = tensor if fused[2] == "g_idx" else third(tensor, number, axis)
            yield f"model.layers.{fused[1]}.self_attn.{part}_proj.{fused[2]}", own
