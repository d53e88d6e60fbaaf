"""A tokenizer and a text that fit the tiny checkpoints, and what a method is given: enough to calibrate with."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from qwen_build.calibration.input_statistics import InputStatistics
from qwen_build.calibration.method import InputReaders, Method
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.graph.architecture import LAYER_KINDS
from qwen_build.quantization.schemes import IntScheme

# The layers of Qwen2 and Qwen3, and the linears that read each of their inputs.
KIND = LAYER_KINDS["full_attention"]
INPUTS = KIND.reader_names

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


def layer_readers(
    config: ModelConfig,
    weights: Mapping[str, np.ndarray],
    statistics: Mapping[str, InputStatistics],
    schemes: Mapping[str, IntScheme],
) -> dict[str, InputReaders]:
    """The readers of every input of a layer that an integer linear reads; ``weights`` by their names in the layer."""
    readers = {}
    for key, linears in INPUTS.items():
        own = {name: schemes[name] for name in linears if name in schemes}
        if own:
            read = {name: weights[f"{name}.weight"] for name in own}
            readers[key] = InputReaders(config, KIND.inputs[key], statistics[key], read, own)
    return readers


def layer_factors(method: Method, readers: Mapping[str, InputReaders]) -> dict[str, np.ndarray]:
    """What ``method`` divides the inputs of a layer by, those that it divides."""
    found = {key: method.factors(one) for key, one in readers.items()}
    return {key: s for key, s in found.items() if s is not None}
