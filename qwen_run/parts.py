"""What an engine needs to be read: its files, what they must hash to, and the operators that know their layout."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import qwen_plugin
from qwen_engine.errors import EngineError
from qwen_engine.manifest import TEXT_FILES, Manifest, Part

# One buffer for all reads, small enough for a core's own cache.
_BUFFER_BYTES = 1 << 20


def measure_part(path: Path) -> Part:
    """Size, crc32 (eight lower-case hexadecimal digits) and sha256 of the file at ``path``, read once."""
    size_bytes, crc32, sha256 = 0, 0, hashlib.sha256()
    for piece in _pieces(path):
        size_bytes += len(piece)
        crc32 = zlib.crc32(piece, crc32)
        sha256.update(piece)
    return Part(size_bytes, f"{crc32:08x}", sha256.hexdigest())


def check_parts(directory: Path, manifest: Manifest) -> None:
    """Check that every part is there, has its size and its crc32: cheap enough for every load.

    Raises:
        EngineError: names the parts that are missing, of another size or changed, and files that would be read
            and are no parts.
    """
    _check_sizes(directory, manifest)
    changed = [name for name, part in manifest.parts.items() if _crc32(directory / name) != part.crc32]
    _refuse(directory, [f"{name} has changed since it was built (its crc32 differs)" for name in changed])


def check_operators(directory: Path, manifest: Manifest) -> None:
    """Check that this installation has the engine's operators in its versions, which also say how weights lie.

    Raises:
        EngineError: names those it lacks.
    """
    lacking = [
        f"{operator.domain}::{operator.name} version {operator.version}"
        for operator in manifest.operators
        if qwen_plugin.OPERATORS.get((operator.domain, operator.name)) != operator.version
    ]
    if lacking:
        raise EngineError(
            f"{directory} needs {', '.join(lacking)}, which this installation's plugin does not have; "
            "build the engine again with the qwen-build of this installation"
        )


def verify_parts(directory: Path, manifest: Manifest) -> None:
    """Check the sha256 of every part, which a crc32 made to match does not deceive.

    Raises:
        EngineError: names the parts that are missing, of another size or changed.
    """
    _check_sizes(directory, manifest)
    changed = [name for name, part in manifest.parts.items() if measure_part(directory / name).sha256 != part.sha256]
    _refuse(directory, [f"{name} has changed since it was built (its sha256 differs)" for name in changed])


def _check_sizes(directory: Path, manifest: Manifest) -> None:
    complaints = [
        f"{name} is there, and the engine was built without it"
        for name in TEXT_FILES
        if name not in manifest.parts and os.path.lexists(directory / name)
    ]
    for name, part in manifest.parts.items():
        path = directory / name
        if not path.is_file():
            complaints.append(f"{name} is missing")
        elif (size_bytes := path.stat().st_size) != part.size_bytes:
            complaints.append(f"{name} has {size_bytes} bytes, expected {part.size_bytes}")
    _refuse(directory, complaints)


def _refuse(directory: Path, complaints: list[str]) -> None:
    if complaints:
        raise EngineError(f"{directory}: {'; '.join(complaints)}; build the engine again or copy it again")


def _crc32(path: Path) -> str:
    crc32 = 0
    for piece in _pieces(path):
        crc32 = zlib.crc32(piece, crc32)
    return f"{crc32:08x}"


def _pieces(path: Path) -> Iterator[memoryview]:
    """The file at ``path`` in pieces that are valid until the next one is asked for."""
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                yield buffer[:count]
    except OSError as error:
        raise EngineError(
            f"{path} cannot be read: {error.strerror}; build the engine again or copy it again"
        ) from error
