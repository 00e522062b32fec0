"""The service as `relay bench serve` sees it: started as a process of its own, and asked over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from transport.errors import RelayError

_UP_S = 180.0
_DOWN_S = 60.0
_LOOK_S = 0.25


@dataclass(frozen=True, slots=True)
class Answer:
    """One request. ttft_s: until its first text arrived here; service_ttft_s, worker_ttft_s: as the service
    and the worker saw it."""

    text: str
    ttft_s: float
    service_ttft_s: float
    worker_ttft_s: float
    prompt_tokens: int
    answer_tokens: int
    cached_tokens: int
    prepared_tokens: int


class ServiceClient:
    """Asks a service, all its requests over connections that are kept.

    Args:
        url: of the service, without /v1. model: asked for. timeout_s: of a request.
    """

    def __init__(self, url: str, model: str, *, api_key: str, seed: int, timeout_s: float) -> None:
        self._model = model
        self._seed = seed
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(
            base_url=url, headers={"Authorization": f"Bearer {api_key}"}, timeout=timeout_s, limits=limits
        )

    async def __aenter__(self) -> ServiceClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    def _body(self, system: str, user: str, tokens: int, relay: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "model": self._model,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
            "max_tokens": tokens,
            "temperature": 0,
            "seed": self._seed,
            "stream": True,
            "stream_options": {"include_usage": True},
            "relay": relay,
        }

    async def ask(
        self, system: str, user: str, tokens: int, *, relay: bool, then: Mapping[str, Any] | None = None
    ) -> Answer | None:
        """A streamed, greedy answer; None where the service did not give a whole one.

        Args:
            then: the request that will contain the answer (`relay.next`).
        """
        body = self._body(system, user, tokens, {"enabled": relay, "next": then})
        begin = time.perf_counter()
        first = 0.0
        parts: list[str] = []
        report: dict[str, Any] | None = None
        usage: dict[str, Any] | None = None
        try:
            async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    return None
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        return None
                    for choice in chunk["choices"]:
                        text = choice["delta"].get("content")
                        if text or choice["finish_reason"]:
                            first = first or time.perf_counter()
                        parts.append(text or "")
                    report = chunk.get("relay") or report
                    usage = chunk.get("usage") or usage
        except httpx.HTTPError:
            return None
        if report is None or usage is None:
            return None
        return Answer(
            text="".join(parts),
            ttft_s=first - begin,
            service_ttft_s=report["ttft_s"],
            worker_ttft_s=report["worker_ttft_s"],
            prompt_tokens=usage["prompt_tokens"],
            answer_tokens=usage["completion_tokens"],
            cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
            prepared_tokens=report["prepared_tokens"],
        )


def served_model(url: str, api_key: str) -> str:
    """The model of a service that is up.

    Raises:
        RelayError: it does not answer, or refuses the key.
    """
    try:
        response = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {api_key}"}, timeout=30.0)
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, LookupError, ValueError) as error:
        raise RelayError(
            f"{url} does not answer as a service: {error}. Start one with `relay serve`."
        ) from error


@contextmanager
def own_service(cluster: Path | None) -> Iterator[str]:
    """`relay serve` as a process of its own on a free port of this machine; its URL. It ends with the block.

    Raises:
        RelayError: it did not come up.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "relay_cluster", "serve", *([str(cluster)] if cluster else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [*command, "--port", str(port)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a signal to our group would end Ray's processes before the service could
    ) as process:
        try:
            _wait_until_up(url, process)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_DOWN_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_up(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _UP_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RelayError(
                f"the service ended with status {process.returncode} before it was up. Run `relay serve` "
                "with the same file to see why."
            )
        try:
            if httpx.get(f"{url}/healthz", timeout=5.0).status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(_LOOK_S)
    raise RelayError(f"the service was not up within {_UP_S:.0f} s. Run `relay serve` to see why.")
