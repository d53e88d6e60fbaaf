"""Engines that are damaged, or that no builder writes: each is refused in one line that names the fault."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qwen_plugin
from cases.one_graph import (
    BLOCK_SIZE,
    MAX_SEQ_LEN,
    MODEL,
    STATES,
    VOCAB_SIZE,
    expected_logits,
    make_batch,
    write_graph,
    write_manifest,
)
from qwen_engine.errors import EngineError
from qwen_engine.graph_io import BATCH_INPUTS, TensorSpec, cache_inputs
from qwen_engine.manifest import (
    GRAPH_FILE,
    LAYERS_GRAPH_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    CacheLayout,
    LinearPart,
    LinearRecord,
    Manifest,
    Operator,
    Quantization,
)
from qwen_engine.tasks import GENERATE, output_of
from qwen_run.engine_files import checksums as parts
from qwen_run.engine_files.checksums import check_parts, measure_part, verify_parts
from qwen_run.runtime.engine import Engine


def test_verify_parts_catches_what_a_crc32_does_not(engine_directory: Path) -> None:
    verify_parts(engine_directory, Manifest.read(engine_directory))
    data = json.loads((engine_directory / MANIFEST_FILE).read_text())
    data["parts"][WEIGHTS_FILE]["sha256"] = "0" * 64
    manifest = Manifest.from_json(json.dumps(data))
    Engine.load(engine_directory)
    with pytest.raises(EngineError, match=r"weights\.bin has changed since it was built \(its sha256 differs\)"):
        verify_parts(engine_directory, manifest)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("size_bytes", [0, 1, 2, 1000, (5 << 20) + 3])
def test_parts_are_checked_in_stretches(
    size_bytes: int, threads: int, intact_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_SMALL_BYTES", 1)  # so that small files have stretches too
    content = bytearray(np.random.default_rng(size_bytes).bytes(size_bytes))
    (tmp_path / "part").write_bytes(content)
    part = measure_part(tmp_path / "part")
    assert part.crc32 == f"{zlib.crc32(content):08x}"
    manifest = dataclasses.replace(Manifest.read(intact_engine), parts={"part": part})
    check_parts(tmp_path, manifest, threads)
    for i in {size_bytes * i // 8 for i in range(8)} if content else ():
        content[i] ^= 128
        (tmp_path / "part").write_bytes(content)
        with pytest.raises(EngineError, match="part has changed since it was built"):
            check_parts(tmp_path, manifest, threads)
        content[i] ^= 128


@pytest.mark.parametrize("advice", [None, 1 << 20])
def test_parts_are_checked_where_huge_pages_cannot_be_asked_for(
    advice: int | None, intact_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_SMALL_BYTES", 1)
    if advice is None:
        monkeypatch.delattr("mmap.MADV_HUGEPAGE", raising=False)
    else:  # which the system does not know
        monkeypatch.setattr("mmap.MADV_HUGEPAGE", advice, raising=False)
    check_parts(intact_engine, Manifest.read(intact_engine), 2)


def change_byte(directory: Path) -> None:
    path = directory / WEIGHTS_FILE
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(directory: Path) -> None:
    os.truncate(directory / WEIGHTS_FILE, 100)


def remove_two(directory: Path) -> None:
    (directory / WEIGHTS_FILE).unlink()
    (directory / LAYERS_GRAPH_FILE).unlink()


def spoil_graph(directory: Path) -> None:
    (directory / GRAPH_FILE).write_bytes(b"not a graph")
    write_manifest(directory)


def drop_graph_from_manifest(directory: Path) -> None:
    write_manifest(directory, parts={WEIGHTS_FILE: measure_part(directory / WEIGHTS_FILE)})


def ask_for_operators(directory: Path) -> None:
    write_manifest(directory, operators=(Operator("qwen", "Known", 2), Operator("qwen", "Unknown", 1)))


def claim_another_cache(directory: Path) -> None:
    states = cache_inputs(layers=(0, 2), kv_heads=3, head_dim=8, block_size=BLOCK_SIZE, dtype="float32")
    model = dataclasses.replace(MODEL, num_key_value_heads=3)
    write_manifest(directory, inputs=(*BATCH_INPUTS, *states), model=model)


def claim_another_dtype(directory: Path) -> None:
    states = cache_inputs(layers=(0, 1), kv_heads=2, head_dim=8, block_size=BLOCK_SIZE, dtype="float16")
    cache = CacheLayout(BLOCK_SIZE, "float16", 2 * 2 * 2 * 8 * 2)
    write_manifest(directory, inputs=(*BATCH_INPUTS, *states), cache=cache)


def claim_another_vocabulary(directory: Path) -> None:
    model = dataclasses.replace(MODEL, vocab_size=VOCAB_SIZE + 1)
    write_manifest(directory, model=model, outputs=(output_of(GENERATE, model.vocab_size),))


def contradict_itself(directory: Path) -> None:
    write_manifest(directory, outputs=(output_of(GENERATE, VOCAB_SIZE + 1),))


def add_template(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{{ messages }}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (add_template, r"chat_template\.jinja is there, and the engine was built without it"),
        (change_byte, r"weights\.bin has changed since it was built \(its crc32 differs\)"),
        (truncate, r"weights\.bin has 100 bytes, expected \d+"),
        (remove_two, r"layers\.onnx is missing; weights\.bin is missing"),
        (spoil_graph, r"model\.onnx cannot be loaded: "),
        (drop_graph_from_manifest, r"has no part model\.onnx"),
        (ask_for_operators, r"needs qwen::Known version 2, qwen::Unknown version 1, .* qwen-build"),
        (
            claim_another_cache,
            r"has key_cache\.0 tensor\(float\) .*has unknown input key_cache\.1.*lacks input key_cache\.2",
        ),
        (claim_another_dtype, r"has key_cache\.0 tensor\(float\) .*, expected float16 "),
        (claim_another_vocabulary, r"has logits tensor\(float\) \('L', 13\), expected float32 \('L', 14\)"),
        (contradict_itself, r"vocab_size is 13, logits have shape \(14,\); build the engine again"),
    ],
)
def test_a_bad_engine_is_one_line(
    engine_directory: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], message: str
) -> None:
    monkeypatch.setattr(qwen_plugin, "OPERATORS", {("qwen", "Known"): 1}, raising=False)
    damage(engine_directory)
    with pytest.raises(EngineError, match=message) as caught:
        Engine.load(engine_directory)
    assert str(engine_directory) in str(caught.value)
    assert "\n" not in str(caught.value)


def set_in_manifest(directory: Path, *path: str | int, value: Any) -> None:
    data = json.loads((directory / MANIFEST_FILE).read_text())
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (directory / MANIFEST_FILE).write_text(json.dumps(data))


PART = {"size_bytes": 1, "crc32": "", "sha256": ""}
FIRST_STATE = len(BATCH_INPUTS)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format_version"], "1", "has format version '1', this runtime reads 6"),
        (["format_version"], 1, "has format version 1, this runtime reads 6"),
        (["format_version"], True, "has format version True"),
        (["parts", "/etc/passwd"], PART, "has part '/etc/passwd', expected the plain name of a file"),
        (["parts", ".."], PART, r"has part '\.\.'"),
        (["parts", "x" * 5000], PART, "has part 'x{80}', expected the plain name"),
        (["parts", "a\0b"], PART, r"has part 'a\\x00b'"),
        (["parts", "\ud800"], PART, r"has part '\\ud800'"),
        (["parts"], {GRAPH_FILE: PART, LAYERS_GRAPH_FILE: PART}, r"has no part weights\.bin"),
        (["outputs"], [], "has no output logits"),
        (["limits", "max_seq_len"], 1, "max_seq_len is 1, expected 2 or more"),
        (["limits", "max_seq_len"], 10**400, "max_seq_len is 1000"),
        (["cache", "block_size"], 0, "block_size is 0, expected a power of two from 32"),
        (["cache", "block_size"], -1, "block_size is -1"),
        (["cache", "block_size"], 48, "block_size is 48"),
        (["cache", "block_size"], 16, "block_size is 16"),
        (["cache", "block_size"], 2**400, "expected a power of two from 32"),
        (["cache", "block_size"], 64, r"key_cache\.0 is not as expected with block_size 64, 2 heads of 8, float32"),
        (["cache", "dtype"], "bogus", "cache dtype is 'bogus', expected one of"),
        (["cache", "dtype"], "float16", r"input key_cache\.0 is not as expected"),
        (["model", "head_dim"], 0, "head_dim 0, expected 1 or more"),
        (["model", "num_key_value_heads"], 10**400, "expected 1 or more"),
        (["inputs", FIRST_STATE, "dtype"], "bogus", r"input key_cache\.0 is not as expected"),
        (["inputs", FIRST_STATE, "shape"], [], r"input key_cache\.0 is not as expected"),
        (["inputs", FIRST_STATE, "layer"], None, r"input key_cache\.\d is not as expected"),
        (["inputs"], [], "has no input input_ids"),
        (
            ["inputs", 1],
            {"name": "x", "kind": "sequence", "dtype": "int32", "shape": ["S"], "layer": None},
            "input x is not as expected, a batch has input_ids, cumulative_lengths",
        ),
        (["inputs", 1, "dtype"], "int64", "input cumulative_lengths is not as expected"),
        (["inputs", 2, "name"], "input_ids", "has input input_ids twice"),
        (["inputs", FIRST_STATE, "name"], "key_scale.0", r"input key_scale\.0 is not as expected"),
        (["inputs", 0], 5, r"inputs\[0\] is 5"),
        (["model", "rope_theta"], 10**400, r"model: rope_theta is 1000.*, expected float"),
        (["model", "rms_norm_eps"], 10**400, r"model: rms_norm_eps is 1000.*, expected float"),
        (["model", "vocab_size"], 1000, r"vocab_size is 1000, logits have shape \(13,\)"),
        (["model", "vocab_size"], 10**400, r"vocab_size is 1000\d*\.\.\.0*, logits have shape"),
        (["eos_token_ids"], [2**70], "eos_token_ids holds 1180591620717411303424, expected ids of tokens"),
        (["eos_token_ids"], [3, -5], "eos_token_ids holds -5"),
    ],
)
def test_a_manifest_that_no_builder_writes(
    engine_directory: Path, path: list[str | int], value: Any, message: str
) -> None:
    set_in_manifest(engine_directory, *path, value=value)
    with pytest.raises(EngineError, match=message) as caught:
        Engine.load(engine_directory)
    assert str(caught.value).startswith(str(engine_directory / MANIFEST_FILE))
    assert str(caught.value).endswith(("; build the engine again", "qwen-build of this installation"))


def test_a_state_that_this_runtime_cannot_keep_is_refused_by_name(engine_directory: Path) -> None:
    recurrent = TensorSpec("delta_state.1", "sequence_state", "float32", ("num_slots", 4, 8), layer=1)
    write_manifest(engine_directory, inputs=(*BATCH_INPUTS, *STATES, recurrent))
    with pytest.raises(EngineError, match=r"states of whole sequences \(delta_state\.1\), .* newer qwen-engine"):
        Engine.load(engine_directory)


@pytest.mark.parametrize(
    ("kind", "dtype", "shape", "complaint"),
    [
        ("sequence_state", "float32", ("num_blocks", 8), r"float32 \('num_blocks', 8\), expected \(num_slots, sizes\)"),
        ("paged_state", "float32", ("num_slots", 8), r"expected \(num_blocks, sizes\)"),
        ("paged_state", "float32", ("num_blocks",), r"expected \(num_blocks, sizes\)"),
        ("paged_state", "float32", (), r"expected \(num_blocks, sizes\)"),
        ("paged_state", "float32", ("num_blocks", "T"), r"expected \(num_blocks, sizes\)"),
        ("paged_state", "float32", ("num_blocks", 0), r"expected \(num_blocks, sizes\)"),
        ("paged_state", "bogus", ("num_blocks", 8), "of a known type"),
    ],
)
def test_a_state_says_its_sizes(
    engine_directory: Path, kind: Any, dtype: str, shape: tuple[int | str, ...], complaint: str
) -> None:
    state = TensorSpec("state.1", kind, dtype, shape, layer=1)
    write_manifest(engine_directory, inputs=(*BATCH_INPUTS, *STATES, state))
    with pytest.raises(EngineError, match=rf"state state\.1 is .*{complaint}.*build the engine again"):
        Engine.load(engine_directory)


def test_a_runtime_keeps_any_state_in_blocks_and_feeds_what_the_manifest_lists(tmp_path: Path) -> None:
    state, inputs = TensorSpec("sums.0", "paged_state", "int32", ("num_blocks", 5), layer=0), BATCH_INPUTS[::4]
    assert [spec.name for spec in inputs] == ["input_ids", "logits_indices"]
    write_graph(tmp_path / GRAPH_FILE, ["logits"], (*inputs, state))
    shutil.copy(tmp_path / GRAPH_FILE, tmp_path / LAYERS_GRAPH_FILE)
    write_manifest(tmp_path, inputs=(*inputs, state))
    engine = Engine.load(tmp_path, num_blocks=7)
    assert {name: pool.shape for name, pool in engine.cache.pools.items()} == {"sums.0": (7, 5)}
    batch = make_batch([3, 4], [1, 6])
    np.testing.assert_allclose(engine.run(batch), expected_logits(batch), rtol=0, atol=1e-5)


def test_a_model_without_states_has_blocks_for_its_sequences_all_the_same(tmp_path: Path) -> None:
    write_graph(tmp_path / GRAPH_FILE, ["logits"], BATCH_INPUTS)
    shutil.copy(tmp_path / GRAPH_FILE, tmp_path / LAYERS_GRAPH_FILE)
    write_manifest(tmp_path, inputs=BATCH_INPUTS)
    for options in ({}, {"cache_bytes": 1}):
        engine = Engine.load(tmp_path, **options)
        assert engine.cache.allocate(engine.cache.blocks_for(MAX_SEQ_LEN)) == [0, 1, 2, 3]


LINEAR = LinearRecord(
    "model.layers.0.mlp.gate_up_proj", 6, 14, (LinearPart("gate", 7), LinearPart("up", 7)), 1,
    Quantization("none", 32, 0, True, "float32", "native", "rows", "group", "group", "none"), 336,
)  # fmt: skip


@pytest.mark.parametrize(
    ("linears", "complaint"),
    [
        ([dataclasses.replace(LINEAR, out_features=15)], r"gate_up_proj has 15 rows, its parts \[7, 7\]"),
        ([dataclasses.replace(LINEAR, parts=())], r"has 14 rows, its parts \[\]"),
        ([dataclasses.replace(LINEAR, parts=(LinearPart("x", 15), LinearPart("y", -1)))], r"its parts \[15, -1\]"),
        ([LINEAR, dataclasses.replace(LINEAR, name="other")], "two linears have the rows of gate"),
        ([dataclasses.replace(LINEAR, stack=2)], r"has 14 rows, its parts 2 times \[7, 7\]"),
        ([dataclasses.replace(LINEAR, stack=2, out_features=28)], "two linears have the rows of gate"),
        ([dataclasses.replace(LINEAR, stack=0)], "has stack 0, expected 1 to 65536"),
        ([dataclasses.replace(LINEAR, stack=10**9, out_features=14 * 10**9)], "has stack 1000000000, expected 1 to"),
        ([dataclasses.replace(LINEAR, in_features=0)], "gate_up_proj has in_features 0, expected 1 or more"),
        ([dataclasses.replace(LINEAR, stored_bytes=10**400)], r"has stored_bytes 10000\d*\.\.\.0*, expected 0 or more"),
        (
            [dataclasses.replace(LINEAR, quantization=dataclasses.replace(LINEAR.quantization, activation_scales="x"))],
            "has activation_scales 'x', expected group, block, token, static",
        ),
    ],
)
def test_the_parts_of_a_linear_are_its_rows(
    engine_directory: Path, linears: list[LinearRecord], complaint: str
) -> None:
    write_manifest(engine_directory, linears=tuple(linears))
    with pytest.raises(EngineError, match=complaint):
        Engine.load(engine_directory)


def test_a_manifest_without_end(engine_directory: Path) -> None:
    for text in ("[" * 200_000, '{"a":' * 200_000, '{"format_version": ' + "9" * 5000 + "}"):
        (engine_directory / MANIFEST_FILE).write_text(text)
        with pytest.raises(EngineError, match="is not JSON"):
            Engine.load(engine_directory)
