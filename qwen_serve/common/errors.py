"""What a client is told when something goes wrong: OpenAI's form, one table of kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from qwen_engine.errors import QwenError


class ErrorKind(NamedTuple):
    """A kind of error: its HTTP status, the ``type`` that clients know, and whether trying again may help."""

    status: int
    type: str
    may_retry: bool = False


KINDS = {
    "invalid_request": ErrorKind(400, "invalid_request_error"),
    "context_length_exceeded": ErrorKind(400, "invalid_request_error"),
    "invalid_api_key": ErrorKind(401, "authentication_error"),
    "forbidden_host": ErrorKind(403, "permission_error"),
    "model_not_found": ErrorKind(404, "not_found_error"),
    "not_found": ErrorKind(404, "not_found_error"),
    "method_not_allowed": ErrorKind(405, "invalid_request_error"),
    "request_timeout": ErrorKind(408, "timeout_error"),
    "request_too_large": ErrorKind(413, "invalid_request_error"),
    "unsupported_media_type": ErrorKind(415, "invalid_request_error"),
    "queue_full": ErrorKind(429, "rate_limit_exceeded", may_retry=True),
    "client_closed_request": ErrorKind(499, "client_closed_request"),
    "internal_error": ErrorKind(500, "server_error"),
    "engine_error": ErrorKind(500, "server_error"),
    "loading": ErrorKind(503, "service_unavailable", may_retry=True),
    "draining": ErrorKind(503, "service_unavailable", may_retry=True),
    "engine_stopped": ErrorKind(503, "service_unavailable"),
    "deadline_exceeded": ErrorKind(504, "timeout_error"),
}


class ServeError(QwenError):
    """An error that a client is told.

    Args:
        code: a key of ``KINDS``.
        param: the field of the request that is wrong.
        retry_after: seconds after which trying again may help.
        more: further fields of the error, such as ``n_prompt_tokens``.
    """

    def __init__(
        self,
        code: str,
        message: str,
        param: str | None = None,
        retry_after: float | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param
        self.retry_after, self.more = retry_after, dict(more or {})

    @property
    def kind(self) -> ErrorKind:
        return KINDS[self.code]

    def body(self) -> dict[str, Any]:
        """The JSON a client gets."""
        error = {"message": self.message, "type": self.kind.type, "param": self.param, "code": self.code}
        return {"error": {**error, **self.more}}

    def headers(self) -> dict[str, str]:
        """What clients obey when they decide whether to try again."""
        headers = {"x-should-retry": "true" if self.kind.may_retry else "false"}
        if self.kind.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, round(self.retry_after)))
            headers["retry-after-ms"] = str(max(1, round(self.retry_after * 1000)))
        return headers
