"""Streams that are damaged or cut: what is refused, and what tolerant reading still gives."""

import struct
import warnings

import pytest

from gnvc_jax.bitstream import BitstreamError, GroupPayload, StreamReader
from gnvc_jax.bitstream.errors import (
    ChecksumMismatch,
    IndexRebuilt,
    MalformedChunk,
    NotThisFormat,
    Truncated,
)


def test_damaged_chunk_raises_checksum_mismatch(toy):
    at = toy.chunks(toy.data)[1][0]
    with pytest.raises(ChecksumMismatch, match=rf"GOPC.*group 1.*offset {at}"):
        list(StreamReader(toy.edit(toy.data, at + 20, b"\0\0\0\0")).groups())


@pytest.mark.parametrize(
    "damage",
    [
        lambda toy: toy.data[:-1],
        lambda toy: toy.data[: toy.chunks(toy.data)[-1][0]],
        lambda toy: toy.edit(toy.data, len(toy.data) - 1, b"\r"),
        lambda toy: toy.edit(toy.data, len(toy.data) - 24, b"\xff"),
        lambda toy: toy.mend(toy.edit(toy.data, len(toy.data) - 24, b"\xff" * 8)),
        lambda toy: toy.mend(toy.edit(toy.data, len(toy.data) - 24, struct.pack("<Q", 140))),
        lambda toy: toy.edit(toy.data, toy.chunks(toy.data)[-1][0] + 30, b"\x55"),
        lambda toy: toy.mend(toy.edit(toy.data, toy.chunks(toy.data)[-1][0] + 20, b"\xff" * 8)),
        lambda toy: toy.mend(toy.edit(toy.data, toy.chunks(toy.data)[-1][0] + 36, b"\xff" * 4)),
    ],
)
def test_damaged_index_is_rebuilt_with_a_warning(toy, damage):
    reader = StreamReader(damage(toy))
    with pytest.warns(IndexRebuilt):
        assert reader.index() == StreamReader(toy.data).index()
    for number, group in enumerate(StreamReader(toy.data).groups()):
        assert reader.group(number) == group


def test_forward_reading_needs_no_index(toy):
    data = toy.edit(toy.data, toy.chunks(toy.data)[-1][0] + 30, b"\x55")
    with pytest.warns(IndexRebuilt):
        assert toy.decode(data) == toy.symbols
    with pytest.warns(IndexRebuilt), pytest.raises(MalformedChunk, match="header 20"):
        toy.decode(toy.mend(data[:40] + b"\x14" + data[41:])[:140] + data[140:])


def test_index_that_points_elsewhere(toy):
    """A well-formed index with wrong contents never gives the wrong group."""
    at = toy.chunks(toy.data)[-1][0] + 20
    rows = [toy.data[at + 24 * i : at + 24 * i + 24] for i in range(3)]
    swapped = toy.mend(toy.edit(toy.data, at, rows[1] + rows[0] + rows[2]))
    with pytest.raises(MalformedChunk, match="group number 1"):
        StreamReader(swapped).group(0)
    late = toy.mend(toy.edit(toy.data, at + 8, b"\1"))
    with pytest.raises(MalformedChunk, match="begins at frame"):
        StreamReader(late).group(0)
    inside = toy.mend(toy.edit(toy.data, at, struct.pack("<Q", 150)))
    with pytest.raises(BitstreamError):
        StreamReader(inside).group(0)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("where", [0, 4, 7, 30])
def test_tolerant_reading_loses_one_group(toy, number, where):
    """Damage in type, length or payload of a chunk costs that group; the index shows the way."""
    at = toy.chunks(toy.data)[number][0] + where
    data = toy.edit(toy.data, at, bytes([toy.data[at] ^ 0x21]))
    with pytest.raises(BitstreamError):
        list(StreamReader(data).groups())
    got = list(StreamReader(data).groups(tolerant=True))
    want = list(StreamReader(toy.data).groups())
    assert [isinstance(g, GroupPayload) for g in got] == [i != number for i in range(3)]
    assert [g for i, g in enumerate(got) if i != number] == want[:number] + want[number + 1 :]


def test_tolerant_reading_without_seeking(toy):
    at = toy.chunks(toy.data)[1][0] + 30
    got = list(StreamReader(toy.pipe(toy.edit(toy.data, at, b"\x55"))).groups(tolerant=True))
    assert [type(g) for g in got] == [GroupPayload, ChecksumMismatch, GroupPayload]
    # a wrong length hides all that follows
    got = list(StreamReader(toy.pipe(toy.edit(toy.data, at - 24, b"\xff"))).groups(tolerant=True))
    assert [type(g) for g in got] == [GroupPayload, Truncated]


def test_tolerant_reading_of_a_contradiction(toy):
    at = toy.chunks(toy.data)[1][0] + 8
    got = list(StreamReader(toy.mend(toy.edit(toy.data, at, b"\5"))).groups(tolerant=True))
    assert [type(g) for g in got] == [GroupPayload, MalformedChunk, GroupPayload]


def lost_frames(data, source=lambda d: d) -> list[int | None]:
    """Frames of each item of tolerant reading; those of groups are negative."""
    items = StreamReader(source(data)).groups(tolerant=True)
    return [-g.n_frames if isinstance(g, GroupPayload) else g.n_frames for g in items]


def test_tolerant_reading_knows_how_much_is_lost(toy, source):
    """The frames of groups and errors are those of the header, whatever is lost."""
    flipped = [toy.edit(toy.data, at + 20, b"\0\0\0\0") for at, _ in toy.chunks(toy.data)[:3]]
    for data, want in zip(flipped, ([9, -9, -1], [-9, 9, -1], [-9, -9, 1])):
        assert lost_frames(data, source) == want
    at = toy.chunks(toy.data)[2][0]
    assert lost_frames(toy.edit(flipped[1], at + 20, b"\0\0\0\0"), source) == [-9, 9, 1]
    for length in (at, at + 5, at + 20):  # cut short
        assert lost_frames(toy.data[:length], source) == [-9, -9, 1]
    assert lost_frames(toy.write((1, 0, 2)), source) == [9, 9, -1]
    assert lost_frames(toy.write((0, 1)), source) == [-9, -9, 1]
    with pytest.warns(IndexRebuilt):
        index = toy.chunks(toy.data)[3][0]
        assert lost_frames(toy.edit(flipped[2], index + 30, b"\x55"), source) == [-9, -9, 1]


def test_tolerant_reading_of_a_stream_of_unknown_length(toy):
    data = toy.mend(toy.edit(toy.data, 40, b"\xff" * 8))
    at = toy.chunks(data)[2][0]
    assert lost_frames(toy.edit(data, at + 20, b"\0\0\0\0")) == [-9, -9, 1]  # from the index
    for source in (lambda d: d, toy.pipe):
        # The number of frames stands in the third byte of the cut group, behind 8 of its chunk.
        assert lost_frames(data[: at + 11], source) == [-9, -9, 1]
        assert lost_frames(data[: at + 10], source) == [-9, -9, 0]
        assert lost_frames(data[: at + 5], source) == [-9, -9, 0]
        assert lost_frames(data[:at], source) == [-9, -9, 0]  # only the index is missing
        damaged = toy.edit(data, at + 20, b"\0\0\0\0")
        assert lost_frames(damaged[: toy.chunks(data)[3][0]], source) == [-9, -9, 1, 0]
        lying = toy.edit(damaged, at + 10, b"\x7f")
        assert lost_frames(lying[: toy.chunks(data)[3][0]], source) == [-9, -9, 0, 0]


def test_file_truncated_at_any_length_gives_its_complete_groups(toy):
    """Whole groups come out, then Truncated; before the first chunk, a header's errors."""
    ends = [at + size for at, size in toy.chunks(toy.data)]
    for length in range(len(toy.data)):
        data, groups = toy.data[:length], []
        for source in (data, toy.pipe(data)):
            groups.clear()
            try:
                groups.extend(StreamReader(source).groups())
                assert length >= ends[-1]  # only the footer is gone
            except NotThisFormat:
                assert length < 132
            except Truncated as error:
                assert 132 <= length < ends[-1]
                assert length < 140 or f"{sum(e <= length for e in ends)} complete" in str(error)
        # Truncated ends the iteration, so read them one by one
        if length >= 140:
            reader, count = StreamReader(data).groups(), 0
            try:
                for _ in reader:
                    count += 1
            except Truncated:
                pass
            assert count == sum(e <= length for e in ends[:-1])


def test_every_flipped_byte_is_detected(toy):
    """An error, or the very symbols (in the footer, or with a warning in the index)."""
    index = toy.chunks(toy.data)[-1][0]
    for at in range(len(toy.data)):
        data = toy.edit(toy.data, at, bytes([toy.data[at] ^ 0xFF]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IndexRebuilt)
            try:
                symbols = toy.decode(data)
            except BitstreamError:
                assert at < index + 8
            else:
                assert at >= index + 8 and symbols == toy.symbols
