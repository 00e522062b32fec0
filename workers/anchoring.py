"""`kvcomm` on a worker: match a prompt's spans before the plan, learn after the first token, share anchors.

    pulled segments -> match() -> planner -> corrections of the executor
    first token     -> learn() -> pool -> sync() -> directory -> other workers' pools

Sharing uses what segments use: an anchor is packed into blocks of the arena and entered in the directory as
`anchor-0 .. anchor-(N-1)` of the space "kvcomm/<model space>/<template>/<slot>", so one batched look-up lists
the anchors of a slot and a pull brings one over. The entry's variant says which anchor it is. The first free
number is taken; when two workers take the same one at once, readers see one of the two. Anchors are soft
state: whatever of this fails costs a later correction, never an answer.

Nothing here is on the way to the first token except `match`, which computes and does not wait for others.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import torch

from transport.errors import RelayError
from transport.types import Located, SegmentKey
from workers.anchors import KEY_GROUP, Anchor, AnchorPool, Context, Match, Stored, StoredKV, frame_of_segment
from workers.kv_cache import SequenceCache
from workers.layout import BlockViews, KVLayout
from workers.methods.base import RectifyPlan, Span
from workers.methods.kvcomm import KVComm
from workers.pulled import PulledSegment
from workers.segment import PromptTemplate
from workers.store import SegmentStore

log = logging.getLogger(__name__)

OnEngine = Callable[[Callable[[], Any]], Any]
"""Runs tensor work on the engine's thread and returns its result."""

PULLS_AT_ONCE: Final = 4
"""Anchors that one `sync` brings over at most: it runs on a request's thread."""
_MAGIC: Final = b"RELAYKA1"
# magic, tokens, bits, version, exact, source
_HEADER: Final = struct.Struct("<8sIIIB3x32s")
_ALIGN: Final = 64


class Anchoring:
    """The anchors of one worker, seen from its requests.

    Args:
        space: of the model's segments.
        inv_freq: [L or 1, rotary_dim / 2] float32.
        max_bytes: budget of the pool; 0 turns anchors off, and `kvcomm` then computes every span.
        producer: who published an anchor, for reports.
    """

    def __init__(
        self,
        store: SegmentStore,
        layout: KVLayout,
        space: str,
        inv_freq: torch.Tensor,
        max_bytes: int,
        on_engine: OnEngine,
        producer: str,
    ) -> None:
        self.pool = AnchorPool(max_bytes, inv_freq)
        self._inv_freq = inv_freq
        self._store = store
        self._layout = layout
        self._space = space
        self._on_engine = on_engine
        self._producer = producer
        self._published: dict[tuple[Context, str], SegmentKey] = {}
        self._retired: list[tuple[Context, str]] = []
        self._refused: set[tuple[Context, str]] = set()
        self._syncing = threading.Lock()

    @torch.inference_mode()
    def match(
        self,
        method: KVComm,
        template: PromptTemplate,
        spans: Sequence[Span],
        hits: Mapping[SegmentKey, Located],
        pulled: Mapping[SegmentKey, PulledSegment],
    ) -> dict[Span, Match]:
        """Measure every span that is a hit. Tensor work: call it on the engine's thread."""
        matches: dict[Span, Match] = {}
        if self.pool.max_bytes == 0:
            return matches
        for span, context in slot_contexts(template_digest(template), spans).items():
            located = hits.get(span.key) if span.key is not None else None
            if located is not None and span.key is not None:
                frame = frame_of_segment(pulled[span.key], len(span), self._inv_freq)
                match = self.pool.match(
                    context,
                    source_of(located),
                    frame,
                    temperature=method.temperature,
                    prior=method.prior,
                )
                self.pool.judged(match, method)
                matches[span] = match
        return matches

    @torch.inference_mode()
    def learn(
        self, method: KVComm, plan: RectifyPlan, matches: Mapping[Span, Match], cache: SequenceCache
    ) -> list[Anchor]:
        """Make anchors of the spans that were computed although their segments are known. Tensor work: call
        it on the engine's thread, after the prefill.

        Returns:
            The new anchors, for `sync`.
        """
        learned: list[Anchor] = []
        exact = True
        for span_plan in plan.spans:
            span, match = span_plan.span, matches.get(span_plan.span)
            if span_plan.source is not None:
                # What follows is computed over corrected KV: a good guess of its true KV, but a guess.
                exact = False
            elif match is not None and self.pool.wants(match.context, match.source, exact=exact):
                entries = cache.kv[:, :, :, span.start : span.stop]
                anchor = self.pool.learn(match, entries, span.start, bits=method.bits, exact=exact)
                if self._insert(anchor, method, pulled=False):
                    learned.append(anchor)
        return learned

    def sync(self, method: KVComm, contexts: Iterable[Context], learned: Sequence[Anchor]) -> None:
        """Publish what was learned and fetch what other workers have. Blocks for a few directory calls and
        pulls; never raises for a fault of the cluster. Not for the engine's thread.

        A worker does one sync at a time; when one is going on already, fetching is left to it.
        """
        if self.pool.max_bytes == 0 or not self._syncing.acquire(blocking=bool(learned)):
            return
        try:
            while self._retired:
                self._store.withdraw(self._published.pop(self._retired.pop()))
            for context in contexts:
                keys = anchor_keys(self._space, context, method.max_anchor_num)
                found = self._store.find(keys)
                unusable = found.unanswered | set(found)
                self._fetch(method, context, found)
                free = [k for k in keys if k not in unusable]
                for key, anchor in zip(free, (a for a in learned if a.context == context), strict=False):
                    self._publish(key, anchor)
        except RelayError as error:
            log.warning("anchors were not shared: %s", error)
        finally:
            self._syncing.release()

    # -- inside --------------------------------------------------------------------------------------------

    def _insert(self, anchor: Anchor, method: KVComm, *, pulled: bool) -> bool:
        gone = self.pool.insert(
            anchor, max_anchors=method.max_anchor_num, window=method.window_size, pulled=pulled
        )
        if gone is None:
            log.warning(
                "an anchor of %d bytes exceeds worker.anchor_bytes = %d: slot %s is not learned",
                anchor.nbytes,
                self.pool.max_bytes,
                anchor.context.slot,
            )
            return False
        for old in gone:
            name = (old.context, _variant(old))
            if name in self._published:
                self._retired.append(name)  # withdrawn by the next `sync`: that is a call to the directory
            else:
                # Somebody else's: fetching what was just given up would go round in circles.
                self._refused.add(name)
        return True

    def _publish(self, key: SegmentKey, anchor: Anchor) -> None:
        capacity = self._layout.window_nbytes

        def fill(blocks: Sequence[BlockViews]) -> None:
            self._on_engine(lambda: write_packed(pack(anchor), blocks))

        try:
            segment = self._store.publish(
                key,
                fill,
                start=0,
                # Told in whole blocks: the bytes are not laid out by token.
                num_tokens=-(-packed_nbytes(anchor) // capacity) * self._layout.block_tokens,
                producer=self._producer,
                variant=_variant(anchor),
            )
        except RelayError as error:
            log.warning("an anchor of slot %s was not published: %s", anchor.context.slot, error)
            return
        # A key that this worker holds already, because a shard has forgotten it for a moment, stays as it is.
        if segment.variant == _variant(anchor):
            self._published[(anchor.context, segment.variant)] = key

    def _fetch(self, method: KVComm, context: Context, found: Mapping[SegmentKey, Located]) -> None:
        known = {_variant(a) for a in self.pool.anchors(context)}
        sources = {a.source: a for a in self.pool.anchors(context)}
        wanted: dict[SegmentKey, int] = {}
        for key, located in found.items():
            variant = located.segment.variant
            source, _, exact = variant.partition("~")
            better = source not in sources or (exact == _EXACT and not sources[source].exact)
            if variant not in known and better and (context, variant) not in self._refused:
                wanted[key] = 1
        wanted = dict(list(wanted.items())[:PULLS_AT_ONCE])
        got = self._store.acquire(wanted)
        try:
            for key, pulled in got.pulled.items():
                self._take(method, context, key, pulled)
        finally:
            self._store.release(got)

    def _take(self, method: KVComm, context: Context, key: SegmentKey, pulled: PulledSegment) -> None:
        try:
            anchor = self._on_engine(lambda: unpack(pulled.blocks, context, self._layout))
        except ValueError as error:
            log.warning("%s is not an anchor that can be read here: %s", key, error)
            return
        self._insert(anchor, method, pulled=True)


# -- names --


def template_digest(template: PromptTemplate) -> str:
    """Names an agent's template: its fixed token ids and the order of its slots."""
    return _template_digest(template)


@functools.lru_cache(maxsize=256)
def _template_digest(template: PromptTemplate) -> str:
    state = hashlib.blake2b(b"relay.template/1", digest_size=16)
    for piece in template.pieces:
        body = struct.pack(f"<{len(piece.token_ids)}I", *piece.token_ids)
        name = (piece.slot or "").encode()
        state.update(struct.pack("<IIB", len(name), len(body), piece.slot is not None) + name + body)
    return state.hexdigest()


def slot_contexts(template: str, spans: Iterable[Span]) -> dict[Span, Context]:
    """The context of every span that has a key. template: its digest."""
    seen: Counter[str] = Counter()
    out: dict[Span, Context] = {}
    for span in spans:
        if span.key is not None and span.slot is not None:
            n = seen[span.slot]
            seen[span.slot] += 1
            out[span] = Context(template, f"{span.slot}#{n}" if n else span.slot)
    return out


def template_contexts(template: PromptTemplate) -> list[Context]:
    """The contexts that prompts made from a template can have."""
    digest = template_digest(template)
    seen: Counter[str] = Counter()
    out: list[Context] = []
    for slot in (p.slot for p in template.pieces if p.slot is not None):
        out.append(Context(digest, f"{slot}#{seen[slot]}" if seen[slot] else slot))
        seen[slot] += 1
    return out


def source_of(located: Located) -> str:
    """Names a stored KV of certain tokens: the same tokens under another context have another base."""
    key = located.segment.key
    body = key.digest + b"/" + located.segment.variant.encode()
    return hashlib.blake2b(body, digest_size=16).hexdigest()


def anchor_keys(space: str, context: Context, count: int) -> list[SegmentKey]:
    """Where the anchors of a slot are entered in the directory."""
    name = f"kvcomm/{space}/{context.template}/{context.slot}"
    return [
        SegmentKey(name, hashlib.blake2b(f"anchor-{i}".encode(), digest_size=16).digest())
        for i in range(count)
    ]


_EXACT: Final = "exact"


def _variant(anchor: Anchor) -> str:
    return f"{anchor.source}~{_EXACT if anchor.exact else 'guess'}"


# -- bytes --


def pack(anchor: Anchor) -> torch.Tensor:
    """An anchor as bytes: uint8 [packed_nbytes(anchor)]."""
    bits = 32 if anchor.base.keys.scale is None else 8
    header = _HEADER.pack(
        _MAGIC, anchor.tokens, bits, anchor.version, anchor.exact, anchor.source.encode("ascii")
    )
    pieces = [torch.frombuffer(bytearray(header), dtype=torch.uint8)]
    pieces += [
        t.detach().cpu().contiguous().view(-1).view(torch.uint8)
        for t in _tensors(anchor.base) + _tensors(anchor.offset)
    ]
    return torch.cat([torch.nn.functional.pad(p, (0, -p.shape[0] % _ALIGN)) for p in pieces])


def packed_nbytes(anchor: Anchor) -> int:
    """Size of `pack(anchor)`."""
    sizes = [_HEADER.size, *(t.nbytes for t in _tensors(anchor.base) + _tensors(anchor.offset))]
    return sum(-(-n // _ALIGN) * _ALIGN for n in sizes)


def unpack(blocks: Sequence[BlockViews], context: Context, layout: KVLayout) -> Anchor:
    """Read what `write_packed` wrote; copies.

    Raises:
        ValueError: the bytes are no anchor, or of another version of this format.
    """
    data = torch.cat([b.window for b in blocks])
    magic, tokens, bits, version, exact, source = _HEADER.unpack(
        bytes(data[: _HEADER.size].cpu().numpy().tobytes())
    )
    if magic != _MAGIC:
        raise ValueError(f"it starts with {magic!r}, not {_MAGIC!r}")
    reader = _Reader(data, layout, tokens, bits)
    base = reader.kv(layout.num_layers)
    offset = reader.kv(layout.num_layers - 1)
    return Anchor(context, source.decode("ascii"), version, bool(exact), tokens, base, offset)


def write_packed(packed: torch.Tensor, blocks: Sequence[BlockViews]) -> None:
    """Spread bytes over the KV windows of blocks; zeros behind them, and in what the windows leave out."""
    at = 0
    for block in blocks:
        window = block.window
        n = min(window.shape[0], packed.shape[0] - at)
        window[:n] = packed[at : at + n]
        window[n:] = 0
        block.checkpoint.zero_()
        block.mass.zero_()
        at += n


class _Reader:
    """Takes tensors off the front of packed bytes."""

    def __init__(self, data: torch.Tensor, layout: KVLayout, tokens: int, bits: int) -> None:
        self._data = data
        self._at = -(-_HEADER.size // _ALIGN) * _ALIGN
        self._layout = layout
        self._tokens = tokens
        self._bits = bits

    def kv(self, layers: int) -> StoredKV:
        heads, dim, tokens = self._layout.num_kv_heads, self._layout.head_dim, self._tokens
        body = (layers, heads, tokens, dim)
        if self._bits == 32:
            return StoredKV(*(Stored(self._take(body, torch.float32)) for _ in range(2)))
        keys = self._take(body, torch.int8)
        key_scale = self._take((layers, heads, -(-tokens // KEY_GROUP), dim), torch.float32)
        values = self._take(body, torch.int8)
        value_scale = self._take((layers, heads, tokens, 1), torch.float32)
        return StoredKV(Stored(keys, key_scale), Stored(values, value_scale))

    def _take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        numel = 1
        for n in shape:
            numel *= n
        begin, nbytes = self._at, numel * dtype.itemsize
        if begin + nbytes > self._data.shape[0]:
            raise ValueError(f"{self._data.shape[0]} bytes are too few for {self._tokens} tokens")
        self._at = begin + -(-nbytes // _ALIGN) * _ALIGN
        return self._data[begin : begin + nbytes].view(dtype).view(shape).clone()


def _tensors(kv: StoredKV) -> list[torch.Tensor]:
    """In the order in which `_Reader.kv` takes them."""
    return [t for s in (kv.keys, kv.values) for t in (s.data, s.scale) if t is not None]
