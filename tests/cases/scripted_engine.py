"""An engine without a model: logits that any wrong table, length or index changes."""

from __future__ import annotations

import zlib
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from qwen_engine.errors import EngineError
from qwen_engine.graph_io import TensorSpec
from qwen_engine.tasks import GENERATE
from qwen_run.runtime.engine import Batch
from qwen_run.runtime.flights import PipelinedEngine, StageLost
from qwen_run.runtime.kv_cache import Blocks, Edit, KVCache

VOCAB_SIZE = 11


class ScriptedEngine:
    """Stands where an ``Engine`` does; the logits of a token are a function of the tokens up to it.

    What it knows of earlier runs it reads from the cache: block entries hold token id + 1, as keys and values do for
    a model.
    """

    def __init__(self, num_blocks: int = 40, block_size: int = 4, max_seq_len: int = 30) -> None:
        self.manifest: Any = SimpleNamespace(
            limits=SimpleNamespace(max_seq_len=max_seq_len),
            model=SimpleNamespace(vocab_size=VOCAB_SIZE, experts=None),
            task=GENERATE,
        )
        pool = TensorSpec("tokens", "paged_state", "int32", ("num_blocks", block_size))
        self.cache = KVCache([pool], block_size, num_blocks)
        self.batches: list[Batch] = []
        self.fails_after = 10**9
        self.checks_past = True
        self.leaves_drafts = False  # rejected drafts stay where the next tokens are written

    def run(self, batch: Batch) -> np.ndarray:
        if len(self.batches) == self.fails_after:
            raise EngineError("scripted failure")
        self.batches.append(batch)
        pool, block_size = self.cache.pools["tokens"], self.cache.block_size
        logits = []
        for sequence, (start, end) in enumerate(
            zip(batch.cumulative_lengths[:-1], batch.cumulative_lengths[1:], strict=True)
        ):
            table, past = batch.block_table[sequence], batch.past_lengths[sequence]
            for position, token_id in enumerate(batch.input_ids[start:end], start=past):
                block, offset = table[position // block_size], position % block_size
                assert self.leaves_drafts or pool[block, offset] == 0, "written twice, or not zeroed"
                assert not self.cache.is_shared(block), "written to a block of two sequences"
                pool[block, offset] = token_id + 1
            history = pool[table].reshape(-1)
            assert history[:past].all() or not self.checks_past, "the past is not written"
            logits += [scripted_logits(history[: past + i + 1]) for i in range(end - start)]
        return np.array(logits, np.float32).reshape(-1, VOCAB_SIZE)[batch.logits_indices]


def scripted_logits(history: np.ndarray) -> np.ndarray:
    """Logits (VOCAB_SIZE,) that change with every entry of ``history`` int32 (n,) and with its length.

    Answers are apt to go 0, 1, 2, 0, 1, 2, ... but now and then do not.
    """
    logits = np.random.default_rng(zlib.crc32(history.tobytes())).normal(size=VOCAB_SIZE).astype(np.float32)
    logits[history[-1] % 3] += 3
    return logits


def expected_tokens(prompt: tuple[int, ...], count: int) -> list[int]:
    """Greedy answer, straight from the definition of the script."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(scripted_logits(np.array(tokens, np.int32) + 1))))
    return tokens[len(prompt) :]


class ScriptedStages(PipelinedEngine):
    """A scripted engine that is given several batches before it runs the first; its pools are edited as stages' are.

    Attributes:
        refuses: numbers of the runs, counted from 0, that are refused.
        loses: numbers of the collects that find a stage lost.
    """

    def __init__(self, num_stages: int, num_blocks: int = 40, block_size: int = 4, max_seq_len: int = 30) -> None:
        self._script = ScriptedEngine(num_blocks, block_size, max_seq_len)
        self._script.leaves_drafts = True
        self._memory = self._script.cache
        self._noted: list[Edit] = []
        self.cache = Blocks(block_size, num_blocks, 4 * block_size, self._noted.append)
        self.manifest, self.directory = self._script.manifest, Path("scripted")
        self.num_stages = num_stages
        self.sent: deque[tuple[Batch, list[Edit]]] = deque()
        self.most_in_flight = self.num_collects = self._num_behind = 0
        self.refuses: set[int] = set()
        self.loses: set[int] = set()

    @property
    def batches(self) -> list[Batch]:
        """What has run."""
        return self._script.batches

    def submit(self, batch: Batch) -> None:
        self.sent.append((batch, self._noted.copy()))
        self._noted.clear()
        self.most_in_flight = max(self.most_in_flight, len(self.sent))
        assert self.most_in_flight <= self.num_stages

    def collect(self) -> tuple[np.ndarray, float]:
        self.num_collects += 1
        if self.num_collects in self.loses:
            raise StageLost("a scripted stage is lost")
        batch, edits = self.sent.popleft()
        for edit in edits:
            self._memory.pools["tokens"][edit.target] = (
                0 if edit.source is None else self._memory.pools["tokens"][edit.source]
            )
        if self.num_collects in self.refuses:
            self._num_behind = len(self.sent)
            raise EngineError("a scripted refusal")
        self._script.checks_past = self._num_behind <= 0  # what was refused may be the past of what is behind it
        self._num_behind -= 1
        return self._script.run(batch), 0.001

    def recover(self) -> None:
        self.sent.clear()
        self._noted.clear()
        self._memory.pools["tokens"][...] = 77  # of others

    def close(self) -> None:
        self.sent.clear()
