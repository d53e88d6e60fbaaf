"""A random checkpoint of a published model's shape: speed and memory do not depend on the values.

    python -m benchmarks.random_checkpoint SHAPE DIRECTORY

Written as Hugging Face writes it: bfloat16, in shards of up to 5 GB with an index. A token of its tokenizer is a byte.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from qwen_build.checkpoint.safetensors_file import LazyTensor, write_safetensors

SHARD_BYTES = 5_000_000_000
# values that are used again and again, from different starts
POOL = np.random.default_rng(0).normal(0, 0.02, 1 << 22).astype(np.float32)

# Sizes of the published config.json files
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": {
        "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        "intermediate_size": 8960, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False,
    },
}  # fmt: skip


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a Qwen2 checkpoint, in the order transformers writes them."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        for name, rows in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv)):
            yield f"{prefix}.self_attn.{name}.weight", (rows, hidden)
            yield f"{prefix}.self_attn.{name}.bias", (rows,)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def random_values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The same values for the same name; norms around 1."""
    start = sum(name.encode()) * 7919 % POOL.size
    values = np.resize(np.roll(POOL, -start), shape)
    return values + np.float32(1) if "norm" in name else values


def byte_tokenizer() -> Tokenizer:
    """Turns a text into its UTF-8 bytes, one token each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: token for token, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_checkpoint(shape: str, directory: Path) -> None:
    """Write the checkpoint of one of :data:`SHAPES` to the new directory ``directory``."""
    config = SHAPES[shape]
    directory.mkdir(parents=True)
    constant = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "max_position_embeddings": 32768, "torch_dtype": "bfloat16", "use_sliding_window": False,
        "eos_token_id": 151645, "bos_token_id": 151643,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(constant | config, indent=1))
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    shards: list[dict[str, LazyTensor]] = [{}]
    size_bytes = 0
    for name, dims in tensor_shapes(config):
        tensor_bytes = 2 * int(np.prod(dims))
        if size_bytes + tensor_bytes > SHARD_BYTES:
            shards.append({})
            size_bytes = 0
        shards[-1][name] = LazyTensor(dims, partial(random_values, name, dims))
        size_bytes += tensor_bytes
    if len(shards) == 1:
        write_safetensors(directory / "model.safetensors", shards[0])
        return
    weight_map = {}
    for number, tensors in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(directory / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
        print(f"{directory / file} written", file=sys.stderr)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    write_checkpoint(arguments.shape, arguments.directory)
