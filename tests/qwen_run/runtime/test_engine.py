"""Loading and running an engine directory, on a graph of two matrices made here: no builder, no plugin operator."""

from __future__ import annotations

import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cases.answering import generate
from cases.one_graph import (
    BLOCK_SIZE,
    EMBEDDING,
    HEAD,
    MAX_SEQ_LEN,
    VOCAB_SIZE,
    expected_logits,
    make_batch,
    write_manifest,
)
from cases.processes import run_python
from qwen_engine.errors import EngineError, RequestError
from qwen_engine.manifest import (
    GRAPH_FILE,
    LAYERS_GRAPH_FILE,
    MANIFEST_FILE,
    Manifest,
)
from qwen_run.runtime.core import Core
from qwen_run.runtime.engine import Engine, newest_engine
from qwen_run.runtime.request import Request
from qwen_run.sampling.sample import SamplingParams


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
