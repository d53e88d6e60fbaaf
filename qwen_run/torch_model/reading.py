"""Columns of a batch, padding among them, as runs of an engine."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from qwen_engine.errors import RequestError
from qwen_run.runtime.engine import Batch, Engine
from qwen_run.torch_model.paged_cache import PagedCache
from qwen_run.torch_model.paged_rows import BlockPool


def read(
    engine: Engine, pool: BlockPool, cache: PagedCache, ids: torch.Tensor, new: torch.Tensor, wanted: torch.Tensor,
    chunk: int, embeds: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Feed new columns to ``engine``; ``cache`` knows them afterwards. Padding is never fed.

    Args:
        ids: (rows, columns) integers, the new columns.
        new: (rows, columns) bool, where they are tokens.
        wanted: (kept,) int64, the columns whose logits are returned, ascending.
        chunk: most tokens of one run.
        embeds: (rows, columns, hidden_size) float32 in place of ``ids``.

    Returns:
        logits float32 (rows, kept, vocab_size); 0 of padding.

    Raises:
        RequestError: a row has more tokens than the engine takes.
        EngineError: the cache is full, or the engine refuses a run.
    """
    counts = new.sum(1).tolist()
    _check_lengths(engine, cache, counts)
    logits = torch.zeros(len(counts), len(wanted), engine.manifest.model.vocab_size)
    place = torch.full((ids.shape[1],), -1, dtype=torch.int64)  # of a column among those that are wanted
    place[wanted] = torch.arange(len(wanted))
    columns = [torch.nonzero(row)[:, 0] for row in new]
    with pool.lock:
        before = list(cache.rows.lengths)
        cache.rows.grow(counts)
        try:
            for parts in _runs(counts, chunk):
                rows, taken = [row for row, _ in parts], [count for _, count in parts]
                past = [cache.rows.lengths[row] for row in rows]
                fed = [
                    columns[row][len_ - before[row] :][:count] for (row, count), len_ in zip(parts, past, strict=True)
                ]
                places = torch.cat([place[at] for at in fed])
                asked = torch.nonzero(places >= 0)[:, 0]
                given = torch.cat([ids[row, at] for row, at in zip(rows, fed, strict=True)])
                batch = Batch(
                    given.numpy().astype(np.int64),
                    np.cumsum([0, *taken]).astype(np.int32),
                    np.array(past, np.int32),
                    cache.rows.table(rows),
                    asked.numpy(),
                    *_embeds(embeds, rows, fed),
                )
                found = torch.from_numpy(engine.run(batch))
                owners = torch.repeat_interleave(torch.tensor(rows), torch.tensor(taken))
                logits[owners[asked], places[asked]] = found
                for row, count in parts:
                    cache.rows.lengths[row] += count
        except BaseException:  # the rows are as they were
            cache.rows.shrink(before)
            raise
    cache.add(new)
    return logits


def _check_lengths(engine: Engine, cache: PagedCache, counts: list[int]) -> None:
    """Refuse rows that are longer with so many more tokens than the engine takes."""
    longest = engine.manifest.limits.max_seq_len
    lengths = [past + count for past, count in zip(cache.rows.lengths, counts, strict=True)]
    if max(lengths) > longest:
        row = lengths.index(max(lengths))
        raise RequestError(
            f"row {row} has {lengths[row]} tokens, expected {longest} or fewer, the engine's max_seq_len"
        )


def _embeds(
    embeds: torch.Tensor | None, rows: list[int], columns: list[torch.Tensor]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The embeddings of ``columns`` of ``rows``, and which tokens of the run they are: all, or none."""
    if embeds is None:
        return None, None
    given = torch.cat([embeds[row, at] for row, at in zip(rows, columns, strict=True)])
    return given.contiguous().numpy(), np.arange(len(given), dtype=np.int64)


def _runs(counts: list[int], chunk: int) -> Iterator[list[tuple[int, int]]]:
    """The rows and numbers of tokens of each run, of at most ``chunk`` tokens in all, or of one token of each row."""
    left = {row: count for row, count in enumerate(counts) if count}
    while left:
        room = max(chunk, len(left))
        parts = []
        for row in list(left):
            taken = min(left[row], room)
            if taken:
                parts.append((row, taken))
                room -= taken
                left[row] -= taken
                if not left[row]:
                    del left[row]
        yield parts
