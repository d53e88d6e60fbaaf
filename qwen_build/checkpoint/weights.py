"""The weights of a checkpoint by the names of the graph, whatever their files and formats are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from qwen_build.checkpoint.adapters import Adapter, LoraChoice, open_adapter
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.files import check_inside
from qwen_build.checkpoint.formats.table import EXACT, FORMATS, Format, find_quantized, quantization_config
from qwen_build.checkpoint.gguf_file import GgufFile, part_files
from qwen_build.checkpoint.gguf_text import cache_folder, weights_file
from qwen_build.checkpoint.merging import adapted, merged
from qwen_build.checkpoint.safetensors import Safetensors
from qwen_build.checkpoint.safetensors_file import STORAGE, Float32
from qwen_build.checkpoint.shards import Shards, some
from qwen_build.checkpoint.stored import FloatWeight, PackedWeight, StoredWeight
from qwen_engine.errors import CheckpointError


def _open_files(directory: Path, config: Mapping[str, Any] | None) -> Safetensors | GgufFile:
    """The files of ``directory``; a link to a GGUF file leads out of it only where ``gguf_text.py`` made it."""
    if config is None or config["quant_method"] != "gguf":
        return Safetensors.open(directory)
    file = weights_file(directory)
    if directory.parent != cache_folder():
        for part in part_files(file):
            check_inside(part)
    return GgufFile.open(file, lists=False)


class Checkpoint:
    """The weights of a model. Made by :meth:`open`; a context manager that closes its files.

    Reading is safe from several threads.

    Attributes:
        tensors: every weight by its name in the graph.
        files: what is read.
        notes: what is read in another way than it is written, a sentence each.
        adapters: what is merged into the weights.
        format: how it is quantised already; None: it is not.
    """

    def __init__(self, files: Safetensors | GgufFile, config: Mapping[str, Any] | None) -> None:
        self._files = files
        self.files: tuple[Path, ...] = files.files
        self.format: Format | None = FORMATS[config["quant_method"]] if config else None
        found = find_quantized(config, files)
        floats = {
            name: FloatWeight(name, info.shape, info.dtype, files)
            for name, info in files.tensors.items()
            if name not in found.parts and isinstance(files, Safetensors)
        }
        self.tensors: Mapping[str, StoredWeight] = {**floats, **found.weights}
        self.notes = (*files.notes, *found.notes)
        self.adapters: tuple[Adapter, ...] = ()

    @classmethod
    def open(cls, directory: Path, lora: Iterable[LoraChoice] = ()) -> Checkpoint:
        """Open the weights of ``directory``. Every header is read and checked against its file's length.

        Args:
            lora: adapters, which are merged into the weights in this order.

        Raises:
            CheckpointError: see :func:`qwen_build.checkpoint.shards.open_shards`, or config.json cannot be read.
            UnsupportedModel: it is stored in a format that is not read, or an adapter cannot be merged.
            WeightMismatch: an adapter does not fit.
        """
        config = quantization_config(directory)
        files = _open_files(directory, config)
        try:
            checkpoint = cls(files, config)
        except BaseException:
            files.close()
            raise
        try:
            checkpoint._merge(directory, lora)
        except BaseException:
            checkpoint.close()
            raise
        return checkpoint

    @classmethod
    def described(cls, directory: Path) -> Checkpoint:
        """The checkpoint of a ``directory`` of which config.json alone is there: it has no tensor to read.

        Raises:
            CheckpointError: what its weights are stored in decides how an engine stores them.
        """
        config = quantization_config(directory)
        if config is not None and EXACT in FORMATS[config["quant_method"]].becomes:
            raise CheckpointError(
                f"{directory} has no weights, and those of a {config['quant_method']} checkpoint say how an engine "
                "stores them; give them too"
            )
        return cls(Safetensors(Shards({}, {}, ())), None)

    @property
    def is_described(self) -> bool:
        """Whether config.json alone is there, see :meth:`described`."""
        return not self.files

    def _merge(self, directory: Path, lora: Iterable[LoraChoice]) -> None:
        for choice in lora:
            self.adapters += (open_adapter(choice),)
        if self.adapters:
            tied = ModelConfig.from_hf(directory).tie_word_embeddings
            self.tensors, notes = merged(self.tensors, self.adapters, tied)
            self.notes += notes

    def adapted(self, config: ModelConfig) -> ModelConfig:
        """``config`` of the directory, as adapters leave it: they may resize the vocabulary, or untie the head."""
        return adapted(config, self.tensors, self.adapters)

    @cached_property
    def packed(self) -> Mapping[str, PackedWeight]:
        """The weights that the engine stores bit for bit."""
        return {name: weight for name, weight in self.tensors.items() if isinstance(weight, PackedWeight)}

    def is_packed(self, linear: str) -> bool:
        """Whether the weight of ``linear`` is stored bit for bit."""
        return f"{linear}.weight" in self.packed

    @property
    def quant(self) -> str | None:
        """The scheme of ``--quant`` that most of what is packed has; None where nothing is."""
        bits = Counter(weight.grid.bits for weight in self.packed.values())
        return f"int{bits.most_common(1)[0][0]}" if bits else None

    def check_readable(self, names: Iterable[str]) -> None:
        """Refuse tensors that are stored in another way than is read, of those that are there.

        Raises:
            CheckpointError: names them.
        """
        weights = [self.tensors[name] for name in sorted(names) if name in self.tensors]
        if empty := [f"{weight.name} {weight.shape}" for weight in weights if 0 in weight.shape]:
            raise CheckpointError(f"{some(empty)} have no values; save the checkpoint whole")
        floats = [weight for weight in weights if isinstance(weight, FloatWeight)]
        if strange := [f"{weight.name} ({weight.dtype})" for weight in floats if weight.dtype not in STORAGE]:
            raise CheckpointError(
                f"the checkpoint stores {some(strange)}, expected only {', '.join(STORAGE)}; config.json has no "
                "quantization_config that says what they are, use the checkpoint it was made from"
            )

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._files.close()
        for adapter in self.adapters:
            adapter.files.close()

    @property
    def dtype(self) -> str:
        """The dtype most float parameters are stored in: ``float32``, ``float16`` or ``bfloat16``; else ``unknown``."""
        parameters: Counter[str] = Counter()
        for info in self._files.tensors.values():
            if info.dtype in STORAGE:
                parameters[info.dtype] += math.prod(info.shape)
        if not parameters:
            return "unknown"
        return STORAGE[max(parameters, key=parameters.__getitem__)].hf_name

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Float32:
        """Rows ``[start, stop)`` of the first axis, all by default, in a new C-contiguous float32 array.

        Raises:
            CheckpointError: a value is NaN or infinite, or the file became shorter since it was opened.
        """
        weight = self.tensors[name]
        rows = weight.shape[0] if weight.shape else 1
        return weight.read(start, rows if stop is None else stop)
