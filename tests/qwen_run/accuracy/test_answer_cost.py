"""What an answer costs is measured in a process of its own, which imports nothing of the current folder."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cases import ROOT
from qwen_run.accuracy.answer_cost import measure_cost

PACKAGES = ("qwen_engine", "qwen_plugin", "qwen_run", "qwen_build")


def test_files_of_the_current_folder_are_not_run(
    tiny_checkpoint: Callable[..., Any],
    build_engine: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = build_engine(tiny_checkpoint("qwen2").path, quant="int8")
    (tmp_path / "numpy.py").write_text("raise ImportError('a file of the current folder was run')")
    monkeypatch.chdir(tmp_path)
    cost = measure_cost("engine", engine, 1, [[1, 2, 3]], 1000)
    assert (cost.side, cost.size_bytes) == ("engine", 1000)
    assert cost.decode_tokens_per_s > 0


@pytest.mark.parametrize("package", PACKAGES)
def test_every_interpreter_is_started_without_the_current_folder(package: str) -> None:
    commands = [
        [ast.unparse(word) for word in node.elts]
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.List) and node.elts and ast.unparse(node.elts[0]) == "sys.executable"
    ]
    assert [command for command in commands if command[1] != "'-P'"] == []
    assert bool(commands) == (package in {"qwen_plugin", "qwen_run"})  # those that start any
