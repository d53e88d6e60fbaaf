"""What importing each package pulls in, seen in a fresh interpreter."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "safetensors",
    "ml_dtypes",
    "huggingface_hub",
    "gguf",
}
RUNTIME = {"numpy", "onnxruntime", "tokenizers", "jinja2", "click", "prompt_toolkit", "tqdm"}

# package -> top-level modules that must not be there after importing all of it
FORBIDDEN = {
    "qwen_engine": {"qwen_plugin", "qwen_run", "qwen_build", *RUNTIME, *HEAVY},
    "qwen_plugin": {"qwen_run", "qwen_build", *(RUNTIME - {"numpy"}), *HEAVY},
    "qwen_run": {"qwen_build", *HEAVY},
    "qwen_build": {"torch", "transformers"},
}


def modules_of(package: str) -> list[str]:
    paths = sorted(path.relative_to(ROOT).with_suffix("") for path in (ROOT / package).rglob("*.py"))
    return [package, *(".".join(path.parts) for path in paths if not path.name.startswith("__"))]


def loaded_after(statement: str) -> set[str]:
    """The top-level modules a fresh interpreter has after ``statement``."""
    script = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_imports_only_what_it_may(package: str) -> None:
    loaded = loaded_after(f"import {', '.join(modules_of(package))}")
    assert package in loaded
    assert loaded & FORBIDDEN[package] == set()


def modules_that_import(package: str, *names: str) -> set[str]:
    """Those of ``package`` that import one of ``names``, inside functions too."""
    found = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if {name.partition(".")[0] for name in imported} & set(names):
                found.add(path.stem)
    return found


def test_what_imports_inside_functions() -> None:
    assert modules_that_import("qwen_run", "qwen_build") == {
        "build_on_demand",
        "origin_checks",
        "reference_sources",
        "weight_checks",
    }
    assert modules_that_import("qwen_run", "torch", "transformers") == {"reference"}
    assert not modules_that_import("qwen_build", "torch", "transformers")


def test_forbidden_modules_are_seen() -> None:
    assert {"numpy", "qwen_run"} <= loaded_after("import qwen_run.runtime.kv_cache")
