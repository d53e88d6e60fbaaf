"""Directories that appear whole or not at all: written under a hidden name beside their place, then renamed.

A lock on the hidden directory ends with its process, however that ends, and so tells one that is being written from
one that a killed process left. Where the file system has no such locks, what was left stays.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

# Inside a hidden directory: what is being written, and what it replaces.
NEW, OLD = "new", "old"


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A hidden directory beside ``target`` that is gone at the end; those that killed processes left go first.

    Raises:
        OSError: the directory of ``target`` cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with locked(target.parent):  # until the new directory is locked, others would take it for one that was left
            _remove_left(target)
            scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
            held.enter_context(locked(scratch))
            held.callback(shutil.rmtree, scratch, ignore_errors=True)
        yield scratch


def _remove_left(target: Path) -> None:
    """Remove what killed processes left beside ``target``; one killed between its two renames left the old engine."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}\.partial")
    for path in target.parent.iterdir():
        if pattern.fullmatch(path.name):
            with suppress(OSError), locked(path, wait=False):
                if (path / OLD).exists() and not target.exists():
                    (path / OLD).rename(target)
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def locked(directory: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of ``directory``; without ``wait``, an OSError if a live process holds it or there are no locks."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if not wait:
                raise
        yield
    finally:
        os.close(descriptor)
