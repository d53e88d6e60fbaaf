"""Tiny GGUF files, written with the package gguf, and the weights they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from cases.tiny import TinyCheckpoint
from qwen_build.checkpoint.formats.gguf import LAYER_MODULES, MODULES

STEMS = {module: stem for stem, module in (LAYER_MODULES | MODULES).items()}
END = "<|im_end|>"


def gguf_name(name: str) -> str:
    """What GGUF calls a tensor of Hugging Face's."""
    module, _, kind = name.rpartition(".")
    if module in STEMS:
        return f"{STEMS[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{STEMS[rest]}.{kind}"


def as_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a head in pairs, as GGUF has those of a llama's q and k."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write(
    tiny: TinyCheckpoint, path: Path, kind: str, architecture: str = "qwen2", head: str = "Q8_0", **metadata: Any
) -> dict[str, np.ndarray]:
    """Write the model of ``tiny``, matrices as ``kind``, embedding and head as ``head``; the weights it stands for."""
    import gguf

    config = json.loads((tiny.path / "config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(5000.0)
    for key, value in metadata.items():
        writer.add_key_value(key.replace("__", "."), *value)
    letters = sorted(ByteLevel.alphabet())[: config["vocab_size"] - 3]
    tokens = [*letters, "Th", END, "<tool>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 2) + [3, 4])
    writer.add_token_merges(["T h"])
    writer.add_eos_token_id(len(tokens) - 2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    weights = {}
    for name, tensor in tiny.model.state_dict().items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        weight = tensor.float().numpy()
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        part = name.split(".")[-2]
        paired = architecture == "llama" and part in heads
        stored = as_pairs(weight, heads[part]) if paired else weight
        own = "F32" if weight.ndim == 1 else head if "layers" not in name else kind
        dtype = gguf.GGMLQuantizationType[own]
        data = quantised(stored, own)
        writer.add_tensor(gguf_name(name), data, raw_dtype=dtype)
        values = gguf.dequantize(data, dtype).astype(np.float32).reshape(weight.shape)
        if paired:
            rows = np.argsort(as_pairs(np.arange(len(weight))[:, None], heads[part])[:, 0])
            values = values[rows]
        weights[name] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def quantised(weight: np.ndarray, kind: str) -> np.ndarray:
    """``weight`` as blocks of ``kind``; random ones where the package gguf cannot make them."""
    import gguf

    dtype = gguf.GGMLQuantizationType[kind]
    try:
        return gguf.quantize(weight, dtype)
    except NotImplementedError:
        elements, size = gguf.GGML_QUANT_SIZES[dtype]
        rng = np.random.default_rng(weight.size)
        blocks = rng.integers(0, 256, (weight.shape[0], weight.shape[1] // elements, size), dtype=np.uint8)
        if kind == "MXFP4":
            blocks[..., 0] = rng.integers(118, 126, blocks.shape[:2])
        else:  # a float16 at the beginning or the end, as the type has it
            scale = (rng.random(blocks.shape[:2]) * 1e-3).astype(np.float16)[..., None].view(np.uint8)
            places = {"Q6_K": [208], "Q3_K": [108], "Q2_K": [80, 82], "Q4_K": [0, 2], "Q5_K": [0, 2]}.get(kind, [0])
            for place in places:
                blocks[..., place : place + 2] = scale
        return blocks.reshape(weight.shape[0], -1)
