"""Errors as OpenAI's API shapes them, and how ours become them.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

The only place that knows HTTP statuses of errors.
"""

from __future__ import annotations

from typing import Any

from transport.errors import (
    CacheFull,
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    PromptTooLong,
    RelayError,
    WorkerLost,
)

_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a client is told.

    Args:
        status: of HTTP.
        message: what is wrong, and what to do.
        code, param: machine-readable reason, and the field that it is about.
        retry_after_s: when to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def kind(self) -> str:
        """OpenAI's `type`."""
        return _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


def api_error(error: Exception) -> ApiError:
    """What a client is told of an error of ours; of one that nobody foresaw, no more than that."""
    match error:
        case ApiError():
            return error
        case PromptTooLong():
            return ApiError(400, str(error), code="context_length_exceeded", param="messages")
        case ConfigError():
            return ApiError(400, str(error))
        case CacheFull():
            return ApiError(503, str(error), code="overloaded", retry_after_s=5)
        case DeadlineExceeded():
            return ApiError(504, str(error), code="timeout")
        case WorkerLost():
            return ApiError(503, str(error), code="worker_lost", retry_after_s=5)
        case Cancelled():
            return ApiError(503, "the request was cancelled: the service is shutting down.", code="cancelled")
        case RelayError():
            return ApiError(500, str(error), code="engine_error")
        case _:
            return ApiError(500, "the service failed; its log says why.", code="internal_error")
