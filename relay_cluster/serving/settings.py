"""Knobs of the service. Defaults live here and nowhere else. Imports are cheap on purpose (see
`workers/settings.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from transport.settings import MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """The HTTP service over a cluster.

    Attributes:
        method: reuse method of requests that name none.
        relay: False remembers nothing and finds nothing: every prompt is what the chat template makes of it.
        workers: workers to start where the cluster file says `workers: auto`.
        default_max_tokens: answer length of requests that give no limit.
        head_timeout_s: a client must have sent its request's HTTP head within so many seconds.
        send_timeout_s: a client that reads nothing of its answer for so long is dropped.
        max_body_bytes: largest request body.
        body_timeout_s: a client must have sent its request's body within so many seconds.
        max_waiting: requests that may wait for a worker; one more is answered with status 429.
        queue_timeout_s: longest wait in that queue, then status 503.
        remember_texts, remember_bytes: most texts kept, and memory for them, for each tenant and model.
        min_input_chars: a shorter user message or tool result is not shared between requests.
        common_chars: characters of recent user messages and tool results in which parts that a later one
            shares are looked for, for each tenant and model; 0: only whole texts are found.
        next_timeout_s: a prompt that was prepared for a request to come (`relay.next`) is kept so long after
            the answer that it contains, then dropped.
        max_expected: requests that are expected at a time; the oldest are dropped. 0: hints are ignored.
        learn_next: whether to learn from a tenant's requests which one follows which, and prepare those too.
        max_agents: agents whose worker is kept in mind.
        api_keys_file: YAML file of keys and tenants; null: none is asked for (only on a loopback address).
        recent_requests: requests whose facts are kept for the live page and `relay top`, for each tenant.
        drain_timeout_s: at the end, running requests have so many seconds before they are cancelled.
    """

    method: str = "auto"
    relay: bool = True
    workers: Annotated[int, Ge(1)] = 2
    default_max_tokens: Annotated[int, Ge(1)] = 256
    head_timeout_s: Annotated[float, Gt(0)] = 15.0
    send_timeout_s: Annotated[float, Gt(0)] = 60.0
    max_body_bytes: Annotated[int, Ge(1024)] = 4 * MIB
    body_timeout_s: Annotated[float, Gt(0)] = 30.0
    max_waiting: Annotated[int, Ge(0)] = 64
    queue_timeout_s: Annotated[float, Gt(0)] = 120.0
    remember_texts: Annotated[int, Ge(0)] = 10_000
    remember_bytes: Annotated[int, Ge(0)] = 256 * MIB
    min_input_chars: Annotated[int, Ge(32), Le(1 << 20)] = 128
    common_chars: Annotated[int, Ge(0)] = 4 << 20
    next_timeout_s: Annotated[float, Gt(0)] = 30.0
    max_expected: Annotated[int, Ge(0)] = 64
    learn_next: Literal["off", "on"] = "off"
    max_agents: Annotated[int, Ge(1)] = 10_000
    api_keys_file: str | None = None
    recent_requests: Annotated[int, Ge(0), Le(10_000)] = 200
    drain_timeout_s: Annotated[float, Ge(0)] = 30.0
