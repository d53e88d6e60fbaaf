"""Files that are not only on this machine: what has an address such as ``s3://bucket/folder/``, read by pyarrow."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from qwen_engine.errors import EngineError, RequestError, first_line

_PARTIAL = ".partial"


def is_address(name: str) -> bool:
    """Whether ``name`` is an address and no path of this machine.

    >>> is_address("s3://bucket/file.jsonl"), is_address("folder/file.jsonl")
    (True, False)
    """
    return "://" in name


class Folder:
    """A folder, or the one file, at an address or a path.

    Args:
        name: of a local path, too.

    Raises:
        EngineError: pyarrow is not installed.
        RequestError: no file system is at that address.
    """

    def __init__(self, name: str) -> None:
        try:
            from pyarrow import fs
        except ImportError as error:
            raise EngineError(
                f"{error.name} is not installed, and {name} needs it; run pip install pyarrow, or give a path"
            ) from error
        self.name = name
        try:
            self._fs, self._path = fs.FileSystem.from_uri(name if is_address(name) else Path(name).resolve().as_uri())
        except (OSError, ValueError) as error:
            raise RequestError(f"{name} cannot be reached: {first_line(error)}; give another address") from error
        self._selector, self._kinds = fs.FileSelector, fs.FileType

    def files(self) -> list[str]:
        """The names of the files in it, in their order; those that begin with a point or a line are left out.

        Raises:
            RequestError: it cannot be read.
        """
        found = self._ask(lambda: self._fs.get_file_info(self._selector(self._path, allow_not_found=True)))
        names = (PurePosixPath(each.path).name for each in found if each.type == self._kinds.File)
        return sorted(name for name in names if not name.startswith((".", "_")))

    @property
    def is_file(self) -> bool:
        """It is one file."""
        return bool(self._ask(lambda: self._fs.get_file_info(self._path).type == self._kinds.File))

    def read(self, file: str | None = None) -> bytes:
        """The content of a file in it, or of itself where it is one.

        Raises:
            RequestError: it cannot be read.
        """

        def content() -> bytes:
            with self._fs.open_input_stream(self._at(file)) as stream:
                return bytes(stream.read())

        return bytes(self._ask(content))

    def write(self, file: str, content: bytes) -> None:
        """Have ``content`` in a file, whole or not at all.

        Raises:
            RequestError: it cannot be written.
        """

        def put() -> None:
            if self._fs.type_name != "local":  # others show a file when it is closed
                with self._fs.open_output_stream(self._at(file)) as stream:
                    stream.write(content)
                return
            self._fs.create_dir(self._path, recursive=True)
            partial = self._at(f".{file}{_PARTIAL}")
            with self._fs.open_output_stream(partial) as stream:
                stream.write(content)
            self._fs.move(partial, self._at(file))

        self._ask(put, "written")

    def remove(self, file: str) -> None:
        """Have no such file.

        Raises:
            RequestError: it cannot be removed.
        """
        self._ask(lambda: self._fs.delete_file(self._at(file)), "changed")

    def _at(self, file: str | None) -> str:
        return self._path if file is None else str(PurePosixPath(self._path) / file)

    def _ask(self, work: Any, what: str = "read") -> Any:
        try:
            return work()
        except OSError as error:
            raise RequestError(f"{self.name} cannot be {what}: {first_line(error)}; give another address") from error


def read_prompts(name: str) -> bytes:
    """The files of a folder one after the other, in the order of their names; or the one file.

    Raises:
        EngineError, RequestError: as :class:`Folder`; or there is nothing.
    """
    folder = Folder(name)
    if folder.is_file:
        return folder.read()
    files = folder.files()
    if not files:
        raise RequestError(f"{name} holds no file; give another --input-file")
    parts = (folder.read(file).removeprefix(b"\xef\xbb\xbf") for file in files)
    return b"".join(part if part.endswith(b"\n") or not part else part + b"\n" for part in parts)
