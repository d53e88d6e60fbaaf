"""Checkpoints with the names of Qwen-1."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from cases.tiny import TINY
from qwen_build.checkpoint import qwen1


def as_qwen1(path: Path, target: Path, **config: Any) -> Path:
    """The checkpoint of a tiny qwen2 with as many key/value heads, in the names of Qwen-1."""
    tensors, old = load_file(path / "model.safetensors"), {}
    modules = {new: name for name, new in qwen1._MODULES.items()}
    for name, tensor in tensors.items():
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.([^.]+)", name)
        if not layer:
            name = name.replace("model.embed_tokens", "transformer.wte").replace("model.norm", "transformer.ln_f")
            old[name] = tensor
        elif layer[2] in modules:
            old[f"transformer.h.{layer[1]}.{modules[layer[2]]}.{layer[3]}"] = tensor
        elif layer[2].endswith("q_proj"):
            axis = 1 if layer[3] in ("qweight", "qzeros", "scales") else 0
            parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            fused = parts[0] if layer[3] == "g_idx" else np.concatenate(parts, axis)
            old[f"transformer.h.{layer[1]}.attn.c_attn.{layer[3]}"] = fused
    for layer in range(TINY["num_hidden_layers"]):
        old[f"transformer.h.{layer}.mlp.c_proj.bias"] = np.zeros(TINY["hidden_size"], np.float16)  # as of GPTQ
        old[f"transformer.h.{layer}.attn.masked_bias"] = np.full((1,), -1e4, np.float32)
    target.mkdir()
    save_file(old, target / "model.safetensors")
    hf = json.loads((path / "config.json").read_text())
    said = {
        "model_type": "qwen", "vocab_size": hf["vocab_size"], "hidden_size": hf["hidden_size"],
        "intermediate_size": 2 * hf["intermediate_size"], "num_hidden_layers": hf["num_hidden_layers"],
        "num_attention_heads": hf["num_attention_heads"], "kv_channels": 8, "seq_length": 640,
        "layer_norm_epsilon": hf["rms_norm_eps"], "rotary_emb_base": TINY["rope_theta"], "no_bias": True,
        "max_position_embeddings": 32768, "use_dynamic_ntk": True,
    }  # fmt: skip
    if "quantization_config" in hf:
        said["quantization_config"] = hf["quantization_config"]
    (target / "config.json").write_text(json.dumps(said | config))
    return target
