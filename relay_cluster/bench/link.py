"""`relay bench link`: time to first token where the segment comes over a network, against what bounds it.

One worker, on the first node, holds an upstream agent's text; another one, on the second node, is asked for
the first token of a prompt that contains it. It keeps nothing between two requests, so every time the segment
travels. What bounds that time is the longer of two: the same prompt with a segment that the reader holds
itself, and the segment's bytes at the rate of a plain socket between the same two nodes.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from relay_cluster.bench.common import (
    BASE,
    Document,
    LinkRow,
    median,
    progress,
    rounds,
    split_method,
)
from relay_cluster.bench.texts import Tasks, TextPool
from relay_cluster.cluster import Cluster
from relay_cluster.config import ClusterConfig
from relay_cluster.links import PROBE_NBYTES, PROBES, probe
from relay_cluster.nodes import affinities
from relay_cluster.pipeline import Agent, Pipeline
from transport.errors import ConfigError, RelayError
from transport.types import WorkerId
from workers.messages import Reply, Request
from workers.segment import SlotValue
from workers.settings import SamplingSettings

_PROBE_TIMEOUT_S = 60.0
_FAR, _NEAR = "far", "near"

_WRITER = Agent("writer", "Task:\n{task}", system="You think a problem through before others read you.")
_READER = Agent(
    "reader",
    "A colleague wrote:\n{writer}\n\nSay in one sentence whether it is right.",
    system="You check what your colleagues write.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSettings:
    """What is measured.

    Attributes:
        methods: as users write them, the base first.
        span_tokens: of the relayed text.
        layer_groups: values of transport.layer_groups, each on workers of its own.
        repeats: timed rounds, after a cold one.
    """

    methods: tuple[str, ...]
    span_tokens: int = 1024
    layer_groups: tuple[int, ...] = (6, 1)
    repeats: int = 5
    seed: int = 0


@dataclass(slots=True)
class _Samples:
    """Replies of one method with a segment at one place, and seconds to the first token at the caller."""

    ttft_s: list[float] = field(default_factory=list[float])
    replies: list[Reply] = field(default_factory=list[Reply])


def run_link(settings: LinkSettings, tasks: Tasks, config: ClusterConfig) -> Document:
    """Measure every number of layer groups, each with workers that are started for it.

    Raises:
        ConfigError: not two nodes, too little text, or a prompt beyond the model's context.
        RelayError: a segment was not published, or not relayed.
    """
    if len(set(config.nodes)) < 2:
        raise ConfigError("the link is measured between two nodes: name them in the cluster file (`nodes`).")
    config = config.model_copy(update={"workers": 2, "worker": replace(config.worker, break_even=False)})
    rows: list[LinkRow] = []
    facts: dict[str, Any] = {}
    steps = len(settings.layer_groups) * (3 + (settings.repeats + 1) * (2 * len(settings.methods) - 1))
    with progress("link", steps) as advance:
        for groups in settings.layer_groups:
            chosen = config.model_copy(update={"transport": replace(config.transport, layer_groups=groups)})
            with Cluster(chosen, agents_hint=Pipeline([_WRITER, _READER], name="link")) as cluster:
                rate = link_gb_s(chosen.nodes[:2])
                advance(f"{groups} layer groups: link of {rate:.3f} GB/s")
                bench = _Bench(cluster, settings, tasks, chosen, advance)
                rows.extend(bench.measure(groups, rate))
                facts = _facts(settings, tasks, chosen, cluster)
    return Document("link", facts, rows)


def link_gb_s(nodes: list[str]) -> float:
    """Rate of a plain connection from the first node to the second, in 1e9 bytes per second.

    Raises:
        RelayError: no answer in time.
    """
    here, there = affinities(nodes)
    try:
        return probe(here.node_id, there.node_id, timeout_s=_PROBE_TIMEOUT_S) / 8
    except TimeoutError as error:
        raise RelayError(
            f"the link between {nodes[0]} and {nodes[1]} could not be measured: {error}"
        ) from error


def _facts(settings: LinkSettings, tasks: Tasks, config: ClusterConfig, cluster: Cluster) -> dict[str, Any]:
    return {
        **asdict(settings),
        "model": config.model,
        "nodes": sorted({info.node for info in cluster.workers.values()}),
        "threads": config.worker.threads,
        "data": list(tasks.sources),
        "data_digest": tasks.digest,
        "spans_made_by": "replay: natural text taken as the answer of an upstream agent",
        "inside_ttft": "Ray dispatch, look-up, lease, transfer, rotation, rectification, prefill",
        "near": "the same prompt with another text of that length, whose segment the reader holds itself",
        "link": f"a plain TCP connection between the two nodes, {PROBE_NBYTES} bytes, median of {PROBES}",
        "bound": "max(near, bytes / link)",
    }


# --- measuring ----------------------------------------------------------------------------------------------


class _Bench:
    def __init__(
        self,
        cluster: Cluster,
        settings: LinkSettings,
        tasks: Tasks,
        config: ClusterConfig,
        advance: Callable[[str], None],
    ) -> None:
        from transformers import AutoTokenizer

        from workers.model import resolve

        self._cluster = cluster
        self._settings = settings
        self._advance = advance
        self._writer, self._reader = list(cluster.workers)[:2]
        tokenizer = AutoTokenizer.from_pretrained(str(resolve(config.model)))
        self._pool = TextPool(tasks, tokenizer, settings.seed)

    def measure(self, layer_groups: int, link_gb_s: float) -> list[LinkRow]:
        """One row for every method."""
        values = {
            _FAR: self._publish((self._writer,)),
            _NEAR: self._publish((self._writer, self._reader)),
        }
        # Full prefill is the same wherever a segment is.
        kinds = [
            f"{m}|{where}" for m in self._settings.methods for where in values if (m, where) != (BASE, _NEAR)
        ]
        found = {kind: _Samples() for kind in kinds}
        for turn in rounds(kinds, self._settings.repeats, self._settings.seed):
            for kind in turn.order:
                method, _, where = kind.rpartition("|")
                reply, ttft_s = self._ask(method, values[where])
                _check(reply, method, where)
                if not turn.cold:
                    found[kind].ttft_s.append(ttft_s)
                    found[kind].replies.append(reply)
                self._advance(f"{layer_groups} layer groups: {method}, {where}")
        base_s = median(found[f"{BASE}|{_FAR}"].ttft_s)
        return [
            self._row(method, layer_groups, link_gb_s, base_s, found)
            for method in self._settings.methods
            if method != BASE
        ]

    def _publish(self, workers: tuple[WorkerId, ...]) -> SlotValue:
        """A text of `span_tokens` tokens as the writer's answer, published on these workers."""
        task = SlotValue(token_ids=self._pool.take(40))
        # One more: the last token of an answer has no KV of its own.
        answer = self._pool.take(self._settings.span_tokens + 1)
        output = SlotValue(text="")
        for worker in workers:
            request = self._request(_WRITER, {"task": task}, BASE)
            reply = self._cluster.replay(worker, replace(request, publish=True), answer)
            if not any(p.slot is None for p in reply.published):
                raise RelayError(f"the text was not published on {worker}: {'; '.join(reply.notes)}")
            output = reply.output
        assert output.token_ids is not None  # an answer is made of ids
        self._advance("published")
        return SlotValue(token_ids=output.token_ids[: output.kv_tokens], kv_tokens=output.kv_tokens)

    def _ask(self, method: str, value: SlotValue) -> tuple[Reply, float]:
        request = self._request(_READER, {_WRITER.name: value}, method)
        return self._cluster.generate(self._reader, request, lambda *_: None)

    def _request(self, agent: Agent, values: dict[str, SlotValue], method: str) -> Request:
        return Request(
            id=f"link-{agent.name}-{uuid.uuid4().hex[:8]}",
            agent=agent.name,
            system=agent.system,
            prompt=agent.prompt,
            values=values,
            method=method,
            sampling=SamplingSettings(max_new_tokens=1),
            publish=False,
        )

    def _row(
        self, asked: str, layer_groups: int, link_gb_s: float, base_s: float, found: dict[str, _Samples]
    ) -> LinkRow:
        far, near = found[f"{asked}|{_FAR}"], found[f"{asked}|{_NEAR}"]
        method, params = split_method(asked, far.replies[-1].resolved_method)
        (transfer,) = [t.transfer for t in far.replies[-1].transfers if t.transfer.nbytes]
        ttft_s, near_s = median(far.ttft_s), median(near.ttft_s)
        wire_s = transfer.nbytes / (link_gb_s * 1e9)
        return LinkRow(
            method=method,
            params=params,
            layer_groups=layer_groups,
            backend=transfer.backend,
            span_tokens=self._settings.span_tokens,
            prompt_tokens=far.replies[-1].prompt_tokens,
            bytes=transfer.nbytes,
            link_gb_s=link_gb_s,
            samples=len(far.ttft_s),
            ttft_s_median=ttft_s,
            ttft_s_min=min(far.ttft_s),
            ttft_s_max=max(far.ttft_s),
            near_ttft_s_median=near_s,
            wire_s=wire_s,
            over_bound=ttft_s / max(near_s, wire_s),
            exposed_s=median([r.stages.pull_s for r in far.replies]),
            hidden_s=median([r.pull_hidden_s for r in far.replies]),
            base_ttft_s_median=base_s,
            speedup=base_s / ttft_s,
        )


def _check(reply: Reply, method: str, where: str) -> None:
    """A sample that did not do what it is to measure is none."""
    if reply.fallbacks:
        raise RelayError(
            f"{method}, {where}: not relayed: {reply.fallbacks[0].reason} {reply.fallbacks[0].detail}"
        )
    travelled = any(t.transfer.nbytes for t in reply.transfers)
    if method != BASE and travelled != (where == _FAR):
        raise RelayError(f"{method}, {where}: the segment {'travelled' if travelled else 'did not travel'}.")
