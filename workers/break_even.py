"""Whether a span is worth a pull: seconds predicted from what earlier transfers and prefills took.

    observe_*   facts of finished transfers, of keys rotated into a cache, of finished prefills
    estimate    pull + rotate + rectify against prefill, for one segment; estimate_relays for all of a prompt

Every prediction is a line fitted to recent measurements (fixed cost plus cost per byte, token or FLOP). What
has not been measured lately is unknown, and what is unknown is pulled: a link that is passed over could
otherwise never show that it has recovered. A wrong prediction costs time, never an answer. Imports no torch
and moves nothing; time is an argument.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from transport.types import Located, SegmentKey, WorkerId
from workers.costs import ModelCosts, span_flops
from workers.methods.base import RectifyPlan, fresh

DECAY = 0.85
"""Weight of a measurement against the one that came after it: about the last 7 count."""
FORGET_S = 60.0
"""A link that was not measured for so long is unknown again."""
MIN_SAMPLES = 3
"""Fewer measurements than this predict nothing."""
MIN_SPREAD = 0.2
"""Standard deviation of the sizes, relative to their mean, from which on a slope can be told."""


@dataclass(slots=True)
class LineFit:
    """Exponentially weighted least squares of seconds against size: seconds = fixed + size * slope.

    Where the sizes are too alike to tell the two apart, or the fit makes either negative, all of it is taken
    to be proportional.
    """

    samples: int = 0
    _weight: float = 0.0
    _size: float = 0.0
    _seconds: float = 0.0
    _size2: float = 0.0
    _product: float = 0.0

    def observe(self, size: float, seconds: float) -> None:
        """Take a measurement. size: above 0."""
        self.samples += 1
        self._weight = DECAY * self._weight + 1
        self._size = DECAY * self._size + size
        self._seconds = DECAY * self._seconds + seconds
        self._size2 = DECAY * self._size2 + size * size
        self._product = DECAY * self._product + size * seconds

    @property
    def known(self) -> bool:
        return self.samples >= MIN_SAMPLES

    @property
    def line(self) -> tuple[float, float]:
        """(fixed seconds, seconds per unit of size); neither is negative.

        Raises:
            ValueError: nothing was measured.
        """
        if not self.samples:
            raise ValueError("nothing was measured.")
        size, seconds = self._size / self._weight, self._seconds / self._weight
        variance = self._size2 / self._weight - size * size
        if variance > (MIN_SPREAD * size) ** 2:
            slope = (self._product / self._weight - size * seconds) / variance
            fixed = seconds - slope * size
            if slope > 0 and fixed >= 0:
                return fixed, slope
        return 0.0, seconds / size

    def predict(self, size: float) -> float:
        """Seconds for `size`; does not fall as size grows."""
        fixed, slope = self.line
        return fixed + slope * size


@dataclass(frozen=True, slots=True)
class Estimate:
    """Predicted seconds for the spans of one segment.

    Attributes:
        pull_s: bytes over the link; rotate_s: keys to their new positions and all into the cache.
        rectify_s: what the method recomputes of it. prefill_s: computing it in full instead.
    """

    pull_s: float
    rotate_s: float
    rectify_s: float
    prefill_s: float

    @property
    def relay_s(self) -> float:
        return self.pull_s + self.rotate_s + self.rectify_s

    @property
    def worth(self) -> bool:
        """Whether pulling is expected to be faster."""
        return self.relay_s < self.prefill_s


@dataclass(slots=True)
class _Link:
    fit: LineFit = field(default_factory=LineFit)
    backend: str = ""
    measured_at: float = 0.0
    given_up: int = 0


class Speeds:
    """What one worker has measured. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._links: dict[tuple[str, str], _Link] = {}
        self._latest: dict[str, str] = {}
        self._rotate = LineFit()
        self._prefill = LineFit()

    def observe_pull(self, node: str, backend: str, nbytes: int, seconds: float, now: float) -> None:
        """A transfer of `nbytes` from `node` over `backend` has succeeded. now: time.monotonic()."""
        if nbytes <= 0:
            return
        with self._lock:
            link = self._links.setdefault((node, backend), _Link())
            link.fit.observe(nbytes, seconds)
            link.measured_at = now
            link.given_up = 0
            self._latest[node] = backend

    def gave_up(self, node: str, backend: str, nbytes: int, seconds: float, now: float) -> None:
        """A transfer of `nbytes` from `node` had not arrived after `seconds`.

        One such says that something failed. From the second in a row on, with none in between that
        succeeded, the link is slow: then it took at least that long.
        """
        if nbytes <= 0:
            return
        with self._lock:
            link = self._links.setdefault((node, backend), _Link())
            link.given_up += 1
            if link.given_up > 1:
                link.fit.observe(nbytes, seconds)
                link.measured_at = now
                self._latest[node] = backend

    def observe_rotate(self, tokens: int, seconds: float) -> None:
        """`tokens` relayed tokens were put into a cache."""
        if tokens > 0:
            with self._lock:
                self._rotate.observe(tokens, seconds)

    def observe_prefill(self, flops: float, seconds: float) -> None:
        """A prefill of `flops` took `seconds` in the engine."""
        if flops > 0:
            with self._lock:
                self._prefill.observe(flops, seconds)

    def prefill_s(self, flops: float) -> float | None:
        """What a prefill of `flops` is predicted to take in the engine; None while too little is known."""
        with self._lock:
            return self._prefill.predict(flops) if self._prefill.known else None

    def estimate(
        self,
        node: str | None,
        nbytes: int,
        tokens: int,
        rectify_flops: float,
        prefill_flops: float,
        now: float,
    ) -> Estimate | None:
        """Predict one segment's way into the cache, or None while too little is known.

        Args:
            node: where it is; None when this worker holds it itself (nothing is pulled).
            nbytes: to pull. tokens: of the prompt that it covers, over all its spans.
            rectify_flops, prefill_flops: recomputing what the method selects of them, and all of them.
            now: time.monotonic().
        """
        with self._lock:
            if not (self._prefill.known and self._rotate.known):
                return None
            pull_s = 0.0
            if node is not None:
                link = self._links.get((node, self._latest.get(node, "")))
                if link is None or not link.fit.known or now - link.measured_at > FORGET_S:
                    return None
                pull_s = link.fit.predict(nbytes)
            # Only the slope: the step that these rows ride in happens in any case.
            per_flop = self._prefill.line[1]
            return Estimate(
                pull_s, self._rotate.line[1] * tokens, per_flop * rectify_flops, per_flop * prefill_flops
            )


def estimate_relays(
    speeds: Speeds,
    costs: ModelCosts,
    plan: RectifyPlan,
    found: Mapping[SegmentKey, Located],
    *,
    here: WorkerId,
    now: float,
) -> dict[SegmentKey, Estimate]:
    """Predict every found segment's relay; those of which too little is known are left out.

    Args:
        plan: what the method would do with all that was found. A span that it computes all the same is taken
            to need no recomputation: such a method decides only once it has seen the bytes.
        here: this worker, which pulls nothing from itself.
    """
    out: dict[SegmentKey, Estimate] = {}
    for key, located in found.items():
        spans = [s for s in plan.spans if s.span.key == key]
        estimate = speeds.estimate(
            None if located.owner.worker == here else located.owner.node,
            sum(block.nbytes for block in located.segment.blocks),
            sum(len(s.span) for s in spans),
            sum(span_flops(costs, s) for s in spans if s.source is not None),
            sum(span_flops(costs, fresh(s.span)) for s in spans),
            now,
        )
        if estimate is not None:
            out[key] = estimate
    return out
