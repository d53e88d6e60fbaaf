"""``qwen_build.build``: the command ``qwen-build`` for programs."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import qwen_build
from cases.processes import run_python
from qwen_build import BuildChoices
from qwen_build.auto import search
from qwen_build.cli import main
from qwen_build.plan.options import BuildOptions
from qwen_engine.errors import BuildError
from qwen_engine.manifest import WEIGHTS_FILE, Manifest


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Any) -> Path:
    path: Path = tiny_checkpoint("qwen2").path
    return path


def test_it_builds_what_the_command_builds(checkpoint: Path, tmp_path: Path) -> None:
    engine = qwen_build.build(checkpoint, tmp_path / "called", quant="int8", group_size=64, exclude="lm_head")
    with pytest.raises(SystemExit, match="0"):
        main(
            [str(checkpoint), "--quant=int8", "--group-size=64", "--exclude=lm_head", f"--output={tmp_path / 'typed'}"]
        )
    assert engine == tmp_path / "called"
    assert (engine / WEIGHTS_FILE).read_bytes() == (tmp_path / "typed" / WEIGHTS_FILE).read_bytes()


def test_what_of_a_checkpoint_is_left_out_is_a_warning(checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"use_foo": True}))
    with pytest.warns(UserWarning, match="config.json has use_foo, unknown to qwen2's configuration and left unread"):
        qwen_build.build(copy, tmp_path / "engine")


def test_the_manifest_keeps_the_call(checkpoint: Path, tmp_path: Path) -> None:
    engine = qwen_build.build(str(checkpoint), tmp_path / "engine", quant="int8")
    call = f"qwen_build.build({str(checkpoint)!r}, {str(engine)!r}, quant='int8')"
    assert Manifest.read(engine).origin.command == call


def test_its_options_and_defaults_are_the_commands() -> None:
    parameters = inspect.signature(qwen_build.build).parameters
    ours = {name: found.default for name, found in parameters.items() if found.kind is found.KEYWORD_ONLY}
    ours |= {name: BuildOptions.__dataclass_fields__[name].default for name in BuildChoices.__annotations__}
    theirs = {str(option.name): option.to_info_dict()["default"] for option in main.params}
    assert ours.keys() == theirs.keys() - {"version", "dry_run", "as_json", "output", "checkpoint"}
    assert {name: ours[name] or None for name in ours} == {name: theirs[name] or None for name in ours}


def test_an_engine_is_replaced_with_force_alone(checkpoint: Path, tmp_path: Path) -> None:
    engine = qwen_build.build(checkpoint, tmp_path / "engine", quant="int8")
    with pytest.raises(BuildError, match="exists"):
        qwen_build.build(checkpoint, engine, quant="none")
    qwen_build.build(checkpoint, engine, quant="none", force=True)
    assert {linear.quantization.scheme for linear in Manifest.read(engine).linears} == {"none"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quants": "int8"}, "unknown option quants, expected quant, "),
        ({"max_kl": 0.1}, 'max_kl is a budget for quant="auto" to choose within'),
        ({"max_size": 1000, "quant": "int8"}, 'max_size is a budget for quant="auto"'),
    ],
)
def test_options_that_cannot_be_are_refused(
    options: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(BuildError, match=message):
        qwen_build.build(checkpoint, tmp_path / "engine", **options)
    assert not (tmp_path / "engine").exists()


def test_auto_gets_its_budget(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(search, "build_auto", lambda weights, located, *rest: calls.append((located.path, *rest)))
    qwen_build.build(checkpoint, tmp_path / "engine", quant="auto", max_size=60_000, force=True)
    (path, options, target, max_kl, max_bytes, force, _) = calls[0]
    assert (path, options.quant, target) == (checkpoint, "auto", tmp_path / "engine")
    assert (max_kl, max_bytes, force) == (None, 60_000, True)


def test_importing_the_package_loads_nothing_else() -> None:
    script = "import sys, qwen_build; print({'numpy', 'onnx', 'click', 'qwen_run'} & set(sys.modules))"
    assert run_python(script, check=True).stdout == "set()\n"
