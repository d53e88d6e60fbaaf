"""Every benchmark explains itself and says in one line what it lacks, also where there is no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import peer_environments
from benchmarks.command import EXTRAS
from cases import ROOT

SCRIPTS = sorted(
    path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")
)
WITHOUT = """
import runpy, sys
sys.modules |= dict.fromkeys({packages})
sys.argv = ["benchmark", *{arguments}]
runpy.run_module("benchmarks.{name}", run_name="__main__")
"""


def run_without_extras(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    script = WITHOUT.format(name=name, packages=list(EXTRAS), arguments=[str(a) for a in arguments])
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_needs_no_extras(name: str) -> None:
    done = run_without_extras(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout) > 100


@pytest.mark.parametrize(("name", "package"), [("train_small", "torch"), ("write_gguf", "gguf")])
def test_what_is_missing_is_named_in_one_line(name: str, package: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    arguments = {"train_small": ["--output", tmp_path], "write_gguf": [tmp_path, tmp_path / "model.gguf"]}[name]
    done = run_without_extras(name, *arguments)
    remedy = f"run pip install -e '.[{EXTRAS[package]}]'"
    assert (done.returncode, done.stderr) == (1, f"Error: the package {package} is not installed; {remedy}\n")


def test_extras_are_those_of_the_package() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for package, extra in EXTRAS.items():
        assert [one for one in extras[extra] if one.startswith(package)], package


def test_peers_are_installed_with_the_torch_of_the_constraints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words: list[str] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: words.extend(map(str, command)))
    peer_environments.install(tmp_path)
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    (torch,) = [word for word in words if word.startswith("torch")]
    assert torch in constraints
    assert torch.startswith("torch==")
