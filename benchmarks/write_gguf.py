"""A Qwen2 or Qwen3 checkpoint as GGUF, for the peers that read nothing else.

    python -m benchmarks.write_gguf CHECKPOINT FILE.gguf [--linears Q4_0] [--head Q8_0]

Rows stay in Hugging Face's order: a reader of ``qwen2`` and ``qwen3`` rotates the two halves of a head, as Hugging Face
does. A Qwen2 whose heads together are not as wide as the model is written as ``llama``, which computes the same and
takes such heads; there the rows of q and k alternate between the halves. Q4_0 and Q8_0 are groups of 32 with a float16
scale and no zero point.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from benchmarks.command import run
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.files import read_json, read_optional_json
from qwen_build.checkpoint.formats.gguf import LAYER_MODULES, MODULES
from qwen_build.checkpoint.gguf_text import SPLITS
from qwen_build.checkpoint.weights import Checkpoint

STEMS = {module: stem for stem, module in (LAYER_MODULES | MODULES).items()}
FAMILIES = ("qwen2", "qwen3")
LLAMA = "llama"
KINDS = ("F32", "BF16", "F16", "Q8_0", "Q4_0")  # how a matrix may be stored
ROWS_AT_A_TIME = 1 << 14
NORMAL, CONTROL = 1, 3  # gguf.TokenType


def write_gguf(checkpoint: Path, file: Path, linears: str = "Q4_0", head: str = "Q8_0") -> None:
    """Write ``checkpoint`` as ``file``, its matrices as the type ``linears``, embedding and head as ``head``.

    Raises:
        ValueError: it is of another family than Qwen2 and Qwen3.
    """
    import gguf

    config = read_json(checkpoint / "config.json")
    family = config["model_type"]
    if family not in FAMILIES:
        raise ValueError(f"its model_type is {family!r}; GGUF is written of {' and '.join(FAMILIES)} alone")
    architecture, head_dim = gguf_architecture(config)
    writer = gguf.GGUFWriter(file, architecture)
    add_sizes(writer, config, head_dim)
    if architecture == LLAMA:
        writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(ModelConfig.from_hf(checkpoint).rope.theta)
    writer.add_quantization_version(2)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if linears == "F32" else f"MOSTLY_{linears}"])
    _add_tokenizer(writer, checkpoint, config)
    with Checkpoint.open(checkpoint) as weights:
        for name, info in weights.tensors.items():
            if name == "lm_head.weight" and config.get("tie_word_embeddings"):
                continue
            kind = "F32" if len(info.shape) == 1 else head if _stem(name) in ("token_embd", "output") else linears
            dtype = gguf.GGMLQuantizationType[kind]
            order = gguf_rows(name, info.shape[0], config)
            writer.add_tensor(gguf_name(name), _quantized(weights, name, order, dtype), None, dtype)
    finish(writer)


def add_sizes(writer: Any, config: dict[str, Any], head_dim: int) -> None:
    """Say to a ``gguf.GGUFWriter`` how large the model of this ``config.json`` is."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def finish(writer: Any) -> None:
    """Write what a ``gguf.GGUFWriter`` was given."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_architecture(config: dict[str, Any]) -> tuple[str, int]:
    """What a file of this ``config.json`` calls its architecture, and the size of a head.

    >>> gguf_architecture({"model_type": "qwen2", "num_attention_heads": 9, "head_dim": 64, "hidden_size": 768})
    ('llama', 64)
    """
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or width // heads
    wide = config["model_type"] != "qwen2" or heads * head_dim == width
    return (config["model_type"] if wide else LLAMA), head_dim


def gguf_rows(name: str, rows: int, config: dict[str, Any]) -> np.ndarray:
    """Which row of a tensor of the checkpoint each row of the file is, int64 (rows).

    >>> config = {"model_type": "qwen2", "num_attention_heads": 3, "head_dim": 4, "hidden_size": 8}
    >>> gguf_rows("model.layers.0.self_attn.k_proj.bias", 8, config)
    array([0, 2, 1, 3, 4, 6, 5, 7])
    >>> gguf_rows("model.layers.0.self_attn.v_proj.bias", 4, config)
    array([0, 1, 2, 3])
    """
    architecture, head_dim = gguf_architecture(config)
    is_paired = architecture == LLAMA and _stem(name) in ("attn_q", "attn_k")
    return in_pairs(rows, head_dim) if is_paired else np.arange(rows)


def in_pairs(rows: int, head_dim: int) -> np.ndarray:
    """The rows of heads, int64 (rows), as a llama's q and k have them: those of both halves in turns."""
    return np.arange(rows).reshape(-1, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def gguf_name(name: str) -> str:
    """What GGUF calls a tensor.

    >>> gguf_name("model.layers.3.self_attn.q_proj.bias"), gguf_name("model.norm.weight")
    ('blk.3.attn_q.bias', 'output_norm.weight')
    """
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return f"{f'blk.{layer[1]}.' if layer else ''}{_stem(name)}.{name.rpartition('.')[2]}"


def _stem(name: str) -> str:
    return STEMS[re.sub(r"^model\.layers\.\d+\.", "", name).rpartition(".")[0]]


def _quantized(weights: Checkpoint, name: str, order: np.ndarray, dtype: Any) -> np.ndarray:
    """The tensor's rows in this order, as GGUF stores them."""
    import gguf

    parts = [
        gguf.quantize(weights.read(name, start, min(start + ROWS_AT_A_TIME, len(order))), dtype)
        for start in range(0, len(order), ROWS_AT_A_TIME)
    ]
    return np.asarray(np.concatenate(parts)[order])


def _add_tokenizer(writer: Any, checkpoint: Path, config: dict[str, Any]) -> None:
    """The checkpoint's byte-level tokenizer and chat template, or a tokenizer that only has as many tokens."""
    tokenizer: dict[str, Any] = {}
    if (checkpoint / "tokenizer.json").is_file():
        tokenizer = json.loads((checkpoint / "tokenizer.json").read_text("utf-8"))
        named = {
            **tokenizer["model"]["vocab"],
            **{token["content"]: token["id"] for token in tokenizer["added_tokens"]},
        }
        special = {token["id"] for token in tokenizer["added_tokens"] if token["special"]}
        merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    else:
        named = {letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}
        special, merges = {_first(config["eos_token_id"])}, []
    if not merges:  # no reader takes a file without
        merges = ["a b"]
        named["ab"] = max(named.values()) + 1
    by_id = {index: token for token, index in named.items()}
    ids = range(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting(tokenizer))
    writer.add_token_list([by_id.get(index, f"<unused{index}>") for index in ids])
    writer.add_token_types([CONTROL if index in special or index not in by_id else NORMAL for index in ids])
    writer.add_token_merges(merges)
    for name, add in (("eos_token_id", writer.add_eos_token_id), ("bos_token_id", writer.add_bos_token_id)):
        if config.get(name) is not None:
            add(_first(config[name]))
    if isinstance(template := read_optional_json(checkpoint / "tokenizer_config.json").get("chat_template"), str):
        writer.add_chat_template(template)


def splitting(tokenizer: dict[str, Any]) -> str:
    """What GGUF calls the way in which a ``tokenizer.json`` splits texts; Qwen2's where it has no name for it.

    >>> splitting({"pre_tokenizer": None})
    'qwen2'
    """
    for name, (_, pieces) in SPLITS.items():
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.Sequence(pieces())
        if json.loads(made.to_str())["pre_tokenizer"] == tokenizer.get("pre_tokenizer"):
            return name
    return "qwen2"


def _first(value: int | list[int]) -> int:
    return value[0] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--linears", default="Q4_0", choices=KINDS)
    parser.add_argument("--head", default="Q8_0", choices=KINDS)
    arguments = parser.parse_args()
    write_gguf(arguments.checkpoint, arguments.file, arguments.linears, arguments.head)


if __name__ == "__main__":
    run(main)
