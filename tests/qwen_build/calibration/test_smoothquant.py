"""SmoothQuant: its formula, which inputs it smooths, what its search finds, and outliers that only it survives."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from click.testing import CliRunner
from tokenizers import decoders, models, pre_tokenizers

from cases.calibration import INPUTS, KIND, layer_factors, layer_readers
from cases.tiny import TINY, run_alone
from qwen_build.calibration.factor_search import as_multiplied, least_error, normalised
from qwen_build.calibration.input_statistics import Collector, InputStatistics
from qwen_build.calibration.plan import METHODS
from qwen_build.calibration.smoothquant import ALPHAS, SmoothQuant, smoothing_factors
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.locate import resolve_checkpoint
from qwen_build.checkpoint.safetensors_file import write_safetensors
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.cli import main
from qwen_build.engine_build import plan_build
from qwen_build.plan.options import CALIBRATED, BuildOptions
from qwen_build.plan.rules import Rule
from qwen_build.quantization.scheme_table import make_scheme
from qwen_engine.choices import CALIBRATED as NAMED_CALIBRATED
from qwen_engine.errors import BuildError
from qwen_engine.manifest import Manifest
from qwen_run.accuracy.datasets import built_in_documents
from qwen_run.accuracy.logits import FullLogits, compare
from qwen_run.runtime.engine import Engine
from qwen_run.text.tokenizer import Tokenizer

W8A8 = {"weight_scales": "channel", "activation_scales": "token"}


def statistics_of(x: np.ndarray) -> InputStatistics:
    collector = Collector(x.shape[1], np.zeros(len(x), bool), with_second_moment=False)
    collector.add(x)
    return collector.finish()


def int8(**options):
    return make_scheme("int8", 32, None, "int8", "native", **options)


def test_the_formula_by_hand():
    activation_max, weight_max = np.array([16.0, 4, 1]), np.array([1.0, 4, 4])
    assert smoothing_factors(activation_max, weight_max, 0.5).tolist() == [4, 1, 0.5]
    assert smoothing_factors(activation_max, weight_max, 1).tolist() == [4, 1, 0.25]  # 16, 4, 1 over their median
    assert smoothing_factors(activation_max, weight_max, 0).tolist() == [4, 1, 1]  # 1, 1/4, 1/4


def test_a_column_that_is_zero_needs_no_factor():
    factors = smoothing_factors(np.array([0.0, 9, 4, 1]), np.array([3.0, 1, 1, 1]), 0.5)
    assert factors.tolist() == [1, 1.5, 1, 0.5]
    assert smoothing_factors(np.zeros(3), np.ones(3), 0.5).tolist() == [1, 1, 1]


def test_a_common_multiple_of_the_factors_is_taken_out_and_extremes_are_clipped():
    assert normalised(np.array([1e-30, 3, 0, 3, 3e9])).tolist() == [2**-10, 1, 1, 1, 2**10]


@pytest.fixture(scope="module")
def layer():
    """Weights and statistics of a layer of the sizes of ``TINY``, some columns of every input large."""
    config = ModelConfig.from_json(TINY | {"model_type": "qwen2", "hidden_act": "silu"})
    rng = np.random.default_rng(0)
    weights = {f"{n}.weight": rng.normal(size=s).astype(np.float32) for n, s in KIND.shapes(config).items()}
    statistics = {}
    for name, (linear, *_) in INPUTS.items():
        x = rng.normal(size=(64, weights[f"{linear}.weight"].shape[1])).astype(np.float32)
        x[:, ::9] *= 40
        statistics[name] = statistics_of(x)
    return config, weights, statistics


def test_what_int4_linears_read_is_left_alone(layer):
    config, weights, statistics = layer
    int4 = make_scheme("int4", 32, None, None, "native")
    schemes = dict.fromkeys(KIND.shapes(config), int8()) | {"self_attn.k_proj": int4, "mlp.down_proj": int4}
    assert layer_factors(SmoothQuant(0.5), layer_readers(config, weights, statistics, schemes)).keys() == {
        "self_attn.o_proj.input",
        "post_attention_layernorm",
    }
    del schemes["self_attn.k_proj"], schemes["mlp.down_proj"], schemes["self_attn.o_proj"]  # float now
    assert layer_factors(SmoothQuant(0.5), layer_readers(config, weights, statistics, schemes)).keys() == {
        "input_layernorm",
        "post_attention_layernorm",
    }


@pytest.mark.parametrize("scales", [{}, W8A8, {"weight_scales": "tensor", "activation_scales": "static"}], ids=str)
def test_auto_is_at_least_as_good_as_any_alpha_and_as_none(scales, layer):
    config, weights, statistics = layer
    schemes = dict.fromkeys(KIND.shapes(config), int8(**scales))

    def error(name: str, factors: np.ndarray) -> float:
        """As :func:`least_error` defines it, for products in float64."""
        own, sample, total = statistics[name], statistics[name].sample, 0.0
        for linear in INPUTS[name]:
            weight = weights[f"{linear}.weight"]
            values = schemes[linear].grid.values(schemes[linear].round(weight * factors), weight.shape[1])
            inputs = as_multiplied(sample / factors, own.largest / factors, schemes[linear])
            exact = sample.astype(np.float64) @ weight.T
            total += np.square(inputs.astype(np.float64) @ values.T - exact).sum() / np.square(exact).sum()
        return total

    readers = layer_readers(config, weights, statistics, schemes)
    auto = layer_factors(SmoothQuant("auto"), readers)
    assert auto.keys() == INPUTS.keys()
    fixed = [layer_factors(SmoothQuant(alpha), readers) for alpha in ALPHAS]
    for name, factors in auto.items():
        others = [factors_of[name] for factors_of in fixed] + [np.ones_like(factors)]
        # the search sums in float32
        assert error(name, factors) <= min(error(name, other) for other in others) * 1.001
        assert error(name, factors) < 0.9 * error(name, others[-1])  # columns that are 40 times larger want smoothing


def test_factors_are_chosen_by_inputs_as_the_engine_rounds_them():
    """Weights that int8 holds exactly, whatever the factors: only the rounding of the input can decide."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(50, 32)).astype(np.float32)
    x[:, 3] *= 64
    weight = np.full((4, 32), 127, np.float32)
    weight[:, 3] = 1
    smoothed = np.where(np.arange(32) == 3, 64, 1).astype(np.float32)
    candidates = [np.ones(32, np.float32), smoothed]
    for activations, best in (("int8", smoothed), ("float32", candidates[0])):
        schemes = {"x": make_scheme("int8", 32, None, activations, "native")}
        assert least_error(candidates, {"x": weight}, statistics_of(x), schemes) is best


def test_factors_whose_weights_the_layout_cannot_hold_are_not_chosen():
    rng = np.random.default_rng(2)
    x, weight = rng.normal(size=(50, 32)).astype(np.float32), 100 * rng.normal(size=(4, 32)).astype(np.float32)
    candidates = [np.full(32, 1000, np.float32), np.ones(32, np.float32)]
    assert least_error(candidates, {"x": weight}, statistics_of(x), {"x": int8()}) is candidates[1]


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[Path, Path]:
    """A random model whose tokens are bytes, and the same function with norm channels 50 times as large."""
    import torch
    import transformers

    path, outliers = (tmp_path_factory.mktemp("planted") / name for name in ("plain", "outliers"))
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 6}
    sizes |= {"initializer_range": 0.12, "num_hidden_layers": 2}
    config = transformers.AutoConfig.for_model(**TINY | sizes | {"model_type": "qwen2"})
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(path)
    byte_tokens = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_tokens, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))

    shutil.copytree(path, outliers)
    with Checkpoint.open(path) as checkpoint:
        tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    channels = [5, 77, 150]
    for i in range(2):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"][channels] *= 50
            for linear in INPUTS[norm]:
                tensors[f"model.layers.{i}.{linear}.weight"][:, channels] /= 50
    write_safetensors(outliers / "model.safetensors", tensors, "float32")
    return path, outliers


@pytest.fixture(scope="module")
def divergence(planted, build_engine):
    """Mean KL of an engine to the float one, over text that did not calibrate."""
    text = built_in_documents("wikitext2", "evaluation")[0].document
    token_ids = Tokenizer.load(planted[0]).encode(text)[:256]
    reference = FullLogits(run_alone(Engine.load(build_engine(planted[0], quant="none"), threads=1), token_ids))

    def measure(path: Path, **options) -> float:
        options |= {"embedding_quant": "none", "kv_cache_dtype": "float32"}
        logits = run_alone(Engine.load(build_engine(path, **options), threads=1), token_ids)
        return float(compare(reference, logits, [*token_ids[1:], -1]).kl.mean())

    return measure


def test_planted_outliers_that_plain_rounding_does_not_survive(planted, divergence):
    plain, outliers = planted
    assert divergence(outliers, quant="none") < 1e-6  # the float function is the same
    healthy = divergence(plain, quant="int8", **W8A8)
    collapsed = divergence(outliers, quant="int8", **W8A8)
    assert collapsed > 30 * healthy
    assert collapsed > 0.2  # nats
    for alpha in ("auto", 0.5):
        assert divergence(outliers, quant="smoothquant", alpha=alpha, calibration_tokens=1024, **W8A8) < 2 * healthy


def test_static_scales_take_the_range_from_calibration(planted, divergence):
    static = {"weight_scales": "channel", "activation_scales": "static", "calibration_tokens": 1024}
    collapsed = divergence(planted[1], quant="int8", **W8A8)
    assert divergence(planted[1], quant="smoothquant", **static) < collapsed / 20


def test_an_input_that_is_always_zero_has_a_static_scale_that_runs(planted, build_engine, tmp_path):
    path = shutil.copytree(planted[0], tmp_path / "silent")
    with Checkpoint.open(path) as checkpoint:
        tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    for part in ("weight", "bias"):
        tensors[f"model.layers.0.self_attn.v_proj.{part}"][:] = 0  # o_proj multiplies nothing but zeros
    write_safetensors(path / "model.safetensors", tensors, "float32")
    engine = build_engine(path, quant="smoothquant", activation_scales="static", calibration_tokens=1024)
    assert np.isfinite(run_alone(Engine.load(engine, threads=1), [1, 2, 3])).all()


def test_the_manifest_names_the_method_and_the_error(planted, build_engine):
    rules = (Rule("rules.json", "*.down_proj", "int4"),)
    path = build_engine(planted[1], quant="smoothquant", calibration_tokens=1024, quant_config=rules)
    records = {one.name.rpartition(".")[2]: one for one in Manifest.read(path).linears if ".layers.1." in one.name}
    assert {name: one.quantization.scheme for name, one in records.items()} == {
        "qkv_proj": "int8",
        "o_proj": "int8",
        "gate_up_proj": "int8",
        "down_proj": "int4",
    }
    methods = {name: one.quantization.method for name, one in records.items()}
    assert methods.pop("down_proj") == "rtn"
    assert set(methods.values()) == {"smoothquant"}
    assert all(0 < one.output_error < 0.05 for name, one in records.items() if name != "down_proj")


def test_the_command_line_has_the_choices_of_the_table():
    assert set(NAMED_CALIBRATED) == set(CALIBRATED)
    assert CALIBRATED.keys() <= METHODS.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant": "int8", "alpha": 0.5}, "--alpha 0.5 is of no use, nothing is smoothed; add --quant smoothquant"),
        ({"alpha": "auto"}, "--alpha auto is of no use"),
        ({"quant": "smoothquant", "alpha": 1.5}, "alpha is 1.5, expected a number from 0 to 1, or 'auto'"),
        ({"quant": "smoothquant", "alpha": float("nan")}, "alpha is nan, expected"),
        ({"quant": "smoothquant", "alpha": "most"}, "alpha is 'most', expected"),
        ({"quant": "smoothquant", "activations": "float32"}, "--quant smoothquant has nothing to smooth"),
        ({"quant": "smoothquant", "exclude": ("model.layers.*",)}, "--quant smoothquant has nothing to smooth"),
        ({"quant": "smoothquant", "quant_config": (Rule("f", "*.layers.*", "int4"),)}, "has nothing to smooth"),
    ],
    ids=str,
)
def test_options_that_contradict_are_refused(options, message, planted):
    with Checkpoint.open(planted[0]) as checkpoint, pytest.raises(BuildError) as error:
        plan_build(checkpoint, resolve_checkpoint(str(planted[0])), BuildOptions(**options))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("alpha", ["1.01", "-1", "some", ""])
def test_the_parser_refuses_what_is_no_alpha(alpha, planted):
    result = CliRunner().invoke(main, [str(planted[0]), "--quant", "smoothquant", "--alpha", alpha, "--dry-run"])
    assert result.exit_code == 2
    assert "Invalid value for '--alpha'" in result.stderr


@pytest.mark.parametrize("alpha", ["auto", "0", "1", "0.85"])
def test_the_command_takes_an_alpha(alpha, planted):
    arguments = [str(planted[0]), "--quant", "smoothquant", "--alpha", alpha, "--dry-run"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "smoothquant" in result.stdout
