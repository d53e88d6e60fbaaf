"""A tokenizer as sentencepiece makes them for Llama 2 and Mistral: pieces with a mark for spaces, and bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, processors

SPACE = "▁"
PIECES = ["▁", "t", "h", "e", "a", "b", "c", "é", "▁t", "he", "▁the", "▁a", "\n", "1", "2", ".", "bc"]
MERGES = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a"), ("b", "c")]
BOS, EOS = 1, 2


def pieces_tokenizer() -> tokenizers.Tokenizer:
    """``<unk>``, ``<s>``, ``</s>``, 256 bytes, a few pieces; as Llama 2's ``tokenizer.json`` has it."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    vocabulary = {name: i for i, name in enumerate(names)}
    core = tokenizers.Tokenizer(models.BPE(vocabulary, MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    core.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    return core


def write_pieces(directory: Path, **config: Any) -> Path:
    """The tokenizer's files of a checkpoint; ``config``: what tokenizer_config.json says besides."""
    directory.mkdir(parents=True, exist_ok=True)
    pieces_tokenizer().save(str(directory / "tokenizer.json"))
    said = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | config
    (directory / "tokenizer_config.json").write_text(json.dumps(said), "utf-8")
    return directory
