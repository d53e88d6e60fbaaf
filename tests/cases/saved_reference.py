"""What a saved reference is asked for."""

from __future__ import annotations

import numpy as np

from cases.tiny import run_alone
from qwen_run.accuracy.logits import Positions, compare
from qwen_run.accuracy.reference import CHUNK_TOKENS
from qwen_run.accuracy.saved_reference import (
    Identity,
)
from qwen_run.runtime.engine import Engine

RNG = np.random.default_rng(3)


SEQUENCES = [RNG.integers(0, 131, length).tolist() for length in (2 * CHUNK_TOKENS + 5, CHUNK_TOKENS, 9)]


IDENTITY = Identity({"model.safetensors": "aa", "tokenizer.json": "bb"}, "cc", "dd", {"max_new_tokens": 6})


def positions(reference, engine: Engine, token_ids: list[int]) -> Positions:
    logits, following = run_alone(engine, token_ids), np.array([*token_ids[1:], -1])
    chunks, start = [], 0
    for chunk in reference.logits(token_ids):
        part = slice(start, start + len(chunk))
        chunks.append(compare(chunk, logits[part], following[part]))
        start += len(chunk)
    assert start == len(token_ids)
    return Positions.concatenate(chunks)
