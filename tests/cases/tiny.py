"""Tiny random checkpoints as transformers saves them, and ways to run an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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


# Those of mixtures of experts have rows in whole panels; the first layer is dense.
MIXTURE: dict[str, Any] = {
    "hidden_size": 96,
    "num_attention_heads": 6,
    "moe_intermediate_size": 48,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [0],
}

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2"},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "llama": {"model_type": "llama", "head_dim": 16, "attention_bias": True},
    "mistral": {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
    "qwen2-moe": MIXTURE | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 144, "norm_topk_prob": False},
    "qwen3-moe": MIXTURE | {"model_type": "qwen3_moe", "head_dim": 24, "norm_topk_prob": True},
    "qwen3-tied": {"model_type": "qwen3", "head_dim": 24, "tie_word_embeddings": True, "attention_bias": True},
}
DENSE = {name: family for name, family in FAMILIES.items() if "num_experts" not in family}
# What a Qwen-1 may be: each query has a key and a value of its own.
QWEN1: dict[str, dict[str, Any]] = {
    "qwen1": {"model_type": "qwen2", "num_key_value_heads": 10},
    "qwen1-large": {"model_type": "qwen2", "num_key_value_heads": 10, "vocab_size": 640},
}

# Mixtures of experts beside those of FAMILIES: of one, of all, in every other layer, with the other rule of weights.
_QWEN3_MIXTURE = FAMILIES["qwen3-moe"] | {"mlp_only_layers": []}
MIXTURES: dict[str, dict[str, Any]] = {
    "experts-one": _QWEN3_MIXTURE | {"num_experts": 1, "num_experts_per_tok": 1},
    "experts-all": _QWEN3_MIXTURE | {"num_experts": 4, "num_experts_per_tok": 4},
    "experts-many": _QWEN3_MIXTURE | {"num_experts": 21, "num_experts_per_tok": 3, "moe_intermediate_size": 16},
    "experts-not-normalised": _QWEN3_MIXTURE | {"norm_topk_prob": False, "attention_bias": True},
    "experts-every-other": FAMILIES["qwen2-moe"]
    | {"decoder_sparse_step": 2, "mlp_only_layers": [], "norm_topk_prob": True, "tie_word_embeddings": True},
    "experts-unbiased": FAMILIES["qwen2-moe"] | {"qkv_bias": False, "mlp_only_layers": [2]},
}
# Families with layers that see the last 40 tokens alone.
WINDOWED: dict[str, dict[str, Any]] = {
    "qwen2-windows": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1},
    "qwen3-windows": {
        "model_type": "qwen3", "head_dim": 24, "use_sliding_window": True, "sliding_window": 40,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "mistral-windows": {"model_type": "mistral", "head_dim": 16, "sliding_window": 40},
}  # fmt: skip

# Families whose positions are rotated in another way; sequences of 300 tokens go beyond what is "original".
_LONG = {"model_type": "qwen3", "head_dim": 24, "max_position_embeddings": 100}
ROTATED: dict[str, dict[str, Any]] = {
    "yarn": _LONG | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}},
    "yarn-told": _LONG
    | {"rope_parameters": {"rope_type": "yarn", "factor": 3.7, "original_max_position_embeddings": 90,
                           "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}},
    "yarn-mscale": _LONG
    | {"rope_parameters": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 50,
                           "mscale": 0.7, "mscale_all_dim": 1.2}},
    "linear": _LONG | {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "llama3": TINY | {"model_type": "qwen2", "rope_parameters": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 80}},
    "longrope": TINY | {"model_type": "qwen3", "head_dim": 24, "rope_parameters": {
        "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 320,
        "short_factor": [1.0 + i / 7 for i in range(12)], "long_factor": [9.0] * 12}},
    "dynamic": TINY | {"model_type": "qwen2", "rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
}  # fmt: skip
for _rotated in ROTATED.values():
    _rotated["rope_parameters"]["rope_theta"] = TINY["rope_theta"]


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


def run_chunks(engine: Any, sequences: Sequence[Sequence[int]], steps: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Logits of every token of every sequence, fed in the given steps.

    Args:
        steps: for each run, how many tokens of each sequence it feeds; zeros leave a sequence out.

    Returns:
        for each sequence (tokens, vocab_size) float32.
    """
    from qwen_run.runtime.engine import Batch

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
