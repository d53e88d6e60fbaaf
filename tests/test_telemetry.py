"""ONNX Runtime does not report to its maker: nothing of it is there that could, and it leaves no file."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cases.processes import PATIENCE_S

ROOT = Path(__file__).parents[1]
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
IMPORTS = ["qwen_run", "qwen_build", "qwen_plugin", "benchmarks", *(name.split(":")[0] for name in COMMANDS.values())]

# What ONNX Runtime sends with is a thread of its own, which looks up names some seconds later.
THREADS = "import onnxruntime, os; onnxruntime.SessionOptions(); print(len(os.listdir('/proc/self/task')))"


def run_afresh(script: str, home: Path) -> tuple[str, list[Path]]:
    """What a fresh interpreter prints, and the files it leaves in a home of its own."""
    home.mkdir()
    # Not what we have in our environment: CI switches it off too.
    environment = {"PATH": os.defpath, "HOME": str(home), "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    output = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        cwd=home,
        timeout=PATIENCE_S,
    ).stdout
    return output.strip(), [path for path in home.rglob("*") if path.is_file()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this system does not show the threads of a process")
@pytest.mark.parametrize("module", IMPORTS)
def test_nothing_is_left_that_could_report(module: str, tmp_path: Path) -> None:
    assert run_afresh(f"import {module}; {THREADS}", tmp_path / "home") == ("1", [])


def test_the_switch_overrides_what_the_environment_says(tmp_path: Path) -> None:
    script = "import os; os.environ['ORT_DISABLE_TELEMETRY'] = '0'; import qwen_run, onnxruntime"
    assert run_afresh(script, tmp_path / "home") == ("", [])
