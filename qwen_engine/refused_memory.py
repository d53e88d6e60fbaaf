"""Errors that mean too little memory: to be recognised, and what helps."""

from __future__ import annotations

import errno

# parts of the messages of Python, the system and ONNX Runtime, in lower case
_REFUSALS = (
    "bad_alloc",
    "bad allocation",
    "allocate memory",
    "failed to map segment",
    "resource temporarily unavailable",
    "can't start new thread",
)


def is_refused_memory(error: BaseException) -> bool:
    """Whether ``error`` says that there is no memory, or none for one more thread."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno in (errno.ENOMEM, errno.EAGAIN)
    return any(words in str(error).lower() for words in _REFUSALS)


def memory_advice() -> str:
    """What helps where memory was refused: a limit of the process itself is named."""
    try:
        import resource  # not on Windows

        limit_bytes = resource.getrlimit(resource.RLIMIT_AS)[0]
    except (ImportError, OSError):
        limit_bytes = -1
    if limit_bytes < 0:
        return "free some memory, or use a machine with more"
    return f"this process may have {limit_bytes / 2**20:,.0f} MiB of addresses: raise that limit (ulimit -v)"
