"""Directories that appear whole or not at all: written under a hidden name beside their place, then renamed.

A lock on the hidden directory ends with its process, however that ends, and so tells one that is being written from
one that a killed process left. Where the file system has no such locks, what was left stays.
"""

from __future__ import annotations

import fcntl
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from qwen_engine.errors import BuildError, EngineError
from qwen_engine.manifest import (
    GRAPH_FILE,
    LAYERS_GRAPH_FILE,
    MANIFEST_FILE,
    TEXT_FILES,
    WEIGHTS_FILE,
    Manifest,
)

# Inside a hidden directory: what is being written, and what it replaces.
NEW, OLD = "new", "old"


def resolved(output: Path) -> Path:
    """Where ``output`` really is: an engine behind a symbolic link is replaced, not the link, and ``.`` has a name."""
    return Path(os.path.realpath(output))  # Path.resolve raises where links run in a circle


def check_output(output: Path, replace: bool) -> None:
    """Refuse an ``output`` that exists, but for an engine that is to be replaced and holds nothing else.

    Raises:
        BuildError: says what is there, or why that cannot be seen.
    """
    target = resolved(output)
    try:
        if not target.exists():
            return
        if not replace:
            raise BuildError(f"{output} exists; use --force to replace it.")
        names = sorted(path.name for path in target.iterdir()) if target.is_dir() else None
    except OSError as error:
        raise BuildError(f"{output} cannot be written: {error.strerror}; choose another --output") from error
    if names is None or (names and MANIFEST_FILE not in names):
        raise BuildError(f"{output} is not an engine, --force does not replace it; choose another --output")
    if foreign := [name for name in names if name not in _own_files(target)]:
        raise BuildError(
            f"{output} holds {foreign[0]}, which is no part of the engine and --force would delete; "
            "move it away or choose another --output"
        )


@contextmanager
def engine_directory(output: Path, replace: bool) -> Iterator[Path]:
    """A new directory that becomes ``output`` at the end, or leaves everything as it was.

    In the end there is also nothing more to go on with, see :func:`left_beside`.

    Raises:
        BuildError: ``output`` is refused by :func:`check_output`, or cannot be written.
    """
    check_output(output, replace)
    target = resolved(output)
    try:
        with scratch_beside(target) as scratch:
            new, old = scratch / NEW, scratch / OLD
            new.mkdir()
            yield new
            check_output(target, replace)  # another build may have come first
            if target.exists():
                target.rename(old)
            try:
                new.rename(target)
            except BaseException:
                if old.exists():
                    old.rename(target)
                raise
            for left in left_beside(target):
                shutil.rmtree(left, ignore_errors=True)
    except OSError as error:
        raise BuildError(f"{output} cannot be written: {error.strerror or error}") from error


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A hidden directory beside ``target`` that is gone at the end; those that killed processes left go first.

    Raises:
        OSError: the directory of ``target`` cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with _locked(target.parent):  # until the new directory is locked, others would take it for one that was left
            _remove_left(target)
            scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
            held.enter_context(_locked(scratch))
            held.callback(shutil.rmtree, scratch, ignore_errors=True)
        yield scratch


def _remove_left(target: Path) -> None:
    """Remove what killed processes left beside ``target``; one killed between its two renames left the old engine."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}\.partial")
    for path in target.parent.iterdir():
        if pattern.fullmatch(path.name):
            with suppress(OSError), _locked(path, wait=False):
                if (path / OLD).exists() and not target.exists():
                    (path / OLD).rename(target)
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _locked(directory: Path, wait: bool = True) -> Iterator[None]:
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


def _own_files(engine: Path) -> set[str]:
    """The files that make up an engine; where its manifest cannot be read, those that any engine may have."""
    try:
        return {MANIFEST_FILE, *Manifest.read(engine).parts}
    except EngineError:
        return {MANIFEST_FILE, GRAPH_FILE, LAYERS_GRAPH_FILE, WEIGHTS_FILE, *TEXT_FILES}


@contextmanager
def resumable_beside(target: Path, key: str) -> Iterator[Path]:
    """A hidden directory beside ``target`` that the next process finds as it is if this one is interrupted.

    So it does after an error that other options or more room may mend; it is gone after all others and after success.

    Raises:
        BuildError: the directory of ``target`` cannot be written, or a live process uses the one of this ``key``.
    """
    directory = target.parent / f".{target.name}.{key}.calibration"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(exist_ok=True)
        with ExitStack() as held:
            try:
                held.enter_context(_locked(directory, wait=False))
            except BlockingIOError:
                raise BuildError(
                    f"another process is building {target}; wait for it or choose another --output"
                ) from None
            except OSError:
                pass  # no locks here
            directory.mkdir(exist_ok=True)  # a process that finished in the meantime removed it
            kept = f"What was finished is kept in {directory}"
            try:
                yield directory
            except OSError as error:
                raise BuildError(f"{_unwritable(target, error)}. {kept}") from error
            except Exception as error:
                if type(error) is BuildError:
                    raise BuildError(f"{error}. {kept}") from error
                shutil.rmtree(directory, ignore_errors=True)
                raise
            shutil.rmtree(directory, ignore_errors=True)
    except OSError as error:
        raise BuildError(_unwritable(target, error)) from error


def _unwritable(target: Path, error: OSError) -> str:
    """In words; a short write of NumPy's has no errno."""
    return f"{target} cannot be written: {error.strerror or 'no space is left'}"


def left_beside(target: Path) -> list[Path]:
    """The directories of :func:`resumable_beside` for ``target`` that no live process uses."""
    left = []
    for directory in target.parent.glob(f".{glob.escape(target.name)}.*.calibration"):
        with suppress(OSError), _locked(directory, wait=False):
            left.append(directory)
    return left
