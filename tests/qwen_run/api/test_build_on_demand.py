"""Engines built where one is asked for: once, again when anything they depend on has changed."""

import json
import shutil
import threading

import pytest

from cases.processes import PATIENCE_S
from qwen_build.checkpoint.files import digest_files
from qwen_engine.errors import BuildError, CheckpointError, EngineError
from qwen_engine.manifest import Manifest
from qwen_run import LLM
from qwen_run.api import build_on_demand
from qwen_run.api.build_on_demand import engine_of


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint("qwen2-tied").path, tmp_path / "checkpoint")


@pytest.fixture
def built(monkeypatch):
    """The engines that were built, in order."""
    engines, original = [], build_on_demand._build

    def build(located, engine, *arguments, **options):
        engines.append(engine)
        original(located, engine, *arguments, **options)

    monkeypatch.setattr(build_on_demand, "_build", build)
    return engines


def test_built_once_and_found_again(checkpoint, tmp_path, built, monkeypatch):
    cache = tmp_path / "cache"
    engine = engine_of(checkpoint, {"quant": "int8"}, cache)
    assert Manifest.read(engine).name == "checkpoint"
    assert engine_of(str(checkpoint), {"quant": "int8", "embedding_quant": "int8"}, cache) == engine  # the default
    assert built == [engine]
    monkeypatch.setattr("qwen_build.checkpoint.files.digest_files", None)  # nor are unchanged files read again
    assert engine_of(checkpoint, {"quant": "int8"}, cache) == engine


@pytest.mark.parametrize("change", ["option", "weights", "config", "version", "added"])
def test_built_again_when_anything_changes(checkpoint, tmp_path, built, monkeypatch, change):
    first = engine_of(checkpoint, {}, tmp_path / "cache")
    if change == "weights":
        with (checkpoint / "model.safetensors").open("r+b") as file:
            file.seek(-2, 2)
            file.write(b"\x00\x00")
    if change == "config":
        path = checkpoint / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-4}))
    if change == "added":
        (checkpoint / "generation_config.json").write_text('{"temperature": 0.7}')
    if change == "version":
        monkeypatch.setattr(build_on_demand, "__version__", "other")
    second = engine_of(checkpoint, {"group_size": 64} if change == "option" else {}, tmp_path / "cache")
    assert built == [first, second]
    assert first != second
    assert engine_of(checkpoint, {"group_size": 64} if change == "option" else {}, tmp_path / "cache") == second


def test_equal_checkpoints_share_an_engine(checkpoint, tmp_path, built):
    other = shutil.copytree(checkpoint, tmp_path / "elsewhere" / "checkpoint")
    assert engine_of(checkpoint, {}, tmp_path / "cache") == engine_of(other, {}, tmp_path / "cache")
    assert len(built) == 1


def test_a_damaged_engine_is_built_again(checkpoint, tmp_path, built):
    engine = engine_of(checkpoint, {}, tmp_path / "cache")
    with (engine / "weights.bin").open("ab") as file:
        file.write(b"x")
    assert engine_of(checkpoint, {}, tmp_path / "cache") == engine
    assert built == [engine, engine]


def test_two_at_once_build_once(checkpoint, tmp_path, built):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(engine_of(checkpoint, {}, tmp_path / "cache"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert (len(built), found) == (1, built * 4)


def test_an_interrupted_build_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    from qwen_build import engine_build

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(engine_build, "write_graph", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine_of(checkpoint, {}, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("[!.]*"))
    Manifest.read(engine_of(checkpoint, {}, tmp_path / "cache"))


def test_an_engine_is_itself(checkpoint, tmp_path):
    engine = engine_of(checkpoint, {}, tmp_path / "cache")
    assert engine_of(engine, {}) == engine
    with pytest.raises(EngineError, match="is an engine, quant cannot change it any more"):
        engine_of(engine, {"quant": "int8"})


def test_mistakes(checkpoint, tmp_path):
    with pytest.raises(EngineError, match=r"unknown option quantum; did you mean quant\?"):
        LLM(checkpoint, quantum="int8")
    with pytest.raises(CheckpointError, match="no such directory"):
        engine_of(tmp_path / "absent", {}, tmp_path / "cache")
    with pytest.raises(BuildError, match="block_size is 48, expected a power of two"):
        engine_of(checkpoint, {"block_size": 48}, tmp_path / "cache")
    (tmp_path / "file").touch()
    with pytest.raises(BuildError, match=r"cannot be written: .*; set XDG_CACHE_HOME"):
        engine_of(checkpoint, {}, tmp_path / "file")


def test_an_engine_that_was_not_built_is_no_model_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EngineError, match="there is no engine engines/mine; make it with qwen-build, whose --output"):
        LLM("engines/mine")


def test_a_packed_checkpoint_names_its_format(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(build_on_demand, "_build", lambda *_, **__: None)
    path = checkpoint / "config.json"
    packed = {"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": True, "desc_act": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": packed}))
    assert engine_of(checkpoint, {}, tmp_path / "cache").name.startswith("checkpoint-gptq-")


def test_a_full_disk_is_one_line(checkpoint, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qwen_build.engine_build.write_graph", full)
    with pytest.raises(BuildError, match=r"^[^\n]* cannot be written: No space left on device"):
        engine_of(checkpoint, {}, tmp_path / "cache")
    monkeypatch.setattr(build_on_demand, "_digests", full)
    with pytest.raises(BuildError, match="cannot be written: No space left on device; set XDG_CACHE_HOME"):
        engine_of(checkpoint, {}, tmp_path / "cache")


def test_the_calibration_text_is_in_the_key(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(build_on_demand, "_build", lambda *_, **__: None)
    text = tmp_path / "text.txt"
    found = []
    for content in ("one", "two"):
        text.write_text(content)
        found += [engine_of(checkpoint, {"calibration": each}, tmp_path / "cache") for each in (text, str(text))]
    assert found[0] == found[1] != found[2] == found[3]
    with pytest.raises(CheckpointError, match="absent cannot be read"):
        engine_of(checkpoint, {"calibration": tmp_path / "absent"}, tmp_path / "cache")


def test_every_file_of_the_build_is_in_the_key(checkpoint, tmp_path):
    """The key is made of all files that the manifest says the engine is made of."""
    engine = engine_of(checkpoint, {}, tmp_path / "cache")
    (known,) = (tmp_path / "cache").glob(".digests-*.json")
    digests = json.loads(known.read_text())
    assert Manifest.read(engine).origin.sha256.items() <= digests.items()
    assert digests == digest_files(checkpoint / name for name in digests)


def test_options_are_taken_as_the_command_line_takes_them(checkpoint, tmp_path):
    rules = tmp_path / "rules.json"
    rules.write_text('{"*.v_proj": {"quant": "int8"}}')
    engine = engine_of(checkpoint, {"exclude": "*.down_proj", "quant_config": str(rules)}, tmp_path / "cache")
    schemes = {record.name.split(".")[-1]: record.quantization.scheme for record in Manifest.read(engine).linears}
    assert (schemes["down_proj"], schemes["v_proj"], schemes["o_proj"]) == ("none", "int8", "int4")
