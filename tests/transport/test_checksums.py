"""Checksums: the same value wherever it is computed, and another one for other bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from transport import checksums

WORDS = st.integers(1, 40).flatmap(lambda n: st.binary(min_size=8 * n, max_size=8 * n))


def by_definition(data: bytes) -> int:
    """Python's integers, word by word."""
    total = 0
    for i in range(len(data) // 8):
        x = (int.from_bytes(data[8 * i : 8 * i + 8], "little") + (i + 1) * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 33) * 0xFF51AFD7ED558CCD % 2**64
        x = (x ^ x >> 33) * 0xC4CEB9FE1A85EC53 % 2**64
        total += x ^ x >> 33
    return total % 2**63 | 1 << 63


@given(WORDS)
def test_words_on_the_cpu(data: bytes) -> None:
    assert checksums.of_words(data) == by_definition(data)


@given(WORDS, st.data())
def test_other_words_or_other_places(data: bytes, draw: st.DataObject) -> None:
    words = [data[i : i + 8] for i in range(0, len(data), 8)]
    i, j = (draw.draw(st.integers(0, len(words) - 1)) for _ in "ij")
    flipped = bytearray(data)
    flipped[draw.draw(st.integers(0, len(data) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    assert checksums.of_words(flipped) != checksums.of_words(data)
    if words[i] != words[j]:
        words[i], words[j] = words[j], words[i]
        assert checksums.of_words(b"".join(words)) != checksums.of_words(data)


@given(st.binary(max_size=99))
def test_bytes_say_that_they_are_bytes(data: bytes) -> None:
    sealed = checksums.of_bytes(data)
    assert sealed < 1 << 63
    assert sealed == xxhash.xxh3_64_intdigest(data) & (1 << 63) - 1
    assert checksums.again(data, sealed) == sealed


@given(WORDS)
def test_whoever_verifies_computes_the_kind_that_was_sealed(data: bytes) -> None:
    assert checksums.again(data, checksums.of_words(data)) == checksums.of_words(data)
    assert checksums.again(data, checksums.of_bytes(data)) == checksums.of_bytes(data)


def test_a_sum_over_words_for_what_has_none_is_not_believed() -> None:
    assert checksums.again(b"odd", 1 << 63 | 5) == checksums.of_bytes(b"odd")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("nbytes", [8, 4096, 2048 * 8 * 8 + 24])
def test_the_kernel_gives_what_the_cpu_gives(device: str, nbytes: int) -> None:
    triton = pytest.importorskip("triton")
    from transport import checksums_triton

    if device == "cpu" and isinstance(checksums_triton._check_kernel, triton.JITFunction):
        pytest.skip("the kernel is compiled here, for a device")
    stride = nbytes + 64
    data = np.random.default_rng(nbytes).integers(0, 256, 3 * stride, dtype=np.uint8)
    buffer = torch.from_numpy(data.copy()).to(device)
    wanted = [checksums.of_words(data[at * stride + 64 : (at + 1) * stride].tobytes()) for at in (2, 0)]
    assert checksums.on_device(buffer, [(2,), (0,)], stride, 64, nbytes) == [[wanted[0]], [wanted[1]]]
    assert np.array_equal(buffer.cpu().numpy(), data)
    # With new headers: the old ones come back, and nothing else is written.
    headers = data.reshape(3, stride)[:, :64].view("<i8")
    rows = [(2, *range(8)), (0, *range(-8, 0))]
    found = checksums.on_device(buffer, rows, stride, 64, nbytes)
    assert found == [[wanted[0], *headers[2].tolist()], [wanted[1], *headers[0].tolist()]]
    after = data.reshape(3, stride).copy()
    after[[2, 0], :64] = np.array([row[1:] for row in rows], "<i8").view(np.uint8)
    assert np.array_equal(buffer.cpu().numpy().reshape(3, stride), after)
