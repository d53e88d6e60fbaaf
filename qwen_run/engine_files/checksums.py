"""What an engine needs to be read: its files, what they must hash to, and the operators that know their layout."""

from __future__ import annotations

import hashlib
import mmap
import os
import zlib
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import qwen_plugin
from qwen_engine.errors import EngineError
from qwen_engine.extents import EXTENTS_FILE, Extent, Extents
from qwen_engine.manifest import GRAPH_FILE, TEXT_FILES, WEIGHTS_FILE, FileRecord, Manifest
from qwen_engine.refused_memory import is_refused_memory, memory_advice

# One buffer for all reads, small enough for a core's own cache.
_BUFFER_BYTES = 1 << 20
# What is not worth a thread.
_SMALL_BYTES = 16 << 20
# The polynomial of crc32, its terms in falling order of bits: x^0 is bit 31.
_CRC32_POLYNOMIAL = 0xEDB88320


def measure_part(path: Path) -> FileRecord:
    """Size, crc32 (eight lower-case hexadecimal digits) and sha256 of the file at ``path``, read once."""
    size_bytes, crc32, sha256 = 0, 0, hashlib.sha256()
    for piece in _pieces(path):
        size_bytes += len(piece)
        crc32 = zlib.crc32(piece, crc32)
        sha256.update(piece)
    return FileRecord(size_bytes, f"{crc32:08x}", sha256.hexdigest())


def measure_extents(path: Path, ends: Iterable[tuple[str, int]]) -> Extents:
    """The extents of the weights file ``path``: what each holds and where it ends, with their crc32."""
    named = list(ends)
    edges = pairwise([0, *(end for _, end in named)])
    return Extents(
        tuple(
            Extent(holds, end, f"{_crc32_of_stretch(path, *edge):08x}")
            for (holds, end), edge in zip(named, edges, strict=True)
        )
    )


def check_parts(directory: Path, manifest: Manifest, threads: int) -> None:
    """Check that every part is there, has its size and its crc32: with ``threads`` cheap enough for every load.

    Raises:
        EngineError: names the parts that are missing, of another size or changed, and files that would be read
            and are no parts.
    """
    _check_sizes(directory, manifest)
    changed = [name for name, part in manifest.parts.items() if _crc32(directory / name, threads) != part.crc32]
    _refuse(directory, [f"{name} has changed since it was built (its crc32 differs)" for name in changed])


def check_stage(
    directory: Path, manifest: Manifest, stretches: Sequence[tuple[int, int]], threads: int, *, others: bool
) -> None:
    """Check what a stage of an engine reads: the graph, and those extents of the weights that ``stretches`` touch.

    What lies between these extents need not be there: the file may have holes.

    Args:
        stretches: first byte and end of what is read.
        others: check all other parts too, such as what text goes through.

    Raises:
        EngineError: as :func:`check_parts`, or the engine has no ``extents.json``.
    """
    extents = Extents.read(directory, manifest.parts[WEIGHTS_FILE].size_bytes)
    needed = {GRAPH_FILE, EXTENTS_FILE}
    if others:
        needed.update(manifest.parts.keys() - {WEIGHTS_FILE})
    _check_sizes(directory, manifest, {*needed, WEIGHTS_FILE}, alone=others)
    changed = [name for name in sorted(needed) if name not in manifest.parts or _changed(directory, manifest, name)]
    _refuse(directory, [f"{name} has changed since it was built (its crc32 differs)" for name in changed])
    crc32, start = 0, 0
    for extent in extents.extents:
        crc32, start = _joined_crc32(crc32, int(extent.crc32, 16), extent.end - start), extent.end
    if f"{crc32:08x}" != manifest.parts[WEIGHTS_FILE].crc32:
        _refuse(directory, [f"{EXTENTS_FILE} is of another {WEIGHTS_FILE}"])
    read = [
        (start, end, extent)
        for start, end, extent in extents.stretches
        if any(first < end and start < last for first, last in stretches)
    ]
    path = directory / WEIGHTS_FILE
    with _readable(path), ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda each: _crc32_of_stretch(path, each[0], each[1]), read))
    _refuse(
        directory,
        [
            f"{WEIGHTS_FILE} is not as it was built where it holds {extent.holds}, bytes {start} to {end}"
            for (start, end, extent), crc in zip(read, found, strict=True)
            if f"{crc:08x}" != extent.crc32
        ],
    )


def _changed(directory: Path, manifest: Manifest, name: str) -> bool:
    return _crc32(directory / name, 1) != manifest.parts[name].crc32


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


def _check_sizes(directory: Path, manifest: Manifest, names: Container[str] | None = None, alone: bool = True) -> None:
    """Check the parts of these ``names``, all if None; and, with ``alone``, that nothing else would be read."""
    complaints = [
        f"{name} is there, and the engine was built without it"
        for name in TEXT_FILES
        if alone and name not in manifest.parts and os.path.lexists(directory / name)
    ]
    for name, part in manifest.parts.items():
        if names is not None and name not in names:
            continue
        path = directory / name
        if not path.is_file():
            complaints.append(f"{name} is missing")
        elif (size_bytes := path.stat().st_size) != part.size_bytes:
            complaints.append(f"{name} has {size_bytes} bytes, expected {part.size_bytes}")
    _refuse(directory, complaints)


def _refuse(directory: Path, complaints: list[str]) -> None:
    if complaints:
        raise EngineError(f"{directory}: {'; '.join(complaints)}; build the engine again or copy it again")


def _crc32(path: Path, threads: int) -> str:
    """As in :func:`measure_part`; each thread takes a stretch of a large file."""
    size_bytes = path.stat().st_size
    count = min(threads, size_bytes // _SMALL_BYTES)
    crc32 = 0
    if not count:
        for piece in _pieces(path):
            crc32 = zlib.crc32(piece, crc32)
        return f"{crc32:08x}"
    stretches = list(pairwise(size_bytes * i // count for i in range(count + 1)))
    with _readable(path), ThreadPoolExecutor(count) as pool:  # zlib does not hold the interpreter's lock
        of_stretches = list(pool.map(lambda stretch: _crc32_of_stretch(path, *stretch), stretches))
    for (first, last), of_stretch in zip(stretches, of_stretches, strict=True):
        crc32 = _joined_crc32(crc32, of_stretch, last - first)
    return f"{crc32:08x}"


def _crc32_of_stretch(path: Path, first: int, last: int) -> int:
    """Of bytes [first, last), mapped as a session maps them: nothing is copied.

    What the file cache lacks of them is read into huge pages, where Linux has them. Who reads a file first decides how
    it lies in memory from then on, and so how fast weights are read: out of small pages that lie all over it a token's
    products take up to 1.2 times as long.
    """
    with _readable(path), path.open("rb") as file, mmap.mmap(file.fileno(), last, access=mmap.ACCESS_READ) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # of a Linux that is built without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        with memoryview(memory)[first:] as stretch:
            return zlib.crc32(stretch)


def _joined_crc32(before: int, after: int, after_bytes: int) -> int:
    """The crc32 of bytes with crc32 ``before`` and the ``after_bytes`` behind them with crc32 ``after``.

    A crc32 is a remainder of polynomials over GF(2), so what stands before n bits is multiplied by x^n; ones that are
    put in and taken out around it cancel (crc32_combine of zlib does the same).
    """
    shift, power = 1 << 31, 1 << 23  # x^0 and x^8, a byte
    while after_bytes:
        if after_bytes & 1:
            shift = _crc32_product(shift, power)
        power = _crc32_product(power, power)
        after_bytes >>= 1
    return _crc32_product(before, shift) ^ after


def _crc32_product(a: int, b: int) -> int:
    """``a`` times ``b``, polynomials modulo that of crc32."""
    product = 0
    for power in range(32):  # b is b x^power
        if a >> (31 - power) & 1:
            product ^= b
        b = b >> 1 ^ (_CRC32_POLYNOMIAL if b & 1 else 0)
    return product


def _pieces(path: Path) -> Iterator[memoryview]:
    """The file at ``path`` in pieces that are valid until the next one is asked for."""
    with _readable(path), path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        while count := file.readinto(buffer):
            yield buffer[:count]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What fails inside is said to be ``path``."""
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:
        if is_refused_memory(error):
            raise EngineError(f"no memory to read {path}; {memory_advice()}") from error
        if not isinstance(error, OSError):
            raise
        raise EngineError(f"{path} cannot be read: {error.strerror}; build the engine again or copy it again") from None
