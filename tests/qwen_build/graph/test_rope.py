"""The tables of every rope type are those of transformers, on the configurations of real models and around them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qwen_build.checkpoint.rope import Rope, read_rope
from qwen_build.graph.rope import inverse_frequencies, rope_tables
from qwen_engine.errors import CheckpointError

ROPES: dict[str, dict[str, Any]] = {
    "linear-4": {"rope_type": "linear", "factor": 4.0},
    "linear-8": {"rope_type": "linear", "factor": 8.0},
    "llama3.1": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                 "original_max_position_embeddings": 8192},
    "llama3.2": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                 "original_max_position_embeddings": 8192},
    "yarn-4": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-2": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 262144},
    "yarn-smooth": {"rope_type": "yarn", "factor": 3.7, "original_max_position_embeddings": 32768, "truncate": False},
    "yarn-betas": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
                   "beta_fast": 16, "beta_slow": 2},
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "yarn-told": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
                  "attention_factor": 1.25},
    "yarn-mscale": {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096,
                    "mscale": 0.707, "mscale_all_dim": 1.0},
    "longrope": {"rope_type": "longrope", "factor": 32.0, "original_max_position_embeddings": 4096,
                 "short_factor": [1 + i / 16 for i in range(32)], "long_factor": [64.0] * 32},
}  # fmt: skip


def transformers_rope(rope: dict[str, Any], head_dim: int, theta: float, positions: int) -> tuple[np.ndarray, float]:
    """Frequencies and attention factor, as transformers computes them."""
    pytest.importorskip("torch")
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    config = transformers.Qwen3Config(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, max_position_embeddings=positions,
        rope_parameters=rope | {"rope_theta": theta},
    )  # fmt: skip
    init = ROPE_INIT_FUNCTIONS.get(rope["rope_type"], Qwen3RotaryEmbedding.compute_default_rope_parameters)
    frequencies, attention_factor = init(config, device="cpu")
    return frequencies.numpy(), attention_factor


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6, 5e6, 1e7])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_frequencies_are_those_of_transformers(name, theta, head_dim):
    positions = int(ROPES[name].get("original_max_position_embeddings", 4096) * ROPES[name]["factor"])
    expected, attention_factor = transformers_rope(dict(ROPES[name]), head_dim, theta, positions)
    rope = read_rope({"rope_parameters": ROPES[name] | {"rope_theta": theta}}, 1.0, positions)
    # torch's float32 powers are a unit in the last place off those that are correctly rounded, here and there
    np.testing.assert_allclose(inverse_frequencies(head_dim, rope), expected, rtol=2e-7, atol=0)
    assert rope.attention_factor == pytest.approx(attention_factor, rel=1e-15)


@pytest.mark.parametrize("name", OTHERS)
def test_what_an_object_may_say_besides_counts_too(name):
    expected, attention_factor = transformers_rope(dict(OTHERS[name]), 64, 1e6, 40960)
    rope = read_rope({"rope_scaling": OTHERS[name] | {"rope_theta": 1e6}}, 1.0, 40960)
    np.testing.assert_allclose(inverse_frequencies(64, rope), expected, rtol=2e-7, atol=0)
    assert rope.attention_factor == pytest.approx(attention_factor, rel=1e-15)


def test_factors_of_another_number_of_channels_are_refused():
    rope = read_rope({"rope_scaling": OTHERS["longrope"]}, 1e4, 40960)
    with pytest.raises(CheckpointError, match="short_factor has 32 numbers, expected 40, half of head_dim"):
        inverse_frequencies(80, rope)


@pytest.mark.parametrize(("head_dim", "theta"), [(64, 1e6), (128, 1e6), (64, 1e4), (80, 5000.0)])
@pytest.mark.parametrize("attention_factor", [1.0, 1.1386294])
def test_rotary_tables_round_where_transformers_rounds(head_dim, theta, attention_factor):
    torch = pytest.importorskip("torch")
    inv_freq = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    angles = torch.arange(32768).float()[:, None] * inv_freq[None]
    cos, sin = rope_tables(head_dim, Rope("default", theta, attention_factor=attention_factor), 32768)
    # A frequency may differ by a unit in the last place where a library's pow is not correctly rounded; its column of
    # angles then drifts by up to 32768 * 2**-24. All others differ by the last place of the cosine alone.
    for ours, theirs in ((cos, angles.cos() * attention_factor), (sin, angles.sin() * attention_factor)):
        difference = np.abs(ours - theirs.numpy()).max(axis=0)
        assert difference.max() < 2.1e-3 * attention_factor
        assert np.mean(difference < 1e-6) > 0.9
