"""A checkpoint in transformers beside its float engine as a model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qwen_run import QwenForCausalLM

PAD = 130
ROWS = [[5, 17, 99, 3, 8, 41, 7], [64, 2, 77], [9, 9, 120, 33, 1]]
# options that are objects with a state: each model gets its own
FRESH = ("logits_processor", "stopping_criteria")


def padded(rows: Sequence[Sequence[int]], left: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of rows of different lengths."""
    width = max(map(len, rows))
    gaps = [[0] * (width - len(row)) for row in rows]
    mask = [[*gap, *[1] * len(row)] if left else [*[1] * len(row), *gap] for gap, row in zip(gaps, rows, strict=True)]
    ids = [[*[PAD] * len(g), *row] if left else [*row, *[PAD] * len(g)] for g, row in zip(gaps, rows, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


class Pair:
    """Both models.

    Attributes:
        theirs: transformers' model, in float32.
        ours: the engine's.
        path: the engine's directory.
        checkpoint: what it was built from.
        rows: prompts, long enough for what is particular to the family.
        free: blocks of the engine's cache that are free where nothing holds one.
    """

    def __init__(self, theirs: Any, checkpoint: Path, engine: Path, times: int = 1) -> None:
        self.theirs, self.checkpoint, self.path = theirs, checkpoint, engine
        self.ours = QwenForCausalLM.from_pretrained(engine, engine_batch_size=4, engine_prefill_chunk_size=64)
        self.rows = [row * times for row in ROWS]
        for model in (self.ours, self.theirs):
            model.generation_config.pad_token_id = PAD
            model.generation_config.eos_token_id = None  # answers of one length, whatever comes
        self.free = self.ours.num_free_blocks

    def both(self, ids: torch.Tensor, mask: torch.Tensor | None, **options: Any) -> list[Any]:
        """What both generate, with equal random numbers."""
        found = []
        for model in (self.ours, self.theirs):
            torch.manual_seed(7)
            made = {name: value() if name in FRESH else value for name, value in options.items()}
            found.append(model.generate(ids, attention_mask=mask, **{"max_new_tokens": 9} | made))
        return found

    def alone(self, row: Sequence[int], **options: Any) -> list[int]:
        """What transformers generates greedily after ``row`` alone, the new tokens."""
        found = self.theirs.generate(torch.tensor([row]), do_sample=False, **options)
        return list(found[0, len(row) :].tolist())
