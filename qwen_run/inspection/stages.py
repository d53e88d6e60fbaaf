"""What each stage of an engine would have: its layers, the weights that it maps, its part of the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_engine.manifest import GRAPH_FILE, Manifest
from qwen_run.runtime.kv_cache import block_bytes
from qwen_run.runtime.stage import even_cuts, read_stage_graph, stage_states

MIB = 1 << 20


@dataclass(frozen=True)
class StageRow:
    """One stage.

    Attributes:
        first_layer, last_layer: of those that it has.
        weight_bytes: of the weights file that it reads; tables that two stages need count in both.
        cache_bytes_per_token: over its layers.
    """

    stage: int
    first_layer: int
    last_layer: int
    weight_bytes: int
    cache_bytes_per_token: int


def stage_rows(engine: Path, manifest: Manifest, num_stages: int) -> list[StageRow]:
    """The stages that ``--pipeline-parallel-size`` makes of the engine.

    Raises:
        EngineError: there are not so many layers, or the graph cannot be cut.
    """
    rows = []
    for index, layers in enumerate(even_cuts(manifest.model.num_hidden_layers, num_stages)):
        graph = read_stage_graph(engine / GRAPH_FILE, layers, manifest)
        cache_bytes = block_bytes(stage_states(manifest, layers)) // manifest.cache.block_size
        rows.append(StageRow(index, layers.start, layers[-1], graph.weight_bytes, cache_bytes))
    return rows


def stage_lines(rows: Sequence[StageRow]) -> list[str]:
    """The stages in columns."""
    cells = [("stage", "layers", "weights MiB", "cache KiB a token")]
    cells += [
        (
            f"{row.stage}",
            f"{row.first_layer} to {row.last_layer}",
            f"{row.weight_bytes / MIB:,.1f}",
            f"{row.cache_bytes_per_token / 1024:.2f}",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in cells]
