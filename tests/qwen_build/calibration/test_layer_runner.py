"""A float32 layer at a time: its hidden states and logits are transformers', whatever the batch of sequences."""

from __future__ import annotations

import numpy as np
import pytest

from cases.calibration import INPUTS, KIND
from cases.tiny import FAMILIES
from qwen_build.calibration.layer_runner import LayerRunner, embed, logits, read_layer
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.weights import Checkpoint

SEQUENCES = ([5, 3, 130, 0, 77] * 8, [9], [12, 90, 41, 6, 6, 18, 100])


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_is_transformers(family, tiny_checkpoint):
    import torch

    tiny = tiny_checkpoint(family)
    config = ModelConfig.from_hf(tiny.path)
    runner = LayerRunner(config, max_tokens=40, threads=1)
    with torch.no_grad():
        expected = [tiny.model(torch.tensor([ids]), output_hidden_states=True).hidden_states for ids in SEQUENCES]
    lengths = [len(ids) for ids in SEQUENCES]
    with Checkpoint.open(tiny.path) as checkpoint:
        hidden = embed(checkpoint, config, np.concatenate(SEQUENCES))
        for layer in range(config.num_hidden_layers):
            # transformers' last hidden state is behind the last norm
            np.testing.assert_allclose(hidden, np.concatenate([e[layer][0] for e in expected]), atol=2e-5)
            hidden = runner.run(layer, read_layer(checkpoint, config, layer), hidden, lengths).output
        found = logits(checkpoint, config, hidden)
    np.testing.assert_allclose(found, np.concatenate([tiny.logits(ids) for ids in SEQUENCES]), atol=2e-4)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_inputs_are_what_the_linears_read(family, tiny_checkpoint):
    import torch

    tiny = tiny_checkpoint(family)
    config = ModelConfig.from_hf(tiny.path)
    seen, modules = {}, dict(tiny.model.model.layers[1].named_modules())
    readers = {name: key for key, names in INPUTS.items() for name in names}
    assert readers.keys() == KIND.shapes(config).keys()
    handles = [
        modules[name].register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0][0]}))
        for name in readers
    ]
    with torch.no_grad():
        hidden = tiny.model(torch.tensor([SEQUENCES[0]]), output_hidden_states=True).hidden_states[1][0].numpy()
    for handle in handles:
        handle.remove()
    with Checkpoint.open(tiny.path) as checkpoint:
        weights = read_layer(checkpoint, config, 1)
    run = LayerRunner(config, 40, 1).run(1, weights, hidden, [40])
    assert run.inputs.keys() == INPUTS.keys()
    for name, key in readers.items():
        np.testing.assert_allclose(run.inputs[key], seen[name], atol=2e-5, err_msg=name)


def test_the_weights_of_a_layer_are_all_that_transformers_has(tiny_checkpoint):
    for family in FAMILIES:
        tiny = tiny_checkpoint(family)
        config = ModelConfig.from_hf(tiny.path)
        expected = {name: tuple(value.shape) for name, value in tiny.model.model.layers[0].named_parameters()}
        with Checkpoint.open(tiny.path) as checkpoint:
            weights = read_layer(checkpoint, config, 0)
        assert {name: value.shape for name, value in weights.items()} == expected
        assert set(weights) == {f"{name}.weight" for name in KIND.shapes(config)} | set(KIND.plain(config))
