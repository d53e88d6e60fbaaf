"""Which cache block holds which tokens, so that a prompt that begins like an earlier one need not be fed again.

A full block is known by a key: a hash of its tokens and of the key of the block before it, that is, of
everything its keys and values depend on.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


def extend_keys(
    keys: list[bytes], token_ids: Sequence[int], block_size: int, count: int, salt: str | None = None
) -> None:
    """Append to ``keys`` those of the next full blocks of ``token_ids``, until there are ``count``.

    Args:
        salt: the keys of different salts are different.
    """
    first = b"" if salt is None else hashlib.blake2b(salt.encode(), digest_size=16).digest()
    for index in range(len(keys), count):
        tokens = np.array(token_ids[index * block_size : (index + 1) * block_size], np.int64)
        # 16 bytes: two of 2^40 different blocks are equal with probability 2^-49
        keys.append(hashlib.blake2b((keys[-1] if keys else first) + tokens.tobytes(), digest_size=16).digest())


class PrefixCache:
    """Keys of blocks, and the blocks nobody owns in the order of their last use."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()

    @property
    def num_unused(self) -> int:
        """Blocks with a key that nobody owns."""
        return len(self._unused)

    def find(self, key: bytes) -> int | None:
        """The block with ``key``."""
        return self._block_of.get(key)

    def publish(self, block: int, key: bytes) -> None:
        """Let ``block``, which is owned, written and full, be found; nothing where another block already is."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def use(self, block: int) -> None:
        """``block`` has an owner again."""
        self._unused.pop(block, None)

    def release(self, block: int) -> bool:
        """Keep ``block``, which nobody owns now, as the one last used; False where it has no key."""
        if block not in self._key_of:
            return False
        self._unused[block] = None
        return True

    def evict(self) -> int:
        """Forget the key of the unused block that was used least recently; that block."""
        block, _ = self._unused.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block
