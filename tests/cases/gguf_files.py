"""Tiny GGUF files, written with the package gguf, and the weights they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from benchmarks.write_gguf import add_sizes, finish, gguf_name, in_pairs
from cases.tiny import TinyCheckpoint

END = "<|im_end|>"


def write(
    tiny: TinyCheckpoint,
    path: Path,
    kind: str,
    architecture: str = "qwen2",
    head: str = "Q8_0",
    tensors_a_file: int = 0,
    **metadata: Any,
) -> dict[str, np.ndarray]:
    """Write the model of ``tiny``, matrices as ``kind``, embedding and head as ``head``; the weights it stands for.

    With ``tensors_a_file`` there are as many files as it takes, whose names begin like that of ``path``.
    """
    import gguf

    config = json.loads((tiny.path / "config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_a_file)
    add_sizes(writer, config, config["head_dim"])
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
        paired = architecture == "llama" and name.split(".")[-2] in ("q_proj", "k_proj")
        order = in_pairs(len(weight), config["head_dim"]) if paired else np.arange(len(weight))
        own = "F32" if weight.ndim == 1 else head if "layers" not in name else kind
        dtype = gguf.GGMLQuantizationType[own]
        data = quantised(weight[order], own)
        writer.add_tensor(gguf_name(name), data, raw_dtype=dtype)
        values = gguf.dequantize(data, dtype).astype(np.float32).reshape(weight.shape)
        weights[name] = values[np.argsort(order)]
    finish(writer)
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
