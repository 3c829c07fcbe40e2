"""One group of latents <-> the payload of a GOPC chunk.

Payload of version 2: LEB128 group number, LEB128 first frame, LEB128 frames; u32 CRC32 of all index
maps, u32 CRC32 of all symbols (z, then y, latent by latent, then the motion segment); u8 q_index of
the intra latent, u8 p, p bytes: q_index of the others, again and again; LEB128 length of the motion
segment, the motion segment; the segment of the latents. Version 1 (read, no longer written) has
fixed fields and one segment per latent.
"""

import dataclasses
import math
import struct
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from gnvc_jax.bitstream.entropy import EntropyCoder, QuantisedLatent, SegmentDecoder
from gnvc_jax.bitstream.errors import (
    Desynchronised,
    EntropyError,
    LimitExceeded,
    MalformedChunk,
)
from gnvc_jax.bitstream.tables import QUALITIES

FIXED_1 = struct.Struct("<IQHHII16s")
CHECKSUMS = struct.Struct("<II")
MAX_LATENTS = 256
MEMORY_LIMIT = 4 << 30
SORT_BYTES = 40  # per y element while one latent is sorted and decoded

# (kind, q_index, z, previous y or None, previous index or None) -> table indices, uint8
ScaleIndex = Callable[[int, int, np.ndarray, np.ndarray | None, np.ndarray | None], np.ndarray]


@dataclasses.dataclass(frozen=True)
class GroupPayload:
    """A parsed payload: what the group says of itself, and its segments still coded.

    segments: one for all latents; one for each in streams of version 1. motion: the symbols of
    block motion of all predicted latents, empty without motion.
    """

    number: int
    first_frame: int
    n_frames: int
    crc_index: int
    crc_symbols: int
    q_indices: tuple[int, ...]
    segments: tuple[bytes, ...]
    motion: bytes = b""


def encode_group(
    latents: Sequence[QuantisedLatent],
    coder: EntropyCoder,
    scale_index: ScaleIndex,
    *,
    number: int,
    first_frame: int,
    n_frames: int,
    motion: bytes = b"",
    temporal_stride: int = 4,
) -> bytes:
    """Payload of a group. It is decoded again before it is returned.

    Raises RuntimeError if the decoder's path does not give the same symbols back.
    """
    crc_index = crc_symbols = 0
    for s in latents:
        crc_index, crc_symbols = _update(crc_index, crc_symbols, s)
    intra, *others = (s.q_index for s in latents)
    pattern = bytes(_period(others))
    payload = (
        b"".join(map(_varint, (number, first_frame, n_frames)))
        + CHECKSUMS.pack(crc_index, zlib.crc32(motion, crc_symbols))
        + bytes([intra, len(pattern)])
        + pattern
        + _varint(len(motion))
        + motion
        + coder.encode(latents)
    )
    z_shape, y_shape = latents[0].z.shape, latents[0].y.shape
    group = parse_group(payload, temporal_stride=temporal_stride)
    again = decode_group(group, coder, scale_index, z_shape, y_shape)
    for number_, (a, b) in enumerate(zip(latents, again, strict=True)):
        if not (np.array_equal(a.z, b.z) and np.array_equal(a.y, b.y)):
            raise RuntimeError(f"group {number}, latent {number_}: does not decode to its symbols")
    return payload


def _period(levels: list[int]) -> list[int]:
    """The shortest beginning that, repeated, gives all levels."""
    for p in range(1, len(levels)):
        if all(a == b for a, b in zip(levels, levels[p:])):
            return levels[:p]
    return levels


def parse_group(payload: bytes, version: int = 2, temporal_stride: int = 4) -> GroupPayload:
    """Read the fields of a payload and check that they agree; nothing is decoded.

    version: major version of the stream; temporal_stride: frames per latent after the first.
    Raises MalformedChunk.
    """
    return _parse_1(payload) if version == 1 else _parse_2(payload, temporal_stride)


def _parse_2(payload: bytes, temporal_stride: int) -> GroupPayload:
    fields, at = [], 0
    for name in ("number", "first frame", "number of frames"):
        value, at = _read_varint(payload, at, f"group: {name}")
        fields.append(value)
    number, first, n_frames = fields
    count = 1 + -(-(n_frames - 1) // temporal_stride)
    if not 1 <= n_frames or count > MAX_LATENTS:
        raise MalformedChunk(f"group {number}: {n_frames} frames make {count} latents")
    if at + CHECKSUMS.size + 2 > len(payload):
        raise MalformedChunk(f"group {number}: ends before its quality levels")
    crc_index, crc_symbols = CHECKSUMS.unpack_from(payload, at)
    at += CHECKSUMS.size
    intra, period = payload[at : at + 2]
    pattern = payload[at + 2 : at + 2 + period]
    at += 2 + period
    if len(pattern) < period or period > count - 1 or (period == 0) != (count == 1):
        raise MalformedChunk(f"group {number}: {period} quality levels for {count - 1} latents")
    levels = (intra, *(pattern[i % period] for i in range(count - 1)))
    if max(levels) >= QUALITIES:
        raise MalformedChunk(f"group {number}: q_index {max(levels)}, expected 0..{QUALITIES - 1}")
    size, at = _read_varint(payload, at, f"group {number}: size of motion")
    if at + size > len(payload):
        raise MalformedChunk(
            f"group {number}: motion of {size} bytes, {len(payload) - at} are there"
        )
    motion, segment = payload[at : at + size], payload[at + size :]
    return GroupPayload(number, first, n_frames, crc_index, crc_symbols, levels, (segment,), motion)


def _parse_1(payload: bytes) -> GroupPayload:
    if len(payload) < FIXED_1.size:
        raise MalformedChunk(f"group payload of {len(payload)} bytes, expected >= {FIXED_1.size}")
    number, first, n_frames, count, crc_index, crc_symbols, _ = FIXED_1.unpack_from(payload)

    def wrong(what: str) -> MalformedChunk:
        return MalformedChunk(f"group {number}: {what}")

    if not 1 <= count <= MAX_LATENTS:
        raise wrong(f"{count} latents, expected 1..{MAX_LATENTS}")
    if not 1 <= n_frames <= 4 * (count - 1) + 1:
        raise wrong(f"{n_frames} frames in {count} latents")
    q_indices, lengths = [], []
    at = FIXED_1.size
    for i in range(count):
        if at + 2 > len(payload):
            raise wrong(f"ends inside the entry of latent {i}")
        kind, q_index = payload[at], payload[at + 1]
        if kind != (i > 0):
            raise wrong(f"latent {i} has kind bits {kind:#x}, expected {int(i > 0)}")
        if q_index >= QUALITIES:
            raise wrong(f"latent {i} has q_index {q_index}, expected 0..{QUALITIES - 1}")
        length, at = _read_varint(payload, at + 2, f"group {number}: length of latent {i}")
        q_indices.append(q_index)
        lengths.append(length)
    if at + sum(lengths) != len(payload):
        raise wrong(f"segments of {sum(lengths)} bytes, {len(payload) - at} are there")
    segments = []
    for length in lengths:
        segments.append(payload[at : at + length])
        at += length
    return GroupPayload(
        number, first, n_frames, crc_index, crc_symbols, tuple(q_indices), tuple(segments)
    )


def claimed_frames(start: bytes, number: int, version: int = 2) -> int | None:
    """Frames of group `number` by the beginning of its payload, the rest of which is damaged.

    None if the first fields are cut off or contradict each other.
    """
    if version == 1:
        if len(start) < FIXED_1.size:
            return None
        found, _, n_frames = FIXED_1.unpack_from(start)[:3]
    else:
        try:
            found, at = _read_varint(start, 0, "number")
            _, at = _read_varint(start, at, "first frame")
            n_frames, _ = _read_varint(start, at, "frames")
        except MalformedChunk:
            return None
    return n_frames if found == number and n_frames >= 1 else None


def decode_group(
    group: GroupPayload,
    coder: EntropyCoder,
    scale_index: ScaleIndex,
    z_shape: tuple[int, int, int],
    y_shape: tuple[int, int, int],
    memory_limit: int = MEMORY_LIMIT,
) -> list[QuantisedLatent]:
    """All integers of a group but those of motion.

    LimitExceeded if they need more than memory_limit bytes; a few bytes of stream can claim any
    picture size, so this is known before anything is allocated.

    The indices of a latent need the symbols of the one before, so both checksums can only be
    compared at the end. A wrong index map is reported first, as Desynchronised, because wrong
    symbols follow from it; EntropyError means that the indices were right and the symbols are not.
    """
    count = len(group.q_indices)
    z_size, y_size = math.prod(z_shape), math.prod(y_shape)
    need = count * (z_size + 2 * y_size) + SORT_BYTES * y_size
    if need > memory_limit:
        raise LimitExceeded(
            f"group {group.number} needs {need >> 20} MiB of memory, allowed {memory_limit >> 20}"
        )
    most = (4 * (z_size + y_size) + 64) * (count if len(group.segments) == 1 else 1)
    crc_index = crc_symbols = 0
    latents: list[QuantisedLatent] = []
    problem = ""
    segments = iter(group.segments)
    for i, q_index in enumerate(group.q_indices):
        begins, ends = i < len(group.segments), len(group.segments) > 1 or i == count - 1
        if begins:
            segment = next(segments)
            if len(segment) > most:
                raise MalformedChunk(f"group {group.number}, latent {i}: {len(segment)} bytes")
            try:
                decoder = SegmentDecoder(coder, segment)
            except EntropyError as error:
                raise EntropyError(f"group {group.number}, latent {i}: {error}") from error
        kind, before = int(i > 0), latents[-1] if latents else None
        z = decoder.z(kind, q_index, z_shape)
        index = scale_index(kind, q_index, z, before and before.y, before and before.index)
        latents.append(QuantisedLatent(kind, q_index, z, decoder.y(index), index))
        crc_index, crc_symbols = _update(crc_index, crc_symbols, latents[-1])
        if ends:
            try:
                decoder.finish()
            except EntropyError as error:
                problem = problem or f"latent {i}: {error}"
    crc_symbols = zlib.crc32(group.motion, crc_symbols)
    if crc_index != group.crc_index:
        raise Desynchronised(
            f"group {group.number}: index maps have CRC32 {crc_index:08x}, the encoder's had "
            f"{group.crc_index:08x}: arithmetic differs on this device, or the model does"
        )
    if crc_symbols != group.crc_symbols and not problem:
        problem = f"symbols have CRC32 {crc_symbols:08x}, expected {group.crc_symbols:08x}"
    if problem:
        raise EntropyError(f"group {group.number}: {problem}")
    return latents


def _update(crc_index: int, crc_symbols: int, s: QuantisedLatent) -> tuple[int, int]:
    crc_symbols = zlib.crc32(np.ascontiguousarray(s.z, np.int8).tobytes(), crc_symbols)
    crc_symbols = zlib.crc32(np.ascontiguousarray(s.y, np.int8).tobytes(), crc_symbols)
    return zlib.crc32(np.ascontiguousarray(s.index, np.uint8).tobytes(), crc_index), crc_symbols


def _varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _read_varint(data: bytes, at: int, what: str) -> tuple[int, int]:
    """Value and the place after it. MalformedChunk if it does not end within nine bytes."""
    value = 0
    for i, byte in enumerate(data[at : at + 9]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    raise MalformedChunk(f"{what} does not end within nine bytes")
