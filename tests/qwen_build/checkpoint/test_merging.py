"""LoRA adapters: what is built of base and adapter is what is built of the model that peft merges."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from cases.adapters import ADAPTERS, ATTENTION, TrainedAdapter, train
from cases.packed import CASES
from cases.tiny import hf_logits, run_alone
from qwen_build import build
from qwen_build.checkpoint.adapters import LoraChoice
from qwen_build.checkpoint.locate import resolve_checkpoint
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.cli import main
from qwen_build.engine_build import plan_build, write_engine
from qwen_build.plan.options import BuildOptions
from qwen_engine.errors import CheckpointError, QwenError, WeightMismatch
from qwen_engine.manifest import WEIGHTS_FILE, Manifest
from qwen_run.accuracy.builder_weights import open_weights
from qwen_run.accuracy.weight_checks import compare_weights
from qwen_run.runtime.engine import Engine

pytest.importorskip("peft")

TOKENS = np.random.default_rng(5).integers(0, 131, 40).tolist()


@pytest.fixture
def adapt(tiny_checkpoint, tmp_path):
    """Makes ``adapt(name, family)``, an adapter of ``ADAPTERS``."""

    def make(name: str, family: str = "qwen2") -> TrainedAdapter:
        return train(tiny_checkpoint(family).model, tmp_path / name, ADAPTERS[name])

    return make


def built(checkpoint: Path, output: Path, *lora: LoraChoice, **options) -> Path:
    with Checkpoint.open(checkpoint, lora) as weights:
        plan = plan_build(weights, resolve_checkpoint(str(checkpoint)), BuildOptions(lora=lora, **options))
        write_engine(plan, weights, output)
    return output


@pytest.mark.parametrize("quant", ["none", "int4"])
@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "dora"])
def test_weights_are_those_of_the_merged_model_to_the_last_bit(name, quant, adapt, tiny_checkpoint, tmp_path):
    base, adapter = tiny_checkpoint("qwen2").path, adapt(name)
    ours = built(base, tmp_path / "ours", LoraChoice(adapter.path), quant=quant)
    theirs = built(adapter.merged(tmp_path / "merged"), tmp_path / "theirs", quant=quant)
    assert (ours / WEIGHTS_FILE).read_bytes() == (theirs / WEIGHTS_FILE).read_bytes()
    plain = built(base, tmp_path / "without", quant=quant)
    assert (ours / WEIGHTS_FILE).read_bytes() != (plain / WEIGHTS_FILE).read_bytes()


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_dora_is_that_of_the_merged_model(family, adapt, tiny_checkpoint, tmp_path):
    adapter = adapt("dora", family)
    merged = adapter.merged(tmp_path / "merged")
    with (
        Checkpoint.open(tiny_checkpoint(family).path, [LoraChoice(adapter.path)]) as ours,
        Checkpoint.open(merged) as theirs,
    ):
        for name in ours.tensors:
            # a length of a row is a sum, and sums differ in their order
            np.testing.assert_allclose(ours.read(name), theirs.read(name), rtol=0, atol=1e-6)
        assert ours.adapters[0].config["use_dora"]


@pytest.mark.parametrize("name", ["embeddings", "saved", "tokens", "plain"])
def test_a_tied_model_becomes_what_peft_computes_before_it_merges(name, adapt, tiny_checkpoint, tmp_path):
    adapter = adapt(name, "qwen3-tied")
    engine = built(tiny_checkpoint("qwen3-tied").path, tmp_path / "engine", LoraChoice(adapter.path), quant="none")
    tied = Manifest.read(engine).model.tie_word_embeddings
    assert tied == (name in ("plain", "tokens"))
    found = run_alone(Engine.load(engine, threads=1), TOKENS)
    # the same weights but for the order in which W x and B A x are added
    np.testing.assert_allclose(found, hf_logits(adapter.model, TOKENS), rtol=3e-4, atol=3e-4)


def test_adapters_add_up_each_with_its_weight(tiny_checkpoint, tmp_path):
    tiny = tiny_checkpoint("qwen2")
    first = train(tiny.model, tmp_path / "first", {"target_modules": ATTENTION})
    second = train(tiny.model, tmp_path / "second", {"target_modules": ["q_proj", "up_proj"], "r": 2}, seed=1)
    with Checkpoint.open(tiny.path, [LoraChoice(first.path), LoraChoice(second.path, -0.5)]) as weights:
        for module in ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"):
            expected = weights.tensors[f"{module}.weight"].base.read(0, weights.tensors[f"{module}.weight"].shape[0])
            for adapter, factor in ((first, 2.0), (second, 8.0 * -0.5)):
                tensors = load_file(adapter.path / "adapter_model.safetensors")
                if (key := f"base_model.model.{module}.lora_A.weight") in tensors:
                    product = tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
                    expected = expected + product * np.float32(factor)
            np.testing.assert_allclose(weights.read(f"{module}.weight"), expected, rtol=0, atol=1e-6)


def test_any_rows_of_a_merged_weight_are_its_rows(adapt, tiny_checkpoint):
    adapter = adapt("embeddings")
    with Checkpoint.open(tiny_checkpoint("qwen2").path, [LoraChoice(adapter.path)]) as weights:
        for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"):
            whole = weights.read(name)
            for start, stop in ((0, 1), (7, 8), (3, 40), (79, 80)):
                assert np.array_equal(weights.read(name, start, stop), whole[start:stop])


def test_a_resized_vocabulary_is_the_merged_models(tiny_checkpoint, tmp_path):
    import copy

    tiny = tiny_checkpoint("qwen2")
    larger = copy.deepcopy(tiny.model)
    larger.resize_token_embeddings(140)
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    adapter = train(larger, tmp_path / "adapter", options)
    ours = built(tiny.path, tmp_path / "ours", LoraChoice(adapter.path))
    theirs = built(adapter.merged(tmp_path / "merged"), tmp_path / "theirs")
    assert Manifest.read(ours).model.vocab_size == 140
    with Checkpoint.open(tiny.path, [LoraChoice(adapter.path)]) as weights:
        assert "resizes the vocabulary to 140 tokens" in weights.notes[-1]
    assert (ours / WEIGHTS_FILE).read_bytes() == (theirs / WEIGHTS_FILE).read_bytes()


def test_the_manifest_names_the_adapter_and_the_comparison_is_with_the_merged_model(adapt, tiny_checkpoint, tmp_path):
    from qwen_run.accuracy.reference import HuggingFace

    base, adapter = tiny_checkpoint("qwen2").path, adapt("patterns")
    engine = build(base, tmp_path / "engine", lora=f"{adapter.path}=0.5", quant="int8")
    (record,) = Manifest.read(engine).origin.adapters
    assert (record.directory, record.weight) == (str(adapter.path), 0.5)
    assert set(record.sha256) == {"adapter_config.json", "adapter_model.safetensors"}
    assert compare_weights(engine, base).passed
    name = "model.layers.0.mlp.up_proj"
    merged, plain = (open_weights(base, adapters).rows(name, slice(0, 9)) for adapters in ([record], []))
    assert not np.array_equal(merged, plain)
    for module in adapter.model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 0.5
    reference = np.concatenate([chunk.values for chunk in HuggingFace(base, 1, adapters=[record]).logits(TOKENS)])
    np.testing.assert_allclose(reference, hf_logits(adapter.model, TOKENS), rtol=1e-4, atol=1e-4)


def test_the_command_merges_and_names_the_engine_after_it(adapt, tiny_checkpoint, tmp_path, monkeypatch):
    adapter = adapt("plain")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, [str(tiny_checkpoint("qwen2").path), "--lora", str(adapter.path)])
    assert result.exit_code == 0, result.output
    (engine,) = (tmp_path / "engines").iterdir()
    assert engine.name.endswith("-plain-int4")
    result = CliRunner().invoke(main, [str(adapter.path)])
    assert f"--lora {adapter.path}" in result.output


def edited(adapter: TrainedAdapter, **changes) -> Path:
    path = adapter.path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return adapter.path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', only 'LORA' can be merged; merge it with peft's"),
        ({"peft_type": None}, "peft_type is None"),
        ({"layer_replication": [[0, 2]]}, "has layer_replication: it runs layers more than once"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the base model"),
        ({"r": 16}, "lora_A of model.layers.0.self_attn.q_proj is (8, 80), expected (16, 80)"),
        ({"r": 0}, "r of model.layers.0.self_attn.q_proj is 0, expected a positive number"),
        ({"lora_alpha": "16"}, "lora_alpha of model.layers.0.self_attn.q_proj is '16', expected a positive number"),
        ({"target_modules": ["q_proj", "c_attn"]}, "the model has no module c_attn, which target_modules names"),
        (
            {"target_modules": ["o_proj"]},
            "has nothing of model.layers.0.self_attn.o_proj and 2 others",
        ),
        ({"rank_pattern": [8]}, "rank_pattern is [8], expected an object"),
        ({"rank_pattern": {"(a+)+": 8}}, "may take for ever to match"),
    ],
    ids=str,
)
def test_what_cannot_be_merged_is_refused_by_name(changes, message, adapt, tiny_checkpoint):
    path = edited(adapt("plain"), **changes)
    with pytest.raises(QwenError) as error:
        Checkpoint.open(tiny_checkpoint("qwen2").path, [LoraChoice(path)])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_adapter_of_another_model_is_refused_with_all_that_differs(adapt, tiny_checkpoint, tmp_path):
    adapter = adapt("plain")
    path = adapter.path / "adapter_model.safetensors"
    tensors = load_file(path)
    prefix = "base_model.model.model.layers"
    tensors[f"{prefix}.9.self_attn.q_proj.lora_A.weight"] = np.zeros((8, 80), np.float32)
    tensors[f"{prefix}.1.self_attn.v_proj.lora_B.weight"] = np.zeros((24, 8), np.float32)
    del tensors[f"{prefix}.2.self_attn.v_proj.lora_B.weight"]
    tensors["base_model.model.model.layers.0.mlp.gate.weight"] = np.zeros((4, 80), np.float32)
    save_file(tensors, path)
    edited(adapter, base_model_name_or_path="Somebody/Else-7B")
    with pytest.raises(WeightMismatch) as error:
        Checkpoint.open(tiny_checkpoint("qwen2").path, [LoraChoice(adapter.path)])
    for part in (
        "the model has no linear model.layers.9.self_attn.q_proj",
        "lora_B of model.layers.1.self_attn.v_proj is (24, 8), expected (16, 8)",
        "model.layers.2.self_attn.v_proj has lora_A and no lora_B",
        "the model has no model.layers.0.mlp.gate.weight",
        "it was trained on Somebody/Else-7B",
    ):
        assert part in str(error.value)


def test_nothing_is_merged_into_packed_weights(adapt, pack):
    adapter, packed = adapt("plain"), pack(CASES[0])
    with pytest.raises(WeightMismatch, match=r"q_proj is quantised already \(gptq int4\), .* in floats"):
        Checkpoint.open(packed.path, [LoraChoice(adapter.path)])


def test_a_folder_that_is_no_adapter_is_refused(adapt, tmp_path):
    with pytest.raises(CheckpointError, match=r"no such directory; give the folder with adapter_config\.json"):
        LoraChoice.parse(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="'much' is no weight, expected a number"):
        LoraChoice.parse(f"{tmp_path}=much")
    (tmp_path / "a=1").mkdir()
    assert LoraChoice.parse(f"{tmp_path}/a=1") == (tmp_path / "a=1", 1.0)
    assert LoraChoice.parse(f"{tmp_path}/a=1=0.5") == (tmp_path / "a=1", 0.5)
    with pytest.raises(CheckpointError, match="it is no LoRA adapter; give the folder that peft saved"):
        _open(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"but adapter_model.bin; save the adapter with save_pretrained"):
        _open(tmp_path)


def _open(path: Path) -> None:
    from qwen_build.checkpoint.adapters import open_adapter

    open_adapter(LoraChoice(path))


def test_whole_weights_cannot_be_weighed(adapt, tiny_checkpoint):
    with pytest.raises(WeightMismatch, match="is a whole weight, which --lora DIR=WEIGHT"):
        Checkpoint.open(tiny_checkpoint("qwen2").path, [LoraChoice(adapt("saved").path, 0.5)])
