"""The owner's process of `relay bench transfer`: sealed blocks behind a backend, and a raw socket beside it.

It reads requests from standard input and answers on standard output, one JSON object a line, until standard
input ends:

    {"backend": ..., "device": ..., "block_nbytes": ..., "parts": [...], "blocks": ...}
        -> {"addresses": {name: base64}, "incarnation": ..., "refs": [[block, generation, nbytes, [sum]]],
            "token": base64}
    {"socket": bytes} -> {"port": ...}    a server that sends as many bytes as it is asked for, at most these
"""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import sys
import threading
import time
from typing import Any, TextIO

import numpy as np
import torch

from transport.arena import Arena
from transport.auto import make_backend
from transport.base import Transport
from transport.directory.granting import Granter, blocks_digest
from transport.settings import TransportSettings
from transport.types import Segment, SegmentKey, WorkerId

WANT = struct.Struct("<Q")
"""What a reader of the raw socket sends: the number of bytes it wants."""
HOST = "127.0.0.1"
KEY = SegmentKey("bench", b"")
READER = WorkerId("reader")
LEASE_S = 3600.0
_ACCEPT_TIMEOUT_S = 30.0


def publish(request: dict[str, Any]) -> tuple[Transport, dict[str, Any]]:
    """Blocks of random bytes behind the backend, and what a reader must know of them."""
    block_nbytes, blocks = int(request["block_nbytes"]), int(request["blocks"])
    parts = [int(n) for n in request["parts"]]
    arena = Arena(blocks * (block_nbytes + 128), block_nbytes, str(request["device"]), parts=parts)
    backend = str(request["backend"])
    transport = make_backend(backend, TransportSettings(), worker=f"owner{block_nbytes}", host=HOST)
    transport.register(arena)
    noise = np.random.default_rng(0)
    wanted = arena.allocate(blocks)
    for block in wanted:
        arena.payload(block).copy_(torch.frombuffer(bytearray(noise.bytes(block_nbytes)), dtype=torch.uint8))
    refs = arena.seal_all(wanted)
    addresses = {backend: base64.b64encode(transport.address()).decode()}
    segment = Segment(KEY, 1, 0, refs)
    # What a directory would do.
    granter = Granter(arena.incarnation, arena.pull_key, int(time.monotonic() * 1e3), 0.0)
    token = granter.token(segment, blocks_digest(segment), READER, 0.0, LEASE_S)
    return transport, {
        "addresses": addresses,
        "incarnation": arena.incarnation,
        "refs": [[r.block, r.generation, r.nbytes, list(r.checksums)] for r in refs],
        "token": base64.b64encode(token).decode(),
    }


def serve_socket(nbytes: int) -> int:
    """Start a thread that sends bytes to one reader; returns the port."""
    buffer = memoryview(np.random.default_rng(1).bytes(nbytes))
    listener = socket.create_server((HOST, 0))
    listener.settimeout(_ACCEPT_TIMEOUT_S)

    def serve() -> None:
        with listener:
            sock, _ = listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with sock:
            while want := sock.recv(WANT.size, socket.MSG_WAITALL):
                sock.sendall(buffer[: WANT.unpack(want)[0]])

    threading.Thread(target=serve, name="bench-socket", daemon=True).start()
    return listener.getsockname()[1]


def private_stdout() -> TextIO:
    """Standard output for our own lines alone; what libraries (UCX) print there goes to standard error."""
    ours = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return ours


def main() -> None:
    """Answer until standard input ends."""
    out = private_stdout()
    transports: list[Transport] = []
    for line in sys.stdin:
        request = json.loads(line)
        if "socket" in request:
            answer: dict[str, Any] = {"port": serve_socket(int(request["socket"]))}
        else:
            transport, answer = publish(request)
            transports.append(transport)
        out.write(json.dumps(answer) + "\n")
        out.flush()
    for transport in transports:
        transport.close()


if __name__ == "__main__":
    main()
