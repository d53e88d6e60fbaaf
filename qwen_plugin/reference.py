"""What the native operators compute, in NumPy: the readable definition that tests compare the kernels with.

Also the cache layout of ``qwen::PagedAttention``, both ways.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_engine.graph_io import KEY_TILE

Array = NDArray[Any]
Integers = NDArray[np.int32]


def pack_keys(keys: Array) -> Array:
    """Keys (..., block_size, head_dim) as a block of the cache stores them: (..., block_size / 32, head_dim, 32)."""
    *outer, block_size, head_dim = keys.shape
    tiles = keys.reshape(*outer, block_size // KEY_TILE, KEY_TILE, head_dim)
    return np.ascontiguousarray(tiles.swapaxes(-1, -2))


def unpack_keys(packed: Array) -> Array:
    """The inverse of :func:`pack_keys`."""
    *outer, tiles, head_dim, tile = packed.shape
    return np.ascontiguousarray(packed.swapaxes(-1, -2)).reshape(*outer, tiles * tile, head_dim)


@dataclass(frozen=True)
class PagedAttentionAttributes:
    """Attributes of the operator, by its own names and with its own defaults.

    ``local_window_size`` w: a query at position p sees the keys at p - w + 1 to p; -1: all up to p.
    """

    num_heads: int
    kv_num_heads: int
    scale: float | None = None  # 1 / sqrt(head_dim)
    do_rotary: int = 0
    qk_norm_epsilon: float = 1e-6
    local_window_size: int = -1


def paged_attention(
    attributes: PagedAttentionAttributes,
    query: Array,
    key_cache: Array,
    value_cache: Array,
    cumulative_lengths: Integers,
    past_lengths: Integers,
    block_table: Integers,
    cos_cache: Array | None = None,
    sin_cache: Array | None = None,
    q_norm_weight: Array | None = None,
    k_norm_weight: Array | None = None,
) -> Array:
    """Causal attention of new tokens over themselves and their past, which lies in blocks of a pool.

    Writes the new keys and values into the pool (rounded to its dtype), then reads everything from there.

    Args:
        query: float32 (T, (N + 2 K) * D), queries, keys and values of a token one after the other.
        key_cache: (num_blocks, K, block_size / 32, D, 32), see :func:`pack_keys`; changed in place.
        value_cache: (num_blocks, K, block_size, D); changed in place.
        cumulative_lengths: (S + 1), sequence s owns tokens ``c[s]`` to ``c[s + 1] - 1``.
        past_lengths: (S), tokens of s that the cache already holds.
        block_table: (S, max_blocks), the blocks of s in order.
        cos_cache, sin_cache: (positions, rotary_dim / 2); channel i turns with channel i + rotary_dim / 2.
        q_norm_weight, k_norm_weight: (D), RMS norm of each head before the rotation.

    Returns:
        float64 (T, N * D).
    """
    heads, kv_heads = attributes.num_heads, attributes.kv_num_heads
    block_size, head_dim = value_cache.shape[2:]
    scale = attributes.scale or head_dim**-0.5
    window = attributes.local_window_size if attributes.local_window_size > 0 else np.inf
    packed = query.astype(np.float64).reshape(len(query), heads + 2 * kv_heads, head_dim)
    output = np.zeros((len(query), heads, head_dim))

    for s, past in enumerate(past_lengths):
        tokens = packed[cumulative_lengths[s] : cumulative_lengths[s + 1]]  # (n, N + 2 K, D)
        positions = past + np.arange(len(tokens))
        queries, keys, values = np.split(tokens, (heads, heads + kv_heads), axis=1)
        if q_norm_weight is not None and k_norm_weight is not None:
            queries = _rms_norm(queries, q_norm_weight, attributes.qk_norm_epsilon)
            keys = _rms_norm(keys, k_norm_weight, attributes.qk_norm_epsilon)
        if attributes.do_rotary and cos_cache is not None and sin_cache is not None:
            queries = _rotate(queries, cos_cache[positions], sin_cache[positions])
            keys = _rotate(keys, cos_cache[positions], sin_cache[positions])

        for position, key, value in zip(positions, keys, values, strict=True):
            block, slot = block_table[s, position // block_size], position % block_size
            key_cache[block, :, slot // KEY_TILE, :, slot % KEY_TILE] = key
            value_cache[block, :, slot] = value

        for i, position in enumerate(positions):
            visible = np.arange(max(0, position - window + 1), position + 1).astype(int)
            blocks, slots = block_table[s, visible // block_size], visible % block_size
            seen_keys = key_cache[blocks, :, slots // KEY_TILE, :, slots % KEY_TILE].astype(np.float64)  # (V, K, D)
            seen_values = value_cache[blocks, :, slots].astype(np.float64)
            grouped = queries[i].reshape(kv_heads, -1, head_dim)  # (K, N / K, D)
            scores = scale * np.einsum("kgd,vkd->kgv", grouped, seen_keys)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            output[cumulative_lengths[s] + i] = np.einsum("kgv,vkd->kgd", weights, seen_values).reshape(heads, head_dim)
    return output.reshape(len(query), heads * head_dim)


def _rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    mean_square: Array = np.mean(x**2, axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + epsilon) * weight


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the first 2 * cos.shape[1] channels of x (n, heads, D) by the angles of its n positions."""
    half = cos.shape[1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
