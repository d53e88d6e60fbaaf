"""Checkpoints and engines that the gate is tried on: random models of two sizes, with a tokenizer and a chat template.

Random weights have what trained ones seldom have, and mistakes show at: norms far from 1, large biases of queries and
keys, no two rows alike. `benchmarks.gate_faults` plants its faults in engines of these.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.train_small import SPECIAL_TOKENS, new_model, train_tokenizer
from qwen_run.accuracy.datasets import built_in_documents

VOCAB_SIZE = 3072
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Every linear has more than one block of 128 columns, and one that is not whole; heads share keys and values.
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "qwen2", "hidden_size": 160, "intermediate_size": 288, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1536,
        "initializer_range": 0.12, "tie_word_embeddings": False,
    },
    "small": {
        "model_type": "qwen2", "hidden_size": 384, "intermediate_size": 1056, "num_hidden_layers": 8,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "initializer_range": 0.08, "tie_word_embeddings": False,
    },
}  # fmt: skip

# scheme -> the options of qwen-build
SCHEMES: dict[str, dict[str, Any]] = {
    "none": {"quant": "none"},
    "int8": {"quant": "int8"},
    "smoothquant": {"quant": "smoothquant", "calibration_tokens": 4096},
    "int4": {"quant": "int4"},
    "gptq": {"quant": "int4", "int4_method": "gptq", "calibration_tokens": 4096},
    "awq": {"quant": "int4", "int4_method": "awq", "calibration_tokens": 4096},
}


def make_checkpoint(size: str, seed: int, directory: Path) -> Path:
    """Write a random checkpoint of ``size``, a key of :data:`CONFIGS`, to the new directory ``directory``."""
    import torch

    directory.mkdir(parents=True)
    torch.manual_seed(seed)
    constant = {
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    model = new_model(constant | {"rms_norm_eps": 1e-5} | CONFIGS[size], dropout=0.0)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 0.2  # as small as trained ones: the epsilon of norms counts then
    model.save_pretrained(directory)
    train_tokenizer(built_in_documents("default", "calibration"), VOCAB_SIZE, directory)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL_TOKENS[0], "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return directory


def build_engine(checkpoint: Path, scheme: str, directory: Path, **options: Any) -> Path:
    """Build an engine of ``checkpoint`` by a row of :data:`SCHEMES` in the new directory ``directory``."""
    from qwen_build import build

    build(str(checkpoint), directory, **SCHEMES[scheme] | options)
    return directory
