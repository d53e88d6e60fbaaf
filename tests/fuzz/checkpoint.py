"""A small random checkpoint that needs no other library than the builder does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from cases.scripted import ADDED, IM_END, write_text_files
from qwen_build.checkpoint.safetensors_file import write_safetensors

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KEY_HEADS, HEAD_DIM = 64, 96, 2, 4, 2, 16
VOCAB = IM_END + len(ADDED) + 1
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "eos_token_id": IM_END,
    "torch_dtype": "float32",
}


def tensors() -> dict[str, np.ndarray]:
    """Every tensor of the checkpoint, by name, float32."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in (f"model.layers.{i}." for i in range(LAYERS)):
        for name, heads in (("q", HEADS), ("k", KEY_HEADS), ("v", KEY_HEADS)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (heads * HEAD_DIM, HIDDEN)
            shapes[f"{layer}self_attn.{name}_proj.bias"] = (heads * HEAD_DIM,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
        shapes[f"{layer}mlp.gate_proj.weight"] = shapes[f"{layer}mlp.up_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{layer}mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes |= dict.fromkeys(
            (f"{layer}input_layernorm.weight", f"{layer}post_attention_layernorm.weight"), (HIDDEN,)
        )
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    return {name: (rng.standard_normal(shape) * 0.15).astype(np.float32) for name, shape in shapes.items()}


def write_checkpoint(directory: Path, template: str = "qwen2_5", **config: Any) -> Path:
    """All files of the checkpoint, in ``directory``.

    Args:
        config: what ``config.json`` has beside or instead of ``CONFIG``.
    """
    write_text_files(directory, template, eos_token_id=IM_END)
    (directory / "config.json").write_text(json.dumps(CONFIG | config))
    write_safetensors(directory / "model.safetensors", tensors(), "float32")
    return directory
