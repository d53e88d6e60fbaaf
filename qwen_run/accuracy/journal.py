"""Results kept as they are made, so that work that was interrupted goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from qwen_engine.errors import RequestError


class Journal:
    """A JSON Lines file: first what the results depend on, then one result a line.

    A line that an interruption cut short is dropped; every other result survives, whenever a process is killed.
    """

    def __init__(self, path: Path, key: Mapping[str, Any], resume: bool) -> None:
        """Begin a new journal at ``path``, or with ``resume`` go on with the one that is there.

        Raises:
            RequestError: the journal to resume was made with another key or is none, or the file cannot be written.
        """
        self._path = path
        self._results: dict[tuple[str, str], Any] = {}
        head = json.dumps(dict(key)).encode() + b"\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not (resume and path.is_file()):
                path.write_bytes(b"")
            self._file = path.open("r+b")
            try:
                kept = self._read(self._file.read(), head)
                self._file.seek(kept)
                self._file.truncate()  # only what an interruption cut short
                if not kept:
                    self._file.write(head)
                    self._file.flush()
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise RequestError(f"{path} cannot be written: {error.strerror}; choose another --report") from error

    def _read(self, data: bytes, head: bytes) -> int:
        """Take the results in ``data``; how many bytes of it are whole lines."""
        *lines, torn = data.split(b"\n")
        if not lines and not head.startswith(torn):
            raise self._foreign(1)
        for number, line in enumerate(lines, start=1):
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                raise self._foreign(number) from None
            if number == 1 and isinstance(found, dict):
                self._check_key(self._path, found, json.loads(head))
            elif number > 1 and _is_result(found):
                self._results[found[0], found[1]] = found[2]
            else:
                raise self._foreign(number)
        return len(data) - len(torn)

    def _foreign(self, number: int) -> RequestError:
        return RequestError(
            f"{self._path}: line {number} is no result of qwen-summarize; run without --resume or choose another "
            "--report"
        )

    @staticmethod
    def _check_key(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
        different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        if different:
            raise RequestError(
                f"{path} was made with another {', '.join(different)}; run without --resume or with the same options"
            )

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def has(self, phase: str, name: str) -> bool:
        return (phase, name) in self._results

    def do(self, phase: str, name: str, compute: Callable[[], Any]) -> Any:
        """The result of ``phase`` for ``name``, plain JSON data: as it was kept, or computed now and kept."""
        if (phase, name) not in self._results:
            result = compute()
            self._file.write(json.dumps([phase, name, result]).encode() + b"\n")
            self._file.flush()
            self._results[phase, name] = json.loads(json.dumps(result))
        return self._results[phase, name]


def _is_result(found: Any) -> bool:
    return isinstance(found, list) and len(found) == 3 and isinstance(found[0], str) and isinstance(found[1], str)
