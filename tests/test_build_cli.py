"""``qwen-build`` as its user meets it: results, messages, exit codes, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import FAMILIES

from qwen_build import export
from qwen_build.build import COPIED, BuildOptions, end_of_sequence_ids, plan_build, write_engine
from qwen_build.checkpoint import Checkpoint, write_safetensors
from qwen_build.cli import main
from qwen_build.config import ModelConfig
from qwen_build.locate import resolve_checkpoint
from qwen_engine.errors import BuildError
from qwen_engine.manifest import MANIFEST_FILE, Manifest
from qwen_run.parts import verify_parts


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path) -> Path:
    """A copy of a tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint("qwen2").path, tmp_path / "tiny"))


def build(*arguments: object):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def refused(result, message: str, left: Path) -> None:
    """The command failed with one line that holds ``message``, and left nothing in the directory ``left``."""
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not left.exists() or not list(left.iterdir())


def edit_config(checkpoint: Path, **changes: object) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(checkpoint: Path, edit) -> None:
    path = checkpoint / "model.safetensors"
    with Checkpoint.open(checkpoint) as weights:
        tensors = {name: weights.read(name) for name in weights.tensors}
    edit(tensors)
    write_safetensors(path, tensors, "float32")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_is_complete_and_its_parts_verify(family, tiny_checkpoint, tmp_path):
    checkpoint, output = tiny_checkpoint(family).path, tmp_path / "out" / "engine"
    result = build(checkpoint, "--output", output)
    assert result.exit_code == 0, result.output
    manifest = Manifest.read(output)
    verify_parts(output, manifest)
    assert {path.name for path in output.iterdir()} == {MANIFEST_FILE, *manifest.parts}
    assert manifest.origin.checkpoint == str(checkpoint)
    assert set(manifest.origin.sha256) >= {"config.json", "model.safetensors"}
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert list(output.parent.iterdir()) == [output]


def test_the_same_checkpoint_gives_the_same_bytes(checkpoint, tmp_path):
    for name in ("a", "b"):
        assert build(checkpoint, "--output", tmp_path / name).exit_code == 0
    a, b = (Manifest.read(tmp_path / name).parts for name in ("a", "b"))
    assert a == b


def test_a_tied_embedding_is_stored_once(tiny_checkpoint, tmp_path):
    sizes = {}
    for family in ("qwen2", "qwen2-tied"):
        result = build(tiny_checkpoint(family).path, "--dry-run", "--json")
        description = json.loads(result.stdout)
        sizes[family] = description["weights_bytes"]
        head = next(linear for linear in description["linears"] if linear["name"] == "lm_head")
    assert head["stored_bytes"] > 0
    assert abs(sizes["qwen2"] - sizes["qwen2-tied"] - head["stored_bytes"]) < 3 * 4096  # but for alignment


def test_dry_run_tells_the_size_and_writes_nothing(checkpoint, tmp_path):
    description = json.loads(build(checkpoint, "--dry-run", "--json", "--output", tmp_path / "engine").stdout)
    assert not (tmp_path / "engine").exists()
    result = build(checkpoint, "--json", "--output", tmp_path / "engine")
    assert json.loads(result.stdout)["weights_bytes"] == description["weights_bytes"]
    table = build(checkpoint, "--dry-run").stdout
    assert all(linear["name"] in table for linear in description["linears"])
    assert "build memory" in table


def test_weights_are_read_in_slices(checkpoint, tmp_path, monkeypatch):
    assert build(checkpoint, "--output", tmp_path / "whole").exit_code == 0
    monkeypatch.setattr(export, "SLICE_ELEMENTS", 1000)  # 12 rows of 80, 8 of 112
    assert build(checkpoint, "--output", tmp_path / "sliced").exit_code == 0
    assert Manifest.read(tmp_path / "whole").parts == Manifest.read(tmp_path / "sliced").parts


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: shutil.rmtree(c), "no such directory"),
        (lambda c: (c / "config.json").unlink(), "has no config.json"),
        (lambda c: (c / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda c: edit_config(c, model_type="llama"), "model_type 'llama' is not one of qwen2, qwen3"),
        (lambda c: edit_config(c, rope_scaling={"type": "yarn", "factor": 4}), "asks for rope type 'yarn'"),
        (lambda c: edit_config(c, use_sliding_window=True), "use_sliding_window True is not supported"),
        (lambda c: edit_config(c, quantization_config={"quant_method": "awq"}), "already quantised (awq)"),
        (lambda c: (c / "model.safetensors").unlink(), "safetensors"),
        (lambda c: os.truncate(c / "model.safetensors", 100_000), "model.safetensors"),
        (lambda c: (c / "model.safetensors").write_bytes(b"x" * 5000), "model.safetensors"),
        (lambda c: edit_tensors(c, lambda t: t.pop("model.norm.weight")), "the checkpoint lacks model.norm.weight"),
        (lambda c: edit_tensors(c, lambda t: t.update(extra=t["model.norm.weight"])), "graph has no place for extra"),
        (
            lambda c: edit_tensors(c, lambda t: t.update({"model.norm.weight": np.ones(79, np.float32)})),
            "model.norm.weight: graph expects (80,), checkpoint has (79,)",
        ),
        (
            lambda c: edit_tensors(c, lambda t: t["model.layers.1.mlp.up_proj.weight"].__setitem__((3, 4), np.nan)),
            "model.layers.1.mlp.up_proj.weight",
        ),
        (
            lambda c: edit_tensors(c, lambda t: t["lm_head.weight"].__setitem__((130, 79), np.inf)),
            "lm_head.weight",
        ),
        (
            lambda c: (c / "generation_config.json").write_text('{"eos_token_id": [5, 131]}'),
            "end-of-sequence ids [131] are outside the vocabulary of 131",
        ),
    ],
)
def test_bad_checkpoints_are_refused_in_one_line(damage, message, checkpoint, tmp_path):
    damage(checkpoint)
    refused(build(checkpoint, "--output", tmp_path / "out" / "engine"), message, tmp_path / "out")


def test_a_missing_shard_is_named(tiny_checkpoint, tmp_path):
    checkpoint = Path(shutil.copytree(tiny_checkpoint("qwen3", "bfloat16", True).path, tmp_path / "sharded"))
    shard = sorted(checkpoint.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(build(checkpoint, "--output", tmp_path / "out" / "engine"), shard.name, tmp_path / "out")


def test_max_seq_len_above_the_trained_length(checkpoint, tmp_path):
    result = build(checkpoint, "--max-seq-len", 641, "--output", tmp_path / "out" / "engine")
    refused(result, "--max-seq-len 641 is more than the 640 tokens", tmp_path / "out")


def test_unknown_options_exit_2(checkpoint):
    for arguments in (["--quant", "int3"], ["--group-size", "48"], ["--max-seq-len", "0"], ["--what"]):
        assert build(checkpoint, *arguments).exit_code == 2


def test_an_existing_engine_is_kept_unless_forced(checkpoint, tmp_path):
    output = tmp_path / "engine"
    assert build(checkpoint, "--output", output).exit_code == 0
    before = (output / MANIFEST_FILE).read_text()
    result = build(checkpoint, "--output", output, "--quant", "int8")
    assert result.exit_code == 1
    assert result.stderr == f"Error: {output} exists; use --force to replace it.\n"
    assert (output / MANIFEST_FILE).read_text() == before
    assert build(checkpoint, "--output", output, "--quant", "int8", "--force").exit_code == 0
    assert Manifest.read(output).linears[1].quantization.bits == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "tiny"]


def test_force_does_not_replace_what_is_no_engine(checkpoint, tmp_path):
    output = tmp_path / "precious"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    result = build(checkpoint, "--output", output, "--force")
    assert result.exit_code == 1
    assert "is not an engine, --force does not replace it" in result.stderr
    assert (output / "thesis.tex").read_text() == "years of work"


def test_a_failed_forced_build_keeps_the_old_engine(checkpoint, tmp_path):
    output = tmp_path / "engine"
    assert build(checkpoint, "--output", output).exit_code == 0
    before = Manifest.read(output)
    edit_tensors(checkpoint, lambda t: t["model.norm.weight"].fill(np.nan))
    assert build(checkpoint, "--output", output, "--force").exit_code == 1
    assert Manifest.read(output) == before
    verify_parts(output, before)


def test_a_failed_replacement_keeps_the_old_engine(checkpoint, tmp_path, monkeypatch):
    output = tmp_path / "out" / "engine"
    assert build(checkpoint, "--output", output).exit_code == 0
    before = Manifest.read(output)
    rename = Path.rename

    def fail_for_the_new_one(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    result = build(checkpoint, "--output", output, "--force", "--quant", "int8")
    assert result.exit_code == 1
    assert "Input/output error" in result.stderr
    assert Manifest.read(output) == before
    assert list(output.parent.iterdir()) == [output]


def test_from_python_too_nothing_is_replaced_unasked(checkpoint, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with Checkpoint.open(checkpoint) as weights:
        plan = plan_build(weights, resolve_checkpoint(str(checkpoint)), BuildOptions())
        for replace in (False, True):
            with pytest.raises(BuildError, match="exists; use --force|is not an engine"):
                write_engine(plan, weights, tmp_path, replace)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("function", ["posix_fallocate", "pwrite"])
def test_a_full_disk(function, checkpoint, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, full)
    refused(build(checkpoint, "--output", tmp_path / "out" / "engine"), "No space left on device", tmp_path / "out")


def test_an_output_that_cannot_be_written(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    result = build(checkpoint, "--output", tmp_path / "file" / "engine")
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr


def test_ctrl_c_leaves_nothing(checkpoint, tmp_path):
    """A real process, interrupted while it writes weights (which are made slow here)."""
    program = (
        "import os, time\n"
        "from qwen_build import checkpoint, cli\n"
        "read = checkpoint.Checkpoint.read\n"
        "def slow(*a):\n    os.write(1, b'reading\\n')\n    time.sleep(0.5)\n    return read(*a)\n"
        "checkpoint.Checkpoint.read = slow\n"
        "cli.main()\n"
    )
    output = tmp_path / "out" / "engine"
    command = [sys.executable, "-c", program, str(checkpoint), "--output", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    assert list(output.parent.iterdir())  # something is being written
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert not list(output.parent.iterdir())


def test_end_of_sequence_ids_are_the_union(checkpoint):
    edit_config(checkpoint, eos_token_id=7)
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [9, 7]}')
    (checkpoint / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    added = [{"id": 3, "content": "<|endoftext|>"}, {"id": 4, "content": "<|im_end|>"}, {"id": 5, "content": "other"}]
    (checkpoint / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    assert end_of_sequence_ids(checkpoint, ModelConfig.from_hf(checkpoint)) == (9, 7, 3, 4)


def test_the_tokenizer_travels_with_the_engine(checkpoint, tmp_path):
    for name in COPIED:
        (checkpoint / name).write_text("{}")
    assert build(checkpoint, "--output", tmp_path / "engine").exit_code == 0
    assert set(COPIED) <= set(Manifest.read(tmp_path / "engine").parts)
    assert all((tmp_path / "engine" / name).read_text() == "{}" for name in COPIED)


def test_defaults_follow_the_scheme():
    exact, quantised = BuildOptions(quant="none").resolved(), BuildOptions(quant="int4").resolved()
    assert (exact.embedding_quant, exact.kv_cache_dtype) == ("none", "float32")
    assert (quantised.embedding_quant, quantised.kv_cache_dtype) == ("int8", "float16")


def test_the_estimated_memory_bounds_a_slice(checkpoint):
    with Checkpoint.open(checkpoint) as weights:
        plan = plan_build(weights, resolve_checkpoint(str(checkpoint)), BuildOptions())
    assert plan.build_memory_bytes > export.SLICE_ELEMENTS * 4
