"""``qwen-build`` and what is where the engine goes: nothing is lost, nothing half-written, whatever interrupts."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cases.builds import edit_tensors, refused, run_build, tiny_tokenizer
from cases.processes import PATIENCE_S, start_python
from qwen_build.checkpoint.locate import resolve_checkpoint
from qwen_build.checkpoint.weights import Checkpoint
from qwen_build.engine_build import plan_build, write_engine
from qwen_build.plan.options import BuildOptions
from qwen_engine.errors import BuildError
from qwen_engine.manifest import MANIFEST_FILE, Manifest
from qwen_engine.whole_files import NEW, OLD, scratch_beside
from qwen_run.engine_files.checksums import verify_parts


def test_an_existing_engine_is_kept_unless_forced(checkpoint, tmp_path):
    output = tmp_path / "engine"
    assert run_build(checkpoint, "--output", output).exit_code == 0
    before = (output / MANIFEST_FILE).read_text()
    result = run_build(checkpoint, "--output", output, "--quant", "int8")
    assert result.exit_code == 1
    assert result.stderr == f"Error: {output} exists; use --force to replace it.\n"
    assert (output / MANIFEST_FILE).read_text() == before
    assert run_build(checkpoint, "--output", output, "--quant", "int8", "--force").exit_code == 0
    assert Manifest.read(output).linears[1].quantization.bits == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "tiny"]


def test_force_does_not_replace_what_is_no_engine(checkpoint, tmp_path):
    output = tmp_path / "precious"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("years of work")
    for spelled, found in ((output, "holds other files"), (tmp_path / "file", "is a file")):
        for force in ((), ("--force",)):
            result = run_build(checkpoint, "--output", spelled, *force)
            assert result.exit_code == 1
            expected = f"{spelled} {found} and is not an engine, which --force could replace; choose another --output"
            assert expected in result.stderr
    assert (output / "thesis.tex").read_text() == (tmp_path / "file").read_text() == "years of work"


@pytest.mark.parametrize("manifest", ["intact", "of another version"])
def test_force_deletes_nothing_but_the_engine(manifest, checkpoint, tmp_path):
    output = tmp_path / "engine"
    assert run_build(checkpoint, "--output", output).exit_code == 0
    if manifest != "intact":
        (output / MANIFEST_FILE).write_text('{"format_version": 0}')
    (output / "notes.txt").write_text("mine")
    result = run_build(checkpoint, "--output", output, "--force")
    assert result.exit_code == 1
    assert "holds notes.txt, which is no part of the engine" in result.stderr
    assert (output / "notes.txt").read_text() == "mine"
    (output / "notes.txt").unlink()
    assert run_build(checkpoint, "--output", output, "--force").exit_code == 0


def test_an_engine_behind_a_link_is_replaced_and_not_the_link(checkpoint, tmp_path):
    engine, link, elsewhere = tmp_path / "a" / "engine", tmp_path / "b" / "link", tmp_path / "b" / "new"
    assert run_build(checkpoint, "--output", engine).exit_code == 0
    link.parent.mkdir()
    link.symlink_to(engine)
    assert run_build(checkpoint, "--output", link, "--force", "--quant", "int8").exit_code == 0
    assert link.is_symlink()
    assert Manifest.read(engine).linears[1].quantization.bits == 8
    elsewhere.symlink_to(tmp_path / "c" / "engine")  # leads nowhere yet
    assert run_build(checkpoint, "--output", elsewhere).exit_code == 0
    verify_parts(tmp_path / "c" / "engine", Manifest.read(elsewhere))
    names = {d: sorted(path.name for path in (tmp_path / d).iterdir()) for d in "abc"}
    assert names == {"a": ["engine"], "b": ["link", "new"], "c": ["engine"]}


@pytest.mark.parametrize("spelled", [".", "../engine", "absent/.."])
def test_an_output_without_a_name_of_its_own(spelled, checkpoint, tmp_path, monkeypatch):
    output = tmp_path / "out" / "engine"
    assert run_build(checkpoint, "--output", output).exit_code == 0
    monkeypatch.chdir(output)
    assert f"{spelled} exists; use --force" in run_build(checkpoint, "--output", spelled).stderr
    result = run_build(checkpoint, "--output", spelled, "--force", "--quant", "int8")
    assert result.exit_code == 0, result.output
    monkeypatch.chdir(tmp_path)
    assert list(output.parent.iterdir()) == [output]


def test_names_the_system_does_not_take(checkpoint, tmp_path):
    refused(run_build(checkpoint, "--output", tmp_path / "out" / ("x" * 300)), "File name too long", tmp_path / "out")


def test_names_that_are_not_utf8(checkpoint, tmp_path):
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    tiny_tokenizer().save(str(checkpoint / "tokenizer.json"))
    shutil.copytree(checkpoint, strange)
    result = run_build(strange, "--output", strange + "-engine")
    assert result.exit_code == 0, result.output
    manifest = Manifest.read(Path(strange + "-engine"))
    assert (manifest.name, manifest.origin.checkpoint) == ("caf\ufffd", f"{tmp_path}/caf\ufffd")


def test_a_failed_forced_build_keeps_the_old_engine(checkpoint, tmp_path):
    output = tmp_path / "engine"
    assert run_build(checkpoint, "--output", output).exit_code == 0
    before = Manifest.read(output)
    edit_tensors(checkpoint, lambda t: t["model.norm.weight"].fill(np.nan))
    assert run_build(checkpoint, "--output", output, "--force").exit_code == 1
    assert Manifest.read(output) == before
    verify_parts(output, before)


def test_a_failed_replacement_keeps_the_old_engine(checkpoint, tmp_path, monkeypatch):
    output = tmp_path / "out" / "engine"
    assert run_build(checkpoint, "--output", output).exit_code == 0
    before = Manifest.read(output)
    rename = Path.rename

    def fail_for_the_new_one(self: Path, target: Path) -> Path:
        if self.name == NEW:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    result = run_build(checkpoint, "--output", output, "--force", "--quant", "int8")
    assert result.exit_code == 1
    assert "Input/output error" in result.stderr
    assert Manifest.read(output) == before
    assert list(output.parent.iterdir()) == [output]


def test_from_python_too_nothing_is_replaced_unasked(checkpoint, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with Checkpoint.open(checkpoint) as weights:
        plan = plan_build(weights, resolve_checkpoint(str(checkpoint)), BuildOptions())
        for replace in (False, True):
            with pytest.raises(BuildError, match="holds other files and is not an engine"):
                write_engine(plan, weights, tmp_path, replace)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("function", ["posix_fallocate", "pwrite"])
def test_a_full_disk(function, checkpoint, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, full)
    refused(run_build(checkpoint, "--output", tmp_path / "out" / "engine"), "No space left on device", tmp_path / "out")


def test_an_output_that_cannot_be_written(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    result = run_build(checkpoint, "--output", tmp_path / "file" / "engine")
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr


def slow_build(checkpoint: Path, output: Path, seconds: float = 0.5) -> subprocess.Popen[str]:
    """A real process that is in the middle of writing weights; each takes ``seconds`` to read."""
    program = (
        "import os, time\n"
        "from qwen_build import cli\nfrom qwen_build.checkpoint import weights as checkpoint\n"
        "read = checkpoint.Checkpoint.read\n"
        "def slow(*a):\n    os.write(1, b'reading\\n')\n    time.sleep(SECONDS)\n    return read(*a)\n"
        "checkpoint.Checkpoint.read = slow\n"
        "cli.main()\n"
    )
    program = program.replace("SECONDS", str(seconds))
    process = start_python(program, checkpoint, "--output", output)
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    assert list(output.parent.iterdir())  # something is being written
    return process


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_build_leaves_nothing(number, checkpoint, tmp_path):
    output = tmp_path / "out" / "engine"
    process = slow_build(checkpoint, output)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + number
    assert "Traceback" not in stderr
    assert not list(output.parent.iterdir())


def test_what_a_killed_build_left_goes_with_the_next_one(checkpoint, tmp_path):
    output = tmp_path / "out" / "engine"
    killed, alive, other = (slow_build(checkpoint, path, 5) for path in (output, output, output.parent / "engine.2"))
    left = set(output.parent.iterdir())
    assert len(left) == 3
    killed.kill()
    killed.communicate(timeout=PATIENCE_S)
    (output.parent / ".engine.notes.partial").mkdir()  # not a name of ours
    assert run_build(checkpoint, "--output", output).exit_code == 0
    rest = {path.name.rpartition(".")[0].rpartition(".")[0] for path in output.parent.glob(".*")}
    assert rest == {".engine", ".engine.2"}
    assert len(left & set(output.parent.iterdir())) == 2  # those of the living
    assert (output.parent / ".engine.notes.partial").exists()
    for process in (alive, other):
        process.kill()
        process.communicate(timeout=PATIENCE_S)


def test_an_engine_lost_between_two_renames_comes_back(checkpoint, tmp_path):
    output = tmp_path / "engine"
    assert run_build(checkpoint, "--output", output).exit_code == 0
    scratch = tmp_path / ".engine.abcdefgh.partial"
    scratch.mkdir()
    output.rename(scratch / OLD)
    (checkpoint / "config.json").rename(tmp_path / "config.json")  # so that the next build fails ...
    with scratch_beside(output):  # ... but not before it looked at what is left
        pass
    verify_parts(output, Manifest.read(output))
    assert not scratch.exists()
