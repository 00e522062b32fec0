"""Calls to a shard as bytes: msgpack with a schema that is checked on both sides, and no pickle.

    request   [epoch of the caller's view, arguments]
    reply     [status, epoch, incarnation of the shard, its view or nil, result]

Records are arrays of their dataclass's fields, in order, each of its type. A segment's block references stay
packed inside a shard (`PackedBlocks`): it never looks into them, and 100,000 segments of dataclasses would be
a million objects for the garbage collector. This module does not know what a call means.
"""

from __future__ import annotations

import dataclasses
import operator
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from sys import intern
from typing import Any, Final, Generic, TypeVar, cast

import msgpack

from transport.directory.catalogue import Cursor, Filter, Listed, Page
from transport.directory.table import Announced, Candidate
from transport.directory.view import View
from transport.errors import RelayError
from transport.settings import DirectorySettings
from transport.tokens import KEY_BYTES, PullKey
from transport.types import BlockRef, Lease, LeaseId, Located, Owner, Segment, SegmentKey

T = TypeVar("T")

MAX_MESSAGE_BYTES: Final = 32 << 20
"""A larger message is refused by whoever receives it; callers split what they send far below."""
OK: Final = 0
MOVED: Final = 1
"""The caller's view is older than the shard's: nothing was done, and the reply carries the newer view."""
PLACED: Final = frozenset({"lookup", "lease", "publish", "candidates", "evict_copies", "advance", "watch"})
"""Calls whose caller has chosen the shard by its list of shards, which must not be an old one."""


class MalformedMessage(RelayError):
    """Bytes that are not a message of this schema."""


# --- bytes --------------------------------------------------------------------------------------------------


def pack(value: Any) -> bytes:
    return bytes(msgpack.packb(value, use_bin_type=True) or b"")


def unpack(data: bytes) -> Any:
    """Decode bounded msgpack.

    Raises:
        MalformedMessage: not msgpack, or too large.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise MalformedMessage(f"a directory message of {len(data)} bytes exceeds {MAX_MESSAGE_BYTES}")
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=False, use_list=True)
    except (ValueError, msgpack.UnpackException, RecursionError) as fault:
        raise MalformedMessage(f"a directory message is not valid msgpack: {fault}") from fault


def expect(value: Any, kind: type[T]) -> T:
    """`value`, whose type is exactly `kind` (an int passes for a float). Raises MalformedMessage."""
    if type(value) is not kind:
        if kind is float and type(value) is int:
            return cast("T", float(value))
        raise MalformedMessage(f"expected {kind.__name__} in a directory message, got {type(value).__name__}")
    return value


def array(value: Any, length: int | None = None) -> list[Any]:
    """`value`, a list of that length. Raises MalformedMessage."""
    items = expect(value, list)
    if length is not None and len(items) != length:
        raise MalformedMessage(f"expected {length} items in a directory message, got {len(items)}")
    return items


# --- records ------------------------------------------------------------------------------------------------


def _checker(hint: Any) -> tuple[type | None, Callable[[Any], Any] | None]:
    """(exact type of a plain value, None) or (None, function that checks and converts)."""
    hint = getattr(hint, "__supertype__", hint)
    if hint in (int, str, bytes, bool):
        return hint, None
    if hint is float:
        return None, lambda v: expect(v, float)
    origin, of = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and len(of) == 2 and of[1] is ...:
        item = getattr(of[0], "__supertype__", of[0])
        return None, lambda v: tuple(expect(x, item) for x in expect(v, list))
    if origin is dict:
        return None, lambda v: {expect(k, of[0]): expect(x, of[1]) for k, x in expect(v, dict).items()}
    if origin is typing.Literal:
        return None, lambda v: _one_of(v, of)
    if origin in (typing.Union, types.UnionType) and type(None) in of:
        inner = next(x for x in of if x is not type(None))
        return None, lambda v: None if v is None else expect(v, getattr(inner, "__supertype__", inner))
    raise TypeError(f"no wire form of {hint}")


def _one_of(value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise MalformedMessage(f"{value!r} is none of {allowed} in a directory message")
    return value


class Record(Generic[T]):
    """A dataclass as an array of its fields, those of `without` left to the caller."""

    def __init__(self, cls: type[T], *without: str) -> None:
        hints = typing.get_type_hints(cls)
        fields = [f.name for f in dataclasses.fields(cast("Any", cls))]
        self._cls = cls
        self.names = tuple(name for name in fields if name not in without)
        self._get = operator.attrgetter(*self.names)
        given = [*without, *self.names]
        self._order = [given.index(name) for name in fields]
        self._by_name = any(f.kw_only for f in dataclasses.fields(cast("Any", cls)))
        self._fields = fields
        pairs = [_checker(hints[name]) for name in self.names]
        self._plain = [kind for kind, _ in pairs]
        self._checks = [(at, check) for at, (_, check) in enumerate(pairs) if check is not None]

    def pack(self, value: T) -> list[Any]:
        return list(self._get(value))

    def check(self, items: Any) -> list[Any]:
        """The fields' values, each of its type. Raises MalformedMessage."""
        items = array(items, len(self.names))
        if list(map(type, items)) == self._plain:  # the usual case, in one comparison
            return items
        for at, kind in enumerate(self._plain):
            if kind is not None:
                expect(items[at], kind)
        for at, check in self._checks:
            items[at] = check(items[at])
        return items

    def unpack(self, items: Any, *rest: Any) -> T:
        """rest: the fields of `without`, in that order. Raises MalformedMessage."""
        checked = self.check(items)
        if self._by_name:
            return self._cls(**dict(zip(self._fields, self._sorted(checked, rest), strict=True)))
        return self._cls(*(self._sorted(checked, rest) if rest else checked))

    def unpack_all(self, rows: list[Any]) -> tuple[T, ...]:
        """Many records of positional fields, none left out. Raises MalformedMessage."""
        plain = self._plain
        for at, items in enumerate(rows):
            if type(items) is not list or list(map(type, items)) != plain:
                rows[at] = self.check(items)
        return tuple(starmap(self._cls, rows))

    def _sorted(self, checked: list[Any], rest: tuple[Any, ...]) -> list[Any]:
        given = [*rest, *checked]
        return [given[at] for at in self._order]


BLOCK: Final = Record(BlockRef)
KEY: Final = Record(SegmentKey)
OWNER: Final = Record(Owner, "pull_key")
"""Without its key: only `pack_announcing` tells it, and only to a shard."""
SEGMENT: Final = Record(Segment, "key", "blocks")
LISTED: Final = Record(Listed, "key")
FILTER: Final = Record(Filter)
SETTINGS: Final = Record(DirectorySettings)


class PackedBlocks(Sequence[BlockRef]):
    """Block references as they came over the wire; equal to a tuple of the same ones.

    Attributes:
        nbytes: payload bytes of all blocks together.
    """

    __slots__ = ("data", "nbytes")

    def __init__(self, data: bytes, nbytes: int) -> None:
        self.data = data
        self.nbytes = nbytes

    @staticmethod
    def of(blocks: Sequence[BlockRef]) -> PackedBlocks:
        if isinstance(blocks, PackedBlocks):
            return blocks
        return PackedBlocks(pack([BLOCK.pack(b) for b in blocks]), sum(b.nbytes for b in blocks))

    def unpacked(self) -> tuple[BlockRef, ...]:
        """Raises MalformedMessage."""
        return BLOCK.unpack_all(array(unpack(self.data)))

    def __len__(self) -> int:
        return len(array(unpack(self.data)))

    def __iter__(self) -> Iterator[BlockRef]:
        return iter(self.unpacked())

    def __getitem__(self, at: Any) -> Any:
        return self.unpacked()[at]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PackedBlocks):
            return self.data == other.data
        return self.unpacked() == other

    def __hash__(self) -> int:
        return hash(self.unpacked())


# --- what several calls have in common ----------------------------------------------------------------------


def pack_announcing(owner: Owner, clock_ms: int) -> list[Any]:
    """An owner about itself, to a shard: with its pull key, and what its monotonic clock shows."""
    key = b"" if owner.pull_key is None else owner.pull_key.reveal()
    return [OWNER.pack(owner), key, clock_ms]


def unpack_announcing(value: Any) -> tuple[Owner, int]:
    """Raises MalformedMessage."""
    of, key, clock_ms = array(value, 3)
    owner, secret, clock = OWNER.unpack(of), expect(key, bytes), expect(clock_ms, int)
    if len(secret) not in (0, KEY_BYTES) or not 0 <= clock < 1 << 62:
        raise MalformedMessage(f"a pull key of {len(secret)} bytes, or a clock that shows {clock}")
    return (dataclasses.replace(owner, pull_key=PullKey(secret)) if secret else owner), clock


def pack_keys(keys: Sequence[SegmentKey]) -> list[Any]:
    """Keys as [spaces, [[index of space, digest], ...]]: one cluster has few spaces."""
    spaces: dict[str, int] = {}
    items = [[spaces.setdefault(k.space, len(spaces)), k.digest] for k in keys]
    return [list(spaces), items]


def unpack_keys(value: Any) -> list[SegmentKey]:
    """Raises MalformedMessage."""
    names, items = array(value, 2)
    spaces = [intern(expect(s, str)) for s in array(names)]
    out: list[SegmentKey] = []
    for item in array(items):
        at, digest = array(item, 2)
        if type(at) is not int or not 0 <= at < len(spaces):
            raise MalformedMessage(f"no space {at!r} in a directory message")
        out.append(SegmentKey(spaces[at], expect(digest, bytes)))
    return out


def pack_segment(segment: Segment) -> list[Any]:
    """All but the key; the blocks as bytes, with their size."""
    blocks = PackedBlocks.of(segment.blocks)
    return [*SEGMENT.pack(segment), blocks.nbytes, blocks.data]


def unpack_segment(key: SegmentKey, value: Any, *, packed: bool) -> Segment:
    """A segment; packed: leave its blocks as bytes. Raises MalformedMessage."""
    items = array(value, len(SEGMENT.names) + 2)
    data = items.pop()
    held = PackedBlocks(expect(data, bytes), expect(items.pop(), int))
    blocks = cast("tuple[BlockRef, ...]", held) if packed else held.unpacked()
    if packed:  # thousands of segments share these texts
        items = [intern(x) if type(x) is str else x for x in items]
    return SEGMENT.unpack(items, key, blocks)


def pack_segments(segments: Sequence[Segment]) -> list[Any]:
    return [pack_keys([s.key for s in segments]), [pack_segment(s) for s in segments]]


def unpack_segments(value: Any, *, packed: bool) -> list[Segment]:
    """Raises MalformedMessage."""
    keys, items = array(value, 2)
    found = unpack_keys(keys)
    return [unpack_segment(k, x, packed=packed) for k, x in zip(found, array(items, len(found)), strict=True)]


def pack_copies(copies: Sequence[tuple[SegmentKey, str]]) -> list[Any]:
    return [pack_keys([k for k, _ in copies]), [v for _, v in copies]]


def unpack_copies(value: Any) -> list[tuple[SegmentKey, str]]:
    """Raises MalformedMessage."""
    keys, variants = array(value, 2)
    found = unpack_keys(keys)
    return [(k, expect(v, str)) for k, v in zip(found, array(variants, len(found)), strict=True)]


def pack_located(found: Mapping[SegmentKey, Located], keys: Sequence[SegmentKey]) -> list[Any]:
    """[owners, [[index of key, index of owner, segment], ...]]: an owner's addresses stand once."""
    owners: dict[tuple[str, int], int] = {}
    told: list[Any] = []
    items: list[Any] = []
    for at, key in enumerate(keys):
        located = found.get(key)
        if located is None:
            continue
        life = (located.owner.worker, located.owner.incarnation)
        if life not in owners:
            owners[life] = len(told)
            told.append(OWNER.pack(located.owner))
        items.append([at, owners[life], pack_segment(located.segment)])
    return [told, items]


def unpack_located(value: Any, keys: Sequence[SegmentKey]) -> dict[SegmentKey, Located]:
    """Raises MalformedMessage."""
    told, items = array(value, 2)
    owners = [OWNER.unpack(x) for x in array(told)]
    out: dict[SegmentKey, Located] = {}
    for item in array(items):
        at, of, segment = array(item, 3)
        if not (type(at) is int and type(of) is int and 0 <= at < len(keys) and 0 <= of < len(owners)):
            raise MalformedMessage("a directory reply names a key or an owner that is not there")
        out[keys[at]] = Located(unpack_segment(keys[at], segment, packed=False), owners[of])
    return out


def pack_leases(granted: Mapping[SegmentKey, Lease], keys: Sequence[SegmentKey]) -> list[Any]:
    """[located, [lease id, ...], [seconds, ...], [token, ...]], in the order of the keys."""
    held = [granted[k] for k in keys if k in granted]
    located = pack_located({k: lease.located for k, lease in granted.items()}, keys)
    return [located, [x.id for x in held], [x.ttl_s for x in held], [x.token for x in held]]


def unpack_leases(value: Any, keys: Sequence[SegmentKey], holder: Any) -> dict[SegmentKey, Lease]:
    """Raises MalformedMessage."""
    located, *facts = array(value, 4)
    found = unpack_located(located, keys)
    named = zip(*(array(fact, len(found)) for fact in facts), strict=True)
    return {
        key: Lease(LeaseId(expect(i, str)), at, holder, expect(ttl_s, float), token=expect(token, bytes))
        for (key, at), (i, ttl_s, token) in zip(found.items(), named, strict=True)
    }


def pack_shared(granted: Mapping[SegmentKey, Lease], keys: Sequence[SegmentKey]) -> list[Any]:
    """Leases and their `others`: one `pack_leases` for the first copies, one for the second ones, and so on.
    Most segments have no second one."""
    rounds = [pack_leases(granted, keys)]
    for at in range(max((len(lease.others) for lease in granted.values()), default=0)):
        rounds.append(pack_leases({k: x.others[at] for k, x in granted.items() if at < len(x.others)}, keys))
    return rounds


def unpack_shared(value: Any, keys: Sequence[SegmentKey], holder: Any) -> dict[SegmentKey, Lease]:
    """Raises MalformedMessage."""
    rounds = [unpack_leases(x, keys, holder) for x in array(value)]
    if not rounds:
        raise MalformedMessage("a directory reply has no leases")
    others = {key: tuple(more[key] for more in rounds[1:] if key in more) for key in rounds[0]}
    return {
        key: dataclasses.replace(lease, others=others[key]) if others[key] else lease
        for key, lease in rounds[0].items()
    }


def pack_page(page: Page) -> list[Any]:
    rows = [LISTED.pack(x) for x in page.rows]
    return [pack_keys([x.key for x in page.rows]), rows, None if page.after is None else list(page.after)]


def unpack_page(value: Any) -> Page:
    """Raises MalformedMessage."""
    keys, rows, after = array(value, 3)
    found = unpack_keys(keys)
    listed = [LISTED.unpack(x, k) for k, x in zip(found, array(rows, len(found)), strict=True)]
    return Page(tuple(listed), unpack_cursor(after))


def unpack_cursor(value: Any) -> Cursor | None:
    """Raises MalformedMessage."""
    if value is None:
        return None
    space, digest, variant, worker = array(value, 4)
    return expect(space, str), expect(digest, bytes), expect(variant, str), expect(worker, str)


def pack_announced(verdict: Announced) -> list[Any]:
    return [verdict.fenced_by, verdict.known, pack_copies(verdict.wishes), verdict.owners]


def unpack_announced(value: Any) -> Announced:
    """Raises MalformedMessage."""
    fenced_by, known, wishes, owners = array(value, 4)
    life = None if fenced_by is None else expect(fenced_by, int)
    return Announced(life, expect(known, bool), tuple(unpack_copies(wishes)), expect(owners, int))


def pack_candidates(offers: Sequence[Candidate]) -> list[Any]:
    return [
        pack_copies([(c.key, c.variant) for c in offers]),
        [[c.nbytes, c.idle_s, c.consumed] for c in offers],
    ]


def unpack_candidates(value: Any) -> list[Candidate]:
    """Raises MalformedMessage."""
    copies, facts = array(value, 2)
    found = unpack_copies(copies)
    out: list[Candidate] = []
    for (key, variant), fact in zip(found, array(facts, len(found)), strict=True):
        nbytes, idle_s, consumed = array(fact, 3)
        facts_of = (expect(nbytes, int), expect(idle_s, float), expect(consumed, bool))
        out.append(Candidate(key, variant, *facts_of))
    return out


def pack_view(view: View) -> list[Any]:
    return [view.epoch, list(view.shards)]


def unpack_view(value: Any) -> View:
    """Raises MalformedMessage."""
    epoch, shards = array(value, 2)
    return View(expect(epoch, int), tuple(expect(x, str) for x in array(shards)))


# --- envelopes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reply:
    """What a shard sends back.

    Attributes:
        status: OK or MOVED.
        epoch, view: of the shard; the view only where the caller's is older.
        incarnation: which life of the shard answered.
        result: as packed by the call.
    """

    status: int
    epoch: int
    incarnation: int
    view: View | None
    result: Any


def pack_request(epoch: int, arguments: Sequence[Any]) -> bytes:
    return pack([epoch, list(arguments)])


def unpack_request(data: bytes) -> tuple[int, list[Any]]:
    """Raises MalformedMessage."""
    epoch, arguments = array(unpack(data), 2)
    return expect(epoch, int), array(arguments)


def pack_reply(reply: Reply) -> bytes:
    view = None if reply.view is None else pack_view(reply.view)
    return pack([reply.status, reply.epoch, reply.incarnation, view, reply.result])


def unpack_reply(data: bytes) -> Reply:
    """Raises MalformedMessage."""
    status, epoch, incarnation, view, result = array(unpack(data), 5)
    told = None if view is None else unpack_view(view)
    return Reply(expect(status, int), expect(epoch, int), expect(incarnation, int), told, result)
