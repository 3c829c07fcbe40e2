"""Chunks, index and footer: layout, limits, random access, audio; see `test_damage` for damage."""

import io
import os
import struct
import threading
import tracemalloc
import zlib

import numpy as np
import pytest

from gnvc_jax.bitstream import BitstreamError, IndexEntry, StreamReader, StreamWriter
from gnvc_jax.bitstream import errors as kinds
from gnvc_jax.bitstream.errors import (
    ChecksumMismatch,
    LimitExceeded,
    MalformedChunk,
    NotThisFormat,
    Truncated,
)


def test_file_layout_is_that_of_the_specification(toy):
    """The whole file, field by field, with struct and zlib only."""
    data = toy.data
    size = struct.unpack_from("<I", data, 12)[0]
    assert data[:8] == b"\x89GNV\r\n\x1a\n" and struct.unpack_from("<HH", data, 8) == (2, 0)
    assert size == 128 + 8 + 4
    assert struct.unpack_from("<IIIIII", data, 16) == (0, 0, 128, 64, 25, 1)
    assert struct.unpack_from("<QHH", data, 40) == (19, 3, 9)
    assert tuple(data[52:60]) == (8, 16, 4, 8, 1, 1, 1, 0)
    assert struct.unpack_from("<HH", data, 60) == (4, 2)
    assert (data[64:96], data[96:112]) == toy.fingerprints
    assert struct.unpack_from("<I4BQ", data, 112) == (
        toy.coder.tables.crc32(), 8, 64, 127, 1, 0
    )  # fmt: skip
    assert data[128:136] == b"\1\0\3\0toy\0"
    assert zlib.crc32(data[:136]) == struct.unpack_from("<I", data, 136)[0]
    at, places = size, []
    for payload in toy.payloads:
        assert data[at : at + 8] == b"GOPC" + struct.pack("<I", len(payload))
        assert data[at + 8 : at + 8 + len(payload)] == payload
        end = at + 8 + len(payload)
        assert zlib.crc32(data[at:end]) == struct.unpack_from("<I", data, end)[0]
        places.append((at, end + 4 - at))
        at = end + 4
    length = 12 + 24 * 3
    assert data[at : at + 8] == b"INDX" + struct.pack("<I", length)
    assert struct.unpack_from("<QI", data, at + 8) == (19, 3)
    for i, (offset, chunk) in enumerate(places):
        mean = round(np.mean([s.q_index for s in toy.groups[i]]))
        row = struct.unpack_from("<QQIHH", data, at + 20 + 24 * i)
        assert row == (offset, 9 * i, chunk, (9, 9, 1)[i], mean)
    footer = data[at + 12 + length :]
    assert footer[:12] == struct.pack("<QI", at, length + 12)
    assert footer[12:] == struct.pack("<I", zlib.crc32(footer[:12])) + b"\x89GNVEND\n"


def test_sequential_reading_gives_all_groups(toy, tmp_path):
    path = tmp_path / "toy.gnvc"
    path.write_bytes(toy.data)
    assert toy.decode(toy.data) == toy.symbols
    assert toy.decode(path) == toy.symbols
    assert toy.decode(str(path)) == toy.symbols
    assert toy.decode(toy.pipe(toy.data)) == toy.symbols


def test_reading_from_a_real_pipe(toy):
    read, write = os.pipe()
    thread = threading.Thread(target=lambda: [os.write(write, toy.data), os.close(write)])
    thread.start()
    with open(read, "rb", buffering=0) as file:
        assert toy.decode(file) == toy.symbols
    thread.join()


def test_random_access_gives_the_requested_group(toy):
    """Any order, also in the middle of reading forward."""
    reader = StreamReader(toy.data)
    forward = list(StreamReader(toy.data).groups())
    for number in (2, 0, 1, 1):
        assert reader.group(number) == forward[number]
    for number, group in enumerate(reader.groups()):
        assert group == forward[number]
        assert reader.group(2 - number) == forward[2 - number]
    for number in (-1, 3):
        with pytest.raises(IndexError):
            reader.group(number)


def test_frame_count_may_be_unknown_when_writing_begins(toy):
    """A writer to a pipe does not know it; the index says it at the end."""
    file = io.BytesIO()
    file.seek = file.tell = None  # the writer never needs them
    writer = StreamWriter(file, toy.header(frame_count=None))
    for payload in toy.payloads:
        writer.write_group(payload)
    expected = writer.closed_size
    writer.close()
    assert len(file.getvalue()) == expected
    assert toy.decode(file.getvalue()) == toy.symbols
    assert struct.unpack_from("<Q", file.getvalue(), 40)[0] == 2**64 - 1


def test_wrong_frame_count_is_refused(toy):
    for count in (18, 20):
        with pytest.raises(MalformedChunk, match="frames"):
            list(StreamReader(toy.mend(toy.edit(toy.data, 40, struct.pack("<Q", count)))).groups())


def test_stream_without_groups_is_readable(toy):
    file = io.BytesIO()
    StreamWriter(file, toy.header(frame_count=None)).close()
    reader = StreamReader(file.getvalue())
    assert list(reader.groups()) == [] == reader.index()


def test_writer_refuses_what_does_not_fit(toy):
    writer = StreamWriter(io.BytesIO(), toy.header())
    with pytest.raises(ValueError, match="does not follow"):
        writer.write_group(toy.payloads[1])
    writer.write_group(toy.payloads[0])
    with pytest.raises(ValueError, match="does not follow"):
        writer.write_group(toy.payloads[0])
    with pytest.raises(ValueError, match="longer"):
        StreamWriter(io.BytesIO(), toy.header(gop_latents=2, gop_frames=5)).write_group(
            toy.payloads[0]
        )
    with pytest.raises(MalformedChunk):
        writer.write_group(toy.payloads[1][:10])
    with pytest.raises(ValueError, match="9 frames were written, the header says 19"):
        writer.close()


def test_chunks_above_the_size_limit_are_refused(toy):
    at = toy.chunks(toy.data)[1][0]
    for source in (lambda d: d, toy.pipe):
        for length, error in ((2**28 + 1, LimitExceeded), (2**32 - 1, LimitExceeded),
                              (2**28, Truncated)):  # fmt: skip
            data = toy.edit(toy.data, at + 4, struct.pack("<I", length))
            tracemalloc.start()
            try:
                with pytest.raises(error):
                    list(StreamReader(source(data)).groups())
                assert tracemalloc.get_traced_memory()[1] < 4 << 20
            finally:
                tracemalloc.stop()


@pytest.mark.parametrize("kind, known", [(b"META", True), (b"xtra", True), (b"XTRA", False)])
def test_unknown_chunks_are_skipped_or_refused_by_their_first_letter(toy, kind, known):
    at, data = toy.chunks(toy.data)[1][0], kind + struct.pack("<I", 5) + b"hello"
    data = toy.data[:at] + data + struct.pack("<I", zlib.crc32(data)) + toy.data[at:]
    if known:
        assert toy.decode(data) == toy.symbols
    else:
        with pytest.raises(MalformedChunk, match="unknown chunk"):
            toy.decode(data)


@pytest.mark.parametrize(
    "order, message",
    [((1, 0, 2), "group number 1"), ((0, 0, 1), "group number 0"), ((0, 2), "group number 2")],
)
def test_groups_out_of_order_are_refused(toy, order, message):
    with pytest.raises(MalformedChunk, match=message):
        list(StreamReader(toy.write(order)).groups())


def test_group_against_header_and_neighbours(toy):
    small = toy.write(gop_latents=2, gop_frames=5)
    with pytest.raises(MalformedChunk, match="longer"):
        list(StreamReader(small).groups())
    at = toy.chunks(toy.data)[1][0] + 8
    with pytest.raises(MalformedChunk, match="begins at frame 10, expected 9"):
        list(StreamReader(toy.mend(toy.edit(toy.data, at + 1, b"\x0a"))).groups())


def test_index_that_disagrees_with_groups_is_refused(toy):
    at = toy.chunks(toy.data)[-1][0]
    for where, value, message in ((8, 18, "18 frames"), (16, 2, "index of 84 bytes for 2")):
        with pytest.raises(MalformedChunk, match=message):
            list(StreamReader(toy.mend(toy.edit(toy.data, at + where, bytes([value])))).groups())
    with pytest.raises(MalformedChunk, match="lists 3 groups, 2"):
        list(StreamReader(toy.data[: toy.chunks(toy.data)[2][0]] + toy.data[at:]).groups())


def test_exit_codes_are_distinct():
    found = [c for c in vars(kinds).values() if isinstance(c, type) and c.__name__[0] != "_"]
    codes = [c.exit_code for c in found if issubclass(c, BitstreamError)]
    assert len(set(codes)) == len(codes) == 13
    assert sorted(codes) == [1, *range(10, 17), *range(20, 25)]


def test_reader_closes_files_it_opened(toy, tmp_path):
    path = tmp_path / "bad.gnvc"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(NotThisFormat):
        StreamReader(path)
    path.write_bytes(toy.data)
    with StreamReader(path) as reader:
        pass
    assert reader.file.closed
    mine = io.BytesIO(toy.data)
    with StreamReader(mine):
        pass
    assert not mine.closed


def test_streams_of_version_1_are_read_whole(toy):
    """Header, index and groups as version 1 wrote them, each latent in a segment of its own."""
    file = io.BytesIO()
    writer = StreamWriter(file, toy.header())
    for number, latents in enumerate(toy.groups):
        payload = toy.version_1(number)
        offset, frames = writer.offset, (9, 9, 1)[number]
        mean = round(np.mean([s.q_index for s in latents]))
        writer.entries.append(IndexEntry(offset, 9 * number, len(payload) + 12, frames, mean))
        writer._chunk(b"GOPC", payload)
        writer.frames += frames
    writer.close()
    data = toy.mend(toy.edit(file.getvalue(), 8, b"\1"))
    assert toy.decode(data) == toy.symbols
    with StreamReader(data) as reader:
        assert reader.header.version == 1 and len(reader.group(1).segments) == 3


@pytest.fixture
def with_audio(toy):
    """The stream of `toy` with audio, and that audio."""
    audio = bytes(range(200))
    return toy.with_audio(audio), audio


def test_audio_is_known_with_the_first_group(with_audio, source):
    data, audio = with_audio
    reader = StreamReader(source(data))
    groups = reader.groups()
    assert next(groups).number == 0 and reader.audio == audio
    assert [group.number for group in groups] == [1, 2]


def test_audio_has_a_chunk_type_that_readers_may_skip(toy, with_audio):
    data, audio = with_audio
    (at, size), *_ = toy.chunks(data)
    assert data[at : at + 4].islower() and size == len(audio) + 12
    assert toy.decode(data) == toy.symbols and StreamReader(data).group(1).number == 1


def test_damaged_audio_costs_no_frame(toy, with_audio, source):
    at = toy.chunks(with_audio[0])[0][0]
    data = toy.edit(with_audio[0], at + 30, b"\0")
    with pytest.raises(ChecksumMismatch, match="audi"):
        list(StreamReader(source(data)).groups())
    reader = StreamReader(source(data))
    error, *groups = reader.groups(tolerant=True)
    assert isinstance(error, ChecksumMismatch) and error.n_frames == 0
    assert [group.number for group in groups] == [0, 1, 2] and reader.audio == b""


def test_audio_is_limited(toy, with_audio, source, monkeypatch):
    for module in ("reader", "writer"):
        monkeypatch.setattr(f"gnvc_jax.bitstream.{module}.MAX_AUDIO", 199)
    with pytest.raises(LimitExceeded, match="audio of more than 199 bytes"):
        list(StreamReader(source(with_audio[0])).groups())
    with pytest.raises(LimitExceeded, match="audio of 200 bytes > 199"):
        toy.with_audio(with_audio[1])
