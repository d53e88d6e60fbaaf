"""The weights of a checkpoint, read for a comparison: nothing of the builder is used, so that its faults show.

What is read is what transformers reads: safetensors files (https://github.com/huggingface/safetensors#format), and in
them the packed integers of GPTQ, AWQ and AutoRound, unpacked as AutoGPTQ's ``qlinear`` and AutoAWQ's ``gemm`` unpack
them; ``stored_numbers.py`` has the other formats.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qwen_engine.errors import CheckpointError
from qwen_engine.graph_io import EMBEDDING, HEAD
from qwen_run.accuracy.qwen1_names import qwen2_tensors
from qwen_run.accuracy.stored_numbers import LinearParts, StoredNumbers, group_size_of, numbers_of

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"

# what a file calls a type -> how its bytes lie; bfloat16 is the upper half of a float32
_ELEMENTS = {
    "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I8": "i1", "U8": "u1", "F8_E4M3": "u1",
}  # fmt: skip

# the last part of a tensor of all experts -> the linears of an expert whose rows follow each other in it
STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}

# AWQ: the place in an int32 of each of eight outputs side by side
_AWQ_PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7])


@dataclass(frozen=True)
class _Tensor:
    """A tensor in a mapped file; ``element`` is its type by the file's name."""

    stored: np.ndarray
    element: str

    def __getitem__(self, part: Any) -> np.ndarray:
        """``part`` of it in a new array: float32, or integers as int32."""
        values = self.stored[part]
        if self.element == "BF16":
            return np.asarray((values.astype(np.uint32) << 16).view(np.float32))
        return np.array(values, np.int32 if values.dtype.kind in "iu" else np.float32)


class CheckpointWeights:
    """Weights of a checkpoint, float32 and by Hugging Face's names, whether they are stored packed or not.

    Args:
        directory: of the checkpoint; its files are mapped, and read a slice at a time.

    Raises:
        CheckpointError: it cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        try:
            self._tensors = _open_tensors(directory)
            config = json.loads((directory / "config.json").read_bytes())
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise CheckpointError(f"the weights of {directory} cannot be read: {error}; download it again") from error
        self._packing: dict[str, Any] = config.get("quantization_config") or config.get("compression_config") or {}

    def is_packed(self, linear: str) -> bool:
        """Whether the checkpoint stores ``linear`` as integers that the engine has too."""
        numbers = self._numbers(linear)
        return self._is_in_words(linear) or (numbers is not None and numbers.is_packed)

    def vector(self, name: str) -> np.ndarray:
        """A norm's weight or a bias.

        Raises:
            CheckpointError: there is none.
        """
        return self._tensor(name)[...]

    def rows(self, linear: str, rows: slice) -> np.ndarray:
        """Some rows of the weight of ``linear``, (rows, in_features). A head that is not there is the embedding.

        Raises:
            CheckpointError: there is no such weight.
        """
        if self._is_in_words(linear):
            return self._unpacked(linear, rows)
        if (numbers := self._numbers(linear)) is not None:
            return numbers.read(self._linear(linear), rows)
        if linear == HEAD and f"{HEAD}.weight" not in self._tensors:
            linear = EMBEDDING
        return self._tensor(f"{linear}.weight")[rows]

    def _is_in_words(self, linear: str) -> bool:
        return f"{linear}.qweight" in self._tensors

    def _numbers(self, linear: str) -> StoredNumbers | None:
        return numbers_of(self._linear(linear))

    def _linear(self, linear: str) -> LinearParts:
        return LinearParts(self._tensors, self._packing, linear)

    def _tensor(self, name: str) -> _Tensor:
        if name not in self._tensors:
            raise CheckpointError(f"the checkpoint lacks {name}, which the engine has; name the one it was built from")
        return self._tensors[name]

    def _unpacked(self, linear: str, rows: slice) -> np.ndarray:
        """(q - zero point) * scale, the latter two of the group of each input."""
        bits = self._bits(linear)
        outputs, mask = np.arange(rows.start, rows.stop), (1 << bits) - 1
        places = _AWQ_PLACES if self._is_awq else np.arange(32 // bits)
        words, shifts = outputs // len(places), bits * places[outputs % len(places)]
        zeros = ((self._tensor(f"{linear}.qzeros")[:, words] >> shifts) & mask) + self._zero_offset
        if self._is_awq:  # an int32 holds outputs of one input
            q = (self._tensor(f"{linear}.qweight")[:, words] >> shifts) & mask
        else:  # inputs of one output
            packed = self._tensor(f"{linear}.qweight")[:, rows]
            q = ((packed[:, None] >> bits * places[:, None]) & mask).reshape(-1, len(outputs))
        groups = self._group_of(linear, len(q))
        scales = self._tensor(f"{linear}.scales")[:, rows]
        return np.ascontiguousarray(((q - zeros[groups]).astype(np.float32) * scales[groups]).T)

    def _group_of(self, linear: str, inputs: int) -> np.ndarray:
        """The group of each input of ``linear``."""
        groups, size = len(self._tensor(f"{linear}.scales").stored), self._group_size
        if groups > 1 and f"{linear}.g_idx" in self._tensors:
            return self._tensor(f"{linear}.g_idx")[...]
        if -(-inputs // size) != groups:  # a rule of the config gives it other groups
            size = group_size_of(inputs, groups)
        return np.asarray(np.arange(inputs) // size)

    def _bits(self, linear: str) -> int:
        """Of an integer of ``linear``: as many of an output's zero points are in a word."""
        shapes = [self._tensor(f"{linear}.{suffix}").stored.shape for suffix in ("qzeros", "scales")]
        return int(32 * shapes[0][1] // shapes[1][1])

    @property
    def _group_size(self) -> int:
        told = int(self._packing.get("group_size", self._packing.get("q_group_size", -1)))
        return 1 << 30 if told == -1 else told

    @property
    def _version(self) -> str:
        """How words are packed, by the name that the format's own key gives it."""
        keys = ("packing_format",) if self._packing["quant_method"] == "auto-round" else ("checkpoint_format", "format")
        return next((str(self._packing[key]).lower() for key in keys if self._packing.get(key)), "gptq")

    @property
    def _is_awq(self) -> bool:
        return self._packing["quant_method"] == "awq" or self._version == "auto_round:auto_awq"

    @cached_property
    def _zero_offset(self) -> int:
        """What is added to a stored zero point: the first version of GPTQ's format has them less one.

        Where all of a GPTQ checkpoint are the middle of the grid, the version is the second, whatever it says.
        """
        if self._is_awq or self._version in ("gptq_v2", "auto_round"):
            return 0
        if self._packing["quant_method"] != "gptq":
            return 1
        stored = {
            name.removesuffix(".qzeros"): each for name, each in self._tensors.items() if name.endswith(".qzeros")
        }
        middles = {4: 0x88888888, 8: 0x80808080}
        alike = ((each.stored.view("<u4") == middles[self._bits(name)]).all() for name, each in stored.items())
        return 0 if all(alike) else 1


def _open_tensors(directory: Path) -> dict[str, _Tensor]:
    """Every tensor of the files in ``directory``, by the name transformers saves it with."""
    names = [_WEIGHTS]
    if not (directory / _WEIGHTS).is_file():
        names = sorted(set(json.loads((directory / _INDEX).read_bytes())["weight_map"].values()))
    tensors: dict[str, _Tensor] = {}
    for path in (directory / name for name in names):
        file = np.memmap(path, np.uint8, "r")
        begin = 8 + int(file[:8].view("<u8")[0])
        for name, entry in json.loads(file[8:begin].tobytes()).items():
            if name == "__metadata__" or entry["dtype"] not in _ELEMENTS:
                continue
            element = np.dtype(_ELEMENTS[entry["dtype"]])
            place = begin + int(entry["data_offsets"][0])
            stored = np.ndarray(entry["shape"], element, file, place)
            tensors[name] = _Tensor(stored, entry["dtype"])
    tensors = _of_each_expert(dict(qwen2_tensors(tensors, _third)))
    embedding = next((name for name in tensors if name.endswith("embed_tokens.weight")), f"{EMBEDDING}.weight")
    prefix = embedding.removesuffix("embed_tokens.weight")
    return {_plain_name(name, prefix): tensor for name, tensor in tensors.items()}


def _of_each_expert(tensors: dict[str, _Tensor]) -> dict[str, _Tensor]:
    """``tensors``, where a layer's experts have one tensor of three dimensions with one for each linear of each."""
    found: dict[str, _Tensor] = {}
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        if not module.endswith(".mlp.experts") or tensor.stored.ndim != 3:
            found[name] = tensor
            continue
        linears = STACKED[last]
        for number, expert in enumerate(tensor.stored):
            for linear, rows in zip(linears, np.split(expert, len(linears)), strict=True):
                found[f"{module}.{number}.{linear}.weight"] = _Tensor(rows, tensor.element)
    return found


def _third(tensor: _Tensor, number: int, axis: int) -> _Tensor:
    return _Tensor(np.split(tensor.stored, 3, axis)[number], tensor.element)


def _plain_name(name: str, prefix: str) -> str:
    """``name`` without what a program put before the decoder's and the head's names."""
    if name.endswith(f"{HEAD}.weight"):
        return f"{HEAD}.weight"
    return f"model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name
