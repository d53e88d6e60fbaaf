"""The tables of the rotary position embedding (Su et al., arXiv 2104.09864, eq. 15), of every rope type.

Powers, frequencies and angles are rounded to float32 where transformers rounds them: at position 10,000 an unrounded
angle is 1e-3 away from the one the model is run with there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from qwen_build.checkpoint.rope import Rope
from qwen_engine.errors import CheckpointError

_F = np.float32


def rope_tables(head_dim: int, rope: Rope, max_seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of every rotary angle, times the attention factor: each (max_seq_len, head_dim / 2), float32."""
    frequencies = inverse_frequencies(head_dim, rope)
    angles = np.outer(np.arange(max_seq_len, dtype=_F), frequencies).astype(np.float64)
    cos, sin = (function(angles).astype(_F) * _F(rope.attention_factor) for function in (np.cos, np.sin))
    return cos, sin


def inverse_frequencies(head_dim: int, rope: Rope) -> np.ndarray:
    """Radians a position by which each pair of channels turns, (head_dim / 2) float32."""
    exponents = np.arange(0, head_dim, 2, dtype=_F) / _F(head_dim)
    powers = (np.float64(rope.theta) ** exponents.astype(np.float64)).astype(_F)
    return np.asarray(_FREQUENCIES[rope.kind](rope, powers), dtype=_F)


def _plain(rope: Rope, powers: np.ndarray) -> np.ndarray:
    return _F(1) / powers


def _linear(rope: Rope, powers: np.ndarray) -> np.ndarray:
    return _plain(rope, powers) / _F(rope.factor)


def _llama3(rope: Rope, powers: np.ndarray) -> np.ndarray:
    """Channels of few turns are stretched, those of many left alone, and those between something between."""
    plain = _plain(rope, powers)
    lengths = (_F(1) / plain) * _F(2 * math.pi)  # torch divides a number by a tensor as number times reciprocal
    stretched = np.where(lengths > _F(rope.original / rope.low_freq_factor), plain / _F(rope.factor), plain)
    turns = (_F(1) / lengths) * _F(rope.original)
    smooth = (turns - _F(rope.low_freq_factor)) / _F(rope.high_freq_factor - rope.low_freq_factor)
    between = (_F(1) - smooth) * stretched / _F(rope.factor) + smooth * stretched
    few = lengths > _F(rope.original / rope.low_freq_factor)
    many = lengths < _F(rope.original / rope.high_freq_factor)
    return np.asarray(np.where(~many & ~few, between, stretched))


def _yarn(rope: Rope, powers: np.ndarray) -> np.ndarray:
    """YaRN (Peng et al., arXiv 2309.00071, section 3.2): the same with a ramp over channels."""
    head_dim = 2 * len(powers)
    low, high = (_channel_of(rope, turns, head_dim) for turns in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(len(powers), dtype=_F) - _F(low)) / _F(high - low), _F(0), _F(1))
    alone = _F(1) - ramp
    stretched = _F(1) / (_F(rope.factor) * powers)
    return np.asarray(stretched * (_F(1) - alone) + _plain(rope, powers) * alone)


def _channel_of(rope: Rope, turns: float, head_dim: int) -> float:
    """The channel that turns so often within the original length."""
    return head_dim * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def _longrope(rope: Rope, powers: np.ndarray) -> np.ndarray:
    """LongRoPE (Ding et al., arXiv 2402.13753) up to the original length."""
    if len(rope.short_factor) != len(powers):
        raise CheckpointError(
            f"config.json: short_factor has {len(rope.short_factor)} numbers, expected {len(powers)}, half of head_dim"
        )
    return np.asarray(_F(1) / (np.array(rope.short_factor, _F) * powers))


_FREQUENCIES: dict[str, Callable[[Rope, np.ndarray], np.ndarray]] = {
    "default": _plain,
    "dynamic": _plain,  # what it is up to max_position_embeddings
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
