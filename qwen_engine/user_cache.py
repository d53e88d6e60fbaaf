"""What is kept in the user's cache directory: engines that were built on demand, and the demo checkpoint.

Everything there can be made again, so everything there may be removed.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qwen_engine.errors import EngineError
from qwen_engine.whole_files import lock

FOLDER = "qwen-engine"
KINDS = {
    "engines": "engine",
    "demo": "demo checkpoint",
    "gguf": "metadata of a GGUF",
}  # by the folder inside FOLDER that they lie in


@dataclass(frozen=True)
class Kept:
    """One directory that is kept.

    Attributes:
        kind: one of ``KINDS``.
        made_s: when it was made, in seconds since 1970.
    """

    kind: str
    path: Path
    size_bytes: int
    made_s: float


def user_cache() -> Path:
    """``$XDG_CACHE_HOME`` where it is set and absolute, else ``~/.cache``."""
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return chosen if chosen.is_absolute() else Path.home() / ".cache"


def lock_file(directory: Path) -> Path:
    """What is locked while ``directory`` is built."""
    return directory.with_name(f".{directory.name}.lock")


def list_kept(cache: Path) -> list[Kept]:
    """All that is kept under ``cache``, in the order of kinds and names; what is still being built is not there yet."""
    found: list[Kept] = []
    for folder, kind in KINDS.items():
        paths = sorted((cache / FOLDER / folder).glob("[!.]*"))
        directories = [path for path in paths if path.is_dir() and not path.is_symlink()]
        found += [Kept(kind, path, _size_bytes(path), path.stat().st_mtime) for path in directories]
    return found


def remove(kept: Kept) -> bool:
    """Remove ``kept``, unless a process builds it anew at this moment; whether it is gone.

    A process that has opened an engine goes on with it.

    Raises:
        EngineError: it cannot be removed.
    """
    path = kept.path
    try:
        descriptor = os.open(lock_file(path), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            lock(descriptor, wait=False)
            hidden = path.with_name(f".{path.name}.removed")  # so that nobody finds a half of it
            shutil.rmtree(hidden, ignore_errors=True)
            path.rename(hidden)
            shutil.rmtree(hidden)
        finally:
            os.close(descriptor)
    except BlockingIOError:
        return False
    except OSError as error:
        raise EngineError(f"{path} cannot be removed: {error.strerror}; remove it by hand") from error
    for digests in path.parent.glob(".digests-*.json"):  # of checkpoints, read again for the next engine
        digests.unlink(missing_ok=True)
    return True


def _size_bytes(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        with suppress(FileNotFoundError):  # removed in the meantime
            total += path.lstat().st_size
    return total
