"""The tables of the rotary position embedding (Su et al., arXiv 2104.09864, eq. 15)."""

from __future__ import annotations

import numpy as np


def rope_tables(head_dim: int, theta: float, max_seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of every rotary angle, each (max_seq_len, head_dim / 2), float32.

    Powers, frequencies and angles are rounded to float32 where transformers rounds them: at position
    10,000 an unrounded angle is 1e-3 away from the one the model is run with there.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = (np.float64(theta) ** exponents.astype(np.float64)).astype(np.float32)
    angles = np.outer(np.arange(max_seq_len, dtype=np.float32), np.float32(1) / powers).astype(np.float64)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
