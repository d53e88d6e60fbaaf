"""GGUF files: grids are kept bit for bit, the rest is what the package gguf dequantises, hostile files are one line."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from cases.formats import assert_read_alike, in_groups
from cases.gguf_files import END, write
from cases.tiny import TinyCheckpoint, run_alone
from qwen_build.checkpoint.formats import gguf as formats_gguf
from qwen_build.checkpoint.formats.gguf import PACKED, _nibbles
from qwen_build.checkpoint.gguf_file import BY_NAME, GgufFile
from qwen_build.checkpoint.gguf_text import as_directory
from qwen_build.checkpoint.locate import resolve_checkpoint
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.cli import main
from qwen_build.engine_build import plan_build, write_engine
from qwen_build.plan.options import BuildOptions
from qwen_engine.errors import BuildError, QwenError
from qwen_engine.manifest import Manifest
from qwen_run.accuracy.gguf_weights import GgufWeights
from qwen_run.accuracy.origin_checks import check_checkpoint
from qwen_run.accuracy.weight_checks import compare_weights
from qwen_run.runtime.engine import Engine
from qwen_run.text.tokenizer import Tokenizer

pytest.importorskip("gguf")

TOKENS = np.random.default_rng(5).integers(0, 131, 40).tolist()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinyCheckpoint:
    return in_groups(tmp_path_factory.mktemp("tiny") / "model", hidden_size=256, intermediate_size=512, head_dim=64)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def build(path: Path, output: Path, **options) -> Path:
    located = resolve_checkpoint(str(path))
    with Checkpoint.open(located.path) as weights:
        write_engine(plan_build(weights, located, BuildOptions(**options)), weights, output)
    return output


@pytest.mark.parametrize("kind", BY_NAME)
def test_weights_are_those_that_the_package_reads(kind, tiny, tmp_path):
    expected = write(tiny, tmp_path / "m.gguf", kind, head="F16")
    with Checkpoint.open(as_directory(tmp_path / "m.gguf")) as weights:
        assert weights.tensors.keys() == expected.keys()
        for name, weight in expected.items():
            assert np.array_equal(weights.read(name), weight), name
            assert np.array_equal(weights.read(name, 3, 70), weight[3:70]), name
        layers = {name for name, weight in expected.items() if weight.ndim == 2 and ".layers." in name}
        assert set(weights.packed) == (layers if kind in PACKED else set())
    linears = {name.removesuffix(".weight"): weight for name, weight in expected.items() if weight.ndim == 2}
    assert_read_alike(as_directory(tmp_path / "m.gguf"), linears)


@pytest.mark.parametrize("kind", PACKED)
def test_what_fits_the_grids_is_stored_bit_for_bit(kind, tiny, tmp_path):
    write(tiny, tmp_path / "m.gguf", kind)
    engine = build(tmp_path / "m.gguf", tmp_path / "engine")
    assert compare_weights(engine, as_directory(tmp_path / "m.gguf")).passed
    result = CliRunner().invoke(main, [str(tmp_path / "m.gguf"), "--output", str(tmp_path / "second")])
    assert "22 stored bit for bit" in result.output, result.output
    with pytest.raises(
        BuildError, match=r"quant int8 cannot be chosen, the checkpoint is stored as GGUF int\d already"
    ):
        build(tmp_path / "m.gguf", tmp_path / "third", quant="int8")


def test_k_quants_are_rounded_as_quant_says(tiny, tmp_path):
    write(tiny, tmp_path / "m.gguf", "Q4_K", head="Q6_K")
    result = CliRunner().invoke(
        main, [str(tmp_path / "m.gguf"), "--quant", "int8", "--output", str(tmp_path / "engine")]
    )
    assert "linears of the GGUF checkpoint: 23 rounded as --quant says" in result.output, result.output
    assert compare_weights(tmp_path / "engine", as_directory(tmp_path / "m.gguf")).passed


def test_a_float_engine_is_that_of_the_safetensors(tiny, tmp_path):
    write(tiny, tmp_path / "m.gguf", "BF16", head="F32")
    ours = Engine.load(build(tmp_path / "m.gguf", tmp_path / "ours", quant="none"), threads=1)
    theirs = Engine.load(build(tiny.path, tmp_path / "theirs", quant="none"), threads=1)
    assert np.array_equal(run_alone(ours, TOKENS), run_alone(theirs, TOKENS))


def test_rows_in_pairs_are_those_of_hugging_face(tiny, tmp_path):
    expected = write(tiny, tmp_path / "model.gguf", "Q8_0", architecture="llama")
    file = GgufFile.open(tmp_path / "model.gguf")
    from qwen_build.checkpoint.formats.gguf import find_gguf

    found = find_gguf({}, file)
    for part in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.1.self_attn.{part}.weight"
        weight = found.weights[name]
        assert np.array_equal(weight.read(0, weight.shape[0]), expected[name])
        assert np.array_equal(weight.read(17, 90), expected[name][17:90])
        ours = GgufWeights(tmp_path)
        assert np.array_equal(ours.rows(name.removesuffix(".weight"), slice(17, 90)), expected[name][17:90])
        bias = name.removesuffix("weight") + "bias"
        assert np.array_equal(ours.vector(bias), expected[bias])
    file.close()


def test_the_tokenizer_and_the_template_are_those_of_the_metadata(tiny, tmp_path):
    write(tiny, tmp_path / "m.gguf", "Q8_0")
    engine = build(tmp_path / "m.gguf", tmp_path / "engine")
    tokenizer = Tokenizer.load(engine)
    ids = tokenizer.encode(f"Th{END}")
    assert ids == [128, 129]
    assert json.loads((engine / "tokenizer_config.json").read_text())["chat_template"].startswith("{% for m in")
    assert as_directory(tmp_path / "m.gguf") == as_directory(tmp_path / "m.gguf")


@pytest.fixture
def parts(tiny, tmp_path) -> tuple[list[Path], dict[str, np.ndarray]]:
    """A model in three files and more, and its weights."""
    expected = write(tiny, tmp_path / "m.gguf", "Q8_0", tensors_a_file=15)
    files = sorted(tmp_path.glob("m-*.gguf"))
    assert len(files) > 2
    return files, expected


def test_a_model_in_several_files_is_that_of_one(parts, tiny, tmp_path):
    files, expected = parts
    write(tiny, tmp_path / "m.gguf", "Q8_0")
    located = resolve_checkpoint(str(files[0]))
    assert located.name == "m"
    with Checkpoint.open(located.path) as weights:
        assert len(weights.files) == len(files)
        assert weights.tensors.keys() == expected.keys()
        for name, weight in expected.items():
            assert np.array_equal(weights.read(name), weight), name
    several = build(files[0], tmp_path / "several")
    alone = build(tmp_path / "m.gguf", tmp_path / "alone")
    digests = [{name: part.sha256 for name, part in Manifest.read(engine).parts.items()} for engine in (several, alone)]
    assert digests[0] == digests[1]
    origin = Manifest.read(several).origin.sha256
    assert sum(name.endswith(f"-of-{len(files):05}.gguf") for name in origin) == len(files)
    check_checkpoint(Manifest.read(several), located.path)
    assert compare_weights(several, located.path).passed


def test_links_of_the_hubs_cache_are_parts_by_their_names(parts, tmp_path):
    files, _ = parts
    (tmp_path / "blobs").mkdir()
    for file in files:
        blob = tmp_path / "blobs" / file.name[::-1]
        file.rename(blob)
        file.symlink_to(blob)
    assert resolve_checkpoint(str(files[0])).name == "m"


@pytest.mark.parametrize("change", ["absent", "another", "again", "renamed", "second", "fewer"])
def test_files_that_are_not_all_of_one_model_are_refused(change, parts, tmp_path):
    files, _ = parts
    count, given = len(files), files[0]
    if change == "absent":
        files[2].unlink()
        message = (
            f"m-00001-of-{count:05}.gguf is the first of {count} files, of which {files[2].name} are not beside it"
        )
    elif change == "another":
        files[2].write_bytes(files[1].read_bytes())
        message = f"{files[2].name} is file 2 of {count} by its metadata, and 3 of {count} by its name"
    elif change == "again":
        key, content = b"split.no", files[1].read_bytes()
        place = content.index(key) + len(key) + 4
        files[2].write_bytes(content[:place] + struct.pack("<H", 2) + content[place + 2 :])
        message = f"{files[2].name} has 'blk.1.attn_k.bias', which an earlier file has too"
    elif change == "renamed":
        given = files[0].rename(tmp_path / "other.gguf")
        message = f"other.gguf is file 1 of {count} by its metadata; give it and the others the names"
    elif change == "second":
        given = files[1]
        message = f"{files[1].name} is file 2 of {count}; give the first, {files[0].name}"
    else:
        content = files[0].read_bytes()
        key = b"split.tensors.count"
        place = content.index(key) + len(key) + 4
        files[0].write_bytes(content[:place] + struct.pack("<i", 3) + content[place + 4 :])
        message = "tensors, it says 3; download them again"
    with pytest.raises(QwenError, match=re.escape(message)):
        resolve_checkpoint(str(given))
    if change in ("renamed", "second"):  # their advice can be followed here
        if change == "renamed":
            given.rename(files[0])
        assert resolve_checkpoint(str(files[0])).name == "m"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general__architecture": ("qwen2moe", 8)}, "architecture 'qwen2moe' is not one of qwen2, qwen3, llama"),
        ({"tokenizer__ggml__model": ("llama", 8)}, "the tokenizer is 'llama' with the splitting 'qwen2'"),
        ({"tokenizer__ggml__pre": ("falcon", 8)}, "with the splitting 'falcon', expected 'gpt2' with one of qwen2"),
        ({"split__count": (3, 4)}, "is file 1 of 3 by its metadata; give it and the others the names"),
        ({"qwen2__block_count": ("x", 8)}, "qwen2.block_count is 'x', expected another type"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_by_name(metadata, message, tiny, tmp_path, monkeypatch):
    import gguf

    write_value = gguf.GGUFWriter.add_key_value

    def changed(self, key, value, kind, *rest, **more):
        if (new := metadata.get(key.replace(".", "__"))) is not None:
            value, kind = new[0], gguf.GGUFValueType(new[1])
        write_value(self, key, value, kind, *rest, **more)

    monkeypatch.setattr(gguf.GGUFWriter, "add_key_value", changed)
    extra = {key: (value, gguf.GGUFValueType(kind)) for key, (value, kind) in metadata.items() if key == "split__count"}
    write(tiny, tmp_path / "m.gguf", "Q8_0", **extra)
    with pytest.raises(QwenError) as error:
        build(tmp_path / "m.gguf", tmp_path / "engine")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "engine").exists()


@pytest.fixture(scope="module")
def small(tiny, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "m.gguf"
    write(tiny, path, "Q4_0")
    return path.read_bytes()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_hostile_file_is_one_line_or_is_read(data, small, tmp_path_factory):
    """Bytes of the header are changed, numbers replaced, the end is cut: never another exception."""
    header = small.index(b"blk.2.ffn_down") + 4000
    content = bytearray(small)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, header))
        value = data.draw(st.sampled_from([b"\xff", b"\x00", struct.pack("<Q", 2**62), struct.pack("<I", 9)]))
        content[place : place + len(value)] = value
    cut = data.draw(st.sampled_from([len(content), len(content) - 1, header, 30]))
    path = tmp_path_factory.mktemp("hostile") / "m.gguf"
    path.write_bytes(content[:cut])
    messages = []
    try:
        with Checkpoint.open(as_directory(path)) as weights:
            plan_build(weights, resolve_checkpoint(str(path)), BuildOptions())
            for name in weights.tensors:
                weights.read(name, 0, 1)
    except QwenError as error:
        messages.append(str(error))
    assert not any("\n" in message for message in messages)


def test_numbers_that_are_not_finite_are_refused(tiny, tmp_path):
    write(tiny, tmp_path / "m.gguf", "Q4_0")
    file = GgufFile.open(tmp_path / "m.gguf")
    offset = file.tensors["blk.1.ffn_up.weight"].offset
    file.close()
    with (tmp_path / "m.gguf").open("r+b") as opened:
        opened.seek(offset)
        opened.write(b"\x00\x7e")  # a NaN of float16
    with pytest.raises(QwenError, match=r"blk.1.ffn_up.weight has NaN or infinite scales"):
        build(tmp_path / "m.gguf", tmp_path / "engine")


def test_a_directory_may_not_link_to_a_file_elsewhere(tiny, tmp_path):
    write(tiny, tmp_path / "m.gguf", "Q4_0")
    made = as_directory(tmp_path / "m.gguf")
    copy = tmp_path / "downloaded"
    copy.mkdir()
    (copy / "config.json").write_text((made / "config.json").read_text())
    (copy / "model.gguf").symlink_to(tmp_path / "m.gguf")
    with pytest.raises(QwenError, match=r"model.gguf"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K"])
def test_the_gate_sees_a_builder_that_reads_other_numbers(kind, tiny, tmp_path, monkeypatch):
    write(tiny, tmp_path / "m.gguf", kind, head="F16")
    turned = dataclasses.replace(PACKED["Q4_0"], q=lambda stored: _nibbles(stored >> 4 | stored << 4))
    monkeypatch.setitem(PACKED, "Q4_0", turned)
    dequantized = formats_gguf._dequantized
    monkeypatch.setattr(formats_gguf, "_dequantized", lambda *stored: dequantized(*stored) * np.float32(1.1))
    check = compare_weights(build(tmp_path / "m.gguf", tmp_path / "engine"), as_directory(tmp_path / "m.gguf"))
    assert "model.layers.0.self_attn.q_proj (" in check.message
    assert not check.passed
