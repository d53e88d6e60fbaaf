"""Texts that every machine has: the built-in samples, and the modules of Python's standard library.

Documents are in one of two halves by their hash, see :func:`qwen_run.accuracy.datasets.half_of`: models train on one
half, and the other half measures.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from qwen_run.accuracy.datasets import Document, Half, half_of

# Articles of WikiText-2 that no built-in text has.
HELD_OUT = Path(__file__).parent / "data" / "wikitext2-evaluation.jsonl"

# Folders of the standard library that are left out: tests and tables of code points say little in many bytes.
_LEFT_OUT = {"test", "tests", "encodings", "site-packages", "dist-packages", "__pycache__", "idlelib", "lib2to3"}
# Longer modules are cut into documents at lines.
_MOST_CHARACTERS = 16_384


def library_documents(half: Half) -> tuple[Document, ...]:
    """One half of the modules of the running Python's standard library: code, and the prose of its docstrings."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _LEFT_OUT.isdisjoint(name.parts):
            text = path.read_text("utf-8", errors="replace")
            if text.strip() and half_of(text) == half:
                documents += [Document(f"{name}:{i}", part, None) for i, part in enumerate(_parts(text))]
    return tuple(documents)


def by_hash(documents: Iterable[Document]) -> tuple[Document, ...]:
    """``documents`` in the order of their texts' hashes: as good as random, and the same everywhere."""
    return tuple(sorted(documents, key=lambda one: (hashlib.sha256(one.document.encode()).digest(), one.id)))


def _parts(text: str) -> list[str]:
    parts: list[list[str]] = [[]]
    size = 0
    for line in text.splitlines(keepends=True):
        if size and size + len(line) > _MOST_CHARACTERS:
            parts.append([])
            size = 0
        parts[-1].append(line)
        size += len(line)
    return ["".join(part) for part in parts]
