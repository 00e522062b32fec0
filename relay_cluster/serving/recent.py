"""The last requests of every tenant: when, how long, where the time went, what was reused. No prompt text.

    begin -> running -> finish | fail | cancel -> ring of its tenant (bounded) -> forgotten

Facts in, plain values out; it asks nobody and waits for nothing. Belongs to one event loop.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from relay_cluster.serving.hops import durations
from relay_cluster.serving.service import Ask, Finished, agent_name
from workers.messages import Reply

Outcome = Literal["running", "ok", "error", "cancelled"]
How = Literal["relayed", "fallback", "cheaper", "prefix", "new"]

ID_DIGITS = 12
"""Of a request's id: the first digits of the one in its answer (`chatcmpl-...`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """Bytes that moved, or failed to: see `transport.types.Transfer`. slot: of the prompt."""

    slot: str
    source: str
    destination: str
    source_node: str
    destination_node: str
    backend: str
    bytes: int
    seconds: float
    outcome: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A slot of a prompt, and how its KV came to be there.

    Attributes:
        id, kind: of the remembered text; "" for an input that was seen for the first time.
        tokens: None where the worker did not tell them.
        how: "relayed"; "fallback": computed though it should have been relayed, see `reason` and `detail`;
            "cheaper": computed because a pull was predicted to take longer; "prefix": not pulled, since the
            worker's own prefix cache has it or it is too short; "new": remembered from now on.
        relay_s: measured, pull to rectification; predicted_relay_s, predicted_prefill_s: see SpanCost.
    """

    slot: str
    id: str
    kind: str
    tokens: int | None
    how: How
    reason: str = ""
    detail: str = ""
    relay_s: float | None = None
    predicted_relay_s: float | None = None
    predicted_prefill_s: float | None = None


@dataclass(slots=True, kw_only=True)
class Entry:
    """A request. Seconds; `at` is Unix time, of its arrival.

    Attributes:
        seq: grows with every end of a request; 0 while it runs.
        status, code: of its error, as the client was told. detail: of errors about workers, in words.
        hops: parts of `ttft_s`, in order.
        full_ttft_s: what it would have been with full prefill; basis: "measured" (this was one),
            "predicted", or "" where too little was measured.
        spans, pulls: what was found in the prompt, and what was moved.
        retries: times that it was started again because its worker was lost.
    """

    id: str
    tenant: str
    at: float
    model: str
    agent: str
    pipeline: str
    begun: float
    seq: int = 0
    outcome: Outcome = "running"
    status: int = 0
    code: str = ""
    detail: str = ""
    worker: str = ""
    node: str = ""
    method: str = ""
    ttft_s: float | None = None
    total_s: float | None = None
    decode_s: float | None = None
    full_ttft_s: float | None = None
    basis: str = ""
    hops: dict[str, float] = field(default_factory=dict[str, float])
    pull_hidden_s: float = 0.0
    prompt_tokens: int = 0
    relayed_tokens: int = 0
    prefix_tokens: int = 0
    computed_tokens: int = 0
    answer_tokens: int = 0
    reuse: float | None = None
    flop_ratio: float | None = None
    finish_reason: str = ""
    retries: int = 0
    spans: tuple[Span, ...] = ()
    pulls: tuple[Pull, ...] = ()
    notes: tuple[str, ...] = ()
    log_id: str = ""

    @property
    def fallbacks(self) -> tuple[Span, ...]:
        return tuple(span for span in self.spans if span.how == "fallback")


class Recent:
    """Rings of requests, one for each tenant.

    Args:
        limit: requests kept of each tenant; 0 keeps none.
        models: names that may be shown; what else a client calls a model is its own text.
        clock: seconds for durations.
    """

    def __init__(
        self, limit: int, models: tuple[str, ...] = (), clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.boot = secrets.token_hex(4)
        self.clock = clock
        self._limit = limit
        self._models = frozenset(models)
        self._rings: dict[str, deque[Entry]] = {}
        self._running: dict[str, Entry] = {}
        self._seq = 0

    def begin(self, request_id: str, ask: Ask) -> Entry:
        """A request has come."""
        entry = Entry(
            id=request_id[:ID_DIGITS],
            tenant=ask.tenant,
            at=time.time(),
            model=ask.model if ask.model in self._models else "",
            agent=agent_name(ask),
            pipeline=ask.told[0],
            begun=self.clock(),
        )
        self._running[request_id] = entry
        return entry

    def end(self, request_id: str, entry: Entry, outcome: Outcome) -> None:
        """It is over: its facts are not changed any more."""
        entry.outcome = outcome
        entry.total_s = self.clock() - entry.begun
        del self._running[request_id]
        self._seq += 1
        entry.seq = self._seq
        if self._limit:
            self._rings.setdefault(entry.tenant, deque(maxlen=self._limit)).append(entry)

    def of(self, tenant: str) -> Iterator[Entry]:
        """A tenant's requests that have ended, newest first."""
        return reversed(self._rings.get(tenant, deque()))

    def running(self, tenant: str) -> list[Entry]:
        """A tenant's requests that run or wait, oldest first."""
        return [entry for entry in self._running.values() if entry.tenant == tenant]

    def find(self, tenant: str, request_id: str) -> Entry | None:
        """One of a tenant's requests, by its id here or the one in its answer."""
        wanted = request_id.rpartition("-")[2][:ID_DIGITS]
        if len(wanted) < ID_DIGITS:
            return None
        every = (*self.running(tenant), *self.of(tenant))
        return next((entry for entry in every if entry.id == wanted), None)


def fill(entry: Entry, done: Finished) -> None:
    """Put the facts of an answered request into its entry."""
    reply = done.reply
    entry.worker, entry.node, entry.model = str(reply.worker), str(reply.node), reply.model
    entry.agent = reply.agent
    entry.method = reply.resolved_method or reply.method
    entry.ttft_s, entry.decode_s = done.ttft_s, reply.decode_s
    entry.hops = durations(
        reply.stages,
        ttft_s=done.ttft_s,
        worker_ttft_s=reply.ttft_s,
        queue_s=done.queue_s,
        match_s=done.match_s,
    )
    entry.pull_hidden_s = reply.pull_hidden_s
    entry.prompt_tokens, entry.answer_tokens = reply.prompt_tokens, len(reply.token_ids)
    entry.relayed_tokens, entry.prefix_tokens = reply.relayed_tokens, reply.prefix_tokens
    entry.computed_tokens = reply.fresh_tokens - reply.prefix_tokens
    entry.reuse, entry.flop_ratio = reply.reuse, reply.flop_ratio
    entry.finish_reason, entry.notes = reply.finish_reason, reply.notes
    entry.log_id = reply.request_id
    entry.retries = _tries(reply.request_id)
    entry.spans, entry.pulls = _spans(done), _pulls(reply)
    entry.full_ttft_s, entry.basis = _full(entry, done)


def _tries(request_id: str) -> int:
    """`Answering.stream` puts "-1" behind the id of the second try, and so on."""
    last = request_id.rpartition("-")[2]
    return int(last) if request_id.count("-") > 1 and last.isdigit() else 0


def _full(entry: Entry, done: Finished) -> tuple[float, str] | tuple[None, str]:
    """Time to first token of the same request with full prefill: the worker's prediction, and the same waits
    before it."""
    if not entry.relayed_tokens and not entry.prefix_tokens:
        return done.ttft_s, "measured"
    if done.reply.full_prefill_s is None:
        return None, ""
    return done.reply.full_prefill_s + done.queue_s + entry.hops["dispatch"], "predicted"


def _pulls(reply: Reply) -> tuple[Pull, ...]:
    return tuple(
        Pull(
            slot=t.slot,
            source=str(part.source),
            destination=str(part.destination),
            source_node=str(t.source_node),
            destination_node=str(reply.node),
            backend=part.backend,
            bytes=part.nbytes,
            seconds=part.seconds,
            outcome=str(part.outcome),
            detail=part.detail,
        )
        for t in reply.transfers
        for part in (t.transfer.shares or (t.transfer,))
    )


def _spans(done: Finished) -> tuple[Span, ...]:
    reply = done.reply
    found = {f.slot: f for f in done.prompt.found}
    costs = {c.slot: c for c in reply.span_costs}
    failed = {f.slot: f for f in reply.fallbacks}
    published = {p.slot: p.tokens for p in reply.published if p.slot is not None}
    # Slots are s0, s1, ... in the order in which they stand in the prompt.
    slots = [*done.prompt.values, *(s for s in (*costs, *failed) if s not in done.prompt.values)]
    spans: list[Span] = []
    for slot in dict.fromkeys(slots):
        text, cost, fault = found.get(slot), costs.get(slot), failed.get(slot)
        how: How = "prefix" if text is not None else "new"
        if cost is not None:
            how = "relayed" if cost.relayed else "cheaper"
        if fault is not None:
            how = "fallback"
        tokens = fault.tokens if fault else cost.tokens if cost else published.get(slot)
        spans.append(
            Span(
                slot=slot,
                id=text.id if text else "",
                kind=text.kind if text else "input",
                tokens=tokens,
                how=how,
                reason=fault.reason if fault else "",
                detail=fault.detail if fault else "",
                relay_s=cost.actual_relay_s if cost else None,
                predicted_relay_s=cost.predicted_relay_s if cost else None,
                predicted_prefill_s=cost.predicted_prefill_s if cost else None,
            )
        )
    return tuple(spans)


def plain(entry: Entry, now: float) -> dict[str, Any]:
    """One row of the list of requests. now: of the ring's clock."""
    return {
        "id": entry.id,
        "seq": entry.seq,
        "at": entry.at,
        "model": entry.model,
        "agent": entry.agent,
        "pipeline": entry.pipeline,
        "worker": entry.worker,
        "outcome": entry.outcome,
        "status": entry.status,
        "code": entry.code,
        "ttft_s": entry.ttft_s,
        "total_s": now - entry.begun if entry.total_s is None else entry.total_s,
        "full_ttft_s": entry.full_ttft_s,
        "basis": entry.basis,
        "prompt_tokens": entry.prompt_tokens,
        "relayed_tokens": entry.relayed_tokens,
        "prefix_tokens": entry.prefix_tokens,
        "computed_tokens": entry.computed_tokens,
        "answer_tokens": entry.answer_tokens,
        "fallbacks": len(entry.fallbacks),
        "retries": entry.retries,
        "hops": {name: seconds for name, seconds in entry.hops.items() if seconds > 0},
    }
