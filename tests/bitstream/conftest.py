"""A toy codec without a network: small tables, an affine scale index, a short stream of groups."""

import functools
import io
import struct
import types
import zlib

import numpy as np
import pytest

from gnvc_jax.bitstream import (
    EntropyCoder,
    Header,
    QuantisedLatent,
    StreamReader,
    StreamWriter,
    Tables,
    decode_group,
    encode_group,
    frequencies_from_probabilities,
    gaussian_frequencies,
    parse_group,
)

Z_SHAPE, Y_SHAPE = (1, 2, 2), (4, 8, 4)
CODEC, VAE = bytes(range(32)), bytes(range(100, 116))


def tables(k_skip: int = 8, z_channels: int = 2) -> Tables:
    """64 Gaussians of the usual scales; hyperlatents of two widths, by quality group."""
    symbols = np.arange(-15, 16)
    widths = np.linspace(1, 6, 2 * 4 * z_channels).reshape(2, 4, z_channels, 1)
    z = frequencies_from_probabilities(np.exp(-np.abs(symbols) / widths))
    y = gaussian_frequencies(0.11 * (16 / 0.11) ** (np.arange(64) / 63))
    return Tables(y, z, k_skip)


def scale_index(kind, q_index, z, prev_y, prev_index):
    """Integers only, like the real one: affine in z, |previous symbols| and previous indices."""
    index = 2 * np.abs(z.astype(int)).sum(-1).repeat(4, 0).repeat(4, 1)[..., None] + q_index // 8
    index = index + 5 * np.arange(Y_SHAPE[2]) - 10
    if prev_y is not None:
        index = (index + 4 * np.abs(prev_y.astype(int)) + prev_index) // 2
    return np.clip(index, 0, 63).astype(np.uint8)


def draw_latents(rng, count: int, coder: EntropyCoder) -> list[QuantisedLatent]:
    """Random integers that the toy codec could have made."""
    latents = []
    for i in range(count):
        q_index = int(rng.integers(64))
        z = np.clip(np.round(rng.normal(0, 3, Z_SHAPE)), -15, 15).astype(np.int8)
        before = latents[-1] if latents else None
        index = scale_index(int(i > 0), q_index, z, before and before.y, before and before.index)
        sigma = 0.11 * (16 / 0.11) ** (index / 63)
        y = np.clip(np.round(rng.normal(0, sigma)), -127, 127)
        y = np.where(index >= coder.tables.k_skip, y, 0).astype(np.int8)
        latents.append(QuantisedLatent(int(i > 0), q_index, z, y, index))
    return latents


def version_1(payload: bytes, latents: list[QuantisedLatent], coder: EntropyCoder) -> bytes:
    """The payload of a group as streams of version 1 have it; payload: that of version 2."""
    group = parse_group(payload)
    symbols = b"".join(s.z.tobytes() + s.y.tobytes() for s in latents)
    fields = group.number, group.first_frame, group.n_frames, len(latents)
    out = struct.pack("<IQHHII16s", *fields, group.crc_index, zlib.crc32(symbols), bytes(16))
    segments = [coder.encode([s]) for s in latents]
    for s, segment in zip(latents, segments):
        length = len(segment)
        varint = [length] if length < 128 else [length & 127 | 128, length >> 7]
        out += bytes([s.kind, s.q_index, *varint])
    return out + b"".join(segments)


def make_header(**changes) -> Header:
    fields = dict(
        width=128, height=64, fps=(25, 1), gop_latents=3, gop_frames=9, y_channels=4, z_channels=2,
        k_skip=8, codec_fingerprint=CODEC, vae_fingerprint=VAE, tables_crc=tables().crc32(),
        frame_count=19, extra={1: b"toy"},
    )  # fmt: skip
    return Header(**fields | changes)


def decode(stream, coder: EntropyCoder) -> list[list[QuantisedLatent]]:
    """All symbols of a stream, as a decoder of video reads it."""
    reader = StreamReader(stream)
    reader.header.check_model(CODEC, VAE, coder.tables.crc32())
    return [decode_group(g, coder, scale_index, Z_SHAPE, Y_SHAPE) for g in reader.groups()]


def fingerprint(groups: list[list[QuantisedLatent]]) -> list:
    """Symbols in a form that can be compared."""
    return [[(s.z.tobytes(), s.y.tobytes(), s.index.tobytes()) for s in g] for g in groups]


def chunks(data: bytes) -> list[tuple[int, int]]:
    """(offset, size) of every chunk, as long as the lengths can be followed."""
    at, found = int.from_bytes(data[12:16], "little"), []
    while at + 12 <= len(data) - 24:
        size = int.from_bytes(data[at + 4 : at + 8], "little") + 12
        if at + size > len(data):
            break
        found.append((at, size))
        at += size
    return found


def mend(data: bytes) -> bytes:
    """The same file with the CRC32 of header, chunks and footer made right, so far as they are."""
    data = bytearray(data)

    def seal(start: int, end: int) -> None:
        data[end : end + 4] = zlib.crc32(data[start:end]).to_bytes(4, "little")

    header = int.from_bytes(data[12:16], "little")
    if 132 <= header <= len(data):
        seal(0, header - 4)
        for at, size in chunks(bytes(data)):
            seal(at, at + size - 4)
    if len(data) >= 24:
        seal(len(data) - 24, len(data) - 12)
    return bytes(data)


def edit(data: bytes, at: int, value: bytes) -> bytes:
    """The same bytes with `value` at a place."""
    return data[:at] + value + data[at + len(value) :]


class Pipe(io.RawIOBase):
    """Cannot seek and gives a few bytes at a time."""

    def __init__(self, data: bytes):
        self.data = io.BytesIO(data)

    def readable(self):
        return True

    def readinto(self, buffer):
        return self.data.readinto(memoryview(buffer)[:7])


def write(payloads: list[bytes], order=(0, 1, 2), **changes) -> bytes:
    """Header, groups in any order, and an index of the right size: a careless writer's file."""
    file = io.BytesIO()
    writer = StreamWriter(file, make_header(**changes))
    for number in order:
        writer._chunk(b"GOPC", payloads[number])
    writer._chunk(b"INDX", struct.pack("<QI", 19, len(order)) + bytes(24 * len(order)))
    return file.getvalue()


@pytest.fixture(params=["bytes", "pipe"])
def source(request):
    """Makes what a reader reads of the bytes of a file: these bytes, or a pipe."""
    return Pipe if request.param == "pipe" else bytes


@pytest.fixture(scope="session")
def toy():
    """A stream of three groups (9 + 9 + 1 frames), its bytes, coder and symbols."""
    rng, coder = np.random.default_rng(7), EntropyCoder(tables())
    groups = [draw_latents(rng, n, coder) for n in (3, 3, 1)]
    frames = [9, 9, 1]
    payloads = [
        encode_group(
            g,
            coder,
            scale_index,
            number=i,
            first_frame=9 * i,
            n_frames=n,
            motion=b"\1\2\3\4" if i == 1 else b"",
        )
        for i, (g, n) in enumerate(zip(groups, frames))
    ]

    def stream(audio: bytes) -> bytes:
        file = io.BytesIO()
        writer = StreamWriter(file, make_header())
        writer.write_audio(audio)
        for payload in payloads:
            writer.write_group(payload)
        writer.close()
        return file.getvalue()

    return types.SimpleNamespace(
        coder=coder,
        groups=groups,
        payloads=payloads,
        data=stream(b""),
        with_audio=stream,
        symbols=fingerprint(groups),
        scale_index=scale_index,
        z_shape=Z_SHAPE,
        y_shape=Y_SHAPE,
        fingerprints=(CODEC, VAE),
        header=make_header,
        tables=tables,
        decode=lambda stream: fingerprint(decode(stream, coder)),
        chunks=chunks,
        mend=mend,
        edit=edit,
        pipe=Pipe,
        write=functools.partial(write, payloads),
        version_1=lambda n: version_1(payloads[n], groups[n], coder),
    )
