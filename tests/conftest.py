"""Tiny random checkpoints as transformers saves them, engines built from them, and ways to run both."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# A shell's background job ignores the key that interrupts, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Sizes pairwise different and not multiples of each other where the architecture allows it.
TINY = {
    "vocab_size": 131,
    "hidden_size": 80,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "max_position_embeddings": 640,
    "initializer_range": 0.15,
    "rope_theta": 5000.0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2"},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "qwen3-tied": {"model_type": "qwen3", "head_dim": 24, "tie_word_embeddings": True},
}


@dataclass(frozen=True)
class TinyCheckpoint:
    """A random model and the directory it is saved in; ``model`` holds what was saved, in float32."""

    path: Path
    model: Any  # transformers.PreTrainedModel

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """transformers' logits, (tokens, vocab_size) float32."""
        return hf_logits(self.model, token_ids)


def hf_logits(model: Any, token_ids: Sequence[int]) -> np.ndarray:
    """Logits of a transformers model for one sequence, (tokens, vocab_size) float32."""
    import torch

    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([list(token_ids)])).logits[0].float().numpy()
    return logits


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyCheckpoint]:
    """Makes ``tiny_checkpoint(family, dtype="float32", sharded=False)``, each once a session."""

    @cache
    def make(family: str, dtype: str = "float32", sharded: bool = False) -> TinyCheckpoint:
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        path = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(**TINY | FAMILIES[family])
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:  # transformers starts norms at 1 and biases at 0, which hides mistakes
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        model.to(getattr(torch, dtype)).save_pretrained(path, **{"max_shard_size": "60KB"} if sharded else {})
        assert (path / "model.safetensors.index.json").exists() == sharded
        # Loaded again: rounding the weights in place would have rounded the rotary frequencies too.
        return TinyCheckpoint(path, transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))

    return make


@pytest.fixture(scope="session")
def build_engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes ``build_engine(checkpoint_directory, **BuildOptions fields)``, the directory of a new engine."""
    from qwen_build.build import plan_build, write_engine
    from qwen_build.checkpoint import Checkpoint
    from qwen_build.locate import resolve_checkpoint
    from qwen_build.options import BuildOptions

    @cache
    def build(directory: Path, **options: Any) -> Path:
        output = tmp_path_factory.mktemp("engines") / "engine"
        with Checkpoint.open(directory) as weights:
            write_engine(
                plan_build(weights, resolve_checkpoint(str(directory)), BuildOptions(**options)), weights, output
            )
        return output

    return build


def run_chunks(engine: Any, sequences: Sequence[Sequence[int]], steps: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Logits of every token of every sequence, fed in the given steps.

    Args:
        steps: for each run, how many tokens of each sequence it feeds; zeros leave a sequence out.

    Returns:
        for each sequence (tokens, vocab_size) float32.
    """
    from qwen_run.engine import Batch

    needed = [engine.cache.blocks_for(len(sequence)) for sequence in sequences]
    owned = [engine.cache.allocate(count) for count in needed]
    done = [0] * len(sequences)
    logits: list[list[np.ndarray]] = [[] for _ in sequences]
    for step in steps:
        fed = [s for s, count in enumerate(step) if count]
        table = np.zeros((len(fed), max(needed[s] for s in fed)), np.int32)
        for row, s in zip(table, fed, strict=True):
            row[: needed[s]] = owned[s]
        lengths = [step[s] for s in fed]
        batch = Batch(
            np.concatenate([np.array(sequences[s][done[s] : done[s] + step[s]], np.int64) for s in fed]),
            np.cumsum([0, *lengths]).astype(np.int32),
            np.array([done[s] for s in fed], np.int32),
            table,
            np.arange(sum(lengths), dtype=np.int64),
        )
        for s, rows in zip(fed, np.split(engine.run(batch), np.cumsum(lengths)[:-1]), strict=True):
            logits[s].append(rows)
            done[s] += step[s]
    for blocks in owned:
        engine.cache.free(blocks)
    assert done == [len(sequence) for sequence in sequences]
    return [np.concatenate(rows) for rows in logits]


def run_alone(engine: Any, sequence: Sequence[int]) -> np.ndarray:
    """Logits of every token of one sequence, fed at once."""
    return run_chunks(engine, [sequence], [[len(sequence)]])[0]
