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

    A line that an interruption cut short is dropped; every other result survives.
    """

    def __init__(self, path: Path, key: Mapping[str, Any], resume: bool) -> None:
        """Begin a new journal at ``path``, or with ``resume`` go on with the one that is there.

        Raises:
            RequestError: the journal to resume was made with another key, or the file cannot be written.
        """
        self._results: dict[tuple[str, str], Any] = {}
        try:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if resume and path.is_file() else []
            complete = [line for line in lines if line.endswith("\n")]
            if complete:
                self._check_key(path, json.loads(complete[0]), dict(key))
                for line in complete[1:]:
                    phase, name, result = json.loads(line)
                    self._results[phase, name] = result
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")
            self._file.writelines(complete or [json.dumps(dict(key)) + "\n"])
            self._file.flush()
        except OSError as error:
            raise RequestError(f"{path} cannot be written: {error.strerror}; choose another --report") from error

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
            self._file.write(json.dumps([phase, name, result]) + "\n")
            self._file.flush()
            self._results[phase, name] = json.loads(json.dumps(result))
        return self._results[phase, name]
