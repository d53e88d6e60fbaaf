"""A tiny random checkpoint with a tokenizer and a chat template, beside its model of transformers."""

from __future__ import annotations

from pathlib import Path

from cases.scripted import write_text_files
from cases.tiny import FAMILIES, TINY, TinyCheckpoint

WORDS = ["the", "cache", "block", "token", "model", "layer", "sum", "key", "value", "query", "weight", "scale"]


def write_chat_checkpoint(directory: Path, family: str) -> TinyCheckpoint:
    """Write one of ``family``, a key of :data:`FAMILIES`, to the new folder ``directory``; norms and biases vary."""
    import torch
    import transformers

    path = write_text_files(directory, eos_token_id=[264, 262])
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(**TINY | FAMILIES[family] | {"vocab_size": 283})
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    generation_config = (path / "generation_config.json").read_text()
    model.save_pretrained(path)
    (path / "generation_config.json").write_text(generation_config)
    return TinyCheckpoint(path, model)
