"""Files and directories that appear whole or not at all, and the locks that tell who is at work on them.

What is written has a hidden name beside its place, ``.NAME.RANDOM.partial``, and is renamed at the end. A lock on it
ends with its process, however that ends, and so tells one that is being written from one that a killed process left:
the next writer of the same place removes those. Where the file system has no locks, what was left stays.

What is found under a hidden name is used or removed only where this user made it (:func:`open_own`): anybody may have
put a link there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

# Inside a hidden directory: what is being written, and what it replaces.
NEW, OLD = "new", "old"

_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def whole_file(target: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``target`` at the end, or vanishes after an error.

    It keeps the permissions of the file it replaces. ``target`` must not be a link, which would be replaced itself:
    give ``Path(os.path.realpath(path))`` where it may be one.

    Raises:
        OSError: the directory of ``target`` cannot be written.
    """
    with ExitStack() as held:
        with locked(target.parent):  # until the new file is locked, others would take it for one that was left
            _remove_left(target)
            scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
            file = held.enter_context(os.fdopen(os.open(scratch, _CREATE, 0o666), "w+b"))
            held.callback(scratch.unlink, missing_ok=True)
            lock(file.fileno(), wait=False)
        yield file
        file.flush()
        with suppress(FileNotFoundError):
            os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
        scratch.replace(target)


@contextmanager
def whole_directory(target: Path, replaces: Callable[[], bool] = lambda: True) -> Iterator[Path]:
    """A new directory that takes the place of ``target`` at the end, or leaves everything as it was.

    Args:
        replaces: asked at the end whether the new one takes the place; what it raises leaves everything as it was.

    Raises:
        OSError: the directory of ``target`` cannot be written.
    """
    with scratch_beside(target) as scratch:
        new, old = scratch / NEW, scratch / OLD
        new.mkdir()
        yield new
        if not replaces():
            return
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise


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
            with suppress(OSError), open_own(path) as descriptor:
                if not lock(descriptor, wait=False):
                    continue
                if not path.is_dir():
                    path.unlink()
                    continue
                if (path / OLD).exists() and not target.exists():
                    (path / OLD).rename(target)
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def open_own(path: Path, flags: int = 0) -> Iterator[int]:
    """A descriptor of the file or directory ``path``, which this user made and not everybody can write.

    Args:
        flags: of ``os.open``, ``os.O_DIRECTORY`` for a directory alone.

    Raises:
        PermissionError: it is a link, another user's, or neither file nor directory.
        OSError: it is not there or cannot be opened.
    """
    try:  # without O_NONBLOCK a FIFO would wait for a writer
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise PermissionError(f"{path} is a link") from error
        raise
    try:
        found = os.fstat(descriptor)
        kind_is_known = stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)
        if not kind_is_known or found.st_uid != os.geteuid() or found.st_mode & stat.S_IWOTH:
            raise PermissionError(f"{path} was not made by this user")
        yield descriptor
    finally:
        os.close(descriptor)


def lock(descriptor: int, wait: bool = True) -> bool:
    """Take the lock of an open file or directory; False where the file system has no locks.

    Raises:
        BlockingIOError: a live process holds it, and this one is not to ``wait``.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of ``directory``, waiting for it; without effect where the file system has no locks."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        lock(descriptor)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """As :func:`locked`, of the file ``path``, which is made if need be and stays."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        lock(descriptor)
        yield
    finally:
        os.close(descriptor)
