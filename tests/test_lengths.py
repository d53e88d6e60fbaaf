"""How long sources are: a module has at most 400 lines or says at its top why not, a function at most 60."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from cases import ROOT

MOST_LINES, MOST_FUNCTION_LINES = 400, 60
REASON = "More than 400 lines: "  # begins the sentence of the docstring, or of the comment at the top, that says why
FOLDERS = ("qwen_engine", "qwen_plugin", "qwen_run", "qwen_serve", "qwen_build", "docs", "tests")
SUFFIXES = (".py", ".h", ".cc")
# Their lines are options and their help.
COMMAND_LINES = {"qwen_build/cli.py:main", "qwen_run/commands/run.py:main"}


def sources(root: Path) -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (root / folder).rglob("*") if path.suffix in SUFFIXES)


def top_of(path: Path) -> str:
    """The docstring of a module, or the comment that a C++ source begins with, in one line."""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        return " ".join((ast.get_docstring(ast.parse(text)) or "").split())
    lines = text.splitlines()
    count = next((number for number, line in enumerate(lines) if not line.startswith("//")), len(lines))
    return " ".join(line.removeprefix("//").strip() for line in lines[:count])


def too_long(root: Path) -> Iterator[str]:
    """Sources with too many lines and no reason, and those with a reason that they do not need."""
    for path in sources(root):
        count, has_reason = len(path.read_text("utf-8").splitlines()), REASON in top_of(path)
        if (count > MOST_LINES) != has_reason:
            yield f"{path.relative_to(root)}: {count} lines, {'a' if has_reason else 'no'} reason at its top"


def long_functions(root: Path) -> Iterator[str]:
    for path in sources(root):
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                name, count = f"{path.relative_to(root)}:{node.name}", node.end_lineno - node.lineno + 1
                if count > MOST_FUNCTION_LINES and name not in COMMAND_LINES:
                    yield f"{name} has {count} lines"


def test_no_module_is_too_long_without_a_reason() -> None:
    assert list(too_long(ROOT)) == []


def test_no_function_is_too_long() -> None:
    assert list(long_functions(ROOT)) == []


@pytest.mark.parametrize(
    ("name", "top", "found"),
    [
        ("qwen_run/a.py", '"""What it is."""', True),
        ("qwen_run/a.py", f'"""What it is. {REASON}it is a table."""', False),
        ("qwen_run/a.py", f"# {REASON}no docstring", True),
        ("qwen_plugin/csrc/a/b.h", "// What it is.\n#pragma once", True),
        ("qwen_plugin/csrc/a/b.h", f"// What it is.\n// {REASON}it is a table.", False),
        ("qwen_plugin/csrc/a/b.cc", f"#include <a>\n// {REASON}not at its top", True),
        ("tests/a/test_b.py", '"""Cases."""', True),
    ],
)
def test_a_planted_module_is_found(tmp_path: Path, name: str, top: str, found: bool) -> None:
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("\n".join([top, *["x = 1"] * MOST_LINES]))
    assert [line.split(":")[0] for line in too_long(tmp_path)] == ([name] if found else [])


def test_a_reason_that_is_not_needed_is_found(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/a.py").write_text(f'"""Short. {REASON}once."""\n')
    assert list(too_long(tmp_path)) == ["tests/a.py: 1 lines, a reason at its top"]


def test_a_planted_function_is_found(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.py").write_text("\n".join(["class A:", "    def f(self):", *["        x = 1"] * 60]))
    assert list(long_functions(tmp_path)) == ["docs/a.py:f has 61 lines"]
