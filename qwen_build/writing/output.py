"""The directory an engine is written to: which may be replaced, and what an interrupted build leaves beside it."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from qwen_engine.errors import BuildError, EngineError
from qwen_engine.extents import EXTENTS_FILE
from qwen_engine.manifest import (
    GRAPH_FILE,
    LAYERS_GRAPH_FILE,
    MANIFEST_FILE,
    TEXT_FILES,
    WEIGHTS_FILE,
    Manifest,
)
from qwen_engine.whole_files import lock, open_own, whole_directory


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
        names = sorted(path.name for path in target.iterdir()) if target.is_dir() else None
    except OSError as error:
        raise BuildError(f"{output} cannot be written: {error.strerror}; choose another --output") from error
    if names is None or (names and MANIFEST_FILE not in names):
        found = "is a file and" if names is None else "holds other files and"
        raise BuildError(f"{output} {found} is not an engine, which --force could replace; choose another --output")
    if foreign := [name for name in names if name not in _own_files(target)]:
        raise BuildError(
            f"{output} holds {foreign[0]}, which is no part of the engine and --force would delete; "
            "move it away or choose another --output"
        )
    if not replace:
        raise BuildError(f"{output} exists; use --force to replace it.")


@contextmanager
def engine_directory(output: Path, replace: bool) -> Iterator[Path]:
    """A new directory that becomes ``output`` at the end, or leaves everything as it was.

    In the end there is also nothing more to go on with, see :func:`left_beside`.

    Raises:
        BuildError: ``output`` is refused by :func:`check_output`, or cannot be written.
    """
    check_output(output, replace)
    target = resolved(output)

    def replaces() -> bool:
        check_output(target, replace)  # another build may have come first
        return True

    try:
        with whole_directory(target, replaces) as new:
            yield new
        for left in left_beside(target):
            shutil.rmtree(left, ignore_errors=True)
    except OSError as error:
        raise BuildError(f"{output} cannot be written: {error.strerror or error}") from error


def _own_files(engine: Path) -> set[str]:
    """The files that make up an engine; where its manifest cannot be read, those that any engine may have."""
    try:
        return {MANIFEST_FILE, *Manifest.read(engine).parts}
    except EngineError:
        return {MANIFEST_FILE, GRAPH_FILE, LAYERS_GRAPH_FILE, WEIGHTS_FILE, EXTENTS_FILE, *TEXT_FILES}


@contextmanager
def resumable_beside(target: Path, key: str) -> Iterator[Path]:
    """A hidden directory beside ``target`` that the next process finds as it is if this one is interrupted.

    So it does after an error that other options or more room may mend; it is gone after all others and after success.

    Raises:
        BuildError: the directory of ``target`` cannot be written, a live process uses the one of this ``key``, or
            something stands there that no build of this user made.
    """
    directory = target.parent / f".{target.name}.{key}.calibration"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        with ExitStack() as held:
            try:
                lock(held.enter_context(open_own(directory, os.O_DIRECTORY)), wait=False)
            except (PermissionError, NotADirectoryError) as error:
                raise _planted(directory) from error
            except BlockingIOError:
                raise BuildError(
                    f"another process is building {target}; wait for it or choose another --output"
                ) from None
            directory.mkdir(mode=0o700, exist_ok=True)  # a process that finished in the meantime removed it
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


def _planted(directory: Path) -> BuildError:
    return BuildError(
        f"{directory} is no directory that a build of yours made, though builds keep calibrations there; "
        "remove it or choose another --output"
    )


def _unwritable(target: Path, error: OSError) -> str:
    """In words; a short write of NumPy's has no errno."""
    return f"{target} cannot be written: {error.strerror or 'no space is left'}"


def left_beside(target: Path) -> list[Path]:
    """The directories of :func:`resumable_beside` for ``target`` that no live process uses."""
    left = []
    for directory in target.parent.glob(f".{glob.escape(target.name)}.*.calibration"):
        with suppress(OSError), open_own(directory, os.O_DIRECTORY) as descriptor:
            if lock(descriptor, wait=False):
                left.append(directory)
    return left
