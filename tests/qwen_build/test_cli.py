"""``qwen-build`` as its user meets it: results, messages, exit codes, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from cases.builds import edit_config, edit_tensors, refused, run_build, tiny_tokenizer
from cases.configs import MIXTURES
from cases.quantization import STORED
from cases.tiny import FAMILIES
from qwen_build.checkpoint.locate import resolve_checkpoint
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.engine_build import plan_build
from qwen_build.plan.options import BuildOptions
from qwen_build.writing import weights_file as export
from qwen_engine.manifest import MANIFEST_FILE, TEXT_FILES, WEIGHTS_FILE, Manifest
from qwen_run.engine_files.checksums import verify_parts


@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_is_complete_and_its_parts_verify(family, tiny_checkpoint, tmp_path):
    checkpoint, output = tiny_checkpoint(family).path, tmp_path / "out" / "engine"
    result = run_build(checkpoint, "--output", output)
    assert result.exit_code == 0, result.output
    manifest = Manifest.read(output)
    verify_parts(output, manifest)
    assert {path.name for path in output.iterdir()} == {MANIFEST_FILE, *manifest.parts}
    assert manifest.origin.checkpoint == str(checkpoint)
    assert set(manifest.origin.sha256) >= {"config.json", "model.safetensors"}
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert list(output.parent.iterdir()) == [output]


def test_the_same_checkpoint_gives_the_same_bytes(checkpoint, tmp_path):
    for name in ("a", "b"):
        assert run_build(checkpoint, "--output", tmp_path / name).exit_code == 0
    a, b = (Manifest.read(tmp_path / name).parts for name in ("a", "b"))
    assert a == b


def test_a_tied_embedding_is_stored_once(tiny_checkpoint, tmp_path):
    sizes = {}
    for family in ("qwen2", "qwen2-tied"):
        result = run_build(tiny_checkpoint(family).path, "--dry-run", "--json")
        description = json.loads(result.stdout)
        sizes[family] = description["weights_bytes"]
        head = next(linear for linear in description["linears"] if linear["name"] == "lm_head")
    assert head["stored_bytes"] > 0
    assert abs(sizes["qwen2"] - sizes["qwen2-tied"] - head["stored_bytes"]) < 3 * 4096  # but for alignment


@pytest.mark.parametrize(("quant", "kernels"), STORED)
def test_dry_run_tells_the_size_and_writes_nothing(quant, kernels, checkpoint, tmp_path):
    options = [checkpoint, "--quant", quant, "--kernels", kernels, "--json", "--output", tmp_path / "engine"]
    description = json.loads(run_build(*options, "--dry-run").stdout)
    assert not (tmp_path / "engine").exists()
    assert json.loads(run_build(*options).stdout)["weights_bytes"] == description["weights_bytes"]
    assert (tmp_path / "engine" / WEIGHTS_FILE).stat().st_size == description["weights_bytes"]
    assert {linear["kernels"] for linear in description["linears"]} == {kernels if quant != "none" else "stock"}


def test_dry_run_shows_a_person_every_linear(checkpoint):
    description = json.loads(run_build(checkpoint, "--dry-run", "--json").stdout)
    table = run_build(checkpoint, "--dry-run").stdout
    assert all(linear["name"] in table for linear in description["linears"])
    assert "int4 g32 asymmetric x int8 per block, native" in table
    assert "build memory" in table


# sizes of engines in GB, and GB that a token reads of the weights, as their shapes say with int4 in 4.4 bits
@pytest.mark.parametrize(
    ("name", "size", "read", "cache"),
    [
        ("Qwen1.5-MoE-A2.7B", 8.2, 1.42, 192),
        ("Qwen2-57B-A14B", 32.1, 7.7, 56),
        ("Qwen3-30B-A3B", 17.1, 1.8, 96),
        ("Qwen3-235B-A22B", 130.0, 12.2, 188),
    ],
)
def test_a_dry_run_of_config_json_alone_says_what_a_published_mixture_takes(name, size, read, cache, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MIXTURES[name]))
    found = json.loads(run_build(tmp_path, "--dry-run", "--json").stdout)
    assert found["weights_bytes"] / 1e9 == pytest.approx(size, rel=0.02)
    assert found["read_bytes_per_token"] / 1e9 == pytest.approx(read, rel=0.03)
    assert found["cache_bytes_per_token"] == cache * 1024
    config = MIXTURES[name]
    assert [found["experts"][key] for key in ("layers", "num_experts", "num_experts_per_tok")] == [
        config[key] for key in ("num_hidden_layers", "num_experts", "num_experts_per_tok")
    ]
    assert found["experts"]["stored_bytes"] == sum(
        linear["stored_bytes"] for linear in found["linears"] if ".mlp.experts." in linear["name"]
    )
    assert found["build_memory_bytes"] < 1 << 30  # whatever the number of experts
    table = run_build(tmp_path, "--dry-run")
    assert f"{config['num_experts_per_tok']} of {config['num_experts']} a token in each of" in table.stdout
    assert "Note: config.json alone was read" in table.stderr


def test_a_dry_run_without_weights_is_that_with_them(checkpoint, tmp_path):
    shutil.copy(checkpoint / "config.json", tmp_path)
    alone, whole = (json.loads(run_build(path, "--dry-run", "--json").stdout) for path in (tmp_path, checkpoint))
    differing = {key for key in whole if whole[key] != alone[key]}
    assert differing - {"created"} == {"checkpoint", "dtype"}
    refused = run_build(tmp_path, "--output", tmp_path / "engine")
    assert (refused.exit_code, "has no weights" in refused.stderr) == (1, True)


def test_a_dry_run_without_weights_says_where_they_decide(checkpoint, tmp_path):
    shutil.copy(checkpoint / "config.json", tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    refused = run_build(tmp_path, "--dry-run")
    assert refused.exit_code == 1
    assert "has no weights, and those of a gptq checkpoint say how an engine stores them; give" in refused.stderr
    edit_config(tmp_path, quantization_config={"quant_method": "fp8"})
    assert run_build(tmp_path, "--dry-run").exit_code == 0


def test_groups_that_fill_widths_up_are_named_where_smaller_ones_would_not(checkpoint, tmp_path):
    for arguments in (["--dry-run"], ["--output", tmp_path / "e"]):
        result = run_build(checkpoint, "--group-size", "64", *arguments)
        assert result.exit_code == 0
        notes = [line for line in result.stderr.splitlines() if "groups of 64" in line]
        assert len(notes) == 1  # the 112 inputs of others take 128 in groups of 32 as well
        assert notes[0].startswith("Note: groups of 64 fill the 80 inputs of ")
        assert notes[0].endswith(" up to 128, so they are larger and less accurate; groups of 32 take 96.")
    assert "groups of" not in run_build(checkpoint, "--group-size", "32", "--dry-run").stderr


@pytest.mark.parametrize(
    ("kernels", "elements"),
    [
        ("stock", 1000),  # 12 rows of 80, 8 of 112
        ("native", 1000),  # one panel of 32 rows
        ("native", 6000),  # two panels of 80 inputs, one of 112
    ],
)
def test_weights_are_read_in_slices(kernels, elements, checkpoint, tmp_path, monkeypatch):
    assert run_build(checkpoint, "--kernels", kernels, "--output", tmp_path / "whole").exit_code == 0
    monkeypatch.setattr(export, "SLICE_ELEMENTS", elements)
    assert run_build(checkpoint, "--kernels", kernels, "--output", tmp_path / "sliced").exit_code == 0
    assert Manifest.read(tmp_path / "whole").parts == Manifest.read(tmp_path / "sliced").parts


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: shutil.rmtree(c), "no such directory"),
        (lambda c: (c / "config.json").unlink(), "has no config.json"),
        (lambda c: (c / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda c: edit_config(c, model_type="mamba"), "model_type 'mamba' is not one of qwen2, qwen3"),
        (
            lambda c: edit_config(c, rope_scaling={"type": "yarn", "factor": 4}),
            "'yarn' and 'default'; keep the right one",
        ),
        (lambda c: edit_config(c, mlp_bias=True), "mlp_bias True is not supported"),
        (
            lambda c: edit_config(c, quantization_config={"quant_method": "eetq"}),
            "already quantised (eetq)",
        ),
        (lambda c: (c / "model.safetensors").unlink(), "safetensors"),
        (lambda c: os.truncate(c / "model.safetensors", 100_000), "model.safetensors"),
        (lambda c: (c / "model.safetensors").write_bytes(b"x" * 5000), "model.safetensors"),
        (lambda c: edit_tensors(c, lambda t: t.pop("model.norm.weight")), "the checkpoint lacks model.norm.weight"),
        (lambda c: edit_tensors(c, lambda t: t.update(extra=t["model.norm.weight"])), "graph has no place for extra"),
        (
            lambda c: edit_tensors(c, lambda t: t.update({"model.norm.weight": np.ones(79, np.float32)})),
            "model.norm.weight: graph expects (80,), checkpoint has (79,)",
        ),
        (
            lambda c: edit_tensors(c, lambda t: t["model.layers.1.mlp.up_proj.weight"].__setitem__((3, 4), np.nan)),
            "model.layers.1.mlp.up_proj.weight",
        ),
        (
            lambda c: edit_tensors(c, lambda t: t["lm_head.weight"].__setitem__((130, 79), np.inf)),
            "lm_head.weight",
        ),
        (lambda c: edit_config(c, num_hidden_layers=10**30), "num_hidden_layers is 1000"),
        (lambda c: edit_config(c, num_hidden_layers=10**9, layer_types=None), "the checkpoint lacks model.layers.3"),
        (lambda c: edit_config(c, max_position_embeddings=1), "original_max_position_embeddings is 1, expected"),
        (lambda c: (c / "tokenizer.json").write_text("{}"), "tokenizer.json is no tokenizer"),
        (lambda c: (c / "tokenizer.json").mkdir(), "tokenizer.json is not a file"),
        (lambda c: (c / "tokenizer.json").symlink_to("absent"), "tokenizer.json is a link to nothing"),
        (
            lambda c: (c / "tokenizer_config.json").write_text('{"eos_token": []}'),
            ": eos_token is [], expected a token",
        ),
        (
            lambda c: (c / "tokenizer_config.json").write_text('{"eos_token": {"content": []}}'),
            ": eos_token is [], expected a token",
        ),
        (
            lambda c: edit_tensors(c, lambda t: t.update({"a\x1b[2J\nb": np.ones(3, np.float32)})),
            r"graph has no place for a\x1b[2J\nb",
        ),
        (
            lambda c: (c / "generation_config.json").write_text('{"eos_token_id": [5, 131]}'),
            "end-of-sequence ids [131] are outside the vocabulary of 131",
        ),
    ],
)
def test_bad_checkpoints_are_refused_in_one_line(damage, message, checkpoint, tmp_path):
    damage(checkpoint)
    refused(run_build(checkpoint, "--output", tmp_path / "out" / "engine"), message, tmp_path / "out")


def test_tensors_of_no_use_are_left_out_as_asked_and_harmless_ones_by_themselves(checkpoint, tmp_path):
    extra = {"visual.norm.weight": np.ones(3, np.float32), "model.layers.0.self_attn.k_scale": np.ones(1, np.float32)}
    assert run_build(checkpoint, "--output", tmp_path / "plain").exit_code == 0
    edit_tensors(checkpoint, lambda tensors: tensors.update(extra))
    result = run_build(checkpoint, "--output", tmp_path / "a")
    assert result.exit_code == 1
    option = result.stderr.partition("as with ")[2].split()
    assert option == ["--ignore-tensors", "visual.norm.weight"]
    result = run_build(checkpoint, "--output", tmp_path / "b", *option)
    assert result.exit_code == 0, result.output
    assert "Note: model.layers.0.self_attn.k_scale is left out: scales of an FP8 cache." in result.stderr
    plain, built = (Manifest.read(tmp_path / name).parts[WEIGHTS_FILE] for name in ("plain", "b"))
    assert plain == built


def test_a_missing_shard_is_named(tiny_checkpoint, tmp_path):
    checkpoint = Path(shutil.copytree(tiny_checkpoint("qwen3", "bfloat16", True).path, tmp_path / "sharded"))
    shard = sorted(checkpoint.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(run_build(checkpoint, "--output", tmp_path / "out" / "engine"), shard.name, tmp_path / "out")


def test_max_seq_len_above_the_trained_length(checkpoint, tmp_path):
    result = run_build(checkpoint, "--max-seq-len", 641, "--output", tmp_path / "out" / "engine")
    refused(result, "--max-seq-len 641 is more than the 640 tokens", tmp_path / "out")


def test_what_is_unknown_in_the_config_is_named_once(checkpoint, tmp_path):
    edit_config(checkpoint, use_foo=True, rope_scaling={"beta": 2})
    result = run_build(checkpoint, "--output", tmp_path / "e")
    note = "Note: config.json has use_foo, rope_scaling.beta, unknown to qwen2's configuration and left unread.\n"
    assert result.exit_code == 0
    assert result.stderr.count(note) == 1


def test_activations_that_the_kernels_lack(checkpoint, tmp_path):
    options = ["--kernels", "stock", "--activations", "int8x2", "--output", tmp_path / "out" / "engine"]
    message = "--kernels stock has no --activations int8x2; choose int8 or float32"
    refused(run_build(checkpoint, *options), message, tmp_path / "out", exit_code=2)


def test_a_weight_too_large_for_the_native_layout(checkpoint, tmp_path):
    edit_tensors(checkpoint, lambda t: t["model.layers.1.self_attn.v_proj.weight"].__setitem__((3, 4), 1e5))
    result = run_build(checkpoint, "--output", tmp_path / "out" / "engine")
    message = "v_proj.weight: 100000 is too large for the native layout's float16 scales; use --kernels stock"
    refused(result, message, tmp_path / "out")
    assert run_build(checkpoint, "--kernels", "stock", "--output", tmp_path / "engine").exit_code == 0


def test_an_int8_cache_has_a_scale_for_every_key_and_value(checkpoint, tmp_path):
    assert run_build(checkpoint, "--kv-cache-dtype", "int8", "--output", tmp_path / "engine").exit_code == 0
    manifest = Manifest.read(tmp_path / "engine")
    pools = {state.name: (state.dtype, state.shape) for state in manifest.states if state.layer == 2}
    assert pools == {
        "key_cache.2": ("int8", ("num_blocks", 2, 2, 8, 32)),
        "value_cache.2": ("int8", ("num_blocks", 2, 64, 8)),
        "key_scale.2": ("float32", ("num_blocks", 2, 64)),
        "value_scale.2": ("float32", ("num_blocks", 2, 64)),
    }
    assert manifest.cache.bytes_per_token == 3 * 2 * 2 * (8 + 4)  # layers, key and value, heads


def test_the_demo_is_announced_when_nothing_is_refused_any_more(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "qwen_build.checkpoint.locate.resolve_checkpoint", lambda _: resolve_checkpoint(str(checkpoint))
    )
    monkeypatch.chdir(tmp_path)
    refused(run_build("--ignore-tensors", "nope"), "nope", tmp_path / "engines")
    assert run_build("--output", "engines/tiny-int4").exit_code == 0
    again = run_build()  # whose output has this name
    assert (again.exit_code, "No checkpoint given" in again.stderr) == (1, False)
    done = run_build("--output", "other")
    assert (done.exit_code, done.stderr.startswith("No checkpoint given: building the demo model")) == (0, True)


def test_unknown_options_exit_2(checkpoint):
    for arguments in (
        ["--quant", "int3"],
        ["--group-size", "48"],
        ["--kernels", "cuda"],
        ["--max-seq-len", "0"],
        ["-x"],
    ):
        assert run_build(checkpoint, *arguments).exit_code == 2


def test_a_byte_order_mark_is_no_damage(checkpoint, tmp_path):
    config = checkpoint / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert run_build(checkpoint, "--output", tmp_path / "engine").exit_code == 0


def test_the_tokenizer_travels_with_the_engine(checkpoint, tmp_path):
    for name in TEXT_FILES:
        (checkpoint / name).write_text("{}\n")
    tiny_tokenizer().save(str(checkpoint / "tokenizer.json"), pretty=False)
    assert run_build(checkpoint, "--output", tmp_path / "engine").exit_code == 0
    assert set(TEXT_FILES) <= set(Manifest.read(tmp_path / "engine").parts)
    for name in TEXT_FILES:
        assert (tmp_path / "engine" / name).read_bytes() == (checkpoint / name).read_bytes()


def test_defaults_follow_the_scheme():
    exact, quantised = BuildOptions(quant="none").resolved(), BuildOptions(quant="int4").resolved()
    assert (exact.embedding_quant, exact.kv_cache_dtype) == ("none", "float32")
    assert (quantised.embedding_quant, quantised.kv_cache_dtype) == ("int8", "float16")


def test_the_estimated_memory_bounds_a_slice(checkpoint):
    with Checkpoint.open(checkpoint) as weights:
        plan = plan_build(weights, resolve_checkpoint(str(checkpoint)), BuildOptions())
    assert plan.build_memory_bytes > export.SLICE_ELEMENTS * 4
