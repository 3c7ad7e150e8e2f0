"""What can be wrong with a request, as OpenAI's API says it. Messages name limits and fields, never files or code."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import Response

from fastcache.serve.engine.events import Failure
from fastcache.serve.http.schema import ErrorBody, ErrorDetail

_TYPES: Mapping[int, str] = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_LONGEST_MESSAGE = 400


class ApiError(Exception):
    """An answer that is not a success. `retry_after_s` becomes the header."""

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after_s = status, code, param, retry_after_s

    @property
    def body(self) -> ErrorBody:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        param = None if self.param is None else _printable(self.param)
        return ErrorBody(error=ErrorDetail(message=_printable(str(self)), type=kind, param=param, code=self.code))

    @property
    def headers(self) -> dict[str, str]:
        named = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return named if self.retry_after_s is None else {**named, "Retry-After": str(self.retry_after_s)}

    def response(self) -> Response:
        """The answer, an ASGI application."""
        return Response(self.body.model_dump_json(), self.status, self.headers, media_type="application/json")


def _printable(text: str) -> str:
    """A client's own words may hold half a character, which no encoding takes, or be long."""
    return text[:_LONGEST_MESSAGE].encode("utf-8", "backslashreplace").decode()


_FAILURES: Mapping[Failure, tuple[int, str]] = {
    "cancelled": (499, "the job was cancelled"),
    "late": (504, "the job was not done in time; ask for fewer steps, or again when the server is less busy"),
    "draining": (503, "the server is shutting down; ask another, or again"),
    "broken": (503, "the server's device has failed and it is about to start again; ask again"),
    "out_of_memory": (500, "the server has not enough memory for this image"),
    "failed": (500, "the image could not be drawn; the server's log says why"),
}


def failure(kind: Failure) -> ApiError:
    """The error that a job's end stands for."""
    status, message = _FAILURES[kind]
    return ApiError(status, message, code=f"job_{kind}", retry_after_s=5 if status == 503 else None)


def internal() -> ApiError:
    return ApiError(500, "the server failed at this request; its log says why", code="internal_error")
