"""What one sequence feeds in one step, what a step of several is for the engine, and how a step is shared."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from qwen_run.runtime.engine import Batch
from qwen_run.runtime.request import Sequence


@dataclass(frozen=True)
class Chunk:
    """The tokens one sequence feeds in one step.

    Attributes:
        num_drafts: how many at the end of ``token_ids`` are guesses and no part of the sequence yet.
        num_logits: how many at the end of ``token_ids`` get logits; 0 in the middle of a prompt.
        start: tokens of the sequence before them.
    """

    sequence: Sequence
    token_ids: list[int]
    num_drafts: int
    num_logits: int
    start: int


def build_batch(chunks: List[Chunk]) -> Batch:
    """The inputs of one engine run. Unused entries of the block table are 0."""
    ends = list(accumulate(len(chunk.token_ids) for chunk in chunks))
    width = max(len(chunk.sequence.block_ids) for chunk in chunks)
    tables = [chunk.sequence.block_ids + [0] * (width - len(chunk.sequence.block_ids)) for chunk in chunks]
    wanted = [range(end - chunk.num_logits, end) for end, chunk in zip(ends, chunks, strict=True)]
    return Batch(
        input_ids=np.array([token_id for chunk in chunks for token_id in chunk.token_ids], np.int64),
        cumulative_lengths=np.array([0, *ends], np.int32),
        past_lengths=np.array([chunk.start for chunk in chunks], np.int32),
        block_table=np.array(tables, np.int32),
        logits_indices=np.array([index for indexes in wanted for index in indexes], np.int64),
    )


def fair_shares(budget: int, wanted: list[int]) -> list[int]:
    """Divide ``budget`` so that nobody gets more than wanted, nor more than another who still wants some.

    Where there is not one for each, the first get it; what does not divide evenly goes to who wants most.

    >>> fair_shares(10, [20, 2, 20]), fair_shares(2, [5, 5, 5]), fair_shares(10, [1, 2])
    ([4, 2, 4], [1, 1, 0], [1, 2])
    """
    shares = [0] * len(wanted)
    order = sorted(range(min(budget, len(wanted))), key=lambda index: wanted[index])
    for position, index in enumerate(order):
        shares[index] = min(wanted[index], budget // (len(order) - position))
        budget -= shares[index]
    return shares


def num_slots(sequence: Sequence) -> int:
    """Places in the batch to keep for ``sequence``: also for those that will be forked from it."""
    return sequence.request.width if len(sequence.request.sequences) == 1 else 1


def num_unjudged(sequence: Sequence) -> int:
    """How many tokens ``sequence`` feeds before the first whose logits are needed."""
    return max(0, first_logits(sequence) - sequence.num_fed)


def first_logits(sequence: Sequence) -> int:
    """The first position whose logits are needed: the last, or that before the first prompt token to be judged."""
    known = len(sequence.request.prompt_logprobs)
    wants_more = 0 < known < len(sequence.request.prompt)
    return known - 1 if wants_more else len(sequence.token_ids) - 1
