"""The files of the chat page, as a browser gets them."""

from __future__ import annotations

import gzip
import hashlib
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response

FOLDER = "/page/"  # what the addresses of the page's parts begin with
_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# Everything comes from this server, nothing is sent elsewhere, and a text never becomes HTML or a script.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cache-control": "no-cache",  # asked for again each time, and sent where it has changed
}


class ChatPage:
    """The page and its parts, read once.

    Attributes:
        paths: their addresses, which need no API key: the page asks a person for it.
    """

    def __init__(self) -> None:
        files = resources.files(__package__).joinpath("files")
        self._files = {FOLDER + file.name: file.read_bytes() for file in files.iterdir() if "." in file.name}
        self._files["/"] = self._files.pop(FOLDER + "index.html")
        self._tags = {path: f'"{hashlib.sha256(data).hexdigest()[:32]}"' for path, data in self._files.items()}
        self._packed = {path: gzip.compress(data, mtime=0) for path, data in self._files.items()}
        self.paths = frozenset(self._files)

    def response(self, path: str, request: Request) -> Response:
        """The file at ``path``, one of ``paths``, packed if the browser unpacks it; nothing of it where it has it."""
        kind = "html" if path == "/" else path.rpartition(".")[2]
        headers = {**_HEADERS, "etag": self._tags[path], "vary": "accept-encoding"}
        if request.headers.get("if-none-match") == self._tags[path]:
            return Response(status_code=304, headers=headers)
        headers["content-type"] = _TYPES[kind]
        if "gzip" not in request.headers.get("accept-encoding", ""):
            return Response(self._files[path], headers=headers)
        return Response(self._packed[path], headers={**headers, "content-encoding": "gzip"})
