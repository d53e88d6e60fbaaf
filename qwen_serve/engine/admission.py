"""Who may come in: so many requests at once, and whoever is one too many is told at once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from qwen_serve.common.errors import ServeError

_REMEMBERED = 64  # ends of requests from which the rate is measured


class Admission:
    """The requests that are in the house.

    Args:
        batch_size: answers that are made at once.
        max_queue: most answers that wait beside them.
    """

    def __init__(self, batch_size: int, max_queue: int) -> None:
        self.most = batch_size + max_queue
        self.num_inside = self.num_refused = 0
        self._ends: deque[float] = deque(maxlen=_REMEMBERED)

    @contextmanager
    def place(self, count: int) -> Iterator[None]:
        """Be inside with ``count`` answers.

        Raises:
            ServeError: there is no room; it says when there may be.
        """
        if self.num_inside and self.num_inside + count > self.most:
            self.num_refused += 1
            raise ServeError(
                "queue_full",
                f"{self.num_inside} answers are running or waiting, expected at most {self.most} with this request's "
                f"{count}; try again later",
                retry_after=self._seconds_to_room(self.num_inside + count - self.most),
            )
        self.num_inside += count
        try:
            yield
        finally:
            self.num_inside -= count
            self._ends.extend([time.monotonic()] * min(count, _REMEMBERED))

    def _seconds_to_room(self, missing: int) -> float:
        """When ``missing`` more may have ended, by the rate at which the last ones did."""
        if len(self._ends) < 2:
            return 1.0
        rate = len(self._ends) / max(1e-3, time.monotonic() - self._ends[0])
        return min(60.0, max(0.1, missing / rate))
