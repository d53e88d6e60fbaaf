"""Reading and writing safetensors: exact values, streamed rows, and every damage found before a weight is read."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cases.processes import run_python
from qwen_build.checkpoint import safetensors as checkpoint
from qwen_build.checkpoint.safetensors_file import STORAGE, LazyTensor, write_safetensors
from qwen_build.checkpoint.weights import Checkpoint
from qwen_engine.errors import CheckpointError

HF_NAMES = [storage.hf_name for storage in STORAGE.values()]


def random_tensors(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"embed.weight": (13, 7), "layers.0.stack": (3, 5, 2), "norm.weight": (11,)}
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def raw_file(header, data=b"", header_bytes=None):
    """A safetensors file with any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if header_bytes is None else header_bytes) + text + data


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def open_error(directory):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def ones(*shape):
    return np.ones(shape, np.float32)


# values


@pytest.mark.parametrize("hf_name", HF_NAMES)
def test_written_tensors_are_read_back(tmp_path, hf_name, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 24)  # several chunks a tensor, the last one partial
    tensors = random_tensors()
    write_safetensors(tmp_path / "model.safetensors", tensors, hf_name)
    step = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8}[hf_name]  # half the spacing of numbers near 1
    with Checkpoint.open(tmp_path) as opened:
        assert opened.dtype == hf_name
        assert {name: info.shape for name, info in opened.tensors.items()} == {
            name: value.shape for name, value in tensors.items()
        }
        for name, value in tensors.items():
            read = opened.read(name)
            assert read.dtype == np.float32
            assert read.flags.c_contiguous
            np.testing.assert_allclose(read, value, rtol=step, atol=0 if step == 0 else 2**-24)
            for start, stop in ((0, 0), (0, 1), (1, 3), (2, len(value))):
                np.testing.assert_array_equal(opened.read(name, start, stop), read[start:stop])
            np.testing.assert_array_equal(opened.read(name, 1), read[1:])


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (1.0, 1.0),
        (1 + 2**-8, 1.0),  # half way between 1 and 1 + 2**-7: to the even one, down
        (1 + 3 * 2**-8, 1 + 2**-6),  # half way again: to the even one, up
        (1 + 2**-8 + 2**-20, 1 + 2**-7),
        (-1 - 2**-8 - 2**-20, -1 - 2**-7),
        (2.0**-133, 2.0**-133),  # the smallest subnormal
    ],
)
def test_bfloat16_rounds_to_nearest_even(tmp_path, value, rounded):
    write_safetensors(tmp_path / "model.safetensors", {"w": np.array([value], np.float32)}, "bfloat16")
    with Checkpoint.open(tmp_path) as opened:
        assert opened.read("w").tolist() == [rounded]


def test_every_finite_bfloat16_survives_reading_and_writing():
    stored = np.arange(1 << 16, dtype=np.uint16)
    stored = stored[stored & 0x7F80 != 0x7F80]
    values = np.empty(stored.size, np.float32)
    bfloat16 = STORAGE["BF16"]
    bfloat16.decode(stored, values)
    assert values[stored == 0x3F80] == 1.0
    assert values[stored == 0xC0A0] == -5.0
    np.testing.assert_array_equal(bfloat16.encode(values), stored)


def test_other_programs_read_what_is_written_and_are_read(tmp_path):
    tensors = random_tensors()
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for directory in (ours, theirs):
        directory.mkdir()
    write_safetensors(ours / "model.safetensors", tensors, "float32")
    safetensors.numpy.save_file(tensors, theirs / "model.safetensors")
    loaded = safetensors.numpy.load_file(ours / "model.safetensors")
    with Checkpoint.open(theirs) as opened:
        assert loaded.keys() == opened.tensors.keys() == tensors.keys()
        for name, value in tensors.items():
            np.testing.assert_array_equal(loaded[name], value)
            np.testing.assert_array_equal(opened.read(name), value)


def test_lazy_tensors_are_made_one_after_the_other(tmp_path):
    made = []

    def load(value):
        made.append(value)
        return np.full((2, 3), value, np.float32)

    tensors = {f"t{i}": LazyTensor((2, 3), lambda i=i: load(i)) for i in range(3)}
    write_safetensors(tmp_path / "model.safetensors", tensors, "float16")
    assert made == [0, 1, 2]
    with Checkpoint.open(tmp_path) as opened:
        assert [opened.read(f"t{i}")[1, 2] for i in range(3)] == [0, 1, 2]


def test_scalar_is_read(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {"scale": np.array(2.5, np.float32)}, "float16")
    with Checkpoint.open(tmp_path) as opened:
        assert opened.read("scale").shape == ()
        assert opened.read("scale") == 2.5


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 14), (3, 2)])
def test_rows_out_of_range_are_refused(tmp_path, start, stop):
    write_safetensors(tmp_path / "model.safetensors", random_tensors())
    with Checkpoint.open(tmp_path) as opened, pytest.raises(IndexError):
        opened.read("embed.weight", start, stop)


def test_dtype_is_that_of_most_parameters(tmp_path):
    header = {"a": entry("F32", (1,), 0, 4), "b": entry("F32", (1,), 4, 8), "c": entry("BF16", (3,), 8, 14)}
    (tmp_path / "model.safetensors").write_bytes(raw_file(header, bytes(14)))
    with Checkpoint.open(tmp_path) as opened:
        assert opened.dtype == "bfloat16"


def test_reading_keeps_nothing_resident(tmp_path):
    rows, columns = 1 << 14, 1 << 12
    size = rows * columns * 2  # 128 MiB of zeros, in a file without blocks
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(raw_file({"w": entry("BF16", (rows, columns), 0, size)}))
        file.truncate(file.tell() + size)
    script = f"""
from pathlib import Path
from qwen_build.checkpoint.weights import Checkpoint

def peak_kib():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))

with Checkpoint.open(Path({str(tmp_path)!r})) as opened:
    before = peak_kib()
    for start in range(0, {rows}, 256):
        opened.read("w", start, start + 256)
    print(peak_kib() - before)
"""
    grown = run_python(script, check=True)
    assert int(grown.stdout) < 24 << 10  # a 4 MiB slice, the one before it and a chunk


# damaged files


@pytest.mark.parametrize("hf_name", HF_NAMES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, hf_name, value, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 16)
    weight = np.ones((6, 5), np.float32)
    weight[3, 2] = weight[4, 1] = value
    write_safetensors(tmp_path / "model.safetensors", {"w": weight}, hf_name)
    with Checkpoint.open(tmp_path) as opened:
        assert opened.read("w", 0, 3).shape == (3, 5)
        with pytest.raises(CheckpointError, match=r"w in .* has 2 NaN or infinite values, the first at \[3, 2\]"):
            opened.read("w", 1)


HEADERS = {
    "empty file": (b"", "0 bytes, too few"),
    "7 bytes": (b"1234567", "7 bytes, too few"),
    "not safetensors": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "not a safetensors file"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
    "header of no bytes": (raw_file(b""), "would have 0 bytes"),
    "header past the end": (raw_file(b"{}", header_bytes=12), "at least 10 bytes are missing"),
    "header not json": (raw_file(b"{'a': 1}"), "header of .* is damaged"),
    "header not utf-8": (raw_file(b'{"\xff": 1}'), "header of .* is damaged"),
    "header too deep": (raw_file(b"[" * 100_000), "header of .* is damaged"),
    "header a list": (raw_file([1]), "is not an object"),
    "name twice": (raw_file(b'{"a": 1, "a": 2}'), "appears twice"),
    "no tensor": (raw_file({"__metadata__": {}}), "without a tensor"),
    "entry a number": (raw_file({"a": 3}), "entry of a is damaged"),
    "no offsets": (raw_file({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "entry of a is damaged"),
    "shape of text": (raw_file({"a": entry(shape="22")}, bytes(8)), "entry of a is damaged"),
    "negative size": (raw_file({"a": entry(shape=(-1, -2))}, bytes(8)), "entry of a is damaged"),
    "negative offset": (raw_file({"a": entry(begin=-8, end=0)}, bytes(8)), "entry of a is damaged"),
    "offset of true": (raw_file({"a": entry("F32", (1,), True, 5)}, bytes(8)), "entry of a is damaged"),
    "shape too large": (raw_file({"a": entry(shape=(3,))}, bytes(8)), "owns 8 bytes, F32 .* needs 12"),
    "shape too small": (raw_file({"a": entry("F16", (2,))}, bytes(8)), "owns 8 bytes, F16 .* needs 4"),
    "overlap": (raw_file({"a": entry(), "b": entry(begin=4, end=12)}, bytes(12)), "b overlaps"),
    "gap": (raw_file({"a": entry(), "b": entry(begin=12, end=20)}, bytes(20)), "b leaves a gap"),
    "truncated": (raw_file({"a": entry(), "b": entry(begin=8, end=16)}, bytes(11)), "truncated: 5 bytes are missing"),
    "bytes of nobody": (raw_file({"a": entry()}, bytes(11)), "3 bytes that belong to no tensor"),
    "gptq too large": (raw_file({"l.qweight": entry("I32", (3,))}, bytes(8)), "owns 8 bytes, I32 .* needs 12"),
}


# taken where nobody needs the tensor
UNREADABLE = {
    "integers": (raw_file({"l.weight": entry("I32")}, bytes(8)), r"l.weight \(I32\).* no quantization_config"),
    "bitsandbytes": (raw_file({"l.weight": entry("U8", (8,))}, bytes(8)), r"l.weight \(U8\).* no quantization_config"),
    "fp8": (raw_file({"l.weight": entry("F8_E4M3", (8,))}, bytes(8)), r"l.weight \(F8_E4M3\).* no quantization_config"),
    "no values": (raw_file({"a": entry(shape=(0, 3), end=0)}), r"a \(0, 3\) have no values; save the checkpoint whole"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_refused_where_it_is_needed(tmp_path, case):
    data, message = UNREADABLE[case]
    (tmp_path / "model.safetensors").write_bytes(data)
    with Checkpoint.open(tmp_path) as opened:
        opened.check_readable(["absent"])
        with pytest.raises(CheckpointError, match=message):
            opened.check_readable(opened.tensors)


@pytest.mark.parametrize("case", HEADERS)
def test_damaged_header_is_refused_at_open(tmp_path, case):
    data, message = HEADERS[case]
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"w": ones(3, 2)}, "float16")
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert "model.safetensors" in open_error(tmp_path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 500), byte=st.integers(0, 255))
def test_a_changed_byte_never_ends_in_another_exception(tmp_path, position, byte):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, random_tensors(), "bfloat16")
    data = bytearray(path.read_bytes())
    data[position % len(data)] = byte
    path.write_bytes(data)
    try:
        with Checkpoint.open(tmp_path) as opened:
            opened.check_readable(opened.tensors)
            for name in opened.tensors:
                opened.read(name)
    except CheckpointError:
        pass


def test_a_file_that_shrinks_after_it_was_opened_is_noticed(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"w": ones(4, 4)}, "float32")
    with Checkpoint.open(tmp_path) as opened:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 1)
        assert opened.read("w", 0, 3).sum() == 12
        with pytest.raises(CheckpointError, match="changed while it was read"):
            opened.read("w")


def test_files_are_closed(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {"w": ones(2)})
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    with Checkpoint.open(tmp_path):
        assert len(list(descriptors.iterdir())) == before + 1
    assert len(list(descriptors.iterdir())) == before
    (tmp_path / "model.safetensors").write_bytes(b"")
    open_error(tmp_path)
    assert len(list(descriptors.iterdir())) == before


def test_many_offenders_are_counted(tmp_path):
    header = {f"layers.{i}.weight": entry("I32", (1,), 4 * i, 4 * i + 4) for i in range(9)}
    (tmp_path / "model.safetensors").write_bytes(raw_file(header, bytes(36)))
    message = r"layers.4.weight \(I32\) and 4 more"
    with Checkpoint.open(tmp_path) as opened, pytest.raises(CheckpointError, match=message):
        opened.check_readable(opened.tensors)
