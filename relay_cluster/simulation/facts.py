"""What is said of simulated requests: in tables at the end, and to the product itself meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from relay_cluster.simulation.fabric import Passage
from relay_cluster.simulation.worker import SimulatedWorker
from transport.types import Located, Outcome, Transfer
from workers.messages import Published, Reply, SlotTransfer, StageTimes
from workers.segment import SlotValue

Stream = Literal["off", "auto", "exact"]


@dataclass(frozen=True, slots=True)
class Mode:
    """How runs are made. text: "METHOD" or "METHOD+stream" ("auto+stream" is --stream auto, "exact+stream"
    is --stream exact)."""

    text: str

    @property
    def stream(self) -> Stream:
        if not self.text.endswith("+stream"):
            return "off"
        return "exact" if self.text.startswith("exact") else "auto"

    @property
    def method(self) -> str:
        name = self.text.removesuffix("+stream")
        return "exact_prefix" if self.stream == "exact" else name


@dataclass(slots=True)
class Answered:
    """One request's facts, in seconds and tokens."""

    run: int
    agent: str
    worker: str
    asked: float
    ttft_s: float = 0.0
    queue_s: float = 0.0
    directory_s: float = 0.0
    pull_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    prompt_tokens: int = 0
    relayed_tokens: int = 0
    prefix_tokens: int = 0
    prepared_tokens: int = 0
    answer_tokens: int = 0
    pulled_bytes: int = 0
    relayed: tuple[str, ...] = ()
    transfers: tuple[SlotTransfer, ...] = ()


@dataclass(slots=True)
class Finished:
    """One run of the pipeline. order: in which it ended."""

    run: int
    began: float
    ended: float


def transfer_of(found: Located, worker: SimulatedWorker, passage: Passage) -> SlotTransfer:
    """A pull as a worker reports it."""
    transfer = Transfer(
        source=found.owner.worker,
        destination=worker.owner.worker,
        backend=passage.kind,
        nbytes=found.segment.nbytes,
        blocks=len(found.segment.blocks),
        seconds=passage.end - passage.begin,
        outcome=Outcome.PULLED,
    )
    return SlotTransfer("", found.segment.key, found.owner.node, transfer)


def reply_of(worker: SimulatedWorker, fact: Answered, published: tuple[Published, ...]) -> Reply:
    """What placement learns from."""
    return Reply(
        request_id="",
        agent=fact.agent,
        worker=worker.owner.worker,
        node=worker.owner.node,
        model="",
        method="",
        prompt_tokens=fact.prompt_tokens,
        fresh_tokens=fact.prompt_tokens - fact.relayed_tokens,
        relayed_tokens=fact.relayed_tokens,
        prefix_tokens=fact.prefix_tokens,
        prepared_tokens=fact.prepared_tokens,
        fresh_entries=0,
        recomputed_entries=0,
        relayed_entries=0,
        ttft_s=fact.ttft_s,
        decode_s=fact.decode_s,
        stages=StageTimes(prefill_s=fact.prefill_s),
        transfers=fact.transfers,
        fallbacks=(),
        published=published,
        token_ids=(0,) * fact.answer_tokens,
        text="",
        finish_reason="length",
        output=SlotValue(text=""),
    )
