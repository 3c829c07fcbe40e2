"""Payload of a group: its bytes, its limits, and what tells damage from wrong arithmetic."""

import dataclasses
import struct
import tracemalloc
import zlib

import numpy as np
import pytest

from gnvc_jax.bitstream import decode_group, encode_group, parse_group
from gnvc_jax.bitstream.errors import (
    Desynchronised,
    EntropyError,
    LimitExceeded,
    MalformedChunk,
)

MOTION = b"\1\2\3\4"  # of the toy's second group; opaque here


def decode(toy, group, network=None):
    return decode_group(group, toy.coder, network or toy.scale_index, toy.z_shape, toy.y_shape)


def test_payload_layout_is_that_of_the_specification(toy):
    """Field by field, from the description of the format."""
    payload, latents = toy.payloads[1], toy.groups[1]
    assert payload[:3] == bytes([1, 9, 9])  # group, first frame, frames: below 128, a byte each
    crc_index, crc_symbols = struct.unpack_from("<II", payload, 3)
    assert crc_index == zlib.crc32(b"".join(s.index.tobytes() for s in latents))
    symbols = b"".join(s.z.tobytes() + s.y.tobytes() for s in latents)
    assert crc_symbols == zlib.crc32(symbols + MOTION)
    levels = [s.q_index for s in latents]
    assert payload[11:15] == bytes([levels[0], 2, *levels[1:]])
    assert payload[15 : 16 + len(MOTION)] == bytes([len(MOTION)]) + MOTION
    assert payload[16 + len(MOTION) :] == toy.coder.encode(latents)


def test_version_1_is_still_read(toy):
    for number, latents in enumerate(toy.groups):
        group = parse_group(toy.version_1(number), version=1)
        assert len(group.segments) == len(latents)
        for got, want in zip(decode(toy, group), latents, strict=True):
            np.testing.assert_array_equal(got.y, want.y)


def test_group_round_trip(toy):
    for payload, latents in zip(toy.payloads, toy.groups):
        for got, want in zip(decode(toy, parse_group(payload)), latents, strict=True):
            assert (got.kind, got.q_index) == (want.kind, want.q_index)
            for name in ("z", "y", "index"):
                np.testing.assert_array_equal(getattr(got, name), getattr(want, name))


def edit(payload: bytes, at: int, value: bytes) -> bytes:
    return payload[:at] + value + payload[at + len(value) :]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: p[:2], "frames does not end"),
        (lambda p: p[:12], "before its quality levels"),
        (lambda p: p[:13], "2 quality levels for 2"),
        (lambda p: p[:15], "size of motion does not end"),
        (lambda p: edit(p, 0, b"\xff" * 9), "number does not end within nine bytes"),
        (lambda p: edit(p, 2, b"\0"), "0 frames make"),
        (lambda p: p[:2] + b"\xff\x7f" + p[3:], "16383 frames make"),
        (lambda p: edit(p, 12, b"\3"), "3 quality levels for 2"),
        (lambda p: edit(p, 12, b"\0"), "0 quality levels for 2"),
        (lambda p: edit(p, 11, b"\x40"), "q_index 64"),
        (lambda p: edit(p, 13, b"\xff"), "q_index 255"),
        (lambda p: edit(p, 15, b"\x7f"), "motion of 127 bytes"),
    ],
)
def test_contradicting_fields_are_refused(toy, damage, message):
    with pytest.raises(MalformedChunk, match=message):
        parse_group(damage(toy.payloads[0]))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: p[:39], "payload of 39 bytes"),
        (lambda p: p[:41], "entry of latent 0"),
        (lambda p: p[:42], "nine bytes"),
        (lambda p: edit(p, 14, b"\0\0"), "0 latents"),
        (lambda p: edit(p, 14, b"\1\1"), "257 latents"),
        (lambda p: edit(p, 12, b"\0\0"), "0 frames"),
        (lambda p: edit(p, 12, b"\x0a\0"), "10 frames in 3"),
        (lambda p: edit(p, 40, b"\1"), "kind bits 0x1"),
        (lambda p: edit(p, 40, b"\2"), "kind bits 0x2"),
        (lambda p: edit(p, 41, b"\x40"), "q_index 64"),
        (lambda p: edit(p, 42, b"\xff" * 9), "nine bytes"),
        (lambda p: edit(p, 42, bytes([p[42] ^ 4])), "segments of"),
        (lambda p: p + bytes(4), "segments of"),
        (lambda p: p[:-1], "segments of"),
    ],
)
def test_contradicting_fields_of_version_1_are_refused(toy, damage, message):
    with pytest.raises(MalformedChunk, match=message):
        parse_group(damage(toy.version_1(0)), version=1)


def test_segment_of_partial_words_is_refused(toy):
    group = parse_group(toy.payloads[0])
    short = dataclasses.replace(group, segments=(group.segments[0][:-1],))
    with pytest.raises(EntropyError, match="words of 4 bytes"):
        decode(toy, short)


def test_segment_longer_than_its_symbols_can_be_is_refused(toy):
    group = parse_group(toy.payloads[2])
    most = 4 * (np.prod(toy.z_shape) + np.prod(toy.y_shape)) + 64
    for length, error in ((most, (EntropyError, Desynchronised)), (most + 4, MalformedChunk)):
        with pytest.raises(error):
            decode(toy, dataclasses.replace(group, segments=(b"\1" * int(length),)))


def test_different_arithmetic_raises_desynchronised(toy):
    """One index off by one, in any latent, is told apart from damaged symbols."""

    def other(where):
        def network(kind, q_index, z, prev_y, prev_index):
            index = toy.scale_index(kind, q_index, z, prev_y, prev_index)
            if calls.pop():
                index[0, 0, 3] ^= 1
            return index

        calls = [i == where for i in reversed(range(3))]
        return network

    for where in range(3):
        with pytest.raises(Desynchronised, match="arithmetic differs"):
            decode(toy, parse_group(toy.payloads[0]), other(where))


def test_wrong_symbols_with_right_indices_raise_entropy_error(toy):
    group = parse_group(toy.payloads[2])
    with pytest.raises(EntropyError, match="symbols have CRC32"):
        decode(toy, dataclasses.replace(group, crc_symbols=group.crc_symbols ^ 1))
    longer = (b"\1\0\0\0" + group.segments[0],)
    with pytest.raises(EntropyError, match=r"latent 0: .*more than its symbols"):
        decode(toy, dataclasses.replace(group, segments=longer))
    zero = (group.segments[0] + bytes(4),)
    with pytest.raises(EntropyError, match=r"group 2, latent 0: .*zero word"):
        decode(toy, dataclasses.replace(group, segments=zero))


def test_symbols_that_would_not_decode_are_not_written(toy):
    """Symbols where nothing is coded cannot come back, so they are never written."""
    s = toy.groups[2][0]
    y = np.where(s.index < toy.coder.tables.k_skip, 1, s.y).astype(np.int8)
    assert (y != s.y).any()
    with pytest.raises(ValueError, match="must be 0 where"):
        encode_group(
            [dataclasses.replace(s, y=y)], toy.coder, toy.scale_index,
            number=0, first_frame=0, n_frames=1,
        )  # fmt: skip


def test_memory_limit_is_checked_before_allocation(toy):
    """A few bytes can claim the largest picture; the limit is met without allocating it."""
    group = parse_group(toy.payloads[0])
    tracemalloc.start()
    try:
        with pytest.raises(LimitExceeded, match="MiB of memory"):
            decode_group(group, toy.coder, toy.scale_index, (256, 128, 512), (1024, 512, 512))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_memory_estimate_is_an_upper_bound(toy):
    z_shape, y_shape = (16, 16, 2), (64, 64, 64)

    def network(kind, q_index, z, prev_y, prev_index):
        return np.full(y_shape, 40, np.uint8)

    group = dataclasses.replace(parse_group(toy.payloads[0]), segments=(b"",))
    need = 3 * (z_shape[0] * z_shape[1] * 2 + 2 * 64**3) + 40 * 64**3
    tracemalloc.start()
    try:
        with pytest.raises(Desynchronised):
            decode_group(group, toy.coder, network, z_shape, y_shape, memory_limit=need)
        assert need / 3 < tracemalloc.get_traced_memory()[1] < need
    finally:
        tracemalloc.stop()
    with pytest.raises(LimitExceeded):
        decode_group(group, toy.coder, network, z_shape, y_shape, memory_limit=need - 1)
