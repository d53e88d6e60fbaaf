"""Whether an engine holds the weights of its checkpoint: of every kind of engine, and of one that does not."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import qwen_plugin
from cases.as_built import MIXED
from cases.packed import CASES, case_name
from qwen_build.checkpoint.safetensors import Checkpoint
from qwen_build.checkpoint.safetensors_file import write_safetensors
from qwen_build.writing.weights_file import SLICE_ELEMENTS
from qwen_engine.errors import EngineError
from qwen_engine.manifest import MANIFEST_FILE, WEIGHTS_FILE, Manifest
from qwen_run.accuracy.report import Check
from qwen_run.accuracy.weight_checks import CheckpointWeights, compare_weights
from qwen_run.engine_files import weights as dequantize
from qwen_run.engine_files.weights import EngineWeights

KINDS = {"none": {"quant": "none"}, "int4": {"quant": "int4"}, "int8": {"quant": "int8", "symmetric": False}, **MIXED}


@pytest.mark.parametrize("elements", [SLICE_ELEMENTS, 4000], ids=["whole", "sliced"])
@pytest.mark.parametrize("family", ["qwen2-tied", "qwen3"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_has_the_weights_of_its_checkpoint(
    kind, family, elements, tiny_checkpoint, build_engine, monkeypatch
):
    monkeypatch.setattr(dequantize, "SLICE_ELEMENTS", elements)
    path = tiny_checkpoint(family).path
    check = compare_weights(build_engine(path, **KINDS[kind]), path)
    assert (check.passed, check.message) == (True, "23 linears equal the checkpoint's, rounded as it is built")


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_packed_linears_are_those_of_the_checkpoint(case, pack, build_engine):
    packed = pack(case, left_float=("model.layers.2.mlp.up_proj",))
    engine = build_engine(packed.path)
    assert compare_weights(engine, packed.path).passed
    weights = EngineWeights(engine)
    for name, expected in packed.weights.items():
        assert np.array_equal(np.concatenate([rows for _, rows in weights.pieces(name)]), expected)
        with CheckpointWeights(packed.path) as checkpoint:
            assert np.array_equal(checkpoint.rows(name, expected.shape, slice(3, 9)), expected[3:9])


def test_only_some_of_many_differing_weights_are_named(tiny_checkpoint, build_engine):
    engine = build_engine(tiny_checkpoint("qwen2").path, quant="int8")
    check = compare_weights(engine, tiny_checkpoint("qwen2", "bfloat16").path)
    assert not check.passed
    assert check.message.endswith("model.layers.1.self_attn.q_proj.bias and 35 more")  # of 16 vectors and 23 linears


@pytest.fixture
def as_calibrated(tiny_checkpoint, build_engine, tmp_path):
    """Checks an int4 engine of a tiny checkpoint whose ``down_proj`` were changed and are said to be calibrated."""

    def make(change) -> Check:
        original, path = (
            Path(shutil.copytree(tiny_checkpoint("qwen2").path, tmp_path / name)) for name in ("original", "changed")
        )
        with Checkpoint.open(path) as checkpoint:
            tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
        weights = [tensors[f"model.layers.{layer}.mlp.down_proj.weight"] for layer in range(3)]
        for weight in weights:
            weight[5] *= 1e-20  # which the engine's scales round to nothing
        write_safetensors(original / "model.safetensors", tensors, "float32")
        for weight in weights:
            change(weight)
        write_safetensors(path / "model.safetensors", tensors, "float32")
        engine = Path(shutil.copytree(build_engine(path, quant="int4", group_size=128), tmp_path / "engine"))
        manifest = Manifest.read(engine)
        linears = tuple(
            dataclasses.replace(linear, output_error=0.01) if linear.name.endswith("down_proj") else linear
            for linear in manifest.linears
        )
        (engine / MANIFEST_FILE).write_text(dataclasses.replace(manifest, linears=linears).to_json())
        return compare_weights(engine, original)

    return make


def scale(weight: np.ndarray) -> None:
    """As folding does: every column, and every row."""
    random = np.random.default_rng(0)
    weight *= np.exp(random.normal(size=weight.shape[1])) * np.exp(random.normal(size=(len(weight), 1)))


def test_calibrated_linears_have_to_correlate(as_calibrated):
    check = as_calibrated(scale)
    assert check.passed, check.message
    assert re.fullmatch(
        r"20 linears equal .*; rows of 3 calibrated ones correlate with it by 0\.9\d\d or more", check.message
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.__setitem__(slice(2), weight[1::-1].copy()),  # two rows change places
        lambda weight: weight.__setitem__(slice(None), np.roll(weight, 32, axis=1)),
        lambda weight: weight.__setitem__(slice(None), 0),
        lambda weight: weight.__setitem__(7, -weight[7]),
    ],
    ids=["rows", "groups", "zero", "sign"],
)
def test_calibrated_linears_that_are_not_the_checkpoints(change, as_calibrated):
    check = as_calibrated(change)
    assert not check.passed
    assert re.search(r": model\.layers\.0\.mlp\.down_proj, .*1.*, .*2\.mlp\.down_proj$", check.message), check.message


def test_weights_that_are_cut_off_are_refused(tiny_checkpoint, build_engine, tmp_path):
    engine = Path(shutil.copytree(build_engine(tiny_checkpoint("qwen2").path, quant="int8"), tmp_path / "engine"))
    with (engine / WEIGHTS_FILE).open("r+b") as file:
        file.truncate(70000)
    with pytest.raises(EngineError, match=r"lies beyond the end of weights\.bin; build the engine again"):
        EngineWeights(engine)


def test_weights_of_other_operators_are_refused(tiny_checkpoint, build_engine, monkeypatch):
    """Their bytes may lie in another order."""
    engine = build_engine(tiny_checkpoint("qwen2").path, quant="int4")
    monkeypatch.setattr(qwen_plugin, "OPERATORS", qwen_plugin.OPERATORS | {("qwen", "QuantLinear"): 99})
    with pytest.raises(EngineError, match=r"needs qwen::QuantLinear version \d+, which .* build the engine again"):
        EngineWeights(engine)
