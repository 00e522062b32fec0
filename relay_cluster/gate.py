"""The quality gate (methods.md section 6): which reuse method the next request of an agent may use.

A pure state machine, one state per edge: no time, no I/O, no randomness but a hash of the seed. It is told
what an agent asks for, answers with the method to use and whether to keep evidence of the request, and later
hears what a shadow check said of it. An answer that is out is never touched: the gate only picks methods for
later requests.

    rungs of an edge:  what was asked for -> something stricter -> full_prefill

    demoted    the mean of the last checks on this rung exceeds the error budget
    recovers   `recover_after` checks in a row within half of it; after each fall that took twice as many

On the last rung nothing is relayed, so there a check judges the rung before it instead: a probe.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Final, Literal

from annotated_types import Ge, Gt, Le

from transport.errors import ConfigError
from workers.methods import parse_reuse
from workers.methods.base import HealMode

Role = Literal["judge", "aggregator"]
STRICT_ROLES: Final = ("judge", "aggregator")
FULL: Final = "full_prefill"
WINDOW: Final = 4
"""Checks whose mean is held against the budget."""
MARGIN: Final = 0.5
"""Share of the budget within which a check counts towards recovery: no edge flips at the very limit."""
MAX_BACKOFF: Final = 16
_SHARES: Final = ("ratio", "r")
"""Parameters that say which share of a span a method recomputes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QualitySettings:
    """The error budget of a pipeline's reuse, and how closely it is watched.

    Attributes:
        kl_budget: mean KL(full prefill || answer's method) over the compared tokens, in nats.
        top1_budget: share of the compared tokens whose most likely token may be another one.
        sample_rate: share of requests that are checked.
        warmup: requests of an edge that are all checked, at the start and on every new rung.
        recover_after: good checks in a row after which an edge goes back to the rung before.
        tokens: first tokens of an answer that are compared.
        timeout_s: deadline of one shadow check; without a verdict by then the request counts as unchecked.
    """

    kl_budget: Annotated[float, Gt(0)] = 0.03
    top1_budget: Annotated[float, Ge(0), Le(1)] = 0.13
    sample_rate: Annotated[float, Ge(0), Le(1)] = 0.1
    warmup: Annotated[int, Ge(0)] = 2
    recover_after: Annotated[int, Ge(1)] = 5
    tokens: Annotated[int, Ge(1), Le(64)] = 16
    timeout_s: Annotated[float, Gt(0)] = 60.0


@dataclass(frozen=True, slots=True)
class Edge:
    """Where KV is relayed to: an agent of a pipeline on a model, and the agents that its prompt takes text
    from. All of them are one edge: a request has one method, so they can only be judged together."""

    pipeline: str
    model: str
    agent: str
    sources: tuple[str, ...]

    def __str__(self) -> str:
        return f"{'+'.join(self.sources) or '-'} -> {self.agent}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What a shadow check found.

    Attributes:
        kl_mean: mean KL over the compared tokens, in nats.
        top1: share of them with the same most likely token.
        value_error: worst layer's mean 1 - cos of the relayed values; reported, not budgeted, since it cannot
            be compared between models.
    """

    kl_mean: float
    top1: float
    value_error: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What a request is to do.

    Attributes:
        method: to use.
        rung: of the edge's ladder, 0 = what was asked for.
        checked: keep evidence and judge the answer later.
        probe: method to judge instead of `method` (on the last rung), or None.
    """

    method: str
    rung: int
    checked: bool
    probe: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeState:
    """One edge's state.

    Attributes:
        ladder: method texts, loosest first; one rung means that there is nothing to watch.
        rung: the one in use.
        requests: decided so far; on_rung: of those, since the edge came to this rung.
        recent: the last checks on this rung, oldest first.
        good: checks in a row, on this rung, that were well within the budget.
        falls: demotions so far; recoveries: ways back.
        checks, skipped: verdicts so far, and checks that came to none.
        reason: of the last change, in words.
    """

    ladder: tuple[str, ...]
    rung: int = 0
    requests: int = 0
    on_rung: int = 0
    recent: tuple[Check, ...] = ()
    good: int = 0
    falls: int = 0
    recoveries: int = 0
    checks: int = 0
    skipped: int = 0
    reason: str = ""

    @property
    def method(self) -> str:
        return self.ladder[self.rung]

    @property
    def probing(self) -> bool:
        """Whether a check judges the rung before: on the last rung the answer itself is exact."""
        return self.rung > 0 and self.method == FULL


def ladder(method: str) -> tuple[str, ...]:
    """Rungs from `method` to full prefill.

    An exact method has one rung. A preset is followed by the stricter presets; a method that recomputes a
    share of every span by itself with twice the share, healed; any other by `auto:strict`.

    Raises:
        ConfigError: the text is not a method.
    """
    reuse = parse_reuse(method)
    text = method.strip()
    name, _, rest = text.partition(":")
    if reuse.method.exact:
        return (text,)
    if name == "auto":
        preset = rest.split("+")[0]
        between = {"fast": ("auto", "auto:strict"), "strict": ()}.get(preset, ("auto:strict",))
        return (text, *between, FULL)
    doubled = _doubled(name, rest, heal=reuse.heal)
    return (text, doubled or "auto:strict", FULL)


def _doubled(name: str, rest: str, *, heal: HealMode) -> str | None:
    """The method with twice its share, at most all, and healing; None where it names no share below 1."""
    items = [item.partition("=") for item in rest.split("+") if item]
    shares = [float(value) for key, _, value in items if key in _SHARES]
    if not shares or shares[-1] >= 1 or shares[-1] <= 0:
        return None
    more = [f"{k}={min(1.0, 2 * float(v)):g}" if k in _SHARES else f"{k}={v}" for k, _, v in items]
    if heal is HealMode.OFF:
        more = [item for item in more if not item.startswith("heal=")] + ["heal=always"]
    return f"{name}:{'+'.join(more)}"


def first_state(method: str, role: str | None) -> EdgeState:
    """The state of an edge of which nothing is known. Judges and aggregators begin one rung stricter: reuse
    that looks harmless on accuracy changes what a judge chooses (arXiv 2601.08343)."""
    rungs = ladder(method)
    if role in STRICT_ROLES and len(rungs) > 1:
        return EdgeState(ladder=rungs, rung=1, reason=f"role {role} starts stricter")
    return EdgeState(ladder=rungs)


def decide(
    state: EdgeState, settings: QualitySettings, *, seed: int, edge: Edge
) -> tuple[EdgeState, Decision]:
    """The next request of an edge: the state behind it, and what it is to do."""
    after = replace(state, requests=state.requests + 1, on_rung=state.on_rung + 1)
    watched = len(state.ladder) > 1
    checked = watched and (
        state.on_rung < settings.warmup or _chance(seed, edge, state.requests) < settings.sample_rate
    )
    probe = state.ladder[state.rung - 1] if checked and state.probing else None
    return after, Decision(method=state.method, rung=state.rung, checked=checked, probe=probe)


def observe(state: EdgeState, settings: QualitySettings, rung: int, check: Check | None) -> EdgeState:
    """The state after a check of a request that used `rung`.

    Args:
        check: None when it came to no verdict. A verdict on a rung that the edge has left is only counted.
    """
    if check is None:
        return replace(state, skipped=state.skipped + 1)
    state = replace(state, checks=state.checks + 1)
    if rung != state.rung or len(state.ladder) == 1:
        return state
    good = state.good + 1 if _within(check, settings, MARGIN) else 0
    recent = (*state.recent, check)[-WINDOW:]
    state = replace(state, recent=recent, good=good)
    if not state.probing and not _within(_mean(recent), settings, 1.0):
        return _move(state, 1, _words(_mean(recent), settings))
    needed = settings.recover_after * min(MAX_BACKOFF, 2 ** max(0, state.falls - 1))
    if state.rung > 0 and good >= needed:
        return _move(state, -1, f"{good} good checks in a row")
    return state


def _move(state: EdgeState, by: int, why: str) -> EdgeState:
    fell = by > 0
    return replace(
        state,
        rung=state.rung + by,
        on_rung=0,
        recent=(),
        good=0,
        falls=state.falls + fell,
        recoveries=state.recoveries + (not fell),
        reason=f"{'demoted' if fell else 'recovered'}: {why}",
    )


def _mean(checks: tuple[Check, ...]) -> Check:
    n = len(checks)
    return Check(
        kl_mean=sum(c.kl_mean for c in checks) / n,
        top1=sum(c.top1 for c in checks) / n,
        value_error=max(c.value_error for c in checks),
    )


def _within(check: Check, settings: QualitySettings, share: float) -> bool:
    """Whether a check is inside `share` of the budget. A number that is none (NaN) is not."""
    return check.kl_mean <= share * settings.kl_budget and 1 - check.top1 <= share * settings.top1_budget


def _words(check: Check, settings: QualitySettings) -> str:
    parts: list[str] = []
    if not check.kl_mean <= settings.kl_budget:
        parts.append(f"KL {check.kl_mean:.3g} exceeds {settings.kl_budget:g}")
    if not 1 - check.top1 <= settings.top1_budget:
        parts.append(f"{1 - check.top1:.0%} other top tokens exceed {settings.top1_budget:.0%}")
    return ", ".join(parts)


def _chance(seed: int, edge: Edge, request: int) -> float:
    """A number in [0, 1) that depends on nothing else."""
    text = repr((seed, edge.pipeline, edge.model, edge.agent, edge.sources, request))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64


class Gate:
    """The states of all edges under one budget. Not thread-safe: its owner serialises calls.

    Args:
        seed: of the sampling.
    """

    def __init__(self, settings: QualitySettings, *, seed: int = 0) -> None:
        self.settings = settings
        self._seed = seed
        self._states: dict[tuple[Edge, str], EdgeState] = {}

    def decide(self, edge: Edge, method: str, role: str | None = None) -> Decision:
        """What the next request on `edge` that asks for `method` is to do. Another method is another ladder,
        with a state of its own.

        Raises:
            ConfigError: `method` is none, or `role` is unknown.
        """
        if role is not None and role not in STRICT_ROLES:
            raise ConfigError(f'role "{role}" is not known. Roles: {", ".join(STRICT_ROLES)}.')
        state = self._states.get((edge, method)) or first_state(method, role)
        self._states[edge, method], decision = decide(state, self.settings, seed=self._seed, edge=edge)
        return decision

    def observe(self, edge: Edge, method: str, decision: Decision, check: Check | None) -> EdgeState:
        """Hear of a checked request.

        Args:
            method: that was asked for; decision: what `decide` said then.

        Returns:
            The edge's state, for reports.
        """
        key = (edge, method)
        self._states[key] = observe(self._states[key], self.settings, decision.rung, check)
        return self._states[key]

    def state(self, edge: Edge, method: str) -> EdgeState | None:
        """The state of an edge, if it has been asked about."""
        return self._states.get((edge, method))

    @property
    def states(self) -> Mapping[tuple[Edge, str], EdgeState]:
        """(edge, method asked for) -> state."""
        return dict(self._states)


def worst(errors: Iterable[float]) -> float:
    """The largest of the value errors; 0 without any."""
    return max(errors, default=0.0)
