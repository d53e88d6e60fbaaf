"""The compile step: which compiler, which files, what it says when it fails."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import os
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
    with pytest.raises(EngineError, match=r"no C\+\+ compiler found for \w+; install g\+\+"):
        compiling.compile_library(tmp_path / "library.so")


@pytest.mark.usefixtures("no_compiler")
def test_ziglang_is_the_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "ziglang" else None)
    command = compiling.find_compiler()
    assert command is not None
    assert command[:5] == [sys.executable, "-P", "-m", "ziglang", "c++"]


def test_a_wheel_for_other_machines_is_compiled_by_ziglang_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    target = compiling.Target.of_wheel("manylinux_2_28_aarch64")
    monkeypatch.setenv("CXX", "my-g++")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "ziglang" else None)
    assert compiling.find_compiler(target) == [
        *(sys.executable, "-P", "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu.2.28"),
    ]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert compiling.find_compiler(target) is None
    with pytest.raises(EngineError, match=r"no C\+\+ compiler found for aarch64; pip install ziglang"):
        compiling.compile_library(Path("library.so"), target=target)


@pytest.mark.parametrize("tag", ["linux_x86_64", "manylinux_2_28_riscv64", "manylinux2014_x86_64", "win_amd64", ""])
def test_platforms_without_wheels_are_refused(tag: str) -> None:
    with pytest.raises(EngineError, match=f"wheels cannot be made for the platform '{tag}', expected one such as"):
        compiling.Target.of_wheel(tag)


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(compiling) == doctest.TestResults(failed=0, attempted=1)


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
def test_only_this_processors_instruction_sets_are_compiled(machine: str, sets: set[str]) -> None:
    flags = {path.stem: flags for path, flags in compiling.sources(machine).items()}
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


@pytest.mark.parametrize("option", ["--plat-name=manylinux_2_28_aarch64", ["--verbose", "--plat-name=any"]])
def test_a_wheel_for_other_machines_asks_for_ziglang(option: object, monkeypatch: pytest.MonkeyPatch) -> None:
    module = backend()
    monkeypatch.setattr(module.build_meta, "get_requires_for_build_wheel", lambda settings: ["else"])
    monkeypatch.setattr(module, "find_compiler", lambda: ["g++"])
    assert module.get_requires_for_build_wheel({"--build-option": option}) == ["else", "ziglang>=0.13"]
