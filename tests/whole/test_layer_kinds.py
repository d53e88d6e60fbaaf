"""An architecture is a row, and a layer kind one description and one module: everything else follows from them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from cases.as_built import as_built, layer_outputs, relative_errors
from cases.made_up import add_made_up, transformers_model
from cases.scripted import write_text_files
from cases.tiny import TINY, TinyCheckpoint, run_alone, run_chunks
from qwen_build import build
from qwen_build.architectures import ARCHITECTURES, Architecture
from qwen_build.calibration.awq import Awq
from qwen_build.calibration.method import InputReaders
from qwen_build.checkpoint.config import ModelConfig
from qwen_build.checkpoint.locate import resolve_checkpoint
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.engine_build import plan_build, write_engine
from qwen_build.graph.architecture import ATTENTION, DENSE_MLP, LAYER_KINDS, LayerKind, distinct_kinds
from qwen_build.plan.options import BuildOptions
from qwen_engine.errors import EngineError
from qwen_engine.graph_io import TensorSpec
from qwen_engine.manifest import Manifest
from qwen_run.accuracy.reference import HuggingFace
from qwen_run.accuracy.weight_checks import compare_weights
from qwen_run.commands.inspect import main as inspect
from qwen_run.commands.summarize import main as summarize
from qwen_run.runtime.core import Core, CoreOptions
from qwen_run.runtime.engine import Engine
from qwen_run.runtime.request import Request
from qwen_run.sampling.sample import SamplingParams
from qwen_run.text.tokenizer import Tokenizer

TOKENS = np.random.default_rng(0).integers(0, 260, 90).tolist()
WORDS = ["the", "cache", "block", "token", "model", "layer", "sum", "key", "value", "query", "weight", "scale"]


@pytest.fixture(scope="module", params=["llama", "made_up"])
def checkpoint(request, tmp_path_factory):
    """A tiny checkpoint of a family with the shortest row, and of a made-up one that the builder is taught."""
    import torch
    import transformers

    with pytest.MonkeyPatch.context() as patch:
        if request.param == "made_up":
            add_made_up(patch)
            transformers_model()
        else:
            patch.setitem(ARCHITECTURES, "llama", Architecture(("Llama",)))  # the whole of a dense family
        path = write_text_files(tmp_path_factory.mktemp(request.param) / "tiny", eos_token_id=[264, 262])
        generation_config = (path / "generation_config.json").read_text()
        torch.manual_seed(1)
        sizes = TINY | {"model_type": request.param, "head_dim": 16, "vocab_size": 283}
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**sizes)).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        model.save_pretrained(path)
        (path / "generation_config.json").write_text(generation_config)
        config = json.loads((path / "config.json").read_text())
        config.pop("layer_types", None)  # transformers has no name for a mixer
        (path / "config.json").write_text(json.dumps(config))
        yield TinyCheckpoint(path, model)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"document": " ".join(rng.choice(WORDS, 60))}) + "\n" for _ in range(40)))
    return path


@pytest.fixture(scope="module")
def build_made_up(checkpoint, texts, tmp_path_factory):
    """Makes ``build(quant or method)``, each engine once."""
    options = {
        "none": {"quant": "none"},
        "int4": {"quant": "int4"},
        "gptq": {"int4_method": "gptq", "calibration": texts},
        "awq": {"int4_method": "awq", "calibration": texts},
        "smoothquant": {"quant": "smoothquant", "activation_scales": "static", "calibration": texts},
    }
    directory = tmp_path_factory.mktemp("engines")

    def make(name: str) -> Path:
        if not (directory / name).exists():
            with Checkpoint.open(checkpoint.path) as weights:
                plan = plan_build(weights, resolve_checkpoint(str(checkpoint.path)), BuildOptions(**options[name]))
                write_engine(plan, weights, directory / name)
        return directory / name

    return make


def test_logits_are_transformers_at_once_and_in_pieces(checkpoint, build_made_up):
    engine, expected = Engine.load(build_made_up("none"), threads=1), checkpoint.logits(TOKENS)
    np.testing.assert_allclose(run_alone(engine, TOKENS), expected, rtol=0, atol=1e-3)
    other = TOKENS[40:60]
    pieces, _ = run_chunks(engine, [TOKENS, other], [[33, 0], [1, 12], *([1, 1] for _ in range(8)), [48, 0]])
    np.testing.assert_array_equal(pieces, run_alone(engine, TOKENS))


@pytest.mark.parametrize("name", ["int4", "gptq", "awq", "smoothquant"])
def test_it_computes_with_the_weights_it_holds_which_are_the_checkpoints(name, checkpoint, build_made_up):
    directory = build_made_up(name)
    assert compare_weights(directory, checkpoint.path).passed
    found = layer_outputs(directory, TOKENS)
    errors = relative_errors(found, as_built(checkpoint, directory).hidden_outputs(TOKENS, found, given=found))
    assert np.median(list(errors.values())) < 1e-6
    assert max(errors.values()) < 2e-3  # one input between two steps, in one small sub-block


def test_requests_that_share_a_beginning_answer_as_transformers_does(checkpoint, build_made_up):
    core = Core(Engine.load(build_made_up("none"), threads=1), CoreOptions(max_batch_tokens=32))
    params = SamplingParams(temperature=0, max_tokens=9)
    requests = [Request((*TOKENS[:70], last), params) for last in (1, 2, 3)]
    for request in requests:
        core.add(request)
        while request is requests[0] and not core.is_done:  # the others find its blocks
            core.step()
    while not core.is_done:
        core.step()
    assert core.statistics.num_prefix_tokens == 2 * 64
    reference = HuggingFace(checkpoint.path, threads=1)
    for request in requests:
        assert request.sequences[0].output == reference.continuation(request.prompt, 9, frozenset())


def test_calibration_takes_from_what_rounding_costs(checkpoint, texts, build_made_up):
    document = json.loads(texts.read_text().splitlines()[0])["document"]
    token_ids = Tokenizer.load(checkpoint.path).encode(document)[:90]
    expected, errors = checkpoint.logits(token_ids), {}
    for name in ("int4", "gptq", "awq", "smoothquant"):
        found = run_alone(Engine.load(build_made_up(name), threads=1), token_ids)
        errors[name] = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert errors["gptq"] < 0.75 * errors["int4"] < 0.5
    assert errors["awq"] < errors["int4"]
    assert errors["smoothquant"] < 0.15  # 8 bits


@pytest.mark.parametrize("name", ["gptq", "awq", "smoothquant"])
def test_all_linears_of_all_layers_are_calibrated(name, build_made_up):
    records = [
        linear for linear in Manifest.read(build_made_up(name)).linears if linear.name.startswith("model.layers.")
    ]
    assert {record.quantization.method for record in records} == {name}
    assert all(record.output_error for record in records)


def test_only_the_layers_that_have_a_cache_take_memory_for_one(checkpoint, build_made_up):
    manifest = Manifest.read(build_made_up("int4"))
    layers = {"llama": [0, 1, 2], "made_up": [0, 2]}[manifest.model.model_type]
    assert [state.layer for state in manifest.states] == [layer for layer in layers for _ in range(2)]
    assert manifest.cache.bytes_per_token == len(layers) * 2 * 2 * 16 * 2  # keys, values; heads; features; float16


def test_the_parts_of_its_linears_are_all_that_transformers_has(checkpoint, build_made_up):
    expected = {
        n.removesuffix(".weight"): tuple(w.shape) for n, w in checkpoint.model.named_parameters() if w.dim() > 1
    }
    records = Manifest.read(build_made_up("int4")).linears
    assert {part.name: (part.rows, one.in_features) for one in records for part in one.parts} == expected


def test_it_is_inspected(build_made_up):
    linears, graph = (
        CliRunner().invoke(inspect, [str(build_made_up("gptq")), *options], catch_exceptions=False).stdout
        for options in ([], ["--graph"])
    )
    for linear in Manifest.read(build_made_up("gptq")).linears:
        assert f"{linear.name} " in linears
        assert f"─ {linear.name.rpartition('.')[2]}" in graph


def test_it_is_summarised(checkpoint, build_made_up, texts, tmp_path):
    options = [
        "--engine",
        build_made_up("gptq"),
        "--checkpoint",
        checkpoint.path,
        "--dataset",
        texts,
        "--report",
        tmp_path,
    ]
    options += ["--max-samples", 2, "--max-new-tokens", 4, "--threads", 1, "--no-cost", "--layers"]
    result = CliRunner().invoke(summarize, [str(option) for option in options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert all(check["passed"] for check in report["checks"])
    metrics = {metric["name"]: metric["value"] for metric in report["metrics"]}
    assert metrics["as_built.kl_mean"] < 1e-5 < metrics["original.kl_mean"] < 0.1
    page = (tmp_path / "report.html").read_text()
    drawn = re.findall(r'<span class="key s\d">(.*?)</span>', page)
    others = ["mixer"] if Manifest.read(build_made_up("gptq")).model.model_type == "made_up" else []
    expected = ["attention", "MLP", *others, "whole layer"]
    assert drawn[-len(expected) :] == expected


def test_an_engine_with_a_state_of_whole_sequences_is_built_and_refused_by_name(
    checkpoint, texts, tmp_path, monkeypatch
):
    def with_state(config: ModelConfig, layer: int, block_size: int, dtype: str) -> tuple[TensorSpec, ...]:
        return (TensorSpec(f"sums.{layer}", "sequence_state", "float32", ("num_slots", 3, 5), layer),)

    recurrent = replace(DENSE_MLP, states=with_state)
    monkeypatch.setitem(LAYER_KINDS, "full_attention", LayerKind((ATTENTION, recurrent)))
    with Checkpoint.open(checkpoint.path) as weights:
        options = BuildOptions(int4_method="gptq", calibration=texts, calibration_tokens=1024)
        plan = plan_build(weights, resolve_checkpoint(str(checkpoint.path)), options)
        manifest = write_engine(plan, weights, tmp_path / "engine")
    assert [state.kind for state in manifest.states if state.layer == 0] == 2 * ["paged_state"] + ["sequence_state"]
    assert plan.cache_bytes_per_token == sum(2 * 2 * 16 * 2 for s in manifest.states if s.name.startswith("key_cache"))
    with pytest.raises(EngineError, match=r"has states of whole sequences \(sums\.0, .*\), .* newer qwen-engine"):
        Engine.load(tmp_path / "engine")


def test_an_input_that_no_factor_can_be_folded_before_is_left_alone(checkpoint, texts, tmp_path, monkeypatch):
    asked = set()

    def factors(self: Awq, readers: InputReaders) -> np.ndarray:
        asked.add(readers.read.name)
        return readers.shared(np.linspace(0.5, 2, len(readers.statistics.largest), dtype=np.float32))

    monkeypatch.setattr(Awq, "factors", factors)
    config = ModelConfig.from_hf(checkpoint.path)
    reads = {read for kind in distinct_kinds(config) for read in kind.inputs.values()}
    with Checkpoint.open(checkpoint.path) as weights:
        options = BuildOptions(int4_method="awq", calibration=texts, calibration_tokens=1024)
        write_engine(plan_build(weights, resolve_checkpoint(str(checkpoint.path)), options), weights, tmp_path / "e")
    assert asked == {read.name for read in reads if read.producer}
    assert ("mixer.out_proj.input" in {read.name for read in reads}) == (config.model_type == "made_up")


def test_a_qwen2_whose_biases_are_zero_is_a_llama(tiny_checkpoint, tmp_path):
    """The demo, SmolLM2, is one: the row of Llamas takes it as it is published."""
    tensors = load_file(tiny_checkpoint("qwen2").path / "model.safetensors")
    config = json.loads((tiny_checkpoint("qwen2").path / "config.json").read_text())
    found = {}
    for model_type in ("qwen2", "llama"):
        path = tmp_path / model_type
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
        left = {name: tensor for name, tensor in tensors.items() if model_type == "qwen2" or ".bias" not in name}
        save_file({n: 0 * t if n.endswith(".bias") else t for n, t in left.items()}, path / "model.safetensors")
        found[model_type] = run_alone(
            Engine.load(build(path, tmp_path / f"{model_type}-engine"), threads=1), [*range(90)]
        )
    assert np.array_equal(found["qwen2"], found["llama"])
