"""Which files of a directory hold its weights, and by which names the graph knows them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qwen_build.checkpoint import shards
from qwen_build.checkpoint.files import digest_files
from qwen_build.checkpoint.safetensors_file import write_safetensors
from qwen_build.checkpoint.weights import Checkpoint
from qwen_engine.errors import CheckpointError


def random_tensors(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"embed.weight": (13, 7), "layers.0.stack": (3, 5, 2), "norm.weight": (11,)}
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def write_sharded(directory, files, weight_map=None):
    for name, tensors in files.items():
        write_safetensors(directory / name, tensors, "float32")
    if weight_map is None:
        weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
    (directory / shards.INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def open_error(directory):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def ones(*shape):
    return np.ones(shape, np.float32)


def test_shards_are_read_as_one(tmp_path):
    tensors = random_tensors()
    names = list(tensors)
    files = {"model-1.safetensors": [names[0], names[2]], "model-2.safetensors": [names[1]]}
    write_sharded(tmp_path, {shard: {n: tensors[n] for n in members} for shard, members in files.items()})
    with Checkpoint.open(tmp_path) as opened:
        assert opened.files == tuple(tmp_path / shard for shard in files)
        assert opened.tensors.keys() == tensors.keys()
        for name, value in tensors.items():
            np.testing.assert_array_equal(opened.read(name), value)


def test_what_counts_is_what_the_shards_hold(tmp_path):
    """An index may name a tensor that nobody has, forget one, or take one for another's."""
    files = {"1.safetensors": {"a": ones(2)}, "2.safetensors": {"b": ones(3)}}
    for index in ({"a": "1", "b": "2", "gone": "1"}, {"a": "1", "gone": "2"}, {"a": "2", "b": "1"}):
        write_sharded(tmp_path, files, {name: f"{shard}.safetensors" for name, shard in index.items()})
        with Checkpoint.open(tmp_path) as opened:
            assert {name: info.shape for name, info in opened.tensors.items()} == {"a": (2,), "b": (3,)}


def test_all_missing_shards_are_named(tmp_path):
    weight_map = {"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors"}
    write_sharded(tmp_path, {"2.safetensors": {"b": ones(2)}}, weight_map)
    assert "lacks 1.safetensors, 3.safetensors" in open_error(tmp_path)


def test_a_tensor_in_two_shards_must_be_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK_BYTES", 8)
    values = np.arange(9, dtype=np.float32)
    write_sharded(tmp_path, {"1.safetensors": {"a": values}, "2.safetensors": {"a": values, "b": ones(2)}})
    with Checkpoint.open(tmp_path) as opened:
        np.testing.assert_array_equal(opened.read("a"), values)
    other = values + (values == 8)
    for wrong in (other, values[:8], values.reshape(3, 3)):
        write_sharded(tmp_path, {"1.safetensors": {"a": values}, "2.safetensors": {"a": wrong, "b": ones(2)}},
                      {"a": "1.safetensors", "b": "2.safetensors"})  # fmt: skip
        assert "a is in both 1.safetensors and" in open_error(tmp_path)


def test_shards_may_lie_in_a_folder(tmp_path):
    (tmp_path / "parts" / "deep").mkdir(parents=True)
    write_sharded(tmp_path, {"parts/1.safetensors": {"a": ones(2)}, "parts/deep/1.safetensors": {"b": ones(3)}})
    with Checkpoint.open(tmp_path) as opened:
        assert opened.tensors.keys() == {"a", "b"}
        digests = digest_files(opened.files, directory=tmp_path)
    assert digests.keys() == {"parts/1.safetensors", "parts/deep/1.safetensors"}


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": {"a": 3}}])
def test_index_without_a_weight_map_is_refused(tmp_path, index):
    (tmp_path / shards.INDEX_FILE).write_text(json.dumps(index))
    assert "has no weight_map" in open_error(tmp_path)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/model.safetensors", "sub/../../model.safetensors", ""])
def test_index_cannot_point_outside_its_directory(tmp_path, shard):
    inside = tmp_path / "checkpoint"
    (inside / "sub").mkdir(parents=True)
    for directory in (tmp_path, inside / "sub"):
        write_safetensors(directory / "model.safetensors", {"a": ones(2)})
    (inside / shards.INDEX_FILE).write_text(json.dumps({"weight_map": {"a": shard}}))
    assert "has no weight_map" in open_error(inside)


@pytest.mark.parametrize(
    ("present", "message"),
    [
        ((), "has no weights: expected model.safetensors"),
        (("pytorch_model.bin",), "has pytorch_model.bin: only safetensors is read; convert it"),
        (("q4.gguf",), "has q4.gguf: give one of these files itself as the checkpoint"),
        (("other.safetensors", "x.bin"), "has other.safetensors: there is neither"),
        (("gptq_model-4bit-128g.safetensors",), "saved by an old AutoGPTQ; rename it to model.safetensors, and add"),
    ],
)
def test_directory_without_weights_says_what_it_has(tmp_path, present, message):
    for name in present:
        (tmp_path / name).touch()
    assert message in open_error(tmp_path)


def test_what_is_no_directory_is_refused(tmp_path):
    assert "is not a directory" in open_error(tmp_path / "nowhere")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "is a GGUF file; give its name to qwen-build" in open_error(tmp_path / "model.gguf")


def test_a_directory_the_system_refuses_is_an_error(tmp_path):
    assert "cannot be read: File name too long" in open_error(tmp_path / ("x" * 300))


def test_an_adapter_is_told_from_a_model(tmp_path):
    (tmp_path / "adapter_model.safetensors").touch()
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen2.5-0.5B"}')
    assert (
        "is a LoRA adapter of Qwen/Qwen2.5-0.5B, no model; give that one as the checkpoint, and --lora"
        in open_error(tmp_path)
    )


def test_weights_may_not_be_links_out_of_the_checkpoint(tmp_path):
    inside, outside = tmp_path / "checkpoint", tmp_path / "outside"
    for directory in (inside, outside):
        directory.mkdir()
    write_safetensors(outside / "model.safetensors", {"a": ones(2)})
    (inside / "model.safetensors").symlink_to(outside / "model.safetensors")
    assert "outside the checkpoint" in open_error(inside)
    (inside / "model.safetensors").unlink()
    (inside / "parts").symlink_to(outside)
    (inside / shards.INDEX_FILE).write_text('{"weight_map": {"a": "parts/model.safetensors"}}')
    assert "outside the checkpoint" in open_error(inside)


NAMES = ("embed_tokens.weight", "layers.0.mlp.up_proj.weight", "norm.weight")


@pytest.mark.parametrize(("decoder", "head"), shards.PREFIXES.items())
def test_names_of_other_programs_are_those_of_the_graph(decoder, head, tmp_path):
    tensors = {decoder + name: ones(i + 1) for i, name in enumerate(NAMES)} | {f"{head}lm_head.weight": ones(9)}
    write_safetensors(tmp_path / "model.safetensors", tensors | {"visual.patch.weight": ones(2)}, "float32")
    with Checkpoint.open(tmp_path) as opened:
        found = {name: info.shape for name, info in opened.tensors.items()}
        assert len(opened.notes) == (decoder != "model.")
    expected = {f"model.{name}": (i + 1,) for i, name in enumerate(NAMES)}
    assert found == expected | {"lm_head.weight": (9,), "visual.patch.weight": (2,)}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("transformer.model.embed_tokens.weight",),
            "names begin with 'transformer.model.', expected 'model.'",
        ),
        (("a.embed_tokens.weight", "b.embed_tokens.weight"), "names begin with 'a.' and 'b.', expected 'model.'"),
        (("embed_tokens.weight", "norm.weight", "model.norm.weight"), "names with and without ''; remove the copies"),
    ],
)
def test_unknown_prefixes_are_named(names, message, tmp_path):
    write_safetensors(tmp_path / "model.safetensors", dict.fromkeys(names, ones(2)))
    assert message in open_error(tmp_path)


def test_a_whole_file_goes_before_an_index_and_that_is_said(tmp_path):
    write_sharded(tmp_path, {"1.safetensors": {"a": ones(2)}})
    write_safetensors(tmp_path / "model.safetensors", {"a": ones(3)})
    with Checkpoint.open(tmp_path) as opened:
        assert opened.tensors["a"].shape == (3,)
        assert "has both model.safetensors and model.safetensors.index.json" in opened.notes[0]
