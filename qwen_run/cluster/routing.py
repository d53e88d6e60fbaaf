"""Which replica answers a request: :class:`Router`. Pure bookkeeping, no clock and no network."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

BLOCK = 64  # tokens; what an engine's cache finds is whole blocks of so many
_MOST_BLOCKS = 1 << 16  # of prompts, remembered for each replica


def block_keys(prompt: Sequence[int], salt: str | None = None) -> list[bytes]:
    """A key for each full block of ``prompt``, of it and all before it; the last token is always computed.

    >>> one, two = block_keys([1] * 130), block_keys([1] * 100)
    >>> (len(one), len(two), one[0] == two[0])
    (2, 1, True)
    """
    ids, key, keys = np.array(prompt, np.int64), (salt or "").encode(), []
    for start in range(0, len(prompt) - BLOCK, BLOCK):
        key = hashlib.blake2b(key + ids[start : start + BLOCK].tobytes(), digest_size=16).digest()
        keys.append(key)
    return keys


@dataclass
class _Remembered:
    """What was sent to one replica."""

    blocks: OrderedDict[bytes, None] = field(default_factory=OrderedDict)  # the oldest first
    num_sent: int = 0

    def match(self, keys: Sequence[bytes]) -> int:
        """How many of ``keys``, from the first on, were sent before."""
        return next((count for count, key in enumerate(keys) if key not in self.blocks), len(keys))

    def add(self, keys: Sequence[bytes]) -> None:
        self.num_sent += 1
        for key in reversed(keys):  # so that of one prompt its end is forgotten first
            self.blocks[key] = None
            self.blocks.move_to_end(key)
        while len(self.blocks) > _MOST_BLOCKS:
            self.blocks.popitem(last=False)


class Router:
    """Sends a request where the beginning of its prompt is in the cache, or where its session is, within limits.

    Both are wishes. A replica that has ``slack`` requests more than the one with the fewest is not considered, so that
    no beginning and no session sends everything to one replica.

    Args:
        slack: at least 1.
    """

    def __init__(self, slack: int) -> None:
        self.slack = max(1, slack)
        self._remembered: dict[int, _Remembered] = {}

    def choose(self, loads: Mapping[int, int], keys: Sequence[bytes], session: str | None = None) -> int:
        """The replica for a prompt with ``keys``, which then is remembered.

        Args:
            loads: unfinished requests of each replica that may be asked, at least one.
            session: requests of one session go to one replica, as long as it is there.
        """
        least = min(loads.values())
        candidates = [number for number, load in loads.items() if load < least + self.slack]
        if session is not None:
            chosen = max(candidates, key=lambda number: _weight(session, number))
        else:
            chosen = min(candidates, key=lambda number: self._cost(number, loads[number], keys))
        self._of(chosen).add(keys)
        return chosen

    def forget(self, number: int) -> None:
        """The replica is gone, and its cache with it."""
        self._remembered.pop(number, None)

    def _cost(self, number: int, load: int, keys: Sequence[bytes]) -> tuple[int, int, int]:
        """Blocks to compute, then how much it has to do, then how much it has had to do."""
        remembered = self._of(number)
        return len(keys) - remembered.match(keys), load, remembered.num_sent

    def _of(self, number: int) -> _Remembered:
        return self._remembered.setdefault(number, _Remembered())


def _weight(session: str, number: int) -> bytes:
    """Rendezvous hashing: without one replica, only its sessions go elsewhere."""
    return hashlib.blake2b(f"{number} {session}".encode(), digest_size=8).digest()
