"""The files of a checkpoint beside its weights: JSON objects, digests, and links that stay where they belong."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from qwen_engine.errors import CheckpointError
from qwen_engine.json_files import read_object
from qwen_engine.regular_files import read_regular

DIGEST_BYTES = 8 << 20


def read_json(path: Path, directory: Path | None = None) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Args:
        directory: of the checkpoint, where the file lies in a folder of it.

    Raises:
        CheckpointError: the file is missing or unreadable, is not JSON, or holds something else than an object.
    """
    check_inside(path, directory)
    try:
        return read_object(path, CheckpointError, "download it again")
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; give a complete Hugging Face directory") from None


def read_optional_json(path: Path) -> dict[str, Any]:
    """As :func:`read_json`; nothing where there is no such file."""
    return read_json(path) if path.is_file() else {}


def read_bytes(path: Path) -> bytes:
    """All of a file of a checkpoint beside its weights.

    Raises:
        CheckpointError: it cannot be read, is no regular file, or lies outside.
    """
    check_inside(path)
    try:
        return read_regular(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; download it again") from error


def check_inside(path: Path, directory: Path | None = None) -> None:
    """Refuse a link out of ``directory``, that of ``path`` by default: what it names would end up in engines.

    A snapshot of the Hub's cache consists of links to ``blobs`` beside ``snapshots``, which belong to it.

    Raises:
        CheckpointError: names the link and where it leads.
    """
    real = Path(os.path.realpath(path))
    home = Path(os.path.realpath(path.parent if directory is None else directory))
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(own) for own in homes):
        raise CheckpointError(
            f"{path} is a link to {real}, outside the checkpoint; put the file itself there, or remove the link"
        )


def digest_files(
    paths: Iterable[Path], progress: Callable[[int], object] | None = None, directory: Path | None = None
) -> dict[str, str]:
    """The sha256 of each file in hexadecimal, by file name.

    Args:
        progress: called with the number of bytes after each piece.
        directory: of all of them, to name those in its folders by their way there.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digests = {}
    buffer = memoryview(bytearray(DIGEST_BYTES))
    for path in paths:
        digest = hashlib.sha256()
        try:
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    digest.update(buffer[:count])
                    if progress is not None:
                        progress(count)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        digests[path.relative_to(directory).as_posix() if directory else path.name] = digest.hexdigest()
    return digests
