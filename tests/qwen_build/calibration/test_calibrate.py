"""Calibrated engines: the numbers the method found are those that run, again and again the same, or nothing is left.

More than 400 lines: all tests use one text and the tiny checkpoints that a method is tried on.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from cases.calibration import INPUTS, letter_tokenizer, letters, with_tokenizer
from cases.packed import CASES
from cases.tiny import hf_logits, run_alone
from qwen_build import cli
from qwen_build import engine_build as building
from qwen_build.calibration import calibrate as calibrating
from qwen_build.calibration.method import Method
from qwen_build.calibration.plan import METHODS
from qwen_build.calibration.results import new_array
from qwen_build.checkpoint.locate import resolve_checkpoint
from qwen_build.checkpoint.safetensors_file import write_safetensors
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.engine_build import plan_build, write_engine
from qwen_build.plan.options import CALIBRATED, BuildOptions
from qwen_build.plan.rules import Rule
from qwen_engine.choices import INT4_METHODS
from qwen_engine.errors import BuildError, CheckpointError
from qwen_engine.manifest import Manifest
from qwen_run.accuracy.weight_checks import compare_weights
from qwen_run.engine_files.weights import EngineWeights
from qwen_run.runtime.engine import Engine

TOKENS = np.random.default_rng(9).integers(0, 26, 90).tolist()
# so that nothing but weights is rounded
EXACT = {"activations": "float32", "embedding_quant": "none", "kv_cache_dtype": "float32"}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(letters(1600))
    return path


@pytest.fixture(params=["qwen2", "qwen3-tied"])
def tiny(request, tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint(request.param)
    return dataclasses.replace(checkpoint, path=with_tokenizer(checkpoint.path, tmp_path / "checkpoint"))


def build_calibrated(checkpoint: Path, output: Path, **options: Any) -> Manifest:
    with Checkpoint.open(checkpoint) as weights:
        plan = plan_build(weights, resolve_checkpoint(str(checkpoint)), BuildOptions(**options))
        return write_engine(plan, weights, output)


def with_weights_of(engine: Path, model: Any) -> Any:
    """A copy of a transformers model that has the engine's dequantised weights."""
    import copy

    import torch

    found, model = EngineWeights(engine), copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in found.parts:
            if f"{name}.weight" in parameters:
                rows = [values for _, values in found.pieces(name)]
                parameters[f"{name}.weight"].copy_(torch.from_numpy(np.concatenate(rows)))
        for name, values in found.vectors.items():
            parameters[name].copy_(torch.from_numpy(np.array(values)))
    return model


def output_error(model: Any, rounded: Any) -> float:
    return float(np.square(hf_logits(rounded, TOKENS) - hf_logits(model, TOKENS)).mean())


def test_gptq_has_less_error(tiny, text, tmp_path):
    errors = []
    for method, path in (("rtn", None), ("gptq", text)):
        build_calibrated(tiny.path, tmp_path / method, group_size=64, int4_method=method, calibration=path, **EXACT)
        errors.append(output_error(tiny.model, with_weights_of(tmp_path / method, tiny.model)))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("method", [method for method in INT4_METHODS if method != "rtn"])
def test_a_calibrated_engine_computes_with_what_it_holds(method, tiny, text, tmp_path, monkeypatch):
    options = {"group_size": 64, "int4_method": method, "calibration": text, **EXACT}
    manifest = build_calibrated(tiny.path, tmp_path / "engine", **options)
    monkeypatch.setattr("qwen_build.writing.weights_file.SLICE_ELEMENTS", 32 * 80)  # several slices of every weight
    assert build_calibrated(tiny.path, tmp_path / "sliced", **options).parts == manifest.parts
    rounded = with_weights_of(tmp_path / "engine", tiny.model)
    logits = run_alone(Engine.load(tmp_path / "engine"), TOKENS)
    np.testing.assert_allclose(logits, hf_logits(rounded, TOKENS), atol=1e-3)
    decoder = [linear for linear in manifest.linears if linear.name.startswith("model.layers")]
    assert {linear.quantization.method for linear in decoder} == {method}
    assert all(0 < linear.output_error < 0.2 for linear in decoder)
    assert {linear.output_error for linear in manifest.linears if linear not in decoder} == {None}
    check = compare_weights(tmp_path / "engine", tiny.path)
    assert check.passed
    assert re.search(rf"; largest error over that of rounding to the nearest: .*{method} [01]\.\d\d", check.message)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "engine", "sliced"}


def test_the_recorded_error_is_that_of_the_output_behind_rounded_layers(tiny, text, tmp_path):
    """Of layer 1 on what the rounded layer 0 puts out: transformers runs the text with the engine's weights."""
    import torch

    manifest = build_calibrated(tiny.path, tmp_path / "engine", int4_method="gptq", calibration=text, **EXACT)
    rounded = with_weights_of(tmp_path / "engine", tiny.model)
    ids = torch.tensor(letter_tokenizer().encode(text.read_text()).ids[:1536]).reshape(3, 512)
    seen: list[np.ndarray] = []
    attention = rounded.model.layers[1].self_attn
    handle = attention.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(1536, -1).numpy()))
    with torch.no_grad():
        rounded.model(ids)
    handle.remove()
    sample = seen[0][np.linspace(0, 1535, 512).astype(int)]
    weight, values = (
        np.concatenate([getattr(module, name).weight.detach().numpy() for name in ("q_proj", "k_proj", "v_proj")])
        for module in (tiny.model.model.layers[1].self_attn, attention)
    )
    expected = np.linalg.norm(sample @ (weight - values).T) / np.linalg.norm(sample @ weight.T)
    found = next(linear for linear in manifest.linears if linear.name == "model.layers.1.self_attn.qkv_proj")
    assert found.output_error == pytest.approx(expected, rel=1e-4)


def test_the_same_text_gives_the_same_bytes_and_another_one_others(tiny, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(letters(1600, seed=1))
    parts = [
        build_calibrated(tiny.path, tmp_path / name, int4_method="gptq", calibration=path).parts
        for name, path in (("a", text), ("b", text), ("c", other))
    ]
    assert parts[0] == parts[1]
    assert parts[0]["weights.bin"] != parts[2]["weights.bin"]


def test_an_interrupted_calibration_goes_on_where_it_was(tiny, text, tmp_path, monkeypatch):
    whole = build_calibrated(tiny.path, tmp_path / "whole", int4_method="gptq", calibration=text)
    engines, read = tmp_path / "engines", []

    def read_layer(checkpoint, config, layer, interrupted: bool):
        read.append(layer)
        if layer == 1 and interrupted:
            raise KeyboardInterrupt
        return original(checkpoint, config, layer)

    original = calibrating.read_layer
    monkeypatch.setattr(calibrating, "read_layer", lambda *args: read_layer(*args, interrupted=True))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            build_calibrated(tiny.path, engines / "e", int4_method="gptq", calibration=text)
        assert [path.name.startswith(".e.") for path in engines.iterdir()] == [True]
    monkeypatch.setattr(calibrating, "read_layer", lambda *args: read_layer(*args, interrupted=False))
    resumed = build_calibrated(tiny.path, engines / "e", int4_method="gptq", calibration=text)
    assert read == [0, 1, 1, 1, 2]
    assert resumed.parts == whole.parts
    assert [path.name for path in engines.iterdir()] == ["e"]


def test_what_was_interrupted_is_of_no_use_for_other_options(tiny, text, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(building, "write_weights", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_calibrated(tiny.path, tmp_path / "out" / "e", int4_method="gptq", calibration=text)
    expected = build_calibrated(tiny.path, tmp_path / "fresh", int4_method="gptq", calibration=text, group_size=64)
    assert (
        build_calibrated(tiny.path, tmp_path / "out" / "e", int4_method="gptq", calibration=text, group_size=64).parts
        == expected.parts
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["e"]


def interrupt(*_):
    raise KeyboardInterrupt


def test_the_user_is_told_what_an_interruption_left_and_that_it_is_gone_on_with(tiny, text, tmp_path, monkeypatch):
    def run(*options: object):
        arguments = [tiny.path, "--output", tmp_path / "out" / "e", *options]
        return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])

    calibrated = ("--int4-method", "gptq", "--calibration", text)
    with monkeypatch.context() as patch:
        patch.setattr(building, "write_weights", interrupt)
        result = run(*calibrated)
    (left,) = (tmp_path / "out").iterdir()
    assert result.exit_code == 130
    assert result.stderr == f"What was finished is kept in {left}; the same command goes on.\n"
    note = f"Note: an interrupted build left {left}; the same build goes on there, another one removes it in the end.\n"
    with monkeypatch.context() as patch:
        patch.setattr(calibrating, "read_layer", None)  # all layers are there
        patch.setattr(building, "write_weights", interrupt)
        assert run(*calibrated).stderr == note + result.stderr
    finished = run("--quant", "int8")  # which has nothing to go on with
    assert (finished.exit_code, finished.stderr) == (0, note)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["e"]


@pytest.mark.parametrize("module", [calibrating, building])
def test_a_full_disk_keeps_what_was_finished(module, tiny, text, tmp_path, monkeypatch):
    """Whether it fills up while layers are calibrated or while the weights are written."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    read = []
    original = calibrating.read_layer
    monkeypatch.setattr(calibrating, "read_layer", lambda *args: read.append(args[2]) or original(*args))
    with monkeypatch.context() as patch:
        patch.setattr(*{calibrating: (calibrating, "new_array", full), building: (os, "pwrite", full)}[module])
        with pytest.raises(BuildError, match=r"No space left on device.*What was finished is kept in .*\.e\.") as error:
            build_calibrated(tiny.path, tmp_path / "out" / "e", int4_method="gptq", calibration=text)
    assert "\n" not in str(error.value)
    build_calibrated(tiny.path, tmp_path / "out" / "e", int4_method="gptq", calibration=text)
    assert read == ([0, 0, 1, 2] if module is calibrating else [0, 1, 2])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["e"]


def test_a_full_disk_shows_before_a_mapped_file_is_written_to(tmp_path, monkeypatch):
    reserved = []
    monkeypatch.setattr("qwen_build.calibration.results.reserve", lambda file, size: reserved.append(size))
    new_array(tmp_path / "array.npy", (3, 1000))[:] = 1
    assert reserved == [(tmp_path / "array.npy").stat().st_size]
    assert reserved[0] >= 12_000


def test_the_same_build_twice_at_once(tiny, text, tmp_path, monkeypatch):
    def second(*_):
        with pytest.raises(BuildError, match=r"another process is building .*; wait for it or choose another --output"):
            build_calibrated(tiny.path, tmp_path / "out" / "e", int4_method="gptq", calibration=text)
        raise KeyboardInterrupt

    monkeypatch.setattr(building, "write_weights", second)
    with pytest.raises(KeyboardInterrupt):
        build_calibrated(tiny.path, tmp_path / "out" / "e", int4_method="gptq", calibration=text)
    monkeypatch.undo()
    build_calibrated(tiny.path, tmp_path / "out" / "e", int4_method="gptq", calibration=text)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["e"]


def test_what_a_live_build_uses_is_left_alone(tiny, text, tmp_path, monkeypatch):
    original = building.write_weights

    def other(*args):
        monkeypatch.setattr(building, "write_weights", original)
        build_calibrated(tiny.path, tmp_path / "out" / "e", quant="int8")
        assert len(list((tmp_path / "out").glob(".e.*.calibration"))) == 1
        return original(*args)

    monkeypatch.setattr(building, "write_weights", other)
    with pytest.raises(BuildError, match="exists; use --force"):
        build_calibrated(tiny.path, tmp_path / "out" / "e", int4_method="gptq", calibration=text)


def test_an_error_leaves_nothing(tiny, text, tmp_path, monkeypatch):
    class Failing(Method):
        def round(self, readers):
            raise OverflowError("7e9 is too large")

    monkeypatch.setitem(METHODS, "gptq", lambda options: Failing())
    with pytest.raises(
        BuildError, match=r"model\.layers\.0\.self_attn\.q_proj .*: 7e9 is too large; use --kernels stock"
    ):
        build_calibrated(tiny.path, tmp_path / "out" / "e", int4_method="gptq", calibration=text)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_model_that_overflows_is_refused(method, tiny, text, tmp_path):
    with Checkpoint.open(tiny.path) as weights:
        tensors = {name: weights.read(name) for name in weights.tensors}
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.1.mlp.{name}.weight"] *= 1e25
    write_safetensors(tiny.path / "model.safetensors", tensors, "float32")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj: what it multiplies is too large"):
        build_calibrated(tiny.path, tmp_path / "out" / "e", int4_method=method, calibration=text, kernels="stock")
    assert not list((tmp_path / "out").iterdir())


class Folding(Method):
    """Folds random factors into every input that an integer linear reads."""

    def factors(self, readers):
        random = np.random.default_rng(len(readers.read.name))
        return readers.shared(random.uniform(0.5, 2, len(readers.statistics.largest)).astype(np.float32))


def test_weights_are_rounded_by_the_statistics_of_folded_inputs(tiny, text, tmp_path, monkeypatch):
    largest, seen = {}, []

    class Spying(Folding):
        def factors(self, readers):
            factors = super().factors(readers)
            largest[readers.read.name] = readers.statistics.largest / factors
            return factors

        def round(self, readers):
            seen.append(readers.read.name)
            np.testing.assert_allclose(readers.statistics.largest, largest.pop(readers.read.name), rtol=1e-6)
            return super().round(readers)

    monkeypatch.setitem(METHODS, "gptq", lambda options: Spying())
    build_calibrated(tiny.path, tmp_path / "engine", int4_method="gptq", calibration=text)
    assert seen == 3 * list(INPUTS)


@pytest.mark.parametrize("pattern", ["*", "*.[od]*_proj", "*.k_proj"])
def test_what_folding_changes_is_in_the_engine(pattern, tiny, text, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "awq", lambda options: Folding())  # a method that may fold
    options = {"calibration": text, "int4_method": "awq", **EXACT}
    # int8, so that rounding changes little; one int4 linear, so that there is a method
    rules = (
        Rule("test", "model.layers.2.mlp.down_proj", "int4", 32),
        Rule("test", f"model.layers.?.*{pattern}", "int8", 32),
    )
    manifest = build_calibrated(tiny.path, tmp_path / "engine", quant="none", quant_config=rules, **options)
    plain = build_calibrated(tiny.path, tmp_path / "plain", quant="none", quant_config=rules, **EXACT)
    logits = {name: run_alone(Engine.load(tmp_path / name), TOKENS) for name in ("engine", "plain")}
    expected = tiny.logits(TOKENS)
    errors = {name: np.square(found - expected).mean() for name, found in logits.items()}
    assert errors["engine"] < 3 * errors["plain"] < 0.1 * np.square(expected).mean()
    norms = [EngineWeights(tmp_path / name).vectors["model.layers.0.input_layernorm.weight"] for name in logits]
    methods = {
        linear.name.rpartition(".")[2]: linear.quantization.method
        for linear in manifest.linears
        if ".0." in linear.name
    }
    if pattern == "*.[od]*_proj":  # the float linears that compute their inputs
        assert methods["qkv_proj"] == methods["gate_up_proj"] == "folded"
        np.testing.assert_array_equal(*norms)
    else:
        assert (norms[0] != norms[1]).all()
    assert {linear.quantization.method for linear in plain.linears} == {"none", "rtn"}
    assert compare_weights(tmp_path / "engine", tiny.path).passed


def test_mixed_schemes_are_calibrated_together_and_float_stays(tiny, text, tmp_path):
    rules = (Rule("test", "*.v_proj", "int8", 64, True), Rule("test", "*.up_proj", "none"))
    manifest = build_calibrated(
        tiny.path, tmp_path / "engine", quant_config=rules, exclude=("model.layers.1.*",), int4_method="gptq",
        calibration=text, **EXACT,
    )  # fmt: skip
    methods = {linear.name: (linear.quantization.scheme, linear.quantization.method) for linear in manifest.linears}
    assert methods["model.layers.0.self_attn.v_proj"] == ("int8", "gptq")
    assert methods["model.layers.0.self_attn.q_proj"] == ("int4", "gptq")
    assert methods["model.layers.0.mlp.up_proj"] == ("none", "none")
    assert {found for name, found in methods.items() if name.startswith("model.layers.1.")} == {("none", "none")}
    check = compare_weights(tmp_path / "engine", tiny.path)
    assert check.passed
    logits = run_alone(Engine.load(tmp_path / "engine"), TOKENS)
    expected = hf_logits(with_weights_of(tmp_path / "engine", tiny.model), TOKENS)
    np.testing.assert_allclose(logits, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": Path("x")}, "--calibration is of no use, nothing calibrates; add --int4-method gptq"),
        ({"calibration_tokens": 9999}, "--calibration-tokens is of no use"),
        ({"quant": "none", "calibration": Path("x")}, "--calibration is of no use"),
        ({"quant": "int8", "int4_method": "gptq"}, "--int4-method gptq has nothing to round"),
        ({"quant": "none", "int4_method": "awq"}, "--int4-method awq has nothing to round"),
        ({"exclude": ("model.layers.*",), "int4_method": "gptq"}, "has nothing to round"),
        ({"int4_method": "best"}, "int4_method is 'best', expected one of rtn, awq, gptq"),
        ({"int4_method": "gptq", "calibration": Path("nowhere")}, "nowhere is neither a file nor"),
    ],
)
def test_options_that_contradict_each_other(options: Mapping[str, Any], message, tiny, tmp_path):
    with pytest.raises(BuildError) as error:
        build_calibrated(tiny.path, tmp_path / "out" / "e", **options)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_command_line_calibrates_and_says_in_one_line_why_it_cannot(tiny, text, tmp_path):
    def run(*options: object):
        arguments = [tiny.path, "--output", tmp_path / "out" / "e", "--int4-method", "gptq", *options]
        return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])

    short = tmp_path / "short.txt"
    short.write_text(letters(300))
    for options in (["--calibration", short], ["--calibration", text, "--calibration-tokens", 2048]):
        result = run(*options)
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert "calibration takes" in result.stderr
    assert not (tmp_path / "out").exists()
    result = run("--calibration", text, "--calibration-tokens", 1024, "--group-size", 64)
    assert result.exit_code == 0, result.output
    options = {"int4_method": "gptq", "calibration": text, "calibration_tokens": 1024, "group_size": 64}
    assert (
        Manifest.read(tmp_path / "out" / "e").parts == build_calibrated(tiny.path, tmp_path / "same", **options).parts
    )
    (tiny.path / "tokenizer.json").unlink()
    result = run("--force")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "has no tokenizer.json, which calibration needs" in result.stderr


def test_a_plan_counts_the_memory_of_calibration(tiny, text):
    with Checkpoint.open(tiny.path) as weights:
        located = resolve_checkpoint(str(tiny.path))
        plain, calibrated = (
            plan_build(weights, located, BuildOptions(int4_method=method, calibration=path)).build_memory_bytes
            for method, path in (("rtn", None), ("gptq", text))
        )
    inner = tiny.model.config.intermediate_size
    assert calibrated > plain
    assert calibrated > 4 * inner * inner


def test_the_tables_agree():
    assert set(METHODS) == {*INT4_METHODS, *CALIBRATED}


def test_what_the_checkpoint_has_packed_stays_as_it_is(pack, text, tmp_path):
    packed = pack(CASES[0], left_float=("model.layers.0.self_attn.k_proj",))
    path = with_tokenizer(packed.path, tmp_path / "checkpoint")
    rules = (Rule("test", "*.0.*.k_proj", "int4", 32),)
    manifest = build_calibrated(
        path, tmp_path / "engine", quant_config=rules, int4_method="gptq", calibration=text, **EXACT
    )
    methods = {linear.name: linear.quantization.method for linear in manifest.linears if ".layers." in linear.name}
    assert methods.pop("model.layers.0.self_attn.k_proj") == "gptq"
    assert set(methods.values()) == {"imported"}
    check = compare_weights(tmp_path / "engine", path)
    assert check.passed, check.message
    assert "; largest error over that of rounding to the nearest: gptq 1." in check.message
    with pytest.raises(BuildError, match="has nothing to round"):
        build_calibrated(path, tmp_path / "other", exclude=("*.0.*.k_proj",), int4_method="gptq", calibration=text)
