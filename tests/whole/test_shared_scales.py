"""Engines in which groups share scales: computed as they are recorded, and refused where only calibration helps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cases.as_built import as_built, layer_outputs, relative_errors
from cases.tiny import FAMILIES, TinyCheckpoint, run_alone
from qwen_build.checkpoint.locate import resolve_checkpoint
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.cli import main
from qwen_build.engine_build import plan_build, write_engine
from qwen_build.plan import scheme_plan
from qwen_build.plan.options import BuildOptions
from qwen_build.writing.weights_file import plan_layout
from qwen_engine.choices import ACTIVATION_SCALES, WEIGHT_SCALES
from qwen_engine.errors import BuildError
from qwen_engine.manifest import LAYERS_GRAPH_FILE, Manifest
from qwen_run.accuracy.reference import CHUNK_TOKENS
from qwen_run.accuracy.weight_checks import compare_weights
from qwen_run.runtime.engine import Engine

TOKENS = np.random.default_rng(5).integers(0, 131, 2 * CHUNK_TOKENS + 7).tolist()


@dataclass(frozen=True)
class Constant:
    """A source of one number, as calibration gives them."""

    value: float
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def read(self, checkpoint: Checkpoint, start: int, stop: int) -> np.ndarray:
        return np.float32([self.value])


@pytest.fixture
def build_static(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes an engine with static activation scales: each linear has another."""
    monkeypatch.setattr(scheme_plan, "_check_scales", lambda options: None)  # it asks for calibration

    def make(path: Path, **options: str) -> Path:
        with Checkpoint.open(path) as weights:
            chosen = BuildOptions(quant="int8", activation_scales="static", **options)
            plan = plan_build(weights, resolve_checkpoint(str(path)), chosen)
            names = [name for name in plan.sources if name.endswith(".input_scale")]
            sources = plan.sources | {name: Constant(0.02 + 0.003 * i) for i, name in enumerate(names)}
            plan = replace(plan, sources=sources, layout=plan_layout(plan.graph, sources))
            write_engine(plan, weights, tmp_path / "engine")
        return tmp_path / "engine"

    return make


def assert_computed_as_recorded(checkpoint: TinyCheckpoint, directory: Path) -> None:
    """Each sub-block by itself, beside transformers with the engine's weights and rounding."""
    found = layer_outputs(directory, TOKENS[:60])
    errors = list(
        relative_errors(found, as_built(checkpoint, directory).hidden_outputs(TOKENS[:60], found, given=found)).values()
    )
    assert np.median(errors) < 1e-6
    assert max(errors) < 5e-3  # one input in the middle between two steps, in one small sub-block
    sequence = TOKENS[:40]
    layers = Engine.load(directory, threads=1, graph=LAYERS_GRAPH_FILE)
    assert np.array_equal(run_alone(layers, sequence), run_alone(Engine.load(directory, threads=1), sequence))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("activations", ["int8", "int8x2"])
def test_a_scale_for_each_channel_and_token(family, activations, tiny_checkpoint, build_engine):
    checkpoint = tiny_checkpoint(family)
    options = {"quant": "int8", "weight_scales": "channel", "activation_scales": "token", "kv_cache_dtype": "float32"}
    directory = build_engine(checkpoint.path, activations=activations, **options)
    for linear in Manifest.read(directory).linears:
        inside = linear.name.startswith("model.layers.")  # of embedding and head each group has its own
        expected = ("channel", "token") if inside else ("group", "group")
        assert (linear.quantization.weight_scales, linear.quantization.activation_scales) == expected
    assert compare_weights(directory, checkpoint.path).passed
    assert_computed_as_recorded(checkpoint, directory)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("activations", ["int8", "int8x2"])
def test_a_constant_for_each_linear(family, activations, tiny_checkpoint, build_static):
    checkpoint = tiny_checkpoint(family)
    directory = build_static(checkpoint.path, activations=activations, kv_cache_dtype="float32")
    assert_computed_as_recorded(checkpoint, directory)


def test_linears_apart_have_constants_of_their_own(tiny_checkpoint, build_static):
    checkpoint = tiny_checkpoint("qwen2")
    directory = build_static(checkpoint.path, exclude=("*.k_proj",), kv_cache_dtype="float32")
    assert_computed_as_recorded(checkpoint, directory)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant": "int8", "weight_scales": "tensor"}, "--weight-scales tensor needs calibration; add --quant smooth"),
        ({"quant": "int4", "activation_scales": "static"}, "--activation-scales static needs calibration; add --quant"),
        ({"quant": "none", "activation_scales": "token"}, "--activation-scales token says how integers are scaled"),
        ({"quant": "int4", "weight_scales": "channel", "symmetric": False}, "leave --asymmetric out"),
        ({"quant": "int8", "weight_scales": "channel", "kernels": "stock"}, "--kernels stock has no --weight-scales"),
        ({"quant": "int8", "weight_scales": "row"}, "weight_scales is 'row', expected one of group, channel, tensor"),
    ],
    ids=str,
)
def test_scales_that_cannot_be_are_refused(options, message, tiny_checkpoint):
    path = tiny_checkpoint("qwen2").path
    with Checkpoint.open(path) as weights, pytest.raises(BuildError) as error:
        plan_build(weights, resolve_checkpoint(str(path)), BuildOptions(**options))
    assert message in str(error.value)


def test_the_command_line_says_which_scales(tiny_checkpoint):
    arguments = [str(tiny_checkpoint("qwen2").path), "--dry-run", "--quant", "int8"]
    table = CliRunner().invoke(main, [*arguments, "--weight-scales", "channel", "--activation-scales", "token"]).output
    assert "model.layers.0.mlp.gate_up_proj" in table
    assert "int8 per channel symmetric x int8 per token, native" in table
    refused = CliRunner().invoke(main, [*arguments, "--activation-scales", "row"])
    assert refused.exit_code == 2
    for value in (*WEIGHT_SCALES, *ACTIVATION_SCALES):
        assert value in CliRunner().invoke(main, ["--help"]).output
