"""The formats of quantised checkpoints: how each is recognised, who reads it, and what becomes of its numbers.

A format is a row. ``quant_method`` of ``quantization_config`` in config.json names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_build.checkpoint.files import read_optional_json
from qwen_build.checkpoint.formats.bitsandbytes import find_four_bits
from qwen_build.checkpoint.formats.compressed import find_compressed
from qwen_build.checkpoint.formats.gguf import find_gguf
from qwen_build.checkpoint.formats.scaled import find_fp8
from qwen_build.checkpoint.formats.words import find_words
from qwen_build.checkpoint.gguf_file import GgufFile
from qwen_build.checkpoint.safetensors import Safetensors
from qwen_build.checkpoint.stored import Found
from qwen_engine.errors import CheckpointError, UnsupportedModel

EXACT, ROUNDED = "bit for bit", "rounded as --quant says"


@dataclass(frozen=True)
class Format:
    """A way to store quantised weights.

    Attributes:
        name: in messages.
        title: as people call what is read of it; README's table of what is supported is made of these.
        becomes: what the engine has of its quantised linears, ``EXACT`` or ``ROUNDED`` or both.
        keeps_float: whether linears that it leaves float stay so; else they are rounded as ``--quant`` says.
        find: reads ``quantization_config`` and finds the weights among the tensors of :class:`Safetensors`, or of
            :class:`GgufFile` in the directories that ``gguf_text.py`` makes.
    """

    name: str
    title: str
    becomes: tuple[str, ...]
    keeps_float: bool
    find: Callable[[Mapping[str, Any], Any], Found]


# quant_method -> the format
FORMATS = {
    "gptq": Format("gptq", "GPTQ", (EXACT,), keeps_float=True, find=find_words),
    "awq": Format("awq", "AWQ", (EXACT,), keeps_float=True, find=find_words),
    "auto-round": Format("auto-round", "AutoRound", (EXACT,), keeps_float=True, find=find_words),
    "compressed-tensors": Format(
        "compressed-tensors", "compressed-tensors", (EXACT, ROUNDED), keeps_float=True, find=find_compressed
    ),
    "fp8": Format("fp8", "FP8", (ROUNDED,), keeps_float=False, find=find_fp8),
    "gguf": Format("GGUF", "GGUF", (EXACT, ROUNDED), keeps_float=False, find=find_gguf),
    "bitsandbytes": Format("bitsandbytes", "NF4", (ROUNDED,), keeps_float=False, find=find_four_bits),
}


def quantization_config(directory: Path) -> dict[str, Any] | None:
    """What config.json of a checkpoint says of its format, which is one of :data:`FORMATS`; None: nothing.

    Raises:
        UnsupportedModel: the format is of no row.
        CheckpointError: config.json cannot be read, or holds something else there.
    """
    try:
        hf = read_optional_json(directory / "config.json")
    except OSError as error:  # a name that the system refuses to look at
        raise CheckpointError(f"{directory} cannot be read: {error.strerror}") from error
    config = hf.get("quantization_config") or hf.get("compression_config")
    if not config:
        return None
    if not isinstance(config, dict):
        raise CheckpointError(f"config.json: quantization_config is {config!r}, expected an object")
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in FORMATS:
        raise UnsupportedModel(
            f"the checkpoint is already quantised ({method}), only {', '.join(FORMATS)} can be read; "
            "give the float checkpoint"
        )
    return config


def find_quantized(config: Mapping[str, Any] | None, files: Safetensors | GgufFile) -> Found:
    """The quantised weights of ``files``.

    Raises:
        CheckpointError, UnsupportedModel: they are not what ``config`` says, or nothing says what they are.
    """
    if config is not None:
        return FORMATS[config["quant_method"]].find(config, files)
    if packed := next((name for name in files.tensors if name.endswith(".qweight")), None):
        raise UnsupportedModel(
            f"the checkpoint has {packed}, and config.json no quantization_config that says how it is packed; "
            'add what quantize_config.json says, with "quant_method": "gptq", or give the float checkpoint'
        )
    return Found({}, frozenset())
