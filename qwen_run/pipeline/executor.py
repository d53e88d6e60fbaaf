"""Who runs the stages before the last: what an engine in stages asks of local processes, or of a cluster's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_run.runtime.engine import Batch
from qwen_run.runtime.kv_cache import Edit


@dataclass(frozen=True)
class StagePlan:
    """A stage that is to run somewhere: which layers, how many blocks its pools have, threads of a run."""

    engine: Path
    layers: range
    num_blocks: int
    threads: int


class Executor(ABC):
    """Stages in a row, each of which works first in, first out.

    Any method may find that one is lost: it then raises ``StageLost``, until :meth:`recover` has been called.
    """

    @abstractmethod
    def start(self, plans: Sequence[StagePlan]) -> None:
        """Begin to load the stages; does not wait."""

    @abstractmethod
    def connect(self) -> list[dict[str, Any]]:
        """Wait until all are loaded, and let them work.

        Returns:
            what each tells of itself: ``facts`` of ``alike.py``.

        Raises:
            EngineError: one cannot be loaded.
        """

    @abstractmethod
    def send(self, batch: Batch, edits: Sequence[Edit]) -> None:
        """Give the first stage a batch, before which ``edits`` happen to the pools of all.

        Raises:
            StageLost: a stage does not answer.
        """

    @abstractmethod
    def receive(self) -> np.ndarray | str:
        """What the stages made of the oldest batch: float32 (T, hidden_size), or why one refuses it.

        Raises:
            StageLost: a stage does not answer.
        """

    @abstractmethod
    def recover(self) -> None:
        """Put others in the place of lost stages; whatever was on its way is dropped.

        Raises:
            EngineError: one cannot be loaded, or is lost again and again.
        """

    @abstractmethod
    def close(self) -> None:
        """End all stages; may be called twice, and by any thread."""
