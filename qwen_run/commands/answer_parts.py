"""Answers in a folder at an address, where no file can be appended to: :class:`AnswerParts`."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping

from qwen_engine.errors import RequestError
from qwen_engine.json_output import to_json
from qwen_run.commands.answer_file import Record, assign
from qwen_run.commands.storage import Folder

_MOST_RECORDS, _MOST_S = 200, 10.0  # of answers that wait to be written together


class AnswerParts:
    """Answers in files of a folder, each file written once; together they are what an :class:`AnswerFile` is.

    A run that was interrupted goes on where it stopped: at most the answers of some seconds are lost.

    Args:
        keys, retry_errors: as :class:`AnswerFile` has them.

    Attributes:
        answered, num_left_out: as :class:`AnswerFile` has them.

    Raises:
        RequestError: the folder cannot be read, or holds anything but answers, or only answers to other prompts.
    """

    is_terminal = False

    def __init__(self, address: str, keys: Mapping[int, str], retry_errors: bool = False) -> None:
        self._folder, self._keys = Folder(address), keys
        self._waiting: list[Record] = []
        self._written_s = time.monotonic()
        self._parts = {file: self._read(file) for file in self._folder.files()}
        records = [record for part in self._parts.values() for record in part]
        found = assign(records, keys)
        self.num_left_out = len(records) - len(found)
        if not found and any("error" not in record for record in records):
            raise RequestError(
                f"{address} answers none of these prompts with these options; "
                "remove the folder or choose another --output-file"
            )
        self._found = {line: record for line, record in found.items() if not (retry_errors and "error" in record)}
        self._answered = dict(self._found)
        self.answered: Mapping[int, Record] = self._answered

    def write(self, record: Record) -> None:
        """Keep ``record``; it is in the folder some seconds later."""
        line = record["line"]
        kept = {"line": line, "key": self._keys[line], **record}
        self._answered[line] = kept
        self._waiting.append(kept)
        if len(self._waiting) >= _MOST_RECORDS or time.monotonic() - self._written_s >= _MOST_S:
            self._write()

    def close(self) -> None:
        """End; if there is an answer to every prompt, leave out what is no answer to one."""
        self._write()
        if len(self.answered) != len(self._keys):
            return
        kept = [record for line, record in self.answered.items() if self._found.get(line) is record]
        if sorted(map(to_json, kept)) == sorted(to_json(each) for part in self._parts.values() for each in part):
            return
        if kept:
            self._folder.write(_new_name(), _lines(kept))
        for file in self._parts:
            self._folder.remove(file)

    def _write(self) -> None:
        if self._waiting:
            self._folder.write(_new_name(), _lines(self._waiting))
            self._waiting = []
        self._written_s = time.monotonic()

    def _read(self, file: str) -> list[Record]:
        records: list[Record] = []
        for line in self._folder.read(file).splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict) or not isinstance(record.get("line"), int) or "key" not in record:
                raise RequestError(
                    f"{self._folder.name}: {file} holds what is no answer of qwen-run; choose another --output-file"
                )
            records.append(record)
        return records


def _new_name() -> str:
    return f"part-{time.time_ns() // 1_000_000}-{secrets.token_hex(4)}.jsonl"


def _lines(records: list[Record]) -> bytes:
    return b"".join(to_json(record).encode() + b"\n" for record in records)
