"""The weights of GGUF files as their own package reads them, for a comparison: nothing of the builder is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qwen_engine.errors import CheckpointError
from qwen_engine.graph_io import EMBEDDING, HEAD

# the types whose integers an engine has too; an embedding is stored as its own option says
_KEPT = ("Q4_0", "Q8_0", "IQ4_NL", "MXFP4")


class GgufWeights:
    """Weights of the files in a directory, float32 and by Hugging Face's names.

    Raises:
        ImportError: the package gguf is not installed.
        CheckpointError: a file cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        import gguf

        try:
            readers = [gguf.GGUFReader(path) for path in sorted(directory.glob("model*.gguf"))]
            fields = readers[0].fields
            self._architecture = str(fields["general.architecture"].contents())
            self._heads, layers = (
                int(fields[f"{self._architecture}.{key}"].contents()) for key in ("attention.head_count", "block_count")
            )
        except (OSError, ValueError, LookupError) as error:
            raise CheckpointError(f"the weights of {directory} cannot be read: {error}; download it again") from error
        self._tensors: dict[str, Any] = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
        kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == self._architecture)
        self._names = gguf.get_tensor_name_map(kind, layers)
        heads_kv = fields.get(f"{self._architecture}.attention.head_count_kv")
        self._heads_kv = int(heads_kv.contents()) if heads_kv else self._heads

    def is_packed(self, linear: str) -> bool:
        """Whether ``linear`` is stored as integers that the engine has too."""
        tensor = self._tensor(f"{linear}.weight")
        return tensor.name != "token_embd.weight" and tensor.tensor_type.name in _KEPT

    def vector(self, name: str) -> np.ndarray:
        """A norm's weight or a bias."""
        return self._values(name, self._tensor(name), None)

    def rows(self, linear: str, rows: slice) -> np.ndarray:
        """Some rows of the weight of ``linear``, (rows, in_features). A head that is not there is the embedding."""
        return self._values(f"{linear}.weight", self._tensor(f"{linear}.weight"), rows)

    def _tensor(self, name: str) -> Any:
        stored = self._names.get_name(name, (".weight", ".bias"))
        if name == f"{HEAD}.weight" and stored not in self._tensors:
            stored = self._names.get_name(f"{EMBEDDING}.weight", (".weight",))
        if stored not in self._tensors:
            raise CheckpointError(f"the checkpoint lacks {name}, which the engine has; name the one it was built from")
        return self._tensors[stored]

    def _values(self, name: str, tensor: Any, rows: slice | None) -> np.ndarray:
        """Rows in Hugging Face's order; a llama's q and k have those of both halves of a head in turns."""
        import gguf

        heads = {"q_proj": self._heads, "k_proj": self._heads_kv}.get(name.split(".")[-2])
        data = tensor.data
        if self._architecture == "llama" and heads:
            places = np.arange(int(tensor.shape[-1])).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
            data = data[places[rows or slice(None)]]
        elif rows is not None:
            data = data[rows]
        values = gguf.dequantize(np.ascontiguousarray(data), tensor.tensor_type)
        return np.asarray(values, np.float32)
