"""The JSON behind the live page and `relay top`, and the page itself.

    GET /relay/v1/board            what runs, the last requests, sums over them, workers, shards
    GET /relay/v1/requests/{id}    one request, in full
    GET /dashboard/                the page; it holds no data, so it needs no key

A tenant sees its own requests and what they come to; workers and shards are everybody's, as in /healthz.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response

from relay_cluster.board.page import HEADERS, asset
from relay_cluster.serving.errors import ApiError
from relay_cluster.serving.explaining import explain, typical
from relay_cluster.serving.hops import GROUPS, HOPS
from relay_cluster.serving.recent import Entry, Recent, plain
from relay_cluster.serving.service import Service
from relay_cluster.serving.summing import WINDOW_S, links, reasons, totals

SCHEMA: Final = "relay.board/1"

Picture = Callable[[], Awaitable[dict[str, Any]]]
TenantOf = Callable[[Request], str]


async def no_picture() -> dict[str, Any]:
    """Of a service whose cluster nobody asks."""
    return {"age_s": None, "workers": [], "shards": [], "gates": []}


class Board:
    """The routes.

    Args:
        recent: requests. service: queue, settings, models.
        picture: of the cluster. tenant_of: raises ApiError where a key is missing.
    """

    def __init__(self, recent: Recent, service: Service, picture: Picture, tenant_of: TenantOf) -> None:
        self._recent = recent
        self._service = service
        self._picture = picture
        self._tenant_of = tenant_of

    def add_to(self, app: FastAPI) -> None:
        """Add the routes to an app."""
        for path, handler in (
            ("/relay/v1/board", self.board),
            ("/relay/v1/requests/{request_id}", self.request),
            ("/dashboard", self.redirect),
            ("/dashboard/{name:path}", self.page),
        ):
            app.add_api_route(path, handler, methods=["GET"], response_model=None, include_in_schema=False)

    async def board(self, request: Request) -> Response:
        """Everything that the page shows at first sight. `?since=SEQ`: only requests that ended after it."""
        tenant = self._tenant_of(request)
        since = _number(request.query_params.get("since", "0"))
        picture = await self._picture()
        return JSONResponse(self.facts(tenant, since, picture), headers={"Cache-Control": "no-store"})

    def facts(self, tenant: str, since: int, picture: dict[str, Any]) -> dict[str, Any]:
        """What `board` answers. since: sequence number; requests up to it are left out."""
        now, clock = time.time(), self._recent.clock()
        every = list(self._recent.of(tenant))
        window = [e for e in every if now - e.at <= WINDOW_S]
        limit = self._service.settings.recent_requests
        up_s = max(0.0, now - self._service.started)
        places = self._service.places
        return {
            "schema": SCHEMA,
            "boot": self._recent.boot,
            "now": now,
            "service": {
                "started": self._service.started,
                "models": list(self._service.models),
                "method": self._service.settings.method if self._service.settings.relay else "full_prefill",
                "running": places.running,
                "waiting": places.waiting,
                "draining": places.draining,
                "kept": limit,
            },
            "totals": totals(window, now, up_s, full=len(every) >= limit > 0),
            "links": links(window),
            "fallbacks": reasons(window),
            "running": [plain(e, clock) for e in self._recent.running(tenant)],
            "requests": [plain(e, clock) for e in every if e.seq > since],
            "cluster": picture,
            "hops": [hop._asdict() for hop in HOPS],
            "groups": dict(GROUPS),
        }

    async def request(self, request: Request, request_id: str) -> Response:
        """One request: parts of its time in order, spans, pulls, and what to make of it in words."""
        tenant = self._tenant_of(request)
        entry = self._recent.find(tenant, request_id)
        if entry is None:
            kept = self._service.settings.recent_requests
            raise ApiError(
                404,
                f"no such request among the last {kept} (serve.recent_requests). Ids are the first 12 digits "
                'of the answer\'s "chatcmpl-..." or "cmpl-...".',
                code="request_not_found",
                param="id",
            )
        whole = detail(entry, self._recent.clock(), list(self._recent.of(tenant)))
        return JSONResponse(whole, headers={"Cache-Control": "no-store"})

    async def redirect(self) -> Response:
        """To the page; relative, so that it holds behind a proxy's prefix."""
        return RedirectResponse("dashboard/", 307)

    async def page(self, request: Request, name: str) -> Response:
        """The page or one of its parts."""
        found = asset(name)
        if found is None:
            raise ApiError(404, "the live page has no such part.")
        if request.headers.get("if-none-match") == found.etag:
            return Response(status_code=304, headers={"ETag": found.etag, **HEADERS})
        return Response(found.body, media_type=found.kind, headers={"ETag": found.etag, **HEADERS})


def detail(entry: Entry, clock: float, others: list[Entry]) -> dict[str, Any]:
    """One request in full. clock: now, of its ring's clock."""
    usual = typical(entry, others)
    at = 0.0
    bars: list[dict[str, Any]] = []
    for name, seconds in entry.hops.items():
        bars.append({"name": name, "start_s": at, "seconds": seconds, "usual_s": usual.seconds.get(name)})
        at += seconds
    return {
        **plain(entry, clock),
        "schema": SCHEMA,
        "bars": bars,
        "why": explain(entry, usual),
        "node": entry.node,
        "method": entry.method,
        "decode_s": entry.decode_s,
        "pull_hidden_s": entry.pull_hidden_s,
        "reuse": entry.reuse,
        "flop_ratio": entry.flop_ratio,
        "finish_reason": entry.finish_reason,
        "spans": [asdict(span) for span in entry.spans],
        "pulls": [asdict(pull) for pull in entry.pulls],
        "notes": list(entry.notes),
        "log_id": entry.log_id,
        "detail": entry.detail,
    }


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ApiError(400, "since must be a whole number, 0 or more.", code="invalid_value", param="since")
    return int(text)
