"""Services over real sockets, without workers: their requests end with errors, which are recorded as any
others are."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from relay_cluster import Cluster, ClusterConfig
from relay_cluster.board.client import BoardClient
from relay_cluster.board.proxy import PageServer
from relay_cluster.serving.app import make_app
from relay_cluster.serving.tenants import Tenants

MODEL = ClusterConfig().model
DEADLINE_S = 60.0
SECRET = "swordfish"
"""What the message of `ask` says."""


def digests(keys: dict[str, str]) -> dict[str, str]:
    return {hashlib.sha256(key.encode()).hexdigest(): tenant for key, tenant in keys.items()}


def make(keys: dict[str, str] | None = None) -> FastAPI:
    return make_app(Cluster(ClusterConfig()), Tenants(digests(keys or {})))


@contextmanager
def serving(app: FastAPI, port: int = 0) -> Iterator[str]:
    """The address of an app that listens."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    listener = socket.create_server(("127.0.0.1", port))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(DEADLINE_S)
        listener.close()
        assert not thread.is_alive()


def ask(url: str, key: str = "", **changes: Any) -> httpx.Response:
    """A chat that no worker answers."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": SECRET}], **changes}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=DEADLINE_S)


@contextmanager
def page_server(url: str, key: str | None = "") -> Iterator[PageServer]:
    with PageServer(0, BoardClient(url, key=key, timeout_s=10.0)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(DEADLINE_S)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]
