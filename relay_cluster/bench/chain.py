"""`relay bench chain`: KVCOMM's five agents, fully connected, over Ray workers.

    agent k reads   prefix | input | answer 1 | ... | answer k-1     and answers with `output_tokens` tokens

One worker decodes every answer once and holds all segments; another one is asked for the first token of every
agent's prompt, again and again, under every method. It keeps nothing between two requests, so each time
look-up, lease, transfer of every span, rotation and rectification are inside the time to first token, which
is taken at the caller, Ray's dispatch included. Agent 1 has nothing to reuse but its own prefix.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from relay_cluster.bench.common import BASE, Document, TimingRow, learners, median, progress, rounds
from relay_cluster.bench.texts import Tasks, TextPool
from relay_cluster.bench.timing import POSITIONS, timing_row
from relay_cluster.cluster import Cluster
from relay_cluster.config import ClusterConfig
from relay_cluster.pipeline import Agent, Pipeline
from transport.errors import ConfigError, RelayError
from transport.types import WorkerId
from workers.messages import Distance, Reply, Request
from workers.segment import PromptBuilder, SlotValue
from workers.settings import SamplingSettings

WARM_CHAINS = 3
"""Other chains that a learning method (`kvcomm`) sees in full before it is measured."""

_INPUT = "input"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainSettings:
    """What is measured.

    Attributes:
        methods: as users write them, the base first.
        agents: length of the chain.
        prefix_tokens: of every agent's own fixed prefix; input_tokens: of the shared input.
        output_tokens: of every answer; stop tokens are held back until then.
        repeats: timed rounds, after a cold one.
        fidelity: compare every method's distributions as well.
    """

    methods: tuple[str, ...]
    agents: int = 5
    prefix_tokens: int = 512
    input_tokens: int = 1000
    output_tokens: int = 512
    repeats: int = 3
    seed: int = 0
    fidelity: bool = True


class ChainShape(Protocol):
    """What the prompts of a chain depend on; see ChainSettings."""

    @property
    def agents(self) -> int: ...
    @property
    def prefix_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Role:
    """One agent of the chain: its template, and the length of its fixed prefix in tokens."""

    agent: Agent
    prefix_tokens: int


@dataclass(slots=True)
class _Samples:
    cold_s: float
    ttft_s: list[float]
    stages: list[dict[str, float]]
    reply: Reply | None = None


def run_chain(
    settings: ChainSettings, tasks: Tasks, config: ClusterConfig, on_event: Callable[..., None] | None = None
) -> Document:
    """Start the cluster, decode the chain, measure, stop the cluster.

    Raises:
        ConfigError: fewer than two workers, too little text, or a prompt beyond the model's context.
    """
    if config.workers == "auto":
        config = config.model_copy(update={"workers": 2})
    if config.worker_count(settings.agents) < 2:
        raise ConfigError(
            "the chain needs two workers, one that holds the segments and one that reads them. "
            "Set `workers: 2` or more in the cluster file."
        )
    tokenizer = _tokenizer(config.model)
    pool = TextPool(tasks, tokenizer, settings.seed)
    roles = make_roles(settings, tokenizer, pool)
    pipeline = Pipeline([role.agent for role in roles], name="chain", model=config.model)
    steps = settings.agents * (1 + (settings.repeats + 1) * len(settings.methods) + settings.fidelity)
    steps += WARM_CHAINS if learners(settings.methods) else 0
    with (
        progress("chain", steps) as advance,
        Cluster(config, agents_hint=pipeline, on_event=on_event) as cluster,
    ):
        bench = _Bench(cluster, settings, roles, advance)
        bench.warm(pool)
        given = SlotValue(token_ids=pool.take(settings.input_tokens), kv_tokens=settings.input_tokens)
        values = bench.decode(given)
        rows = bench.measure(values)
        facts = _facts(settings, tasks, config, cluster, bench.notes)
    return Document("chain", facts, rows)


def _facts(
    settings: ChainSettings, tasks: Tasks, config: ClusterConfig, cluster: Cluster, notes: Mapping[str, None]
) -> dict[str, Any]:
    infos = list(cluster.workers.values())
    return {
        **asdict(settings),
        "model": config.model,
        "workers": len(infos),
        "nodes": len({i.node for i in infos}),
        "device": "+".join(dict.fromkeys(i.device for i in infos)),
        "backends": sorted({b for i in infos for b in i.backends}),
        "threads": config.worker.threads,
        "data": list(tasks.sources),
        "data_digest": tasks.digest,
        "spans_made_by": f"decoded by {BASE} on one worker, greedy, stop and special tokens held back",
        "inside_ttft": "Ray dispatch, admission, look-up, lease, transfer of every span from the other "
        "worker, rotation, rectification, fresh prefill, first token",
        "prefix": "every agent's own prefix is in the reader's exact local prefix cache; full_prefill "
        "computes the whole prompt",
        "learning": f"kvcomm has seen {WARM_CHAINS} other chains of the same shape, computed in full",
        "kl": f"against full_prefill, teacher-forced on its greedy answer, up to {POSITIONS} tokens",
        "notes": list(notes),
    }


# --- prompts ------------------------------------------------------------------------------------------------


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    from workers.model import resolve

    return AutoTokenizer.from_pretrained(str(resolve(model)))


def make_roles(settings: ChainShape, tokenizer: Any, pool: TextPool) -> tuple[Role, ...]:
    """Templates of all agents, each with a fixed prefix of `prefix_tokens` tokens of natural text.

    Raises:
        ConfigError: the prefix is shorter than the template's own fixed text.
    """
    builder = PromptBuilder(tokenizer, "", min_segment_tokens=1, max_context=1 << 30)
    roles: list[Role] = []
    for number in range(1, settings.agents + 1):
        heard = "".join(f"\n\nAgent {n}:\n{{agent{n}}}" for n in range(1, number))
        prompt = f"Input:\n{{{_INPUT}}}{heard}\n\nYour contribution:"
        opening = f"You are agent {number} of {settings.agents}. Keep to these notes.\n"
        notes = pool.take(settings.prefix_tokens)
        count, system, length = settings.prefix_tokens, "", -1
        # Text that is cut and tokenised again may come out a token longer or shorter.
        for _ in range(8):
            system = opening + tokenizer.decode(notes[:count])
            length = len(builder.template(system, prompt).leading_ids)
            if length == settings.prefix_tokens:
                break
            count += settings.prefix_tokens - length
            if count < 1:
                raise ConfigError(
                    f"--prefix-tokens {settings.prefix_tokens} is too small: the template alone has "
                    f"{length - max(1, count)} tokens or more. Take at least 64."
                )
        roles.append(Role(Agent(f"agent{number}", prompt, system=system), length))
    return tuple(roles)


# --- measuring ----------------------------------------------------------------------------------------------


class _Bench:
    def __init__(
        self,
        cluster: Cluster,
        settings: ChainSettings,
        roles: tuple[Role, ...],
        advance: Callable[[str], None],
    ) -> None:
        self._cluster = cluster
        self._settings = settings
        self._roles = roles
        self._advance = advance
        self._writer, self._reader = list(cluster.workers)[:2]
        self.notes: dict[str, None] = {}

    def decode(self, given: SlotValue) -> dict[str, SlotValue]:
        """Every answer, decoded and published on the writer.

        Raises:
            RelayError: an answer was not published, so that nobody could reuse it.
        """
        values = {_INPUT: given}
        length = self._settings.output_tokens
        sampling = SamplingSettings(max_new_tokens=length, min_new_tokens=length)
        for role in self._roles:
            request = self._request(role, values, BASE, sampling)
            reply = self._ask(self._writer, replace(request, publish=True))[0]
            if not any(p.slot is None for p in reply.published):
                raise RelayError(
                    f"{role.agent.name}'s answer was not published ({'; '.join(reply.notes)}). "
                    "Raise transport.arena_bytes in the cluster file."
                )
            values[role.agent.name] = reply.output
            self._advance(f"{role.agent.name} decoded {len(reply.token_ids)} tokens")
        return values

    def warm(self, pool: TextPool) -> None:
        """Let methods that learn see other chains of the same shape, computed in full by the reader."""
        settings = self._settings
        names = learners(settings.methods)
        for number in range(WARM_CHAINS if names else 0):
            ids = pool.take(settings.input_tokens)
            values = {_INPUT: SlotValue(token_ids=ids, kv_tokens=len(ids))}
            once = SamplingSettings(max_new_tokens=1)
            for role in self._roles:
                request = replace(self._request(role, values, BASE, once), publish=True)
                answer = pool.take(settings.output_tokens)
                values[role.agent.name] = self._cluster.replay(self._writer, request, answer).output
            for role in self._roles:
                for name in names:
                    self._ask(self._reader, replace(self._request(role, values, name, once), publish=True))
            self._advance(f"{', '.join(names)} learns from chain {number + 1}")

    def measure(self, values: Mapping[str, SlotValue]) -> list[TimingRow]:
        """Rows of every agent, methods interleaved."""
        settings = self._settings
        for role in self._roles:
            self._cluster.prepare(self._reader, role.agent.system, role.agent.prompt)
        found = {
            (role.agent.name, method): _Samples(0.0, [], [])
            for role in self._roles
            for method in settings.methods
        }
        for turn in rounds(settings.methods, settings.repeats, settings.seed):
            for role in self._roles:
                for method in turn.order:
                    self._sample(role, method, values, found[role.agent.name, method], cold=turn.cold)
                    self._advance(f"{role.agent.name}: {method}")
        rows: list[TimingRow] = []
        for number, role in enumerate(self._roles, start=1):
            distances = self._distances(role, values)
            for method in settings.methods:
                rows.append(self._row(number, role, method, found, distances.get(method)))
        return rows

    def _sample(
        self, role: Role, method: str, values: Mapping[str, SlotValue], found: _Samples, *, cold: bool
    ) -> None:
        request = self._request(role, values, method, SamplingSettings(max_new_tokens=1))
        reply, ttft_s = self._ask(self._reader, request)
        found.reply = reply
        for fallback in reply.fallbacks:
            what = f"{role.agent.name}, {method}: slot {fallback.slot} computed, {fallback.reason}"
            self.notes[what] = None
        if cold:
            found.cold_s = ttft_s
            return
        found.ttft_s.append(ttft_s)
        stages = {name: getattr(reply.stages, name) for name in reply.stages.__slots__}
        found.stages.append({"dispatch_s": max(0.0, ttft_s - reply.ttft_s), **stages})

    def _distances(self, role: Role, values: Mapping[str, SlotValue]) -> dict[str, Distance]:
        if not self._settings.fidelity:
            return {}
        request = self._request(role, values, BASE, SamplingSettings(max_new_tokens=1))
        measured = self._cluster.distances(self._reader, request, self._settings.methods, tokens=POSITIONS)
        self._advance(f"{role.agent.name}: fidelity")
        return {d.method: d for d in measured}

    def _request(
        self, role: Role, values: Mapping[str, SlotValue], method: str, sampling: SamplingSettings
    ) -> Request:
        first = role is self._roles[0]
        return Request(
            id=f"chain-{role.agent.name}-{uuid.uuid4().hex[:8]}",
            agent=role.agent.name,
            system=role.agent.system,
            prompt=role.agent.prompt,
            values={slot: values[slot] for slot in role.agent.slots},
            method=method,
            sampling=sampling,
            publish=False,
            # When the first agent is asked, nobody has read the input before.
            only_keys=frozenset() if first else None,
        )

    def _ask(self, worker: WorkerId, request: Request) -> tuple[Reply, float]:
        return self._cluster.generate(worker, request, lambda *_: None)

    def _row(
        self,
        number: int,
        role: Role,
        method: str,
        found: Mapping[tuple[str, str], _Samples],
        distance: Distance | None,
    ) -> TimingRow:
        samples = found[role.agent.name, method]
        reply = samples.reply
        assert reply is not None  # every method had its rounds
        base_s = median(found[role.agent.name, BASE].ttft_s)
        spans = 0 if number == 1 else number
        settings = self._settings
        # The last token of an answer has no KV of its own: it is computed by whoever reads it.
        kept = settings.output_tokens - 1
        span_tokens = settings.input_tokens + (number - 1) * kept if spans else 0
        return timing_row(
            method,
            reply.resolved_method or method,
            [distance] if distance else [],
            samples.ttft_s,
            base_s=base_s,
            quoted=(BASE, base_s),
            flops=(getattr(reply, "flop_ratio_predicted", None), getattr(reply, "flop_ratio", None)),
            reuse=reply.reuse,
            agent=number,
            span_tokens=span_tokens,
            spans=spans,
            fresh_tokens=reply.prompt_tokens - role.prefix_tokens - span_tokens,
            prefix_tokens=role.prefix_tokens,
            prompt_tokens=reply.prompt_tokens,
            ttft_s_cold=samples.cold_s,
            stages={key: median([s[key] for s in samples.stages]) for key in samples.stages[0]},
        )
