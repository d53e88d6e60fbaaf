"""The weights of a checkpoint for a comparison: by readers that use nothing of the builder, but of merged adapters.

What the builder makes of adapters is compared with peft by its tests.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from qwen_engine.errors import CheckpointError
from qwen_engine.graph_io import EMBEDDING, HEAD
from qwen_engine.manifest import MergedAdapter
from qwen_run.accuracy.checkpoint_weights import CheckpointWeights
from qwen_run.accuracy.gguf_weights import GgufWeights


class BuilderWeights:
    """Weights as the builder reads them, float32 and by Hugging Face's names, with ``adapters`` merged into them.

    Attributes:
        vocab_size: adapters may resize it.
        tied: whether the head is the embedding.

    Raises:
        CheckpointError, UnsupportedModel, WeightMismatch: it cannot be read.
    """

    def __init__(self, directory: Path, adapters: Sequence[MergedAdapter] = ()) -> None:
        from qwen_build.checkpoint.adapters import LoraChoice
        from qwen_build.checkpoint.config import ModelConfig
        from qwen_build.checkpoint.weights import Checkpoint

        lora = [LoraChoice(Path(adapter.directory), adapter.weight) for adapter in adapters]
        self._checkpoint = Checkpoint.open(directory, lora)
        config = self._checkpoint.adapted(ModelConfig.from_hf(directory))
        self.vocab_size, self.tied = config.vocab_size, config.tie_word_embeddings

    def __del__(self) -> None:
        if hasattr(self, "_checkpoint"):
            self._checkpoint.close()

    def is_packed(self, linear: str) -> bool:
        """Whether the checkpoint stores ``linear`` on a grid of the engine's."""
        return self._checkpoint.is_packed(EMBEDDING if linear == HEAD and self.tied else linear)

    def vector(self, name: str) -> np.ndarray:
        """A norm's weight or a bias."""
        return self._checkpoint.read(name)

    def rows(self, linear: str, rows: slice) -> np.ndarray:
        """Some rows of the weight of ``linear``, (rows, in_features). A tied head is the embedding."""
        name = EMBEDDING if linear == HEAD and self.tied else linear
        return self._checkpoint.read(f"{name}.weight", rows.start, rows.stop)


def open_weights(
    directory: Path, adapters: Sequence[MergedAdapter] = ()
) -> CheckpointWeights | GgufWeights | BuilderWeights:
    """The weights of ``directory`` with ``adapters``.

    The builder reads a GGUF where the package gguf is not installed.

    Raises:
        CheckpointError, UnsupportedModel, WeightMismatch: they cannot be read.
    """
    try:
        config = json.loads((directory / "config.json").read_bytes())
        stored = config.get("quantization_config") or config.get("compression_config") or {}
        is_gguf = stored.get("quant_method") == "gguf"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the weights of {directory} cannot be read: {error}; download it again") from error
    if adapters:
        return BuilderWeights(directory, adapters)
    if is_gguf:
        with suppress(ImportError):
            return GgufWeights(directory)
        return BuilderWeights(directory)
    return CheckpointWeights(directory)
