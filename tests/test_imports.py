"""Who may import whom: read from the source, and seen in a fresh interpreter."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from cases.imports import circle, climbing, find_imports, misplaced, module_name, room_of
from cases.processes import run_python

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
    "lm_eval",
    "ray",
}
SERVER = {"fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client"}
RUNTIME = {"numpy", "onnxruntime", "tokenizers", "jinja2", "click", "prompt_toolkit", "tqdm"}

# package -> top-level modules that must not be there after importing all of it
FORBIDDEN = {
    "qwen_engine": {"qwen_plugin", "qwen_run", "qwen_build", "qwen_serve", *RUNTIME, *HEAVY},
    "qwen_plugin": {"qwen_run", "qwen_build", "qwen_serve", *(RUNTIME - {"numpy"}), *HEAVY},
    "qwen_run": {"qwen_build", "qwen_serve", "llguidance", *HEAVY, *SERVER},
    "qwen_serve": {"qwen_build", *HEAVY},
    "qwen_build": {"torch", "transformers", "qwen_serve", *SERVER},
}

# From the lowest floor to the highest: a module imports from its own room and from lower floors, also inside functions.
FLOORS = (
    ("qwen_engine",),
    ("qwen_plugin",),
    ("qwen_run.sampling", "qwen_run.engine_files"),
    ("qwen_run.runtime",),
    ("qwen_run.pipeline",),
    ("qwen_run.text",),
    ("qwen_run.api",),
    ("qwen_run.torch_model", "qwen_run.harness"),
    ("qwen_run.accuracy",),
    ("qwen_run.reports",),
    ("qwen_run.bench", "qwen_run.inspection"),
    ("qwen_run.commands",),
    ("qwen_run",),  # the public names
    ("qwen_serve.common", "qwen_serve.answers"),
    ("qwen_serve.engine",),
    ("qwen_serve.openai",),
    ("qwen_serve.anthropic", "qwen_serve.page"),
    ("qwen_serve.http",),
    ("qwen_serve.cli",),
    ("qwen_serve",),
    ("qwen_build.architectures", "qwen_build.quantization"),
    ("qwen_build.checkpoint",),
    ("qwen_build.graph",),
    ("qwen_build.plan", "qwen_build.writing"),
    ("qwen_build.calibration",),
    ("qwen_build.engine_build",),
    ("qwen_build.auto",),
    ("qwen_build.cli_output",),
    ("qwen_build.cli",),
    ("qwen_build",),  # the public function
)
# What these modules of the package import inside functions, no other module of it imports.
INSIDE_FUNCTIONS = {
    "qwen_run": {
        "qwen_build": (
            "qwen_run.accuracy.origin_checks",
            "qwen_run.accuracy.builder_weights",
            "qwen_run.accuracy.reference_sources",
            "qwen_run.api.build_on_demand",
        ),
        **dict.fromkeys(HEAVY, ()),
        "torch": ("qwen_run.accuracy.reference",),
        "transformers": ("qwen_run.accuracy.reference",),
        "huggingface_hub": ("qwen_run.torch_model.loading",),
        "gguf": ("qwen_run.accuracy.gguf_weights",),
        "llguidance": ("qwen_run.text.grammar",),
        "ray": ("qwen_run.pipeline.ray_stages",),
    },
    "qwen_build": {
        "torch": (),
        "transformers": (),
        "gguf": ("qwen_build.checkpoint.demo", "qwen_build.checkpoint.formats.gguf"),
        "huggingface_hub": ("qwen_build.checkpoint.locate",),
    },
    "qwen_serve": dict.fromkeys(["qwen_build", *HEAVY], ()),
    "qwen_plugin": dict.fromkeys(HEAVY, ()),
    "qwen_engine": dict.fromkeys(HEAVY, ()),
}
# Rooms that are imported only where these libraries are wanted.
FREE = {"qwen_run.torch_model": {"torch", "transformers"}, "qwen_run.harness": {"lm_eval"}}
IMPORTS = find_imports(ROOT, FORBIDDEN)


def test_imports_lead_downwards() -> None:
    assert climbing(IMPORTS, FLOORS, INSIDE_FUNCTIONS["qwen_run"]) == []


def test_every_room_has_its_floor() -> None:
    modules = {module_name(path, ROOT) for package in FORBIDDEN for path in (ROOT / package).rglob("*.py")}
    assert sorted({room_of(module) for module in modules}) == sorted(room for floor in FLOORS for room in floor)


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(IMPORTS) == []


@pytest.mark.parametrize("package", INSIDE_FUNCTIONS)
def test_what_is_heavy_is_imported_where_it_may_be_alone(package: str) -> None:
    assert misplaced(IMPORTS, INSIDE_FUNCTIONS[package], package, FREE) == []


def test_tests_import_from_cases_and_not_from_each_other() -> None:
    names = {module_name(path, ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    names |= {name.rpartition(".")[2] for name in names} | {"conftest"}
    assert [found for found in find_imports(ROOT, ["tests"]) if found.target.removeprefix("tests.") in names] == []


MADE_UP = {
    "qwen_engine/errors.py": "",
    "qwen_run/__init__.py": "",
    "qwen_run/low/__init__.py": "",
    "qwen_run/low/deep/a.py": "import qwen_engine.errors\nfrom . import b",
    "qwen_run/low/deep/b.py": "",
    "qwen_run/high/c.py": "from qwen_run.low.deep import a\nfrom ..low.deep.b import name",
    "qwen_run/free/f.py": "import torch",
    "qwen_run/high/d.py": "def call():\n    import torch.nn\n    from qwen_build import build",
    "qwen_build/build.py": "",
}
MADE_UP_FLOORS = (
    ("qwen_engine",),
    ("qwen_run.low", "qwen_run.beside"),
    ("qwen_run.free",),
    ("qwen_run.high",),
    ("qwen_build.build",),
)
MADE_UP_FLOORS = (*MADE_UP_FLOORS, ("qwen_run",))
MADE_UP_FREE = {"qwen_run.free": {"torch"}}
MADE_UP_LAZY = {"torch": ("qwen_run.high.d",), "qwen_build": ("qwen_run.high.d",)}


def made_up_complaints(root: Path, changes: dict[str, str]) -> list[str]:
    """What is found in the tree ``MADE_UP`` with ``changes``."""
    for name, text in (MADE_UP | changes).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    imports = find_imports(root, ["qwen_engine", "qwen_run", "qwen_build"])
    complaints = climbing(imports, MADE_UP_FLOORS, MADE_UP_LAZY) + misplaced(
        imports, MADE_UP_LAZY, "qwen_run", MADE_UP_FREE
    )
    found = circle(imports)
    return complaints + ([f"circle of {', '.join(sorted(set(found)))}"] if found else [])


def test_a_tree_that_keeps_the_rules_is_not_complained_of(tmp_path: Path) -> None:
    assert made_up_complaints(tmp_path, {}) == []


C, E, LOW = "qwen_run.high.c", "qwen_run.high.e", "which is not below it"


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("qwen_run/low/deep/b.py", "import qwen_run.high.c", f"qwen_run.low.deep.b imports {C}, {LOW}"),
        ("qwen_run/low/deep/b.py", "from qwen_run.high import c", f"qwen_run.low.deep.b imports {C}, {LOW}"),
        ("qwen_run/low/deep/b.py", "from ...high.c import x", f"qwen_run.low.deep.b imports {C}, {LOW}"),
        ("qwen_run/low/e.py", "def f():\n  import qwen_run.high.c", f"qwen_run.low.e imports {C}, {LOW}"),
        ("qwen_run/low/e.py", "f = lambda: __import__('qwen_run.high.c')", f"qwen_run.low.e imports {C}, {LOW}"),
        ("qwen_run/low/e.py", "import qwen_run.beside.x", f"qwen_run.low.e imports qwen_run.beside.x, {LOW}"),
        ("qwen_run/low/e.py", "from qwen_run import LLM", f"qwen_run.low.e imports qwen_run, {LOW}"),
        ("qwen_engine/e.py", "import qwen_run.low.deep.a", f"qwen_engine.e imports qwen_run.low.deep.a, {LOW}"),
        ("qwen_run/new/e.py", "", None),  # a room without imports breaks no rule
        ("qwen_run/new/e.py", "import qwen_engine.errors", "qwen_run.new has no floor"),
        ("qwen_run/high/e.py", "import qwen_run.new", f"{E} imports qwen_run.new, which has no floor"),
        ("qwen_run/high/e.py", "def f():\n  import qwen_build.build", f"{E} imports qwen_build.build, {LOW}"),
        ("qwen_run/high/e.py", "def f():\n  import torch", f"{E} imports torch"),
        ("qwen_run/high/e.py", "import qwen_run.free.f", f"{E} imports qwen_run.free.f at module level"),
        ("qwen_run/high/e.py", "def f():\n  import qwen_run.free.f", None),
        ("qwen_run/low/d.py", "def f():\n  import torch", "qwen_run.low.d imports torch"),  # of the same stem
        ("qwen_run/high/d.py", "import torch", "qwen_run.high.d imports torch at module level"),
        ("qwen_run/high/d.py", "def f():\n  import torch", "qwen_run.high.d does not import qwen_build"),
        ("qwen_run/low/deep/b.py", "import qwen_run.low.deep.a", "circle of qwen_run.low.deep.a, qwen_run.low.deep.b"),
    ],
)  # fmt: skip
def test_a_planted_violation_is_found(tmp_path: Path, path: str, text: str, complaint: str | None) -> None:
    found = made_up_complaints(tmp_path, {path: text})
    assert (complaint in found) if complaint else found == []


def modules_of(package: str) -> list[str]:
    paths = sorted(path.relative_to(ROOT).with_suffix("") for path in (ROOT / package).rglob("*.py"))
    names = [package, *(".".join(path.parts) for path in paths if not path.name.startswith("__"))]
    return [name for name in names if room_of(name) not in FREE]


def loaded_after(statement: str) -> set[str]:
    """The top-level modules a fresh interpreter has after ``statement``."""
    script = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    result = run_python(script)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_imports_only_what_it_may(package: str) -> None:
    if package == "qwen_serve":
        pytest.importorskip("fastapi", reason="the extra serve is not installed")
    loaded = loaded_after(f"import {', '.join(modules_of(package))}")
    assert package in loaded
    assert loaded & FORBIDDEN[package] == set()


def test_forbidden_modules_are_seen() -> None:
    assert {"numpy", "qwen_run"} <= loaded_after("import qwen_run.runtime.kv_cache")


def test_no_two_classes_have_one_name() -> None:
    found: dict[str, list[str]] = {}
    for package in FORBIDDEN:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef):
                    found.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}
