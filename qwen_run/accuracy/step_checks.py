"""Whether an engine says the same however a text is fed to it: token by token, in pieces, beside others, after a guess.

A reference sees a text at once, and so does the engine where both are compared. Answers come in other ways: other
kernels multiply one row than many, and a step mixes sequences. Every way of feeding the last tokens of real documents
is held against one run of the whole document. Where the engine promises it, every bit of the logits is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qwen_engine.errors import EngineError
from qwen_engine.manifest import Manifest
from qwen_run.accuracy.both_sides import one_sequence
from qwen_run.accuracy.logits import FullLogits, compare
from qwen_run.runtime.engine import Batch, Engine
from qwen_run.runtime.kv_cache import KVCache

# Last tokens of each document whose logits are compared, and how a document that is fed in pieces ends: with the
# numbers of rows that decoding and verifying guesses have.
COMPARED = 16
_ENDS = (7, 4, 3, 2)
# What a document that is fed in pieces begins with: lengths beside the tiles of the kernels.
_BEGINS = (1, 33, 64, 7, 127, 5)
# Wrong guesses that follow a token.
_GUESSES = 3
# Documents that are fed, and the most tokens of each.
DOCUMENTS, DOCUMENT_TOKENS = 3, 640

Sequences = Sequence[Sequence[int]]
# sequences -> which of them are fed how many tokens, run by run
Schedule = Callable[[Sequences], Iterator[dict[int, int]]]


@dataclass(frozen=True)
class Way:
    """A way of feeding documents.

    Attributes:
        name: of the check.
        schedule: the runs; the tokens of a document follow each other.
        guesses: whether wrong tokens follow each of the last ones, which the next run writes over.
        shared: whether the later documents are the first one, and find its whole blocks in the cache.
    """

    name: str
    schedule: Schedule
    guesses: bool = False
    shared: bool = False


def _token_by_token(sequences: Sequences) -> Iterator[dict[int, int]]:
    for s, sequence in enumerate(sequences):
        yield {s: len(sequence) - COMPARED}
        yield from ({s: 1} for _ in range(COMPARED))


def _in_pieces(sequences: Sequences) -> Iterator[dict[int, int]]:
    for s, sequence in enumerate(sequences):
        left = len(sequence) - COMPARED
        for number in range(len(sequence)):
            piece = min(left, _BEGINS[number % len(_BEGINS)])
            if piece:
                yield {s: piece}
            left -= piece
        yield from ({s: piece} for piece in _ENDS)


def _together(sequences: Sequences) -> Iterator[dict[int, int]]:
    """One after the other joins; those that are there go on by a token, as a server's answers do."""
    done = [0] * len(sequences)
    for s, sequence in enumerate(sequences):
        step = {other: 1 for other in range(s) if done[other] < len(sequences[other])}
        step[s] = len(sequence) - COMPARED
        yield step
        for other, count in step.items():
            done[other] += count
    while step := {s: 1 for s, sequence in enumerate(sequences) if done[s] < len(sequence)}:
        yield step
        for s in step:
            done[s] += 1


def _at_once(sequences: Sequences) -> Iterator[dict[int, int]]:
    for s, sequence in enumerate(sequences):
        yield {s: len(sequence)}


WAYS = (
    Way("token by token", _token_by_token),
    Way("in pieces", _in_pieces),
    Way("beside others", _together),
    Way("after wrong guesses", _token_by_token, guesses=True),
    Way("from cached blocks", _at_once, shared=True),
)


def promises_bits(manifest: Manifest) -> bool:
    """Whether no bit of an answer depends on how its tokens are fed: all weights quantised, the project's kernels."""
    return all(one.quantization.group_size and one.quantization.kernels == "native" for one in manifest.linears)


def longest(sequences: Sequences, max_seq_len: int) -> list[tuple[int, ...]]:
    """The documents to feed: the longest, cut to lengths that differ."""
    chosen = sorted(map(tuple, sequences), key=len, reverse=True)[:DOCUMENTS]
    most = min(DOCUMENT_TOKENS, max_seq_len - _GUESSES)
    cut = [sequence[: most - 37 * number] for number, sequence in enumerate(chosen)]
    return [sequence for sequence in cut if len(sequence) > COMPARED]


@dataclass(frozen=True)
class Difference:
    """How far the logits of a way are from those of one run: positions that differ, largest difference, mean KL."""

    positions: int
    differing: int
    largest: float
    kl: float


def feed(engine: Engine, sequences: Sequences, way: Way) -> list[np.ndarray]:
    """Logits of the last ``COMPARED`` tokens of each document, (COMPARED, vocab_size) float32.

    Raises:
        EngineError: the cache has no room.
    """
    cache = engine.cache
    taken: list[list[int]] = []
    tables: list[list[int]] = []
    if way.shared:
        sequences = [sequences[0]] * 2
    known = [0] * len(sequences)
    try:
        for s, sequence in enumerate(sequences):
            shared: list[int] = []
            if way.shared and s:
                known[s] = (len(sequence) - COMPARED) // cache.block_size * cache.block_size
                shared = tables[0][: known[s] // cache.block_size]
            blocks = cache.allocate(cache.blocks_for(len(sequence) + _GUESSES) - len(shared))
            if blocks is None:
                raise _no_room(cache, sequences)
            taken.append(blocks)
            tables.append([*shared, *blocks])
        logits = _run(engine, sequences, tables, known, way)
    finally:
        for blocks in taken:
            cache.free(blocks)
    return [logits[-1]] if way.shared else logits


def _run(
    engine: Engine, sequences: Sequences, tables: Sequence[Sequence[int]], known: list[int], way: Way
) -> list[np.ndarray]:
    """Logits of the last tokens of each sequence; ``known`` of its tokens are in the cache, and are not fed."""
    done = list(known)
    found: list[list[np.ndarray]] = [[] for _ in sequences]
    widest = max(map(len, tables))
    padded = np.array([[*table, *[0] * (widest - len(table))] for table in tables], np.int32)
    for step in way.schedule(sequences):
        fed: list[int] = []
        lengths: list[int] = []
        wanted: list[tuple[int, int]] = []  # sequence, index in this run
        for s, count in step.items():
            count = min(count, len(sequences[s]) - done[s])
            tokens = list(sequences[s][done[s] : done[s] + count])
            first = max(len(sequences[s]) - COMPARED - done[s], 0)
            wanted += [(s, sum(lengths) + index) for index in range(first, count)]
            if way.guesses and count == 1:
                tokens += [(tokens[0] + 1 + guess) % engine.manifest.model.vocab_size for guess in range(_GUESSES)]
            fed += tokens
            lengths.append(len(tokens))
        rows = engine.run(
            Batch(
                np.array(fed, np.int64),
                np.cumsum([0, *lengths]).astype(np.int32),
                np.array([done[s] for s in step], np.int32),
                padded[list(step)],
                np.array([index for _, index in wanted], np.int64),
            )
        )
        for (s, _), row in zip(wanted, rows, strict=True):
            found[s].append(row)
        for s, count in step.items():
            done[s] = min(done[s] + count, len(sequences[s]))
    return [np.array(rows) for rows in found]


def at_once(engine: Engine, sequence: Sequence[int]) -> np.ndarray:
    """Logits of the last ``COMPARED`` tokens of a document that is fed in one run."""
    blocks = engine.cache.allocate(engine.cache.blocks_for(len(sequence)))
    if blocks is None:
        raise _no_room(engine.cache, [sequence])
    try:
        return engine.run(one_sequence(sequence, 0, blocks, first_logits=len(sequence) - COMPARED))
    finally:
        engine.cache.free(blocks)


def compare_ways(engine: Engine, sequences: Sequences) -> dict[str, Difference]:
    """Each of :data:`WAYS` beside one run of each document."""
    expected = [at_once(engine, sequence) for sequence in sequences]
    differences = {}
    for way in WAYS:
        found = np.concatenate(feed(engine, sequences, way))
        beside = np.concatenate(expected[:1] if way.shared else expected)
        kl = compare(FullLogits(beside), found, np.full(len(found), -1)).kl
        differing = int(np.any(found.view(np.uint32) != beside.view(np.uint32), axis=1).sum())
        difference = float(np.abs(found.astype(np.float64) - beside).max())
        differences[way.name] = Difference(len(found), differing, difference, float(kl.mean()))
    return differences


def _no_room(cache: KVCache, sequences: Sequences) -> EngineError:
    """What to say of a cache that does not hold ``sequences`` together."""
    needed = sum(cache.blocks_for(len(sequence) + _GUESSES) for sequence in sequences)
    return EngineError(
        "the cache has no room for the documents that are fed; raise --kv-cache-memory to "
        f"{cache.mebibytes_of(needed)} MiB"
    )
