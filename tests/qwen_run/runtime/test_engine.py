"""Loading and running an engine directory, on a graph of two matrices made here: no builder, no plugin operator."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qwen_plugin
from cases.answering import generate
from cases.processes import run_python
from qwen_engine.errors import EngineError, RequestError
from qwen_engine.graph_io import BATCH_INPUTS, TensorSpec, cache_inputs
from qwen_engine.manifest import (
    FORMAT_VERSION,
    GRAPH_FILE,
    LAYERS_GRAPH_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    CacheLayout,
    Limits,
    LinearPart,
    LinearRecord,
    Manifest,
    ModelSizes,
    Operator,
    Origin,
    Quantization,
)
from qwen_engine.tasks import GENERATE, output_of
from qwen_run.engine_files import checksums as parts
from qwen_run.engine_files.checksums import check_parts, measure_part, verify_parts
from qwen_run.runtime.core import Core
from qwen_run.runtime.engine import Batch, Engine, newest_engine
from qwen_run.runtime.request import Request
from qwen_run.sampling.sample import SamplingParams

VOCAB_SIZE, HIDDEN_SIZE, MAX_SEQ_LEN, BLOCK_SIZE = 13, 6, 100, 32
STATES = cache_inputs(layers=(0, 1), kv_heads=2, head_dim=8, block_size=BLOCK_SIZE, dtype="float32")
MODEL = ModelSizes("qwen2", VOCAB_SIZE, HIDDEN_SIZE, 7, 2, 4, 2, 8, 1e-6, 10000.0, "default", 1.0, False)
RNG = np.random.default_rng(5)
EMBEDDING = RNG.normal(size=(VOCAB_SIZE, HIDDEN_SIZE)).astype(np.float32)
HEAD = RNG.normal(size=(HIDDEN_SIZE, VOCAB_SIZE)).astype(np.float32)


def write_graph(path: Path, outputs: list[str], specs: Sequence[TensorSpec] = (*BATCH_INPUTS, *STATES)) -> None:
    """``logits`` = embedding of the selected tokens times the head; ``hidden`` the embeddings of all tokens.

    ``cached`` is the sum of one cache pool, to see which memory the session reads.
    """
    types = {"int64": TensorProto.INT64, "int32": TensorProto.INT32, "float32": TensorProto.FLOAT}
    inputs = [helper.make_tensor_value_info(spec.name, types[spec.dtype], spec.shape) for spec in specs]
    infos = {
        "logits": helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["L", VOCAB_SIZE]),
        "hidden": helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["T", HIDDEN_SIZE]),
        "cached": helper.make_tensor_value_info("cached", TensorProto.FLOAT, []),
    }
    summed = [helper.make_node("ReduceSum", ["value_cache.1"], ["cached"], keepdims=0)] if "cached" in outputs else []
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["embedding", "input_ids"], ["hidden"]),
            helper.make_node("Gather", ["hidden", "logits_indices"], ["selected"]),
            helper.make_node("MatMul", ["selected", "head"], ["logits"]),
            *summed,
        ],
        "two matrices",
        inputs,
        [infos[name] for name in outputs],
        [numpy_helper.from_array(EMBEDDING, "embedding"), numpy_helper.from_array(HEAD, "head")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location=WEIGHTS_FILE, size_threshold=0)


def write_manifest(directory: Path, **changes: Any) -> None:
    """A manifest that fits the directory's files, with fields of it replaced by ``changes``."""
    fields: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "name": "two-matrices",
        "model": MODEL,
        "limits": Limits(MAX_SEQ_LEN),
        "cache": CacheLayout(BLOCK_SIZE, "float32", 2 * 2 * 2 * 8 * 4),
        "inputs": (*BATCH_INPUTS, *STATES),
        "outputs": (output_of(GENERATE, VOCAB_SIZE),),
        "linears": (),
        "operators": (),
        "eos_token_ids": (0,),
        "parts": {path.name: measure_part(path) for path in sorted(directory.iterdir()) if path.name != MANIFEST_FILE},
        "origin": Origin("made by a test", None, "float32", {}, None, (), "0", ""),
    }
    (directory / MANIFEST_FILE).write_text(Manifest(**{**fields, **changes}).to_json(), encoding="utf-8")


@pytest.fixture(scope="session")
def intact_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("engine")
    write_graph(directory / LAYERS_GRAPH_FILE, ["logits", "hidden", "cached"])
    (directory / WEIGHTS_FILE).unlink()  # saving the second graph appends to the file of the first
    write_graph(directory / GRAPH_FILE, ["logits"])
    write_manifest(directory)
    return directory


@pytest.fixture
def engine_directory(intact_engine: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(intact_engine, tmp_path / "engine"))


def make_batch(lengths: list[int], logits_indices: list[int], seed: int = 0) -> Batch:
    """Random tokens for sequences of these lengths, each in blocks of its own."""
    return Batch(
        input_ids=np.random.default_rng(seed).integers(0, VOCAB_SIZE, sum(lengths)),
        cumulative_lengths=np.cumsum([0, *lengths]).astype(np.int32),
        past_lengths=np.zeros(len(lengths), np.int32),
        block_table=np.arange(len(lengths), dtype=np.int32)[:, None],
        logits_indices=np.array(logits_indices, np.int64),
    )


def expected_logits(batch: Batch) -> np.ndarray:
    return EMBEDDING[batch.input_ids[batch.logits_indices]] @ HEAD


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"threads": 0}, "threads is 0, expected a whole number, 1 or more"),
        ({"threads": "2"}, "threads is '2', expected a whole number, 1 or more"),
        ({"threads": True}, "threads is True, expected a whole number, 1 or more"),
        ({"threads": 1025}, "threads is 1025, expected 1024 or fewer"),
        ({"num_blocks": -1}, "num_blocks is -1, expected a whole number, 1 or more"),
        ({"cache_bytes": 0.5}, "cache_bytes is 0.5, expected a whole number, 1 or more"),
    ],
)
def test_a_size_that_is_none_is_refused(intact_engine: Path, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(EngineError, match=complaint):
        Engine.load(intact_engine, **options)


def test_run(intact_engine: Path) -> None:
    engine = Engine.load(intact_engine, threads=1)
    for lengths, indices in ([3, 5], [2, 7]), ([1], [0]), ([4], []), ([2, 2, 2], [0, 1, 2, 3, 4, 5]):
        batch = make_batch(lengths, indices)
        logits = engine.run(batch)
        assert (logits.shape, logits.dtype) == ((len(indices), VOCAB_SIZE), np.float32)
        np.testing.assert_allclose(logits, expected_logits(batch), rtol=0, atol=1e-5)  # sums of 6 products near 1


def test_logits_outlive_the_next_run(intact_engine: Path) -> None:
    engine = Engine.load(intact_engine)
    batches = [make_batch([2, 2], [1, 3], seed) for seed in range(20)]
    results = [engine.run(batch) for batch in batches]
    for batch, logits in zip(batches, results, strict=True):
        np.testing.assert_allclose(logits, expected_logits(batch), rtol=0, atol=1e-5)


def test_run_layers_returns_every_output(intact_engine: Path) -> None:
    engine = Engine.load(intact_engine, graph=LAYERS_GRAPH_FILE)
    batch = make_batch([3, 2], [4])
    layers = engine.run_layers(batch)
    assert layers.keys() == {"logits", "hidden", "cached"}
    np.testing.assert_array_equal(layers["hidden"], EMBEDDING[batch.input_ids])
    np.testing.assert_array_equal(layers["logits"], engine.run(batch))


def test_the_session_reads_the_pools_themselves(intact_engine: Path) -> None:
    engine = Engine.load(intact_engine, graph=LAYERS_GRAPH_FILE)
    for value in (0, 1, 3):
        engine.cache.pools["value_cache.1"][1] = value
        assert engine.run_layers(make_batch([1], [0]))["cached"] == value * 2 * BLOCK_SIZE * 8


def test_generate_over_a_session(intact_engine: Path) -> None:
    """The next token of this graph depends on the last one alone: argmax of its row."""
    following = np.argmax(EMBEDDING @ HEAD, axis=1)
    requests = [Request((3, 1), SamplingParams(temperature=0.0, max_tokens=4)), Request((7,), SamplingParams(0.0))]
    engine = Engine.load(intact_engine)
    for _ in generate(engine, requests, max_batch_tokens=2):
        pass
    for request, count in zip(requests, (4, MAX_SEQ_LEN - 1), strict=True):
        sequence = [request.prompt[-1], *request.sequences[0].output]
        assert [int(following[token_id]) for token_id in sequence[:-1]] == request.sequences[0].output
        assert len(request.sequences[0].output) == count
    assert engine.cache.num_free == engine.cache.num_blocks


def test_the_pool_is_as_large_as_asked(intact_engine: Path) -> None:
    engine = Engine.load(intact_engine, num_blocks=4)
    assert engine.cache.pools["key_cache.1"].shape == (4, 2, 1, 8, 32)
    assert engine.manifest.limits.max_seq_len == MAX_SEQ_LEN


def test_a_pool_below_one_sequence_makes_sequences_shorter_and_says_so(intact_engine: Path) -> None:
    with pytest.warns(UserWarning, match=r"^a request may have up to 96 tokens, which is what a cache of .* holds"):
        engine = Engine.load(intact_engine, num_blocks=3)
    assert engine.manifest.limits.max_seq_len == 96
    request = Request((1, 2, 3), SamplingParams(temperature=0, max_tokens=1000))
    for _ in generate(engine, [request]):
        pass
    assert len(request.sequences[0].token_ids) == 96


def test_a_shorter_sequence_needs_less_of_a_pool(intact_engine: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = Engine.load(intact_engine, num_blocks=2, max_seq_len=50)
    assert (engine.manifest.limits.max_seq_len, engine.cache.num_blocks) == (50, 2)
    with pytest.raises(
        RequestError, match=r"has 50 tokens, the engine takes 49 .*run or build .* larger --max-seq-len"
    ):
        Core(engine).add(Request((1,) * 50, SamplingParams()))
    with pytest.raises(EngineError, match=f"max_seq_len is 9999, expected 2 to {MAX_SEQ_LEN}"):
        Engine.load(intact_engine, max_seq_len=9999)


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
        (["format_version"], "1", "has format version '1', this runtime reads 5"),
        (["format_version"], 1, "has format version 1, this runtime reads 5"),
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
    "model.layers.0.mlp.gate_up_proj", 6, 14, (LinearPart("gate", 7), LinearPart("up", 7)),
    Quantization("none", 32, 0, True, "float32", "native", "rows", "group", "group", "none"), 336,
)  # fmt: skip


@pytest.mark.parametrize(
    ("linears", "complaint"),
    [
        ([dataclasses.replace(LINEAR, out_features=15)], r"gate_up_proj has 15 rows, its parts \[7, 7\]"),
        ([dataclasses.replace(LINEAR, parts=())], r"has 14 rows, its parts \[\]"),
        ([dataclasses.replace(LINEAR, parts=(LinearPart("x", 15), LinearPart("y", -1)))], r"its parts \[15, -1\]"),
        ([LINEAR, dataclasses.replace(LINEAR, name="other")], "two linears have the rows of gate"),
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


def test_a_refused_batch_is_one_line(intact_engine: Path) -> None:
    engine = Engine.load(intact_engine)
    batch = make_batch([2], [5])  # there is no token 5
    with pytest.raises(EngineError, match=r"cannot run: .*indices") as caught:
        engine.run(batch)
    assert "\n" not in str(caught.value)
    good = make_batch([2], [1])
    np.testing.assert_allclose(engine.run(good), expected_logits(good), rtol=0, atol=1e-5)


def test_a_path_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="is not a UTF-8 path; rename it"):
        Engine.load(tmp_path / "caf\udce9")


def test_newest_engine(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no engine in .*qwen-build"):
        newest_engine(tmp_path / "engines")
    for name, age in ("old", 300), ("new", 100), ("middle", 200):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST_FILE).write_text("{}")
        os.utime(tmp_path / name / MANIFEST_FILE, (10**9 - age, 10**9 - age))
    (tmp_path / "no engine").mkdir()
    assert newest_engine(tmp_path).name == "new"


LIMITED = """
import resource, sys
from pathlib import Path
from qwen_engine.errors import EngineError
from qwen_run.runtime.engine import Engine
{preparation}
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
limit_bytes = int(status["VmSize"].split()[0]) * 1024 + (int(sys.argv[2]) << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
try:
    {action}
    print("done")
except EngineError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of addresses are kept by Linux")
@pytest.mark.parametrize(
    ("room_mib", "preparation", "action"),
    [
        (0, "", "Engine.load(Path(sys.argv[1]), threads=2)"),
        (
            30,
            "from qwen_run.engine_files import checksums",
            "checksums._crc32(Path(sys.argv[1]) / 'large', 2)",
        ),
    ],
)
def test_where_addresses_are_limited_the_advice_is_memory(
    engine_directory: Path, room_mib: int, preparation: str, action: str
) -> None:
    if preparation:
        with (engine_directory / "large").open("wb") as file:
            file.truncate(200 << 20)
    done = run_python(LIMITED.format(preparation=preparation, action=action), engine_directory, room_mib)
    assert done.stderr == ""
    assert re.search(r"; this process may have [\d,]+ MiB of addresses: raise that limit \(ulimit -v\)$", done.stdout)
    assert len(done.stdout.splitlines()) == 1
    assert "build the engine again" not in done.stdout


def test_a_message_of_onnx_runtime_that_is_no_text_is_one_line(engine_directory: Path) -> None:
    graph = (engine_directory / GRAPH_FILE).read_bytes()
    assert graph.count(b"MatMul") == 1
    (engine_directory / GRAPH_FILE).write_bytes(graph.replace(b"MatMul", b"Mat\xff\xfel"))
    write_manifest(engine_directory)
    with pytest.raises(EngineError, match=r"model\.onnx cannot be loaded: \S[^\n]*$"):
        Engine.load(engine_directory)


def test_a_checkpoint_in_the_place_of_an_engine_is_told_from_one(tmp_path):
    checkpoint = tmp_path / "a model"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    with pytest.raises(
        EngineError, match=r"a model is a checkpoint; make an engine of it with `qwen-build '.*a model'`"
    ):
        Manifest.read(checkpoint)
