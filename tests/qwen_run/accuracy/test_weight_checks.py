"""Whether an engine holds the weights of its checkpoint: of every kind of engine, and of one that does not."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import qwen_plugin
from cases.as_built import MIXED
from cases.packed import CASES, case_name
from qwen_build.writing.weights_file import SLICE_ELEMENTS
from qwen_engine.errors import EngineError
from qwen_engine.manifest import WEIGHTS_FILE
from qwen_run.accuracy.builder_weights import open_weights
from qwen_run.accuracy.weight_checks import compare_weights
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
    assert check.passed, check.message
    assert re.match(r"23 linears and \d+ vectors are the checkpoint's", check.message)


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_packed_linears_are_those_of_the_checkpoint(case, pack, build_engine):
    packed = pack(case, left_float=("model.layers.2.mlp.up_proj",))
    engine = build_engine(packed.path)
    assert compare_weights(engine, packed.path).passed
    weights = EngineWeights(engine)
    for name, expected in packed.weights.items():
        assert np.array_equal(np.concatenate([rows for _, rows in weights.pieces(name)]), expected)
        assert np.array_equal(open_weights(packed.path).rows(name, slice(3, 9)), expected[3:9])


def test_only_some_of_many_differing_weights_are_named(tiny_checkpoint, build_engine):
    engine = build_engine(tiny_checkpoint("qwen2").path, quant="int8")
    check = compare_weights(engine, tiny_checkpoint("qwen2", "bfloat16").path)
    assert not check.passed
    assert re.search(r"v_proj \([\d.]+% of its values are not the nearest\) and 35 more$", check.message)  # of 39


@pytest.mark.parametrize("change", ["nearest", "reader", "order"])
def test_faults_of_the_builder_are_seen(change, tiny_checkpoint, monkeypatch, tmp_path):
    """The comparison shares nothing with what it checks: a builder that is wrong everywhere is not its own witness."""
    from qwen_build import build
    from qwen_build.checkpoint import weights
    from qwen_build.quantization.grid import Grid

    nearest, read = Grid.nearest, weights.Checkpoint.read

    def down(grid, groups, scales, zero_points):
        return nearest(grid, groups - scales[..., None] / 4, scales, zero_points)

    def other(checkpoint, name, start=0, stop=None):
        return (
            read(checkpoint, name, start, stop)[..., ::-1]
            if "down_proj" in name
            else read(checkpoint, name, start, stop)
        )

    def larger(checkpoint, name, start=0, stop=None):
        values = read(checkpoint, name, start, stop)
        return values * np.float32(1.01) if "o_proj" in name else values

    if change == "nearest":
        monkeypatch.setattr(Grid, "nearest", down)
    else:
        monkeypatch.setattr(weights.Checkpoint, "read", other if change == "order" else larger)
    path = tiny_checkpoint("qwen2").path
    check = compare_weights(build(path, tmp_path / "engine", quant="int8"), path)
    assert not check.passed
    named = {"nearest": "embed_tokens", "reader": "o_proj", "order": "down_proj"}[change]
    assert f"{named} (" in check.message


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
