"""An engine cut into stages when it is loaded: every cut, the same bits, and no byte of what other stages have."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cases.processes import run_python
from cases.tiny import TinyCheckpoint
from qwen_engine.errors import EngineError
from qwen_engine.extents import EXTENTS_FILE, Extents
from qwen_engine.manifest import GRAPH_FILE, MANIFEST_FILE, WEIGHTS_FILE, Manifest
from qwen_run.engine_files.stage_graph import stage_graph
from qwen_run.runtime.engine import Batch, Engine
from qwen_run.runtime.kv_cache import Edit
from qwen_run.runtime.stage import Stage, even_cuts

BLOCKS = 12
BUILDS = {
    "int4": ("qwen2", {"quant": "int4"}),
    "int8, tied, int8 cache": ("qwen3-tied", {"quant": "int8", "kv_cache_dtype": "int8"}),
    "windows": ("qwen3-windows", {"quant": "int8"}),
    "stock": ("llama", {"quant": "int8", "kernels": "stock"}),
    "float32": ("qwen2-tied", {"quant": "none"}),
    "embeddings in place of ids": ("qwen2", {"quant": "int8", "inputs_embeds": True}),
}


@pytest.fixture(scope="module", params=BUILDS)
def engine(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Callable[..., TinyCheckpoint],
    build_engine: Callable[..., Path],
) -> Path:
    family, options = BUILDS[request.param]
    return build_engine(tiny_checkpoint(family).path, **options)


@pytest.fixture(scope="module")
def tied_engine(tiny_checkpoint: Callable[..., TinyCheckpoint], build_engine: Callable[..., Path]) -> Path:
    return build_engine(tiny_checkpoint("qwen3-tied").path, quant="int8")


@pytest.fixture
def damaged(tied_engine: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tied_engine, tmp_path / "engine"))


def batches(manifest: Manifest) -> Iterator[Batch]:
    """Two sequences: prompts in chunks, then a token of each."""
    rng = np.random.default_rng(0)
    past = np.zeros(2, np.int32)
    table = np.array([[3, 1, 5], [7, 2, 0]], np.int32)
    for lengths in ([70, 9], [1, 40], [1, 1], [5, 1]):
        count = sum(lengths)
        yield Batch(
            rng.integers(0, manifest.model.vocab_size, count),
            np.cumsum([0, *lengths]).astype(np.int32),
            past.copy(),
            table,
            np.arange(count - 1, dtype=np.int64),
        )
        past += np.array(lengths, np.int32)


def outputs_of(stages: list[Stage], batch: Batch) -> np.ndarray:
    hidden = None
    for stage in stages:
        hidden = stage.run(batch, hidden)
    assert hidden is not None
    return hidden


def test_every_cut_computes_the_same_bits(engine: Path) -> None:
    whole = Engine.load(engine, threads=1, num_blocks=BLOCKS, max_seq_len=128)
    expected = [whole.run(batch) for batch in batches(whole.manifest)]
    for cuts in ([0, 3], [0, 1, 3], [0, 2, 3], [0, 1, 2, 3]):
        layers = [range(*edge) for edge in pairwise(cuts)]
        stages = [Stage.load(engine, each, BLOCKS, threads=1) for each in layers]
        for batch, logits in zip(batches(whole.manifest), expected, strict=True):
            assert np.array_equal(outputs_of(stages, batch).view(np.int32), logits.view(np.int32)), cuts


@pytest.mark.parametrize("layers", [range(1, 1), range(2, 1), range(-1, 2), range(4), range(3, 4), range(0, 3, 2)])
def test_wrong_layers_are_refused(tied_engine: Path, layers: range) -> None:
    with pytest.raises(EngineError, match=r"^layers is range.*expected neighbouring ones of the 3 .* range\(0, 1\)$"):
        Stage.load(tied_engine, layers, BLOCKS)


def test_cuts_are_even() -> None:
    assert even_cuts(30, 4) == [range(7), range(7, 15), range(15, 22), range(22, 30)]
    with pytest.raises(EngineError, match="4 stages are asked for, expected 1 to 3, as many as the engine has"):
        even_cuts(3, 4)


def test_edits_reach_every_pool_of_a_stage(tied_engine: Path) -> None:
    """A copied block gives what its source would; a cleared one is zeros."""
    stages = [Stage.load(tied_engine, each, BLOCKS, threads=1) for each in even_cuts(3, 2)]
    first, second, *_ = batches(stages[0].manifest)
    outputs_of(stages, first)
    moved = Batch(*(getattr(second, name) for name in ("input_ids", "cumulative_lengths", "past_lengths")),
                  np.array([[9, 10, 5], [11, 2, 0]], np.int32), second.logits_indices)  # fmt: skip
    for stage in stages:
        stage.apply([Edit(9, 3), Edit(10, 1), Edit(11, 7)])
    expected = outputs_of(stages, second)
    assert np.array_equal(outputs_of(stages, moved), expected)
    for stage in stages:
        stage.apply([Edit(9, None)])
    assert not np.array_equal(outputs_of(stages, moved)[:1], expected[:1])


# -- what is read of the weights


def test_extents_cover_the_weights_and_each_layer_has_one(engine: Path) -> None:
    manifest = Manifest.read(engine)
    found = Extents.read(engine, manifest.parts[WEIGHTS_FILE].size_bytes)
    names = [extent.holds for extent in found.extents]
    assert [name for name in names if ".layers." in name] == [f"model.layers.{i}" for i in range(3)]
    assert names[:2] == ["constants", "model.embed_tokens"]
    assert names[-1] in ("model.norm", "lm_head")
    for layer in range(3):
        graph = stage_graph((engine / GRAPH_FILE).read_bytes(), range(layer, layer + 1), manifest)
        read = {e.holds for a, b, e in found.stretches for first, last in graph.stretches if first < b and a < last}
        others = {f"model.layers.{i}" for i in range(3) if i != layer}
        assert f"model.layers.{layer}" in read
        assert not read & others
        assert ("model.embed_tokens" in read) == (layer == 0 or (layer == 2 and manifest.model.tie_word_embeddings))


def test_a_stage_loads_where_the_rest_of_the_weights_is_not_there(tied_engine: Path, tmp_path: Path) -> None:
    """A node that has fetched its extents alone: the weights file has holes, other files are not there."""
    whole = Stage.load(tied_engine, range(1, 2), BLOCKS, threads=1)
    for name in (MANIFEST_FILE, GRAPH_FILE, EXTENTS_FILE):
        shutil.copy(tied_engine / name, tmp_path / name)
    manifest = Manifest.read(tied_engine)
    size = manifest.parts[WEIGHTS_FILE].size_bytes
    with (tied_engine / WEIGHTS_FILE).open("rb") as source, (tmp_path / WEIGHTS_FILE).open("wb") as sparse:
        sparse.truncate(size)
        for start, end, extent in Extents.read(tied_engine, size).stretches:
            if extent.holds in ("constants", "model.layers.1"):
                source.seek(start)
                sparse.seek(start)
                sparse.write(source.read(end - start))
    stage = Stage.load(tmp_path, range(1, 2), BLOCKS, threads=1)
    batch = next(batches(manifest))
    hidden = np.random.default_rng(1).normal(size=(len(batch.input_ids), 80)).astype(np.float32)
    assert np.array_equal(stage.run(batch, hidden), whole.run(batch, hidden))
    with pytest.raises(EngineError, match=r"weights.bin is not as it was built where it holds model\.layers\.2, bytes"):
        Stage.load(tmp_path, range(1, 3), BLOCKS)
    with pytest.raises(EngineError, match=r"tokenizer\.json is missing|layers\.onnx is missing"):
        Stage.load(tmp_path, range(1, 2), BLOCKS, checks_others=True)
    with pytest.raises(EngineError, match=r"layers\.onnx is missing"):
        Engine.load(tmp_path)


def test_damage_is_seen_by_the_stage_that_reads_it(damaged: Path) -> None:
    manifest = Manifest.read(damaged)
    start = next(
        a for a, _, e in Extents.read(damaged, manifest.parts[WEIGHTS_FILE].size_bytes).stretches
        if e.holds == "model.layers.1"
    )  # fmt: skip
    with (damaged / WEIGHTS_FILE).open("r+b") as file:
        file.seek(start + 100)
        file.write(b"\xff" if file.read(1) != b"\xff" else b"\0")
    Stage.load(damaged, range(1), BLOCKS)
    with pytest.raises(EngineError, match=r"where it holds model\.layers\.1, bytes \d+ to \d+; build the engine again"):
        Stage.load(damaged, range(2), BLOCKS)


def test_an_engine_without_extents_runs_whole_and_not_in_stages(damaged: Path) -> None:
    (damaged / EXTENTS_FILE).unlink()
    text = (damaged / MANIFEST_FILE).read_text("utf-8")
    without = re.sub(r'  "extents\.json": \{[^}]*\},\n', "", text)
    assert without != text
    (damaged / MANIFEST_FILE).write_text(without, "utf-8")
    Engine.load(damaged, num_blocks=BLOCKS, max_seq_len=64)
    with pytest.raises(EngineError, match=r"has no extents\.json, which stages need .*; build the engine again"):
        Stage.load(damaged, range(1), BLOCKS)


def test_extents_of_other_weights_are_refused(damaged: Path) -> None:
    text = (damaged / EXTENTS_FILE).read_text("utf-8")
    for old, new, message in (
        (r'"crc32": "(\w)', '"crc32": "f', r"extents.json has changed since it was built \(its crc32 differs\)"),
        (r'"end": 4096\b', '"end": 4096000', "does not divide the"),
        (r'"holds"', '"has"', "lacks holds"),
    ):
        changed = re.sub(old, new, text, count=1)
        (damaged / EXTENTS_FILE).write_text(changed if changed != text else text.replace('"end": ', '"end": -', 1))
        with pytest.raises(EngineError, match=message):
            Stage.load(damaged, range(1), BLOCKS)


MAPPED = """
import sys
from pathlib import Path
import numpy as np
from qwen_run.runtime.stage import Stage
from qwen_run.runtime.engine import Batch
engine, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
stage = Stage.load(engine, range(first, last), 4, threads=1)
counts = [np.array(each, np.int32) for each in ([0, 1], [0], [[1]])]
batch = Batch(np.array([5]), *counts, np.array([0]))
stage.run(batch, np.ones((1, stage.manifest.model.hidden_size), np.float32))
size, ours = 0, False
for line in open("/proc/self/smaps"):
    head = line.split()[0]
    if "-" in head and not head.endswith(":"):
        ours = line.rstrip().endswith("weights.bin")
    elif ours and head == "Size:":
        size += int(line.split()[1]) * 1024
print(size)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="maps are read from /proc")
def test_stages_map_their_own_weights_and_no_more(tied_engine: Path) -> None:
    """All stages together map the file, and once more what two of them need: the tied table, and constants."""
    manifest = Manifest.read(tied_engine)
    cuts = even_cuts(3, 3)
    mapped = []
    for layers in cuts:
        script = f"import sys; sys.argv = ['', {str(tied_engine)!r}, '{layers.start}', '{layers.stop}']\n{MAPPED}"
        done = run_python(script)
        assert done.returncode == 0, done.stderr
        mapped.append(int(done.stdout))
    size = manifest.parts[WEIGHTS_FILE].size_bytes
    extents = {e.holds: b - a for a, b, e in Extents.read(tied_engine, size).stretches}
    # A map is of whole pages, at both ends; tensors below a page share them.
    tensors = sum(len(stage_graph((tied_engine / GRAPH_FILE).read_bytes(), each, manifest).stretches) for each in cuts)
    assert sum(mapped) <= size + extents["model.embed_tokens"] + 2 * extents["constants"] + tensors * 2 * 4096
    assert min(mapped) >= 4096


# -- graphs that cannot be cut


def test_two_values_that_cross_are_refused(damaged: Path) -> None:
    model = onnx.load(damaged / GRAPH_FILE, load_external_data=False)
    last = model.graph.node[-1]
    early = model.graph.node[1].output[0]  # of layer 0
    model.graph.node.insert(len(model.graph.node) - 1, helper.make_node("Identity", [early], ["kept"], name="kept"))
    model.graph.output.append(helper.make_tensor_value_info("kept", TensorProto.FLOAT, None))
    assert last.output[0] == "logits"
    with pytest.raises(
        EngineError, match=r"2 values cross from layer \d to \d \(.*\), expected the hidden state alone"
    ):
        stage_graph(model.SerializeToString(), range(1, 2), Manifest.read(damaged))


def test_a_graph_within_an_operator_is_refused(damaged: Path) -> None:
    model = onnx.load(damaged / GRAPH_FILE, load_external_data=False)
    inner = helper.make_graph([], "inner", [], [])
    model.graph.node.append(helper.make_node("If", ["input_ids"], [], then_branch=inner, else_branch=inner))
    with pytest.raises(EngineError, match="If has a graph of its own, which is not cut; run it whole, without stages"):
        stage_graph(model.SerializeToString(), range(1), Manifest.read(damaged))


@pytest.mark.parametrize("model", [b"", b"not ONNX at all", b"\x3a\x05ab"])
def test_what_is_no_graph_is_refused(tied_engine: Path, model: bytes) -> None:
    with pytest.raises(EngineError, match="the graph is not ONNX; build the engine again"):
        stage_graph(model, range(1), Manifest.read(tied_engine))
