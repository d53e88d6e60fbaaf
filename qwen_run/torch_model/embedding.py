"""The rows that an engine looks up for token ids, for who puts others beside them."""

from __future__ import annotations

from pathlib import Path

import torch

from qwen_engine.graph_io import EMBEDDING
from qwen_run.engine_files.weights import EngineWeights


class EngineEmbedding(torch.nn.Module):
    """What ``get_input_embeddings`` returns: a module that looks rows up in the engine's files.

    Attributes:
        num_embeddings: ids that have a row.
        embedding_dim: numbers of a row.

    Raises:
        EngineError: the engine's files cannot be read.
    """

    def __init__(self, engine: Path) -> None:
        super().__init__()
        self._linear = EngineWeights(engine).linears[EMBEDDING]
        self.num_embeddings, self.embedding_dim = self._linear.record.out_features, self._linear.record.in_features

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The rows of ``input_ids``, float32 (..., embedding_dim).

        Raises:
            ValueError: an id has no row.
        """
        ids, places = input_ids.cpu().long().unique(return_inverse=True)
        if ids.numel() and not 0 <= int(ids[0]) <= int(ids[-1]) < self.num_embeddings:
            raise ValueError(
                f"input_ids holds {int(ids[0])} to {int(ids[-1])}, expected 0 to {self.num_embeddings - 1}"
            )
        rows = torch.empty(len(ids), self.embedding_dim)
        for row, token_id in zip(rows, ids.tolist(), strict=True):
            row.copy_(torch.from_numpy(self._linear.rows(token_id, token_id + 1)[0].copy()))
        return rows[places]
