"""Lease tokens by themselves: what opens what, and until when."""

from __future__ import annotations

import copy
import pickle
from dataclasses import asdict, astuple, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport import tokens
from transport.directory.granting import Granter, OwnerClock, blocks_digest
from transport.tokens import Claim, PullKey, TokenRefused, check_token, make_token
from transport.types import BlockId, BlockRef, Incarnation, NodeId, Owner, Segment, SegmentKey, WorkerId

KEY = PullKey(bytes(range(32)))
CLAIM = Claim(7, "space", b"digest", "reader", tokens.digest_of(b"blocks"))
BLOCKS = (BlockRef(BlockId(3), 5, 64, (1,)), BlockRef(BlockId(9), 1, 64, (2,)))
SEGMENT = Segment(SegmentKey("space", b"digest"), 2, 0, BLOCKS)


def test_a_token_opens_its_claim_until_its_last_millisecond() -> None:
    token = make_token(KEY, CLAIM, 1000)
    check_token(KEY, CLAIM, token, 0)
    check_token(KEY, CLAIM, token, 999)
    for now_ms in (1000, 1001, 1 << 60):
        with pytest.raises(TokenRefused) as refused:
            check_token(KEY, CLAIM, token, now_ms)
        assert refused.value.expired


@pytest.mark.parametrize(
    "other",
    [
        {"incarnation": 8},
        {"space": "other tenant"},
        {"digest": b"other"},
        {"holder": "thief"},
        {"blocks": tokens.digest_of(b"other blocks")},
    ],
)
def test_a_token_opens_nothing_else(other: dict[str, object]) -> None:
    token = make_token(KEY, CLAIM, 1000)
    with pytest.raises(TokenRefused) as refused:
        check_token(KEY, replace(CLAIM, **other), token, 0)  # type: ignore[arg-type]
    assert not refused.value.expired


def test_another_key_opens_nothing() -> None:
    with pytest.raises(TokenRefused):
        check_token(PullKey.random(), CLAIM, make_token(KEY, CLAIM, 1000), 0)


@given(st.integers(0, tokens.TOKEN_BYTES - 1), st.integers(1, 255), st.sampled_from([0, 999, 5000]))
def test_no_byte_of_a_token_can_be_changed(at: int, flip: int, now_ms: int) -> None:
    """A token that was changed is not even called expired: what it says of its end is not believed."""
    token = bytearray(make_token(KEY, CLAIM, 1000))
    token[at] ^= flip
    with pytest.raises(TokenRefused) as refused:
        check_token(KEY, CLAIM, bytes(token), now_ms)
    assert not refused.value.expired


@given(st.binary(max_size=200) | st.binary(min_size=tokens.TOKEN_BYTES, max_size=tokens.TOKEN_BYTES))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(TokenRefused):
        check_token(KEY, CLAIM, data, 0)


@given(st.text(max_size=8), st.binary(max_size=8), st.text(max_size=8), st.integers(0, 8))
def test_fields_cannot_be_shifted_into_each_other(space: str, digest: bytes, holder: str, cut: int) -> None:
    """Each field has its length in front of it: the same bytes cut elsewhere are another claim."""
    claim = Claim(1, space, digest, holder, b"")
    moved = Claim(1, space[:cut], space[cut:].encode() + digest, holder, b"")
    token = make_token(KEY, claim, 10)
    if moved == claim:
        check_token(KEY, moved, token, 0)
    else:
        with pytest.raises(TokenRefused):
            check_token(KEY, moved, token, 0)


@given(st.lists(st.tuples(st.integers(-1, 2**64), st.integers(-1, 2**64)), max_size=4))
def test_blocks_are_packed_or_refused(pairs: list[tuple[int, int]]) -> None:
    """An owner may publish any numbers: those that a token cannot name get none, and nothing breaks."""
    refs = [BlockRef(BlockId(b), g, 1, ()) for b, g in pairs]
    if all(0 <= n < 1 << 64 for pair in pairs for n in pair):
        assert list(tokens.unpack_blocks(tokens.pack_blocks(refs))) == pairs
        return
    with pytest.raises(ValueError, match="out of range"):
        tokens.pack_blocks(refs)
    assert blocks_digest(replace(SEGMENT, blocks=tuple(refs))) == b""
    assert Granter(Incarnation(1), KEY, 0, 0.0).token(SEGMENT, b"", WorkerId("r"), 0.0, 1.0) == b""


def test_a_granter_makes_what_its_owner_accepts() -> None:
    granter = Granter(Incarnation(7), KEY, clock_ms=50_000, now=3.0)
    digest = tokens.digest_of(tokens.pack_blocks(BLOCKS))
    token = granter.token(SEGMENT, blocks_digest(SEGMENT), WorkerId("reader"), 4.0, 2.0)
    claim = Claim(7, "space", b"digest", "reader", digest)
    check_token(KEY, claim, token, 52_900)  # granted a second after the announcement, for two
    with pytest.raises(TokenRefused) as refused:
        check_token(KEY, claim, token, 53_000)
    assert refused.value.expired


# -- clocks ----------------------------------------------------------------------------------------------

DRIFT = 200e-6
"""More than clocks of machines drift apart: 50 ppm is a bad one."""


@given(
    st.floats(-1e5, 1e5),
    st.floats(-DRIFT, DRIFT),
    st.lists(st.tuples(st.floats(0.1, 30), st.floats(0, 20)), min_size=1, max_size=12),
    st.floats(0, 300),
    st.floats(0.01, 60),
)
def test_a_token_never_ends_late(
    ahead_s: float, drift: float, beats: list[tuple[float, float]], wait_s: float, ttl_s: float
) -> None:
    """Whatever the clocks show, however they drift, however long announcements are on their way."""

    def owner_ms(now: float) -> float:
        return (2e5 + ahead_s + now * (1 + drift)) * 1e3

    clock, heard = None, 0.0
    for gap_s, way_s in beats:
        sent = heard + gap_s
        heard = sent + way_s
        if clock is None:
            clock = OwnerClock(int(owner_ms(sent)), heard)
        else:
            clock.note(int(owner_ms(sent)), heard)
    assert clock is not None
    granted = heard + wait_s
    assert clock.at(granted) <= owner_ms(granted)
    # Counted by the owner, it ends when the lease does, but for the drift meanwhile.
    assert clock.at(granted, ttl_s) <= owner_ms(granted + ttl_s) + ttl_s * DRIFT * 1e3 + 1


def test_a_late_announcement_does_not_make_tokens_end_early() -> None:
    clock = OwnerClock(1000_000, 10.0)  # came at once
    clock.note(1001_000, 15.0)  # four seconds on its way
    assert 1004_900 <= clock.at(15.0) <= 1005_000
    clock.note(1020_000, 30.0)
    assert clock.at(30.0) == 1020_000, "a quick one is believed again"


# -- the key stays where it is ---------------------------------------------------------------------------


def test_a_pull_key_shows_itself_nowhere() -> None:
    owner = Owner(WorkerId("w"), Incarnation(1), NodeId("n"), {}, KEY)
    secret = KEY.reveal()
    for said in (repr(KEY), str(KEY), repr(owner), f"{owner}", repr(Segment)):
        assert secret.hex() not in said
        assert repr(secret)[2:-1] not in said
    for leak in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="pull key"):
            leak(KEY)
        with pytest.raises(TypeError, match="pull key"):
            copy.deepcopy(owner)
    for leak in (asdict, pickle.dumps):
        with pytest.raises(TypeError, match="pull key"):
            leak(owner)
    with pytest.raises(TypeError, match="pull key"):
        astuple(owner)


def test_keys_are_random_and_of_one_size() -> None:
    assert len({PullKey.random().reveal() for _ in range(100)}) == 100
    assert len(PullKey.random().reveal()) == 32
    for wrong in (b"", bytes(31), bytes(33)):
        with pytest.raises(ValueError, match="32 bytes"):
            PullKey(wrong)
