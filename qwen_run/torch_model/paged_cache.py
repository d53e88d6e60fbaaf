"""``past_key_values`` of an engine: a cache of transformers that holds blocks in place of tensors."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from qwen_run.torch_model.paged_rows import BlockPool, PagedRows


class PagedCache(Cache):
    """What an engine has read of a batch. :meth:`QwenForCausalLM.forward` makes it, or ``new_cache``.

    Several may be alive at once, each a conversation of its own. The blocks go back to the engine's pool with
    :meth:`reset`, or when nothing refers to the object any more.

    Attributes:
        rows: the rows in the engine's cache, which hold no padding.
        shown: (rows, columns) bool, where the columns read so far are tokens and not padding.
    """

    def __init__(self, pool: BlockPool) -> None:
        super().__init__(layers=[])
        self._pool = pool
        self.rows = PagedRows(pool, 0)
        self.shown = torch.zeros(0, 0, dtype=torch.bool)

    def begin(self, rows: int) -> None:
        """Hold ``rows`` rows of no tokens."""
        self.rows = PagedRows(self._pool, rows)
        self.shown = torch.zeros(rows, 0, dtype=torch.bool)

    def add(self, new: torch.Tensor) -> None:
        """Note columns that have been read, (rows, columns) bool."""
        self.shown = torch.cat([self.shown, new], 1)

    @property
    def batch_size(self) -> int:
        """Rows, -1 before the first were read."""
        return len(self.rows) or -1

    @property
    def is_croppable(self) -> bool:
        """True: columns can be forgotten."""
        return True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that were read, padding included."""
        return int(self.shown.shape[1])

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the cache grows as the pool allows."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns that ``query_length`` new ones see, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make the rows ``beam_idx`` the only ones. Rows that come twice share their blocks."""
        self.rows.choose(beam_idx.tolist())
        self.shown = self.shown[beam_idx.cpu()]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """As :meth:`reorder_cache`."""
        self.reorder_cache(torch.arange(len(self.rows))[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have every row ``repeats`` times, one after the other."""
        self.reorder_cache(torch.arange(len(self.rows)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` columns, none if 0.

        Raises:
            ValueError: the number is above 0, or there are fewer columns.
        """
        columns = self.get_seq_length()
        if not -columns <= tokens_to_remove <= 0:
            raise ValueError(
                f"tokens_to_remove is {tokens_to_remove}, expected minus the number of tokens to forget, at least "
                f"{-columns}"
            )
        kept = columns + tokens_to_remove
        self.rows.cut(self.shown[:, kept:].sum(1).tolist())
        self.shown = self.shown[:, :kept]

    def reset(self) -> None:
        """Forget everything."""
        self.rows.close()
        self.shown = torch.zeros(0, 0, dtype=torch.bool)
