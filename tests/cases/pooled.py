"""Tiny checkpoints whose graphs end in something else than a vocabulary, with the tokenizer of the scripted model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from cases.scripted import ENDOFTEXT, core_tokenizer, write_text_files
from cases.tiny import TINY

SIZES = TINY | {"vocab_size": 283, "max_position_embeddings": 512, "pad_token_id": ENDOFTEXT}
QUERY_PROMPT = "Instruct: find it\nQuery:"


def write_pooled(directory: Path, model_class: str, model_type: str = "qwen3", **config: Any) -> Any:
    """Save a random model of this class of transformers, every parameter of one dimension random; the model."""
    import torch
    import transformers

    write_text_files(directory)
    torch.manual_seed(5)
    sizes = SIZES | {"model_type": model_type} | ({"head_dim": 24} if model_type == "qwen3" else {}) | config
    own = transformers.AutoConfig.for_model(**sizes)
    model = getattr(transformers, model_class)(own).float().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(directory)
    return model


def write_sentence_files(directory: Path, **pooling: Any) -> None:
    """What sentence-transformers saves beside Qwen3-Embedding, and the tokenizer that closes every text."""
    core = core_tokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", ENDOFTEXT)]
    )
    core.save(str(directory / "tokenizer.json"))
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds.items())
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir(exist_ok=True)
    config = {"word_embedding_dimension": SIZES["hidden_size"], "pooling_mode_lasttoken": True, "include_prompt": True}
    config |= {f"pooling_mode_{way}": False for way in ("cls_token", "mean_tokens", "max_tokens")} | pooling
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(config))
    prompts = {"prompts": {"query": QUERY_PROMPT, "document": ""}, "default_prompt_name": None}
    (directory / "config_sentence_transformers.json").write_text(json.dumps(prompts))


def add_words(directory: Path, *words: str) -> None:
    """Give the tokenizer tokens for whole words, which no text of it has otherwise."""
    core = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    core.add_tokens(list(words))
    core.save(str(directory / "tokenizer.json"))
