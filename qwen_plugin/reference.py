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
    """Keys (..., block_size, head_dim) as a block of the cache stores them: (..., block_size / 32, head_dim, 32).

    In an int8 cache the 32 * head_dim numbers of a tile are (head_dim / 4, 32, 4) instead, in the same shape.
    """
    *outer, block_size, head_dim = keys.shape
    packed = np.empty((*outer, block_size // KEY_TILE, head_dim, KEY_TILE), keys.dtype)
    tiles = tokens_of_keys(packed)
    tiles[:] = keys.reshape(tiles.shape)
    return packed


def unpack_keys(packed: Array) -> Array:
    """The inverse of :func:`pack_keys`."""
    *outer, tiles, head_dim, tile = packed.shape
    return tokens_of_keys(packed).reshape(*outer, tiles * tile, head_dim)


def pack_values(values: Array) -> Array:
    """Values (..., block_size, head_dim) as a block of the cache stores them: just so, in an int8 cache in fours.

    There every four tokens' numbers are (head_dim, 4), in the same shape.
    """
    packed = np.empty_like(values, order="C")
    tokens = tokens_of_values(packed)
    tokens[:] = values.reshape(tokens.shape)
    return packed


def unpack_values(packed: Array) -> Array:
    """The inverse of :func:`pack_values`."""
    return tokens_of_values(packed).reshape(packed.shape)


def tokens_of_keys(packed: Array) -> Array:
    """A view of packed keys by token: (..., block_size / 32, 32, head_dim / n, n), where n numbers lie together."""
    *outer, head_dim, tile = packed.shape
    together = _numbers_together(packed)
    return packed.reshape(*outer, head_dim // together, tile, together).swapaxes(-2, -3)


def tokens_of_values(packed: Array) -> Array:
    """A view of packed values by token: (..., block_size / n, n, head_dim), where n tokens lie together."""
    *outer, block_size, head_dim = packed.shape
    together = _numbers_together(packed)
    return packed.reshape(*outer, block_size // together, head_dim, together).swapaxes(-1, -2)


def _numbers_together(packed: Array) -> int:
    return 4 if packed.dtype == np.int8 else 1


def quantize_tokens(x: Array) -> tuple[Array, Array]:
    """Round every token's head x (..., head_dim) to int8.

    Returns:
        int8 (..., head_dim) and the scales, float32 (...), of which these are multiples.
    """
    largest = np.abs(x).max(axis=-1).astype(np.float32)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(127) / largest
    inverse[~np.isfinite(inverse)] = 0
    return np.rint(x.astype(np.float32) * inverse[..., None]).astype(np.int8), largest / np.float32(127)


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
    key_scale: Array | None = None,
    value_scale: Array | None = None,
) -> Array:
    """Causal attention of new tokens over themselves and their past, which lies in blocks of a pool.

    Writes the new keys and values into the pool (rounded to its dtype), then reads everything from there, in float64.

    Args:
        query: float32 (T, (N + 2 K) * D), queries, keys and values of a token one after the other.
        key_cache: (num_blocks, K, block_size / 32, D, 32), see :func:`pack_keys`; changed in place.
        value_cache: (num_blocks, K, block_size, D), see :func:`pack_values`; changed in place.
        cumulative_lengths: (S + 1), sequence s owns tokens ``c[s]`` to ``c[s + 1] - 1``.
        past_lengths: (S), tokens of s that the cache already holds.
        block_table: (S, max_blocks), the blocks of s in order.
        cos_cache, sin_cache: (positions, rotary_dim / 2); channel i turns with channel i + rotary_dim / 2.
        q_norm_weight, k_norm_weight: (D), RMS norm of each head before the rotation.
        key_scale, value_scale: (num_blocks, K, block_size), with int8 caches; changed in place.

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
            weighted = ((queries, q_norm_weight), (keys, k_norm_weight))
            queries, keys = (_rms_norm(x, weight, attributes.qk_norm_epsilon) for x, weight in weighted)
        if attributes.do_rotary and cos_cache is not None and sin_cache is not None:
            queries, keys = (_rotate(x, cos_cache[positions], sin_cache[positions]) for x in (queries, keys))
        blocks, slots = block_table[s, positions // block_size], positions % block_size
        _store(tokens_of_keys(key_cache), key_scale, keys, blocks, slots)
        _store(tokens_of_values(value_cache), value_scale, values, blocks, slots)

        for i, position in enumerate(positions):
            visible = np.arange(max(0, position - window + 1), position + 1).astype(int)
            blocks, slots = block_table[s, visible // block_size], visible % block_size
            seen_keys = _load(tokens_of_keys(key_cache), key_scale, head_dim, blocks, slots)  # (V, K, D)
            seen_values = _load(tokens_of_values(value_cache), value_scale, head_dim, blocks, slots)
            output[cumulative_lengths[s] + i] = _attend(scale * queries[i], seen_keys, seen_values)
    return output.reshape(len(query), heads * head_dim)


def _attend(queries: Array, keys: Array, values: Array) -> Array:
    """Softmax attention of the scaled queries of one token, (N, D), over keys and values (V, K, D): (N, D)."""
    grouped = queries.reshape(keys.shape[1], -1, keys.shape[2])  # (K, N / K, D)
    scores = np.einsum("kgd,vkd->kgv", grouped, keys)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed: Array = np.einsum("kgv,vkd->kgd", weights, values)
    return mixed.reshape(queries.shape)


def _store(pool: Array, scales: Array | None, x: Array, blocks: Integers, slots: Integers) -> None:
    """Put x (n, K, D) into slots (n) of blocks (n) of ``pool`` (num_blocks, K, tiles, tile, ...)."""
    if scales is not None:
        x, scales[blocks, :, slots] = quantize_tokens(x)
    tile = pool.shape[3]
    pool[blocks, :, slots // tile, slots % tile] = x.reshape(*x.shape[:2], *pool.shape[4:])


def _load(pool: Array, scales: Array | None, head_dim: int, blocks: Integers, slots: Integers) -> Array:
    """What :func:`_store` put there, float64 (n, K, D)."""
    tile = pool.shape[3]
    x: Array = pool[blocks, :, slots // tile, slots % tile].astype(np.float64).reshape(len(slots), -1, head_dim)
    return x if scales is None else x * scales[blocks, :, slots].astype(np.float64)[..., None]


def _rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    mean_square: Array = np.mean(x**2, axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + epsilon) * weight


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the first 2 * cos.shape[1] channels of x (n, heads, D) by the angles of its n positions."""
    half = cos.shape[1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
