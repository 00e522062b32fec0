"""The life of one request of the service:

    model and method known? -> a place to run -> remembered texts become slots -> a worker answers
    -> the answer and its inputs are remembered -> the caller gets the reply and its reuse report

It runs on one event loop; only `answering.py` has threads. Knows nothing of HTTP.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import NamedTuple

from relay_cluster.gate import Edge
from relay_cluster.recording import Recorder
from relay_cluster.serving.answering import Answering
from relay_cluster.serving.errors import ApiError
from relay_cluster.serving.expecting import OUTCOMES, SOURCES, Expecting, Hint, Outcome, Readers, Taken
from relay_cluster.serving.learning import Learner
from relay_cluster.serving.memory import ChatText, Memory, Rewritten, plain
from relay_cluster.serving.places import Places
from relay_cluster.serving.settings import ServeSettings
from relay_cluster.tracing import NO_TRACE, Trace
from transport.errors import ConfigError
from workers.messages import Reply, Request, Token
from workers.methods import parse_method
from workers.segment import SlotValue
from workers.settings import SamplingSettings

log = logging.getLogger(__name__)

_MOST_MEMORIES = 1024
"""Pairs of tenant and model."""
_MOST_CHARS = 1 << 20
"""A longer prompt is not searched: the event loop would stand still for it, and no model takes it."""
_CANCELLING_S = 1.0
"""For requests that have just been cancelled."""
_RAW = "user"
"""Role under which the prompt of a plain completion is searched: its texts are shared as a user's are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request, whichever route it came by.

    Attributes:
        tenant: whose it is; "" when no keys are asked for.
        model: as the client names it.
        texts: the messages; of a plain completion one, the prompt.
        raw: continue the text, without a chat template.
        sampling: how tokens are drawn.
        relay: False finds and remembers nothing.
        reuse: method; None leaves it to the service.
        agent: who asks; None: told by the first message.
        only: find nothing but these ids; None: anything.
        told: pipeline and agent as the client names them, for metrics; "" where it does not.
        next: requests that are expected to contain the answer.
        trace: the request's.
    """

    tenant: str
    model: str
    texts: tuple[ChatText, ...]
    sampling: SamplingSettings
    raw: bool = False
    relay: bool = True
    reuse: str | None = None
    agent: str | None = None
    only: frozenset[str] | None = None
    told: tuple[str, str] = ("", "")
    next: tuple[Hint, ...] = ()
    trace: Trace = NO_TRACE


@dataclass(frozen=True, slots=True)
class Finished:
    """How a request ended.

    Attributes:
        reply: of the worker.
        segment: id of the answer, for later requests; None where it cannot be relayed.
        prompt: the slots that were made.
        queue_s: waiting for a place. match_s: finding texts. ttft_s: from the request to its first token.
    """

    reply: Reply
    segment: str | None
    prompt: Rewritten
    queue_s: float
    match_s: float
    ttft_s: float


class _Times(NamedTuple):
    """Instants (time.perf_counter) of a request: it came, had a place, was rewritten, had its first token."""

    arrived: float
    entered: float
    matched: float
    first: float


class Service:
    """Answers requests on a cluster's workers. All methods belong to one event loop.

    Args:
        settings: knobs.
        models: names that are served; the first is the default.
        answering: the workers.
        places: the queue.
        recorder: gets the metrics.
        agent_labels: whether they have the names that clients give agents and pipelines.
    """

    def __init__(
        self,
        settings: ServeSettings,
        models: Collection[str],
        answering: Answering,
        places: Places,
        *,
        recorder: Recorder | None = None,
        agent_labels: bool = True,
    ) -> None:
        self.settings = settings
        self.models = tuple(models)
        self.places = places
        self.metrics = recorder or Recorder(self.models)
        self.started = int(time.time())
        self._agent_labels = agent_labels
        self._answering = answering
        self._answering.on_retry = self.metrics.counter("relay_request_retries_total").inc
        self._drained_by = 0.0
        self._memories: OrderedDict[tuple[str, str], Memory] = OrderedDict()
        self._learners: OrderedDict[tuple[str, str], Learner] = OrderedDict()
        self._expecting = Expecting(
            answering,
            self._memory_of,
            timeout_s=settings.next_timeout_s,
            most=settings.max_expected,
            on_end=self._expected,
        )
        for source in SOURCES:
            for how in OUTCOMES:  # so that the first one of each is seen as an increase
                self.metrics.counter("relay_expected_requests_total", source, how)

    async def answer(self, ask: Ask) -> AsyncGenerator[Token | Finished, None]:
        """Tokens as they are drawn, and at last how it ended. Close it when it is left early: that cancels
        the work.

        Raises:
            ApiError: unknown model or method, or no place. RelayError: see `Answering.stream`.
        """
        arrived = time.perf_counter()
        method = self._method(ask)
        if ask.model not in self.models:
            known = ", ".join(self.models)
            raise ApiError(
                404,
                f'model "{ask.model}" is not served. Served: {known}.',
                code="model_not_found",
                param="model",
            )
        async with self.places.place():
            entered = time.perf_counter()
            taken = self._take(ask, method)
            prompt = taken.prompt if taken else self._rewrite(ask, method)
            matched = time.perf_counter()
            request = self._request(ask, prompt, method)
            if taken:
                request = replace(request, id=taken.request_id)
            first = 0.0
            stream = self._answering.stream(request, ask.model, taken.worker if taken else None)
            with self._readers(ask, request, prompt, taken) as readers:
                async with aclosing(stream):
                    async for item in stream:
                        first = first or time.perf_counter()
                        if isinstance(item, Token):
                            readers.add(item.id)
                            yield item
                            continue
                        times = _Times(arrived, entered, matched, first)
                        done = self._finished(ask, request, prompt, item, times)
                        readers.answered(item)
                        yield done

    def _finished(self, ask: Ask, request: Request, prompt: Rewritten, reply: Reply, at: _Times) -> Finished:
        """Remember, count and tell an answer."""
        segment = self._remember(ask, prompt, reply)
        if segment is not None and self._learns(ask):
            learner = self._learner((ask.tenant, ask.model))
            learner.answered(request.agent, ask.texts, prompt, segment, reply.output_text)
        self._record(ask, reply, at)
        log.info(
            "answered after %.3f s, first token after %.3f s, %d of %d prompt tokens relayed",
            time.perf_counter() - at.arrived,
            at.first - at.arrived,
            reply.relayed_tokens,
            reply.prompt_tokens,
            extra={"request": request.id, "worker": reply.worker},
        )
        return Finished(
            reply,
            segment,
            prompt,
            queue_s=at.entered - at.arrived,
            match_s=at.matched - at.entered,
            ttft_s=at.first - at.arrived,
        )

    def _take(self, ask: Ask, method: str) -> Taken | None:
        """What was prepared for the request. Nothing where its prompt must be what relay off makes of it, or
        where the client says what may be found."""
        if ask.raw or method == "full_prefill" or ask.only is not None:
            return None
        taken = self._expecting.take((ask.tenant, ask.model), ask.texts)
        if taken is not None:
            self._count_found(taken.prompt)
        return taken

    def _readers(self, ask: Ask, request: Request, prompt: Rewritten, taken: Taken | None) -> Readers:
        """Begin to prepare those who will read the answer."""
        key, limit = (ask.tenant, ask.model), ask.sampling.max_new_tokens
        hints = ask.next
        if not self._relaying or not ask.relay or not self.settings.max_expected:
            return Readers(self._expecting, ())
        if self._learns(ask):
            learnt = self._learner(key).asked(request.agent, ask.texts, prompt, limit)
            hints = hints or learnt  # who says what follows knows better
        if not hints:
            return Readers(self._expecting, ())
        writer = taken.worker if taken else self._answering.worker_for(request.agent, ask.model)
        return self._expecting.begin(key, hints, writer, limit)

    def _learns(self, ask: Ask) -> bool:
        return self.settings.learn_next == "on" and not ask.raw

    def _learner(self, key: tuple[str, str]) -> Learner:
        while len(self._learners) >= _MOST_MEMORIES and key not in self._learners:
            self._learners.popitem(last=False)
        return self._learners.setdefault(key, Learner())

    def _expected(self, key: tuple[str, str], hint: Hint, outcome: Outcome) -> None:
        self.metrics.counter("relay_expected_requests_total", hint.source, outcome).inc()
        if hint.source == "learnt":
            self._learner(key).ended(hint, came=outcome in ("came", "displaced"))

    def _record(self, ask: Ask, reply: Reply, at: _Times) -> None:
        """An answered request, in metrics and in its trace."""
        seconds = time.perf_counter() - at.arrived
        ttft_s = at.first - at.arrived
        stages = {"wait": at.entered - at.arrived, "match": at.matched - at.entered}
        stages["dispatch"] = max(0.0, ttft_s - sum(stages.values()) - reply.ttft_s)
        pipeline, agent = ask.told if self._agent_labels else ("", "")
        self.metrics.answered(
            reply,
            edge=Edge(pipeline, ask.model, agent, ()),
            ttft_s=ttft_s,
            seconds=seconds,
            stages=stages,
            tenant=ask.tenant,
        )
        ask.trace.answered(reply, stages, arrived=at.arrived, seconds=seconds)

    def failed(self, error: ApiError) -> None:
        """A request ended in an error."""
        self.metrics.counter("relay_request_errors_total", error.code or "error").inc()

    def forget(self) -> None:
        """Remember and expect nothing any more."""
        self._expecting.close()
        self._memories.clear()
        self._learners.clear()

    def observe(self) -> None:
        """Bring the gauges up to date."""
        gauges = {
            "relay_requests_running": self.places.running,
            "relay_requests_waiting": self.places.waiting,
            "relay_requests_expected": len(self._expecting),
            "relay_remembered_texts": sum(len(m) for m in self._memories.values()),
            "relay_remembered_bytes": sum(m.nbytes for m in self._memories.values()),
        }
        for name, value in gauges.items():
            self.metrics.gauge(name).set(value)

    async def drain(self) -> None:
        """Let nobody in any more, and wait for those that run, at most settings.drain_timeout_s from the
        first call on: the server calls it at a signal, and the app at its end."""
        now = time.monotonic()
        self._drained_by = self._drained_by or now + self.settings.drain_timeout_s
        self._expecting.close()  # nobody is let in who might come for it
        if not await self.places.drain(max(_CANCELLING_S, self._drained_by - now)):
            log.warning(
                "%d requests were still running at the end of serve.drain_timeout_s", self.places.running
            )

    def close(self) -> None:
        """Let the threads go. Idempotent."""
        self._answering.close()

    @property
    def _relaying(self) -> bool:
        return self.settings.relay

    def _method(self, ask: Ask) -> str:
        if not (self._relaying and ask.relay):
            return "full_prefill"
        method = ask.reuse or self.settings.method
        try:
            parse_method(method)
        except ConfigError as error:
            raise ApiError(400, str(error), code="invalid_value", param="relay.reuse") from None
        if ask.tenant and method.partition(":")[0] == "kvcomm":
            what = "its anchors are shared by all tenants, so it is not available with API keys."
            raise ApiError(400, f"reuse method kvcomm: {what}", code="invalid_value", param="relay.reuse")
        return method

    def _rewrite(self, ask: Ask, method: str) -> Rewritten:
        if not (self._relaying and ask.relay):
            return plain(ask.texts)
        begin = time.perf_counter()
        if sum(len(m.text) for m in ask.texts) > _MOST_CHARS:
            return plain(ask.texts)
        prompt = self._memory(ask).rewrite(ask.texts, ask.only)
        self.metrics.histogram("relay_matching_seconds").observe(time.perf_counter() - begin)
        self._count_found(prompt)
        if method == "full_prefill":
            # Nothing will be reused, so nothing need be spliced: at the seams of slots, and where an answer's
            # own ids are not those of its text, the tokens would be others than with relay off.
            return replace(plain(ask.texts), found=prompt.found, asked=prompt.asked)
        return prompt

    def _count_found(self, prompt: Rewritten) -> None:
        for found in prompt.found:
            self.metrics.counter("relay_found_texts_total", found.kind).inc()

    def _remember(self, ask: Ask, prompt: Rewritten, reply: Reply) -> str | None:
        if not (self._relaying and ask.relay):
            return None
        memory = self._memory(ask)
        memory.keep_inputs(prompt)
        # What a client quotes is the text that it was given; ids that spell another one are no use.
        if not reply.output_text or not reply.text.startswith(reply.output_text):
            return None
        kept = memory.keep_answer(reply.output_text, reply.output)
        if reply.kv_text != reply.output_text and reply.output.token_ids:
            # The same segment, for clients that strip the blanks at the end, or quote less than all.
            count = reply.output.kv_tokens
            memory.keep_answer(reply.kv_text, SlotValue(None, reply.output.token_ids[:count], count))
        return kept

    def _memory(self, ask: Ask) -> Memory:
        return self._memory_of(ask.tenant, ask.model)

    def _memory_of(self, tenant: str, model: str) -> Memory:
        key = (tenant, model)
        if key not in self._memories:
            self._memories[key] = Memory(
                max_texts=self.settings.remember_texts,
                max_bytes=self.settings.remember_bytes,
                min_input_chars=self.settings.min_input_chars,
                common_chars=self.settings.common_chars,
            )
        self._memories.move_to_end(key)
        while len(self._memories) > _MOST_MEMORIES:
            self._memories.popitem(last=False)
        return self._memories[key]

    def _request(self, ask: Ask, prompt: Rewritten, method: str) -> Request:
        raw = ask.raw
        return Request(
            id=f"req-{uuid.uuid4().hex}",
            agent=agent_name(ask),
            prompt=prompt.messages[0].content if raw else "",
            messages=() if raw else prompt.messages,
            raw=raw,
            tenant=ask.tenant,
            values=prompt.values,
            method=method,
            sampling=ask.sampling,
            prefix_first=True,
            publish=self._relaying and ask.relay,
            traceparent=ask.trace.traceparent,
        )


def agent_name(ask: Ask) -> str:
    """Who asks: as it says, or a name that is the same for the same opening, which is what its worker has
    cached."""
    return ask.agent or opening_name(ask.tenant, ask.texts[0])


def opening_name(tenant: str, first: ChatText) -> str:
    """The name of an agent whose chats begin with this message."""
    opening = f"{tenant}\0{first.role}\0{first.text}"
    return "agent-" + hashlib.blake2b(opening.encode(), digest_size=6).hexdigest()


def random_seed() -> int:
    """For requests that name none."""
    return secrets.randbits(31)


def raw_text(prompt: str) -> tuple[ChatText, ...]:
    """The prompt of a plain completion, as `Ask.texts` has it."""
    return (ChatText(_RAW, prompt),)


__all__ = ["Ask", "Finished", "Service", "agent_name", "opening_name", "random_seed", "raw_text"]
