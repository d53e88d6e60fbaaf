"""The compile step: which compiler, which files, what it says when it fails."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import qwen_plugin
from qwen_engine.errors import EngineError
from qwen_plugin import compile as compiling


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_the_users_compiler_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "ccache my-g++ -m64")
    assert compiling.find_compiler() == ["ccache", "my-g++", "-m64"]


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_error_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no C\\+\\+ compiler found; install g\\+\\+"):
        compiling.compile_library(tmp_path / "library.so")


@pytest.mark.usefixtures("no_compiler")
def test_ziglang_is_the_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "ziglang" else None)
    command = compiling.find_compiler()
    assert command is not None
    assert command[:4] == [sys.executable, "-m", "ziglang", "c++"]


def test_a_failing_compiler_is_quoted_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'out of tea' >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(EngineError, match=r"(?s)the C\+\+ compiler failed: .*out of tea"):
        compiling.compile_library(tmp_path / "out" / "library.so")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_compiler_that_does_not_exist_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(EngineError, match="no-such-compiler cannot be run"):
        compiling.compile_library(tmp_path / "library.so")


def test_a_library_older_than_a_source_is_not_current(tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    assert not compiling.is_current(library)
    library.touch()
    assert compiling.is_current(library)
    os.utime(library, (0, 0))
    assert not compiling.is_current(library)


@pytest.mark.parametrize(
    ("machine", "sets"),
    [
        ("x86_64", {"amx", "avx2", "avxvnni", "avx512", "avx512vnni", "plain"}),
        ("aarch64", {"neon", "neondot", "plain"}),
        ("arm64", {"neon", "neondot", "plain"}),
        ("riscv64", {"plain"}),
    ],
)
def test_only_this_processors_instruction_sets_are_compiled(
    machine: str, sets: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    flags = {path.stem: flags for path, flags in compiling.sources().items()}
    assert {stem.split("_")[2] for stem in flags if stem.count("_") == 2} == sets  # paged_attention_*, quant_linear_*
    assert not flags["paged_attention_plain"]
    assert not flags["quant_linear"]


def test_a_missing_library_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen_plugin, "LIBRARY_NAME", "absent.so")
    with pytest.raises(EngineError, match=r"absent\.so has not been compiled; install the package again"):
        qwen_plugin.library_path()


def test_the_table_of_operators_is_the_sources() -> None:
    found = {}
    for path in compiling.SOURCES.rglob("*.cc"):
        source = path.read_text()
        name = re.search(r"(?:kName = |GetName = .*return )\"(\w+)\"", source)
        version = re.search(r"(?:kVersion = |GetEndVersion = .*return )(\d+)", source)
        assert (name is None) == (version is None)
        if name is not None and version is not None:
            found["qwen", name[1]] = int(version[1])
    assert found == qwen_plugin.OPERATORS


def backend() -> ModuleType:
    pytest.importorskip("setuptools")
    return importlib.import_module("qwen_plugin.build_backend")


@pytest.mark.parametrize("hook", ["get_requires_for_build_wheel", "get_requires_for_build_editable"])
def test_the_build_asks_for_ziglang_only_without_a_compiler(hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = backend()
    monkeypatch.setattr(module.build_meta, hook, lambda settings: ["else"])
    monkeypatch.setattr(module, "find_compiler", lambda: ["g++"])
    assert getattr(module, hook)() == ["else"]
    monkeypatch.setattr(module, "find_compiler", lambda: None)
    assert getattr(module, hook)() == ["else", "ziglang>=0.13"]
