"""`relay bench pull`: how long a worker waits for a small segment of another worker, everything included.

A segment of a block or a few is published on one worker of a real cluster. Another one asks the directory for
it, leases it, pulls and verifies it, and gives it back, again and again, in turn with a Ray call that does
nothing: look-up and lease are such calls, so three of them are what a pull may take.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray

from relay_cluster.bench.common import BASE, Document, median, progress, quantile
from relay_cluster.bench.pull_rows import PullRow
from relay_cluster.bench.texts import Tasks, TextPool
from relay_cluster.cluster import Cluster
from relay_cluster.config import ClusterConfig
from relay_cluster.pipeline import Agent, Pipeline
from transport.errors import RelayError
from transport.types import Outcome, SegmentKey, WorkerId
from workers.actor import Worker
from workers.messages import Request
from workers.segment import SlotValue

_CALL_TIMEOUT_S = 120.0
_WRITER = Agent("writer", "{task}", system="You think a problem through before others read you.")
_READER = Agent("reader", "{writer}", system="You check what your colleagues write.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PullSettings:
    """What is measured.

    Attributes:
        backends: of the cluster, one after another.
        blocks: in how many blocks a segment lies.
        samples: timed pulls of each.
    """

    backends: tuple[str, ...] = ("auto", "tcp")
    blocks: tuple[int, ...] = (1, 4)
    samples: int = 300
    seed: int = 0


@dataclass(frozen=True, slots=True)
class PullTimes:
    """Seconds of one pull and of one call that does nothing."""

    whole_s: float
    lookup_s: float
    lease_s: float
    read_s: float
    call_s: float
    backend: str
    nbytes: int


class Echo:
    """An actor that does nothing."""

    def ping(self) -> None:
        """Nothing."""


def run_pull(settings: PullSettings, tasks: Tasks, config: ClusterConfig) -> Document:
    """Measure every backend on a cluster of its own.

    Raises:
        RelayError: a segment was not published, or a pull did not bring it.
    """
    rows: list[PullRow] = []
    with progress("pull", len(settings.backends) * len(settings.blocks)) as advance:
        for backend in settings.backends:
            transport = replace(config.transport, backend=backend)
            chosen = config.model_copy(update={"workers": 2, "transport": transport})
            with _Reach(chosen, agents_hint=Pipeline([_WRITER, _READER], name="pull")) as cluster:
                for blocks in settings.blocks:
                    rows.append(_measure(cluster, chosen, blocks, settings, tasks))
                    advance(f"{backend}, {blocks} blocks")
    facts = {
        **asdict(settings),
        "model": config.model,
        "data": list(tasks.sources),
        "data_digest": tasks.digest,
        "inside": "look-up, lease, transfer, verification; giving back is not waited for in a request",
        "call": "a Ray call to an idle actor that does nothing, from the reading worker",
    }
    return Document("pull", facts, rows)


class _Reach(Cluster):
    """A cluster whose workers can be asked to run something."""

    def run_on(self, worker: WorkerId, what: Callable[..., Any], *args: Any) -> Any:
        """`what(worker, *args)` in the worker's process.

        Raises:
            RayError: it failed, or the worker is gone.
        """
        handle = self._members[worker].handle
        return ray.get(handle.__ray_call__.remote(what, *args), timeout=_CALL_TIMEOUT_S)


def _measure(
    cluster: _Reach, config: ClusterConfig, blocks: int, settings: PullSettings, tasks: Tasks
) -> PullRow:
    owner, reader = list(cluster.workers)[:2]
    key, tokens = _publish(cluster, owner, blocks * config.transport.block_tokens, settings.seed, tasks)
    # An actor of its own: the shards have other work, and their queues would be measured.
    echo: Any = ray.remote(Echo).options(num_cpus=0).remote()
    try:
        times: list[PullTimes] = cluster.run_on(reader, time_pulls, echo, key, tokens, settings.samples)
    finally:
        ray.kill(echo)
    whole, calls = [t.whole_s for t in times], [t.call_s for t in times]
    return PullRow(
        backend=times[0].backend,
        blocks=blocks,
        bytes=times[0].nbytes,
        samples=len(times),
        seconds_p50=median(whole),
        seconds_p90=quantile(whole, 0.9),
        lookup_s_p50=median([t.lookup_s for t in times]),
        lease_s_p50=median([t.lease_s for t in times]),
        read_s_p50=median([t.read_s for t in times]),
        call_s_p50=median(calls),
        call_s_p90=quantile(calls, 0.9),
        ratio=median(whole) / median(calls),
    )


def _publish(
    cluster: Cluster, worker: WorkerId, tokens: int, seed: int, tasks: Tasks
) -> tuple[SegmentKey, int]:
    """A text of `tokens` tokens as an answer of the worker's; its key."""
    from transformers import AutoTokenizer

    from workers.model import resolve

    tokenizer = AutoTokenizer.from_pretrained(str(resolve(cluster.config.model)))
    pool = TextPool(tasks, tokenizer, seed)
    request = Request(
        id=f"pull-{uuid.uuid4().hex[:8]}",
        agent=_WRITER.name,
        system=_WRITER.system,
        prompt=_WRITER.prompt,
        values={"task": SlotValue(token_ids=pool.take(24))},
        method=BASE,
        publish=True,
    )
    # One more: the last token of an answer has no KV of its own.
    reply = cluster.replay(worker, request, pool.take(tokens + 1))
    answers = [p for p in reply.published if p.slot is None]
    if not answers:
        raise RelayError(f"the text was not published on {worker}: {'; '.join(reply.notes)}")
    return answers[0].key, tokens


def time_pulls(worker: Worker, echo: Any, key: SegmentKey, tokens: int, samples: int) -> list[PullTimes]:
    """Pull and call in turn, after a tenth as many rounds to warm up. Run in the reading worker.

    Raises:
        RelayError: a pull did not bring the segment.
    """
    store = worker.store
    times: list[PullTimes] = []
    for number in range(-(samples // 10) - 1, samples):
        begin = time.perf_counter()
        got = store.acquire({key: tokens}, pipelined=True)
        whole_s = time.perf_counter() - begin
        got.settle(_CALL_TIMEOUT_S)
        store.release(got)
        if [t.outcome for _, t in got.transfers] != [Outcome.PULLED]:
            raise RelayError(f"a pull of {key} brought nothing: {got.misses or got.transfers}")
        begin = time.perf_counter()
        ray.get(echo.ping.remote(), timeout=_CALL_TIMEOUT_S)
        call_s = time.perf_counter() - begin
        if number >= 0:
            transfer = got.transfers[0][1]
            times.append(
                PullTimes(
                    whole_s,
                    got.lookup_s,
                    got.lease_s,
                    got.pull_s,
                    call_s,
                    transfer.backend,
                    transfer.nbytes,
                )
            )
    return times
