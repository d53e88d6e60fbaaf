"""Who imports whom, read from the source: imports at module level, inside functions, and by ``import_module``."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

# Packages whose sub-packages are rooms of their own. Any other package is one room.
DIVIDED = ("qwen_run", "qwen_build", "qwen_serve")


@dataclass(frozen=True)
class Import:
    """One import statement: ``target`` is the module or package that ``importer`` names.

    Attributes:
        lazy: only a call runs it, or nothing does (``if TYPE_CHECKING``).
    """

    importer: str
    target: str
    lazy: bool


def module_name(path: Path, root: Path) -> str:
    """``root/a/b.py`` is ``a.b``, and ``root/a/__init__.py`` is ``a``."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def find_imports(root: Path, packages: Iterable[str]) -> list[Import]:
    """Every import of every module of ``packages``, at any depth of folders."""
    paths = {module_name(path, root): path for package in packages for path in (root / package).rglob("*.py")}
    return [found for name, path in sorted(paths.items()) for found in _imports_of(name, path, paths)]


def _imports_of(importer: str, path: Path, modules: Mapping[str, Path]) -> Iterator[Import]:
    package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for target in _targets(node, package, modules):
            yield Import(importer, target, lazy)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for field, value in ast.iter_fields(node):
            never_run = isinstance(node, ast.If) and field == "body" and "TYPE_CHECKING" in ast.unparse(node.test)
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from visit(child, inside or never_run)

    return visit(ast.parse(path.read_text(encoding="utf-8")), False)


def _targets(node: ast.AST, package: str, modules: Mapping[str, Path]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        origin = ".".join([*parents, *([node.module] if node.module else [])])
        names = [f"{origin}.{alias.name}" for alias in node.names]  # a module of the package, or what it defines
        return [name if name in modules else origin for name in names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
        return [first.value for first in node.args[:1] if isinstance(first, ast.Constant)]
    return []


def room_of(module: str) -> str:
    """The part of the design that ``module`` belongs to: ``qwen_run.text.stops`` is of ``qwen_run.text``."""
    package, _, rest = module.partition(".")
    return f"{package}.{rest.partition('.')[0]}" if rest and package in DIVIDED else package


def climbing(
    imports: Sequence[Import], floors: Sequence[Sequence[str]], exceptions: Mapping[str, Iterable[str]]
) -> list[str]:
    """Complaints about imports between rooms that do not lead to a lower floor.

    Args:
        floors: rooms from the lowest floor to the highest. Rooms of one floor do not import each other.
        exceptions: package or library -> the modules that may import it all the same, inside functions.
    """
    floor_of = {room: floor for floor, rooms in enumerate(floors) for room in rooms}
    ours = {room.partition(".")[0] for room in floor_of}
    complaints = [f"{room} has no floor" for room in sorted({room_of(i.importer) for i in imports} - floor_of.keys())]
    for found in imports:
        here, there = room_of(found.importer), room_of(found.target)
        if here == there or there.partition(".")[0] not in ours or here not in floor_of:
            continue
        if found.lazy and found.importer in exceptions.get(found.target.partition(".")[0], ()):
            continue
        if there not in floor_of:
            complaints.append(f"{found.importer} imports {found.target}, which has no floor")
        elif floor_of[there] >= floor_of[here]:
            complaints.append(f"{found.importer} imports {found.target}, which is not below it")
    return complaints


def misplaced(
    imports: Sequence[Import], exceptions: Mapping[str, Iterable[str]], package: str, free: Mapping[str, Iterable[str]]
) -> list[str]:
    """Complaints about modules of ``package`` that import what is kept for others, or no longer what is kept for them.

    Args:
        exceptions: package or library -> all modules of ``package`` that import it, inside functions only.
        free: room -> libraries that its modules import as they like. Nobody imports such a room at module level.
    """
    complaints = [
        f"{i.importer} imports {i.target} at module level"
        for i in imports
        if room_of(i.target) in free and not i.lazy and room_of(i.importer) != room_of(i.target)
    ]
    for library, allowed in exceptions.items():
        found = [
            i
            for i in imports
            if i.target.partition(".")[0] == library
            and i.importer.partition(".")[0] == package
            and library not in free.get(room_of(i.importer), ())
        ]
        importers = {i.importer for i in found}
        complaints += [f"{i.importer} imports {library} at module level" for i in found if not i.lazy]
        complaints += [f"{name} imports {library}" for name in sorted(importers - set(allowed))]
        complaints += [f"{name} does not import {library}" for name in sorted(set(allowed) - importers)]
    return complaints


def circle(imports: Sequence[Import]) -> list[str]:
    """Modules that import each other in a circle, the first also last; empty if there is none."""
    sorter: TopologicalSorter[str] = TopologicalSorter()
    modules = {i.importer for i in imports}
    for found in imports:
        if found.target in modules - {found.importer} and not found.importer.startswith(f"{found.target}."):
            sorter.add(found.importer, found.target)
    try:
        sorter.prepare()
    except CycleError as error:
        return list(error.args[1])
    return []
