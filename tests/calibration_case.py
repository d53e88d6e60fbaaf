"""A tokenizer and a text that fit the tiny checkpoints: enough to calibrate with."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def letter_tokenizer() -> tokenizers.Tokenizer:
    """A token for each letter, and none for anything else."""
    tokenizer = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def letters(count: int, seed: int = 0) -> str:
    return "".join(np.random.default_rng(seed).choice(list(LETTERS), count))


def with_tokenizer(checkpoint: Path, copy: Path) -> Path:
    """A copy of a checkpoint that has the tokenizer of letters."""
    shutil.copytree(checkpoint, copy)
    letter_tokenizer().save(str(copy / "tokenizer.json"))
    return copy
