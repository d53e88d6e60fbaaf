"""Experts are calibrated one by one with the tokens they saw, and those that saw too few are rounded to the nearest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cases.as_built import as_built, layer_outputs, relative_errors
from cases.chat_checkpoint import WORDS, write_chat_checkpoint
from cases.experts import lopsided
from cases.tiny import TinyCheckpoint, run_alone
from qwen_build.calibration import experts
from qwen_build.checkpoint.locate import resolve_checkpoint
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.engine_build import plan_build, write_engine
from qwen_build.plan.options import BuildOptions
from qwen_engine.errors import BuildError
from qwen_engine.graph_io import CHOSEN
from qwen_engine.manifest import Manifest
from qwen_run.accuracy.weight_checks import compare_weights
from qwen_run.engine_files.weights import EngineWeights
from qwen_run.runtime.engine import Engine
from qwen_run.text.tokenizer import Tokenizer

METHODS = {
    "rtn": {"quant": "int4"},
    "gptq": {"int4_method": "gptq"},
    "awq": {"int4_method": "awq"},
    "auto": {"int4_method": "auto"},
    "smoothquant": {"quant": "smoothquant"},
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"document": " ".join(rng.choice(WORDS, 60))}) + "\n" for _ in range(40)))
    return path


@pytest.fixture(scope="module", params=["qwen2-moe", "qwen3-moe"])
def checkpoint(request, tmp_path_factory) -> TinyCheckpoint:
    return write_chat_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", request.param)


def built(path: Path, output: Path, texts: Path, name: str) -> tuple[Path, list[str]]:
    """An engine, and what was said of its calibration."""
    options = METHODS[name] | ({} if name == "rtn" else {"calibration": texts})
    said: list[str] = []
    with Checkpoint.open(path) as weights:
        plan = plan_build(weights, resolve_checkpoint(str(path)), BuildOptions(**options))
        write_engine(plan, weights, output, tell=said.append)
    return output, [*plan.notes, *said]


@pytest.fixture(scope="module")
def engines(checkpoint, texts, tmp_path_factory) -> dict[str, tuple[Path, list[str]]]:
    directory = tmp_path_factory.mktemp("engines")
    return {name: built(checkpoint.path, directory / name, texts, name) for name in METHODS}


def experts_of(engine: Path) -> dict[str, str]:
    """The method of each linear of experts."""
    records = Manifest.read(engine).linears
    return {record.name: record.quantization.method for record in records if ".mlp.experts." in record.name}


@pytest.mark.parametrize("name", METHODS)
def test_it_computes_with_the_weights_it_holds_which_are_the_checkpoints(name, checkpoint, engines):
    engine, _ = engines[name]
    check = compare_weights(engine, checkpoint.path)
    assert check.passed, check.message
    tokens = np.random.default_rng(0).integers(0, 260, 90).tolist()
    found = layer_outputs(engine, tokens)
    expected = as_built(checkpoint, engine).hidden_outputs(tokens, found, given=found)
    outputs = [{n: v for n, v in side.items() if not n.endswith(CHOSEN)} for side in (found, expected)]
    errors = relative_errors(*outputs)
    assert np.median(list(errors.values())) < 1e-6
    assert max(errors.values()) < 5e-3  # one input between two steps, in one small sub-block


def test_methods_are_recorded_and_what_leaves_experts_alone_says_so(engines):
    for name, (engine, notes) in engines.items():
        told = [note for note in notes if "experts" in note]
        if name == "smoothquant":
            assert told == ["smoothquant leaves the experts alone: they are rounded to the nearest."]
        else:
            assert told == []
        assert set(experts_of(engine).values()) == {"rtn" if name == "smoothquant" else name}
        records = [one for one in Manifest.read(engine).linears if one.name in experts_of(engine)]
        assert len(records) == 4
        assert all((one.output_error is not None) == (name not in ("rtn", "smoothquant")) for one in records)


def test_calibration_takes_from_what_rounding_costs(checkpoint, texts, engines):
    """Also in the experts alone: all else of an engine has the calibrated weights of the same method."""
    document = json.loads(texts.read_text().splitlines()[0])["document"]
    token_ids = Tokenizer.load(checkpoint.path).encode(document)[:90]
    expected, errors = checkpoint.logits(token_ids), {}
    for name, (engine, _) in engines.items():
        found = run_alone(Engine.load(engine, threads=1), token_ids)
        errors[name] = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert errors["gptq"] < 0.85 * errors["rtn"]
    assert errors["auto"] < 0.85 * errors["rtn"]
    recorded = {
        name: [one.output_error for one in Manifest.read(engine).linears if ".mlp.experts." in one.name]
        for name, (engine, _) in engines.items()
        if name in ("gptq", "awq")
    }
    assert max(recorded["gptq"]) < min(recorded["awq"])


def test_an_expert_that_saw_too_few_tokens_is_rounded_to_the_nearest(checkpoint, texts, tmp_path):
    path = tmp_path / "lopsided"
    shutil.copytree(checkpoint.path, path)
    save_file(lopsided(load_file(path / "model.safetensors")), path / "model.safetensors")
    (engine, notes), (nearest, _) = (built(path, tmp_path / name, texts, name) for name in ("gptq", "rtn"))
    told = [note for note in notes if "experts saw too few tokens" in note]
    assert len(told) == 1
    few = int(told[0].split()[0])
    assert told[0].startswith(f"{few} of the 10 experts saw too few tokens of the calibration text")
    ours, theirs = EngineWeights(engine), EngineWeights(nearest)

    def weight(side: EngineWeights, name: str) -> np.ndarray:
        return np.concatenate([values for _, values in side.pieces(name)])

    def is_alike(layer: int, expert: int) -> bool:
        names = [f"model.layers.{layer}.mlp.experts.{expert}.{linear}_proj" for linear in ("gate", "up", "down")]
        return all(np.array_equal(weight(ours, name), weight(theirs, name)) for name in names)

    alike = {(layer, expert): is_alike(layer, expert) for layer in (1, 2) for expert in range(5)}
    assert few >= sum(alike.values()) >= 2  # the last of both layers saw none
    assert alike[1, 4]
    assert alike[2, 4]
    assert not alike[1, 0]  # and the first all
    assert compare_weights(engine, path).passed


@pytest.mark.parametrize(
    ("tokens", "held_out", "enough"), [(23, 0, False), (24, 0, True), (32, 8, True), (31, 7, False), (30, 8, False)]
)
def test_how_many_tokens_are_enough(tokens, held_out, enough):
    from qwen_build.calibration.best import Best
    from qwen_build.calibration.gptq import Gptq

    method = Best() if held_out else Gptq()
    assert experts._is_enough(method, np.zeros((tokens, 96)), np.arange(tokens) < held_out) == enough


def test_what_measures_each_linear_is_refused(checkpoint, tmp_path):
    from qwen_build import build

    with pytest.raises(BuildError, match="this one is a mixture of experts; choose --quant int8, or int4"):
        build(checkpoint.path, tmp_path / "engine", quant="auto", max_kl=0.1)
