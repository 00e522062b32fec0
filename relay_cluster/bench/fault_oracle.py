"""What an answer should have been: the same request again in a clean room.

The clean room has a worker for each of the cluster, of the same name, in this process: same model, engine and
store, a directory of its own, and no faults. A request is run there with exactly the spans that its report
says were relayed (`Request.only_keys`), each from the copy that it names (source and variant), in the order
in which the requests ended; so upstream segments are there when a downstream request wants them. With greedy
decoding the answer must be the same, token by token.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from transport.directory.local import LocalDirectory
from transport.types import Outcome, Segment, SegmentKey, WorkerId
from workers.desk import Desk, load_for_desk, open_desk
from workers.messages import Reply, Request
from workers.settings import WorkerSettings

_ARENA_BLOCKS = 64


@dataclass(frozen=True, slots=True)
class _Clean:
    """What the clean room answered."""

    token_ids: tuple[int, ...]
    relayed_keys: frozenset[SegmentKey]


class CleanRoom:
    """See the module. A context manager.

    Args:
        model: name of the model.
        settings: of the workers of the cluster.
        workers: their names.
    """

    def __init__(self, model: str, settings: WorkerSettings, workers: Sequence[WorkerId]) -> None:
        # As the workers do it: how a sum is split over threads is part of its value.
        torch.set_num_threads(settings.threads or torch.get_num_threads())
        self.loaded, profile = load_for_desk(model, settings)
        self._known: dict[Hashable, tuple[_Clean, ...]] = {}
        self._directory = LocalDirectory()
        self._desks: dict[WorkerId, Desk] = {
            name: open_desk(
                name,
                self.loaded,
                profile,
                arena_blocks=_ARENA_BLOCKS,
                settings=settings,
                directory=self._directory,
            )
            for name in workers
        }

    def __enter__(self) -> CleanRoom:
        return self

    def __exit__(self, *_: object) -> None:
        for desk in self._desks.values():
            desk.close()

    def tokens_of(self, text: str) -> int:
        """Number of tokens of a text."""
        return len(self.loaded.tokenizer(text, add_special_tokens=False)["input_ids"])

    def wrong(self, turns: Sequence[tuple[Request, Reply]]) -> list[str]:
        """Run the requests of one pipeline again; what differs, one line each, without any text."""
        name = tuple(_essence(request, reply) for request, reply in turns)
        if name not in self._known:
            try:
                self._known[name] = tuple(self._again(request, reply) for request, reply in turns)
            finally:
                for desk in self._desks.values():
                    desk.clear()
        found = zip(turns, self._known[name], strict=True)
        return [line for (request, reply), clean in found if (line := _difference(request, reply, clean))]

    def _again(self, request: Request, reply: Reply) -> _Clean:
        clean = replace(
            request,
            id=f"{request.id}-clean-{time.time_ns()}",
            only_keys=reply.relayed_keys,
            # With a longer prefix from the cache it might not publish what the cluster's worker did.
            prefix_limit=reply.prefix_tokens,
            shadow_tokens=0,
        )
        desk = self._desks[reply.worker]
        with self._only_these_copies(reply):
            again = desk.agent.generate(clean)
        return _Clean(again.token_ids, again.relayed_keys)

    @contextmanager
    def _only_these_copies(self, reply: Reply) -> Iterator[None]:
        """Hide copies of the relayed segments other than those that were relayed."""
        used = _copies(reply)
        hidden: list[tuple[Desk, Segment]] = [
            (desk, segment)
            for name, desk in self._desks.items()
            for segment in desk.agent.store.segments()
            if segment.key in used and used[segment.key] != (name, segment.variant)
        ]
        for desk, segment in hidden:
            self._directory.retract(desk.owner, [segment])
        yield
        for desk, segment in hidden:
            self._directory.publish(desk.owner, [segment])


def _copies(reply: Reply) -> dict[SegmentKey, tuple[str, str]]:
    """Key -> (source, variant) of the segments that were relayed."""
    return {
        t.key: (t.transfer.source, t.variant)
        for t in reply.transfers
        if t.transfer.outcome is Outcome.PULLED and t.key in reply.relayed_keys
    }


def _essence(request: Request, reply: Reply) -> Hashable:
    """All that a fault-free answer depends on."""
    return (
        reply.worker,
        request.agent,
        request.system,
        request.prompt,
        request.method,
        request.sampling,
        tuple(sorted((slot, value.text, value.token_ids) for slot, value in request.values.items())),
        reply.prefix_tokens,
        frozenset(_copies(reply).items()),
        reply.relayed_keys,
    )


def _difference(request: Request, reply: Reply, clean: _Clean) -> str:
    if clean.relayed_keys != reply.relayed_keys:
        lost = reply.relayed_keys - clean.relayed_keys
        copies = "; ".join(
            f"{t.key} of slot {t.slot} from {t.transfer.source}, variant {t.variant[:12]}"
            for t in reply.transfers
            if t.key in lost
        )
        return f"{request.agent}: relayed KV that no fault-free run has made: {copies}"
    if clean.token_ids != reply.token_ids:
        return (
            f"{request.agent} on {reply.worker}: {len(reply.relayed_keys)} spans relayed; answered "
            f"{list(reply.token_ids)}, fault-free {list(clean.token_ids)}"
        )
    return ""
