"""Every rule of EngineConfig: names of its own and of RBLN, and what an engine has to agree with."""

import dataclasses
import json
import shutil
import warnings

import numpy as np
import pytest

from cases.torch_pair import ROWS
from qwen_build import build
from qwen_engine.choices import QUANTS
from qwen_engine.manifest import Manifest
from qwen_run import EngineConfig
from qwen_run.api import causal_lm
from qwen_run.api.causal_lm import EngineForCausalLM
from qwen_run.runtime.capacity import Capacity


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return tiny_checkpoint("qwen3-tied")


@pytest.fixture(scope="module")
def engine(checkpoint, build_engine):
    return build_engine(checkpoint.path, quant="none")


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("batch_size", 0, "a positive integer"),
        ("batch_size", True, "a positive integer"),
        ("batch_size", 1.5, "a positive integer"),
        ("max_seq_len", 1, "2 tokens or more"),
        ("kvcache_block_size", 16, "a power of two from 32"),
        ("kvcache_block_size", 96, "a power of two from 32"),
        ("kvcache_num_blocks", 0, "a positive integer"),
        ("prefill_chunk_size", 0, "a positive multiple of 64"),
        ("prefill_chunk_size", 100, "a positive multiple of 64"),
        ("prefill_chunk_size", -64, "a positive multiple of 64"),
        ("quantization", "int3", "one of none, int8, int6, int5, int4"),
        ("use_inputs_embeds", 1, "True or False"),
        ("use_attention_mask", 0, "True or False"),
        ("attn_impl", "sdpa", "eager or flash_attn"),
        ("kvcache_partition_len", 4095, "4096 to 32768 tokens"),
        ("kvcache_partition_len", 32769, "4096 to 32768 tokens"),
    ],
)
def test_a_violated_rule_is_named(field, value, rule):
    with pytest.raises(ValueError, match=f"{field} is {value!r}.*{rule}"):
        EngineConfig.of({field: value})


def test_fields_and_defaults():
    assert dataclasses.asdict(EngineConfig()) == {
        "batch_size": 1,
        "max_seq_len": None,
        "kvcache_block_size": None,
        "kvcache_num_blocks": None,
        "prefill_chunk_size": 128,
        "quantization": None,
        "use_inputs_embeds": False,
        "attn_impl": None,
        "kvcache_partition_len": None,
        "use_attention_mask": False,
    }
    with pytest.raises(ValueError, match="engine_config has 'batch', expected batch_size, "):
        EngineConfig.of({"batch": 2})


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        ({"attn_impl": "flash_attn", "max_seq_len": 8191}, "max_seq_len 8191, expected 8192 or more; leave attn_impl"),
        ({"attn_impl": "eager", "kvcache_partition_len": 4096}, "attn_impl 'eager', expected 'flash_attn'"),
        ({"kvcache_partition_len": 4096, "max_seq_len": 4096}, "expected a multiple of it, twice it or more"),
        ({"kvcache_partition_len": 4096, "max_seq_len": 10000}, "expected a multiple of it, twice it or more"),
        ({"kvcache_partition_len": 8192, "kvcache_block_size": 64}, "kvcache_block_size is 64, expected the 8192"),
        ({"quantization": {"weights": "fp8"}}, "quantization has weights 'fp8', expected one of none, .*, fp16"),
        ({"quantization": {"weights": ["int4"]}}, r"quantization has weights \['int4'\], expected one of"),
        ({"quantization": {"activations": "fp8"}}, "quantization has activations 'fp8', expected one of int8"),
        ({"quantization": {"kv_caches": "int4"}}, "quantization has kv_caches 'int4', expected one of float32"),
        ({"quantization": {"bits": 4}}, "quantization has 'bits', expected weights, activations, kv_caches"),
        ({"quantization": {"format": "gptq"}}, "quantization has format 'gptq', expected 'rbln'"),
        ({"quantization": {"weights": "fp16", "activations": "int8"}}, "weights that are not quantised"),
        ({"quantization": 4}, "quantization is 4, expected one of none, .*, or a dictionary"),
    ],
)
def test_fields_that_contradict_each_other_are_named(config, rule):
    with pytest.raises(ValueError, match=rule):
        EngineConfig.of(config)


@pytest.mark.parametrize(
    ("quantization", "options"),
    [
        ("int8", {"quant": "int8"}),
        ({"weights": "int4"}, {"quant": "int4"}),
        (
            {"format": "rbln", "weights": "int4", "activations": "fp16", "kv_caches": "fp16"},
            {"quant": "int4", "activations": "float32", "kv_cache_dtype": "float16"},
        ),
        ({"weights": "fp16", "activations": "fp16", "kv_caches": "int8"}, {"quant": "none", "kv_cache_dtype": "int8"}),
        ({}, {}),
    ],
)
def test_a_quantization_is_a_name_or_a_dictionary(quantization, options):
    assert EngineConfig(quantization=quantization).build_options == options


def test_a_dictionary_of_quantization_takes_effect(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = {"weights": "int8", "activations": "fp16", "kv_caches": "int8"}
    model = EngineForCausalLM.from_pretrained(checkpoint.path, export=True, engine_config={"quantization": asked})
    manifest = model.engine.manifest
    stored = (
        {row.quantization.scheme for row in manifest.linears},
        {row.quantization.activations for row in manifest.linears if ".layers." in row.name},
    )
    assert (stored, manifest.cache.dtype) == (({"int8"}, {"float32"}), "int8")
    EngineForCausalLM.from_pretrained(model.engine.directory, engine_config={"quantization": asked})
    for name, value, rule in (
        ("weights", "int4", "quantization has weights 'int4', expected 'int8' as the engine was built"),
        ("activations", "int8", "quantization has activations 'int8', expected 'float32' as the engine was built"),
        ("kv_caches", "fp16", "quantization has kv_caches 'float16', expected 'int8' as the engine was built"),
    ):
        with pytest.raises(ValueError, match=rule):
            EngineForCausalLM.from_pretrained(
                model.engine.directory, engine_config={"quantization": asked | {name: value}}
            )


def test_what_changes_no_answer_is_said(engine):
    with pytest.warns(UserWarning, match="use_attention_mask of engine_config: no effect") as warned:
        EngineForCausalLM.from_pretrained(engine, engine_config={"use_attention_mask": True})
    assert len(warned) == 1
    with pytest.raises(ValueError, match="attn_impl is 'flash_attn' and max_seq_len 640, expected 8192 or more"):
        EngineForCausalLM.from_pretrained(engine, engine_config={"attn_impl": "flash_attn"})


def test_flash_attention_with_the_lengths_it_may_have(tiny_checkpoint, tmp_path):
    long = shutil.copytree(tiny_checkpoint("qwen2").path, tmp_path / "long")
    config = json.loads((long / "config.json").read_text())
    (long / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16384}))
    build(long, tmp_path / "engine")
    settings = {"attn_impl": "flash_attn", "kvcache_partition_len": 8192, "kvcache_num_blocks": 256}
    with pytest.warns(UserWarning, match="attn_impl, kvcache_partition_len of engine_config: no effect"):
        EngineForCausalLM.from_pretrained(tmp_path / "engine", engine_config=settings)
    with pytest.raises(ValueError, match="kvcache_partition_len is 16384 and max_seq_len 16384, expected a multiple"):
        EngineForCausalLM.from_pretrained(
            tmp_path / "engine", engine_config=settings | {"kvcache_partition_len": 16384}
        )


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        ({"max_seq_len": 641}, "max_seq_len is 641, expected 640 or less"),
        ({"kvcache_block_size": 32}, "kvcache_block_size is 32, expected 64 as the engine was built"),
        ({"quantization": "int4"}, "quantization is 'int4', expected 'none' as the engine was built"),
        ({"kvcache_num_blocks": 29, "batch_size": 3}, "expected 30 or more: batch_size 3 times the 10 blocks"),
        ({"kvcache_num_blocks": 1, "max_seq_len": 65}, "expected 2 or more"),
    ],
)
def test_an_engine_and_its_config_agree(engine, config, rule):
    with pytest.raises(ValueError, match=rule):
        EngineForCausalLM.from_pretrained(engine, engine_config=config)


def test_rows_may_be_shorter_than_the_engine_was_built_for(engine):
    small = EngineForCausalLM.from_pretrained(engine, engine_config={"kvcache_num_blocks": 3, "max_seq_len": 64})
    assert small.engine.cache.num_blocks == 3
    ids = np.array(ROWS[:1])
    assert small.generate(ids, max_length=64).shape[1] <= 64
    with pytest.raises(ValueError, match="input_ids has 70 columns, expected less than max_seq_len, which is 64"):
        small.generate(np.ones((1, 70), int))


def test_more_blocks_than_memory_holds_warn(engine, monkeypatch):
    monkeypatch.setattr(causal_lm, "choose_capacity", lambda *_, **__: Capacity(30, 640))
    with pytest.warns(UserWarning, match="kvcache_num_blocks is 90, more than the 30"):
        EngineForCausalLM.from_pretrained(engine, engine_config={"kvcache_num_blocks": 90})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = EngineForCausalLM.from_pretrained(engine, engine_config={"kvcache_num_blocks": 30})
    assert model.engine.cache.num_blocks == 30


def test_a_mixed_engine_has_no_quantization_to_agree_with(checkpoint, build_engine):
    manifest = Manifest.read(build_engine(checkpoint.path, quant="int8", exclude=("*.up_proj",)))
    EngineConfig().check(manifest)
    with pytest.raises(ValueError, match="quantization is 'int8', expected None as the engine mixes int8 and none"):
        EngineConfig(quantization="int8").check(manifest)


def test_quantizations_are_the_builders():
    from qwen_build.quantization.scheme_table import SCHEMES

    assert set(QUANTS) == set(SCHEMES)
