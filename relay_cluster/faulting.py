"""Errors of Ray, turned into ours at one edge."""

from __future__ import annotations

from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from transport.errors import DeadlineExceeded, RelayError, WorkerLost


def unwrapped(error: RayError | RelayError, what: str) -> RelayError:
    """Our own error out of Ray's wrapping; a dead actor becomes WorkerLost."""
    if isinstance(error, RelayError):
        return error
    if isinstance(error, RayTaskError) and isinstance(error.cause, RelayError):
        return error.cause
    if isinstance(error, RayActorError):
        return WorkerLost(f"{what}: the worker process died. {_last_line(error)}")
    if isinstance(error, GetTimeoutError):
        return DeadlineExceeded(f"{what}: no answer within the deadline (worker.request_timeout_s).")
    return RelayError(f"{what}: {_last_line(error)}")


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
