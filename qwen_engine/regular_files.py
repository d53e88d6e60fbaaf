"""Reading a file that a user, a checkpoint or an engine names, whatever it turns out to be."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

MOST_BYTES = 1 << 30  # of what is read whole: texts and graphs, but not weights


def read_regular(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """All of the file at ``path``; a pipe, which may never say anything, or a device, which may never end, is refused.

    Raises:
        OSError: there is no such file, it cannot be read, is no regular one, or has more than ``most_bytes``; with a
            ``strerror`` to show.
    """
    # O_NONBLOCK: opening a pipe waits for who writes to it
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        content = file.read(min(status.st_size, most_bytes) + 1)  # room for as much is taken at once
        if len(content) > status.st_size:  # it grew
            content += file.read(most_bytes + 1 - len(content))
    if len(content) > most_bytes:
        size_bytes = max(status.st_size, len(content))
        raise OSError(errno.EFBIG, f"it has {size_bytes} bytes, expected at most {most_bytes}", str(path))
    return content
