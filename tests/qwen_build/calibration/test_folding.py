"""Factors folded into the weights leave the float function as it was, at each input and in a whole model."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases.calibration import INPUTS, KIND
from cases.tiny import DENSE
from qwen_build.calibration.folding import fold_inputs, shared
from qwen_build.calibration.layer_runner import LayerRunner, embed, logits, read_layer
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.weights import Checkpoint

LENGTHS = [13, 1, 20]
TOKEN_IDS = np.random.default_rng(1).integers(0, 131, sum(LENGTHS))

runner = cache(lambda config: LayerRunner(config, max_tokens=20, threads=1))


def random_factors(config: ModelConfig, names, seed: int) -> dict[str, np.ndarray]:
    """Factors over four powers of ten."""
    rng, reads = np.random.default_rng(seed), [KIND.inputs[name] for name in names]
    return {
        read.name: shared(config, read, np.exp(rng.uniform(-4.6, 4.6, read.size(config))).astype(np.float32))
        for read in reads
    }


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@settings(max_examples=25, deadline=None)
@given(names=st.sets(st.sampled_from(sorted(INPUTS)), min_size=1), seed=st.integers(0, 2**32 - 1))
def test_a_layer_computes_what_it_did_from_divided_inputs(family, names, seed, tiny_checkpoint):
    path = tiny_checkpoint(family).path
    config = ModelConfig.from_hf(path)
    factors = random_factors(config, sorted(names), seed)
    hidden = np.random.default_rng(seed).normal(size=(sum(LENGTHS), config.hidden_size)).astype(np.float32)
    with Checkpoint.open(path) as checkpoint:
        weights = read_layer(checkpoint, config, 1)
    before = runner(config).run(0, weights, hidden, LENGTHS)
    after = runner(config).run(0, fold_inputs(config, KIND, weights, factors), hidden, LENGTHS)
    scale = np.abs(before.output).max()
    # a weight is rounded twice more, to 2^-24 each time, and hundreds are summed
    np.testing.assert_allclose(after.output, before.output, rtol=0, atol=1e-5 * scale)
    for name, values in before.inputs.items():
        expected = values / factors.get(name, np.float32(1))
        atol = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(after.inputs[name], expected, rtol=1e-4, atol=atol, err_msg=name)


@pytest.mark.parametrize("family", DENSE)
def test_the_logits_of_a_folded_model_are_unchanged(family, tiny_checkpoint):
    path = tiny_checkpoint(family).path
    config = ModelConfig.from_hf(path)
    with Checkpoint.open(path) as checkpoint:
        hidden = folded = embed(checkpoint, config, TOKEN_IDS)
        for layer in range(config.num_hidden_layers):
            weights = read_layer(checkpoint, config, layer)
            hidden = runner(config).run(0, weights, hidden, LENGTHS).output
            weights = fold_inputs(config, KIND, weights, random_factors(config, INPUTS, layer))
            folded = runner(config).run(0, weights, folded, LENGTHS).output
        before, after = logits(checkpoint, config, hidden), logits(checkpoint, config, folded)
    # float32 rounding through three layers
    np.testing.assert_allclose(after, before, rtol=0, atol=3e-5 * np.abs(before).max())


def test_the_query_heads_of_a_key_value_head_share_their_factors(tiny_checkpoint):
    config = ModelConfig.from_hf(tiny_checkpoint("qwen2").path)  # heads of 8, five to a key/value head
    values = np.arange(80.0)
    read = KIND.inputs["self_attn.o_proj.input"]
    largest, mean = (shared(config, read, values, reduce) for reduce in (np.max, np.mean))
    assert largest[:16].tolist() == [32, 33, 34, 35, 36, 37, 38, 39] * 2
    assert largest[40:48].tolist() == [72, 73, 74, 75, 76, 77, 78, 79]
    assert mean[:8].tolist() == [16, 17, 18, 19, 20, 21, 22, 23]
    for name in INPUTS.keys() - {"self_attn.o_proj.input"}:
        assert shared(config, KIND.inputs[name], values) is values


def test_factors_that_a_value_head_cannot_have_are_our_own_mistake(tiny_checkpoint):
    path = tiny_checkpoint("qwen2").path
    config = ModelConfig.from_hf(path)
    with Checkpoint.open(path) as checkpoint:
        weights = read_layer(checkpoint, config, 0)
    with pytest.raises(AssertionError, match="columns that one output feeds"):
        fold_inputs(config, KIND, weights, {"self_attn.o_proj.input": np.arange(1, 81, dtype=np.float32)})
