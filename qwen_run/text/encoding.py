"""Bytes to text."""

from __future__ import annotations

from qwen_engine.errors import RequestError


def decode_utf8(data: bytes, name: str) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        RequestError: ``data`` is not UTF-8; the message has ``name`` and the offset of the byte.
    """
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{name}: byte {error.start} (0x{data[error.start]:02x}) is not UTF-8; convert it to UTF-8"
        ) from error
