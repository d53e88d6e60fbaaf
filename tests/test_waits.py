"""No test waits for ever: whatever hangs ends as a failure of the test that waited."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from cases import TESTS

# What blocks, and after how many positional arguments one of them is a time-out.
BLOCKING = {
    "subprocess.run": 99,
    "subprocess.check_call": 99,
    "subprocess.check_output": 99,
    "subprocess.Popen": 99,  # what is read from it may never come: cases/processes.py kills it in the end
    ".communicate": 1,  # the first is the input
    ".wait": 0,
    ".get": 0,
    ".join": 0,
    ".result": 0,
    ".exception": 0,
    ".acquire": 1,
    "asyncio.run": 99,
}
# What kills a process that does not end; and what is run by hand, and compiles or installs for as long as that takes.
EXCEPTED = {TESTS / "cases/processes.py", *(path for path in TESTS.glob("*.py") if not path.match("test_*.py"))}


def endless_waits(source: str) -> list[int]:
    """Lines of ``source`` with a call that waits without a time-out."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        before = next((least for end, least in BLOCKING.items() if name.endswith(end)), -1)
        bounded = len(node.args) > before or any(word.arg in ("timeout", None) for word in node.keywords)
        if before >= 0 and not bounded and "wait_for" not in ast.unparse(node):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: path.relative_to(TESTS).as_posix())
def test_every_wait_ends(path: Path) -> None:
    assert path in EXCEPTED or endless_waits(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("call", "ends"),
    [
        ("subprocess.run(['x'])", False),
        ("subprocess.run(['x'], timeout=300)", True),
        ("subprocess.Popen(['x'])", False),
        ("process.communicate('input')", False),
        ("process.communicate(timeout=300)", True),
        ("process.wait()", False),
        ("process.wait(300)", True),
        ("threads[0].join()", False),
        ("', '.join(names)", True),
        ("queue.get()", False),
        ("{}.get('key')", True),
        ("pool.submit(work).result()", False),
        ("asyncio.run(main())", False),
        ("asyncio.run(asyncio.wait_for(main(), 300))", True),
    ],
)
def test_a_wait_without_an_end_is_seen(call: str, ends: bool) -> None:
    assert (endless_waits(call) == []) == ends
