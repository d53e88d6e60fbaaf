"""The front of an engine whose weights are elsewhere: its text, its limits, and no session."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_engine.errors import EngineError
from qwen_engine.manifest import Manifest
from qwen_run.api.build_on_demand import engine_of
from qwen_run.api.llm import LLM
from qwen_run.api.llm_options import LLMOptions
from qwen_run.cluster.replica import Description
from qwen_run.runtime.capacity import with_limit
from qwen_run.runtime.engine import Batch, Engine
from qwen_run.runtime.kv_cache import KVCache
from qwen_run.text.text_model import TextModel


class FrontEngine(Engine):
    """An engine directory with nothing of its weights: what a request is checked against.

    Args:
        num_blocks, max_seq_len: of the replicas that run it.
    """

    def __init__(self, directory: Path, num_blocks: int, max_seq_len: int) -> None:
        manifest = Manifest.read(directory)
        self.directory, self.manifest = directory, with_limit(manifest, max_seq_len)
        self.cache = KVCache([], manifest.cache.block_size, num_blocks)

    def _run(self, batch: Batch, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        raise EngineError(f"{self.directory} is run by replicas, not in this process; ask the ReplicatedLLM")


def front_of(model: str | Path, options: Mapping[str, Any], replicas: Sequence[Description]) -> LLM:
    """What prepares requests for ``replicas`` of ``model``: text, templates and checks, as each of them has them.

    Raises:
        EngineError, BuildError: as :class:`~qwen_run.api.llm.LLM`.
    """
    opening = ("threads", "num_blocks", "cache_bytes", "skip_tokenizer_init", "raw")
    chosen = LLMOptions.of({name: value for name, value in options.items() if name not in opening})
    engine = FrontEngine(
        engine_of(model, chosen.build),
        min(each.num_blocks for each in replicas),
        min(each.max_seq_len for each in replicas),
    )
    no_text = bool(options.get("skip_tokenizer_init"))
    if options.get("raw"):
        return LLM(TextModel.of(engine, raw=True), seed=chosen.seed, **dataclasses.asdict(chosen.core))
    return LLM(engine, skip_tokenizer_init=no_text, seed=chosen.seed, **dataclasses.asdict(chosen.core))
