"""AWQ: its formula, which inputs it scales, and that this takes off output error."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cases.calibration import INPUTS, KIND, layer_factors, layer_readers
from cases.tiny import FAMILIES, TINY
from qwen_build.calibration.awq import Awq, awq_factors
from qwen_build.calibration.input_statistics import Collector, InputStatistics
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.quantization.scheme_table import make_scheme
from qwen_plugin.layout import GROUP_SIZES

INT8 = make_scheme("int8", 32, None, None, "native")


def statistics_of(x: np.ndarray) -> InputStatistics:
    collector = Collector(x.shape[1], np.zeros(len(x), bool), with_second_moment=False)
    collector.add(x)
    return collector.finish()


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def layer(request):
    """Weights and statistics of a layer of the sizes of ``TINY``, some columns of every input large."""
    config = ModelConfig.from_json(TINY | FAMILIES[request.param] | {"hidden_act": "silu"})
    rng = np.random.default_rng(0)
    weights = {f"{n}.weight": rng.normal(size=s).astype(np.float32) for n, s in KIND.shapes(config).items()}
    statistics = {}
    for name, (linear, *_) in INPUTS.items():
        x = rng.normal(size=(64, weights[f"{linear}.weight"].shape[1])).astype(np.float32)
        x[:, ::24] *= 20  # the same channel of each head of 8 or 24
        statistics[name] = statistics_of(x)
    return config, weights, statistics


def test_the_formula_by_hand():
    magnitude = np.array([0.0, 1, 4, 16])
    assert awq_factors(magnitude, 0.5).tolist() == [1, 0.5, 1, 2]
    assert awq_factors(magnitude, 0).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_scaled_columns_and_searched_scales_lower_the_output_error(group_size, symmetric, layer):
    config, weights, statistics = layer
    schemes = dict.fromkeys(KIND.shapes(config), make_scheme("int4", group_size, symmetric, "float32", "native"))
    readers = layer_readers(config, weights, statistics, schemes)
    factors = layer_factors(Awq(), readers)
    assert factors.keys() == INPUTS.keys()
    moved = {name: s for name, s in factors.items() if not np.array_equal(s, np.ones_like(s))}
    assert len(moved) >= len(factors) - 1  # searched scales may leave nothing to gain for one of them
    for name, s in moved.items():
        own, divided = statistics[name], statistics[name].divided(s)
        folded = {linear: weights[f"{linear}.weight"] * s for linear in INPUTS[name]}
        rounded = Awq().round(dataclasses.replace(readers[name], statistics=divided, weights=folded))
        assert rounded.keys() == folded.keys()
        for linear, weight in folded.items():
            original, scheme = weights[f"{linear}.weight"], schemes[linear]

            def values(rounded, columns=weight.shape[1], grid=scheme.grid):
                return grid.values(rounded, columns)

            plain = own.output_error(original, values(scheme.round(original)))
            scaled = divided.output_error(weight, values(scheme.round(weight)))
            both = divided.output_error(weight, values(rounded[linear]))
            assert both < scaled < 0.95 * plain  # the search of scales lowers the plain error too


def test_what_int8_linears_read_is_left_alone(layer):
    config, weights, statistics = layer
    schemes = dict.fromkeys(KIND.shapes(config), make_scheme("int4", 32, None, None, "native"))
    schemes |= {"self_attn.v_proj": INT8, "mlp.down_proj": INT8}
    assert layer_factors(Awq(), layer_readers(config, weights, statistics, schemes)).keys() == {
        "self_attn.o_proj.input",
        "post_attention_layernorm",
    }
    assert not layer_factors(Awq(), layer_readers(config, weights, statistics, {"mlp.down_proj": INT8}))
