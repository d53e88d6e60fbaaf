"""The weights file as it is written: by threads, in pieces that are zeros before."""

from __future__ import annotations

import json
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from cases.experts import fused
from cases.tiny import FAMILIES, TINY
from qwen_build.checkpoint.locate import resolve_checkpoint
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.engine_build import plan_build
from qwen_build.plan.options import BuildOptions
from qwen_build.writing import weights_file
from qwen_build.writing.weights_file import WeightsFile, write_weights

SIZE = 5 * (1 << 20) + 12_345  # two whole pieces and a part of one


def test_threads_write_across_pieces_in_any_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, SIZE, np.uint8)
    cuts = [0, *sorted(rng.choice(SIZE, 40, replace=False).tolist()), SIZE]
    parts = [(data[start:stop], start) for start, stop in pairwise(cuts)]
    rng.shuffle(parts)  # type: ignore[arg-type]
    with closing(WeightsFile(tmp_path / "weights.bin", SIZE)) as file, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda part: file.write(*part), parts))
    assert np.array_equal(np.fromfile(tmp_path / "weights.bin", np.uint8), data)


def test_what_nobody_writes_is_zero(tmp_path: Path) -> None:
    with closing(WeightsFile(tmp_path / "weights.bin", SIZE)) as file:
        file.write(np.float32([1.5]), 3 << 20)
    written = np.fromfile(tmp_path / "weights.bin", np.uint8)
    assert len(written) == SIZE
    assert written[3 << 20 :][:4].view(np.float32) == 1.5
    assert np.count_nonzero(written) == np.count_nonzero(np.float32([1.5]).view(np.uint8))


@pytest.mark.parametrize("quant", ["none", "int4"])
def test_large_tensors_start_at_a_page_and_small_ones_at_a_cache_line(tiny_checkpoint, build_engine, quant) -> None:
    engine = build_engine(tiny_checkpoint("qwen2").path, quant=quant)
    tensors = [
        {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}
        for tensor in onnx.load(engine / "model.onnx", load_external_data=False).graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
    large = [tensor["offset"] % 4096 for tensor in tensors if tensor["length"] >= 4096]
    small = [tensor["offset"] % 64 for tensor in tensors if tensor["length"] < 4096]
    assert (len(large) > 5, len(small) > 5) == (True, True)
    assert (set(large), set(small)) == ({0}, {0})


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_text("mine")
    with pytest.raises(FileExistsError):
        WeightsFile(tmp_path / "weights.bin", SIZE)
    assert (tmp_path / "weights.bin").read_text() == "mine"


def test_the_memory_that_writing_takes_does_not_grow_with_the_experts(tmp_path, monkeypatch) -> None:
    """Thirty-two times as many experts, and the same numbers in memory at a time."""
    monkeypatch.setattr(weights_file, "SLICE_ELEMENTS", 1 << 11)
    peaks = {}
    for experts in (2, 64):
        path = tmp_path / f"{experts}"
        path.mkdir()
        sizes = TINY | FAMILIES["qwen3-moe"] | {"num_experts": experts, "rms_norm_eps": 1e-6}
        (path / "config.json").write_text(json.dumps(sizes))
        with Checkpoint.described(path) as described:
            shapes = plan_build(described, resolve_checkpoint(str(path)), BuildOptions()).sources
        rng = np.random.default_rng(0)
        needed = {name: shape for source in shapes.values() for name, shape in source.shapes}
        save_file({n: rng.random(s, np.float32) for n, s in needed.items()}, path / "model.safetensors")
        for form in ("of each", "fused"):
            with Checkpoint.open(path) as checkpoint:
                plan = plan_build(checkpoint, resolve_checkpoint(str(path)), BuildOptions())
                tracemalloc.start()
                write_weights(plan.layout, checkpoint, tmp_path / f"{experts} {form}.bin", lambda _: None)
                peaks[experts, form] = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
            save_file(fused(load_file(path / "model.safetensors")), path / "model.safetensors")
    one_expert = 4 * 3 * 48 * 96
    for form in ("of each", "fused"):  # threads overlap as they like: by less than what one more expert would add
        assert abs(peaks[64, form] - peaks[2, form]) < 62 * one_expert / 10, peaks
