"""One group of latents <-> the payload of a GOPC chunk.

`encode_group` makes a payload, and decodes it again to be sure. `parse_group` reads its fields,
`decode_group` its symbols.

Payload of version 2: LEB128 group number, LEB128 first frame, LEB128 frames; u32 CRC32 of all index
maps, u32 CRC32 of all symbols (z, then y, latent by latent, then the motion segment); u8 q_index of
the intra latent, u8 p, p bytes: q_index of the others, repeated; LEB128 length of the motion
segment, the motion segment; the segment of the latents. Version 1 (read, no longer written) has
fields of fixed size and one segment per latent.
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

# Fields of version 1: number, first frame, frames, latents, two checksums, 16 unused bytes.
FIXED_1 = struct.Struct("<IQHHII16s")
CHECKSUMS = struct.Struct("<II")  # of index maps, of symbols
MAX_LATENTS = 256  # in one group
MEMORY_LIMIT = 4 << 30  # bytes, by default
SORT_BYTES = 40  # for each element of y, while one latent is sorted and decoded

# (kind, q_index, z, previous y or None, previous index or None) -> table indices, uint8
ScaleIndex = Callable[[int, int, np.ndarray, np.ndarray | None, np.ndarray | None], np.ndarray]


@dataclasses.dataclass(frozen=True)
class GroupPayload:
    """A parsed payload: its fields, and its segments still coded.

    Attributes:
        number: Number of the group in the stream, from 0.
        first_frame: Number of the first frame of the group.
        n_frames: Number of frames in the group.
        crc_index: CRC32 of all index maps.
        crc_symbols: CRC32 of all symbols and of the motion segment.
        q_indices: Quality level of each latent.
        segments: One segment for all latents; one for each latent in streams of version 1.
        motion: Symbols of block motion of all predicted latents, empty without motion.
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
    """Encodes a group to a payload, and decodes it again before it is returned.

    Args:
        latents: Latents of the group; the first is intra, the others are predicted.
        coder: Entropy coder of the model.
        scale_index: Integer network of the model.
        number: Number of the group in the stream, from 0.
        first_frame: Number of the first frame of the group.
        n_frames: Number of frames in the group.
        motion: Motion segment, see `gnvc_jax.motion.coding.encode_fields`.
        temporal_stride: Frames per latent after the first.

    Returns:
        The payload of a GOPC chunk.

    Raises:
        RuntimeError: If decoding does not give the same symbols back.
    """
    crc_index = crc_symbols = 0
    for s in latents:
        crc_index, crc_symbols = _update(crc_index, crc_symbols, s)
    # Levels mostly repeat with a short period, so a byte or two tell those of a whole group.
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
    # A fault here would otherwise show when the stream is decoded, perhaps years later.
    group = parse_group(payload, temporal_stride=temporal_stride)
    again = decode_group(group, coder, scale_index, z_shape, y_shape)
    for i, (a, b) in enumerate(zip(latents, again, strict=True)):
        if not (np.array_equal(a.z, b.z) and np.array_equal(a.y, b.y)):
            raise RuntimeError(f"group {number}, latent {i}: does not decode to its symbols")
    return payload


def _period(levels: list[int]) -> list[int]:
    """Finds the shortest prefix that gives all levels when it is repeated."""
    # A period p means that the sequence agrees with itself, moved by p.
    for p in range(1, len(levels)):
        if all(a == b for a, b in zip(levels, levels[p:])):
            return levels[:p]
    return levels


def parse_group(payload: bytes, version: int = 2, temporal_stride: int = 4) -> GroupPayload:
    """Reads the fields of a payload and checks that they agree; decodes no symbols.

    Args:
        payload: Payload of a GOPC chunk.
        version: Major version of the stream.
        temporal_stride: Frames per latent after the first.

    Raises:
        MalformedChunk: If the fields are cut off or contradict each other.
    """
    return _parse_1(payload) if version == 1 else _parse_2(payload, temporal_stride)


def _parse_2(payload: bytes, temporal_stride: int) -> GroupPayload:
    fields, at = [], 0
    for name in ("number", "first frame", "number of frames"):
        value, at = _read_varint(payload, at, f"group: {name}")
        fields.append(value)
    number, first, n_frames = fields
    # Every number is checked before it decides how much is read or allocated.
    # One latent for the first frame, then one for every `temporal_stride` frames, rounded up.
    count = 1 + -(-(n_frames - 1) // temporal_stride)
    if not 1 <= n_frames or count > MAX_LATENTS:
        raise MalformedChunk(f"group {number}: {n_frames} frames make {count} latents")
    if at + CHECKSUMS.size + 2 > len(payload):
        raise MalformedChunk(f"group {number}: ends before its quality levels")
    crc_index, crc_symbols = CHECKSUMS.unpack_from(payload, at)
    at += CHECKSUMS.size
    # Quality levels: that of the intra latent, and the pattern of the others.
    intra, period = payload[at : at + 2]
    pattern = payload[at + 2 : at + 2 + period]
    at += 2 + period
    # A pattern is there if and only if there are predicted latents, and is not longer than they.
    if len(pattern) < period or period > count - 1 or (period == 0) != (count == 1):
        raise MalformedChunk(f"group {number}: {period} quality levels for {count - 1} latents")
    levels = (intra, *(pattern[i % period] for i in range(count - 1)))
    if max(levels) >= QUALITIES:
        raise MalformedChunk(f"group {number}: q_index {max(levels)}, expected 0..{QUALITIES - 1}")
    # Motion segment, then the latents' segment, which takes the rest.
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
    """Number of frames that a damaged group claims in the first fields of its payload.

    Args:
        start: Beginning of the payload, perhaps cut off.
        number: Number that the group should have.
        version: Major version of the stream.

    Returns:
        The number of frames, or None if the first fields are cut off or not plausible.
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
    """Decodes the symbols of all latents of a group.

    The indices of a latent need the symbols of the one before, so both checksums can only be
    compared at the end. A wrong index map is reported first, because wrong symbols follow from it.

    Args:
        group: Parsed payload, see `parse_group`.
        coder: Entropy coder of the model.
        scale_index: Integer network of the model.
        z_shape, y_shape: Shapes of z and y of every latent.
        memory_limit: Largest memory in bytes. A few bytes of stream can claim any picture size, so
            this is checked before anything is allocated.

    Returns:
        The latents, in order.

    Raises:
        LimitExceeded: If the symbols need more memory than allowed.
        MalformedChunk: If a segment is longer than its latents can be.
        Desynchronised: If the index maps are not the encoder's.
        EntropyError: If the index maps are right, but the symbols are not.
    """
    count = len(group.q_indices)
    z_size, y_size = math.prod(z_shape), math.prod(y_shape)
    # int8 for z and y, uint8 for the indices.
    need = count * (z_size + 2 * y_size) + SORT_BYTES * y_size
    if need > memory_limit:
        raise LimitExceeded(
            f"group {group.number} needs {need >> 20} MiB of memory, allowed {memory_limit >> 20}"
        )
    # More bytes than the encoder could make of the worst symbols: the rarest has a frequency of 1
    # in 2**24 and takes 24 bits; the state adds a few words.
    most = (4 * (z_size + y_size) + 64) * (count if len(group.segments) == 1 else 1)
    crc_index = crc_symbols = 0
    latents: list[QuantisedLatent] = []
    problem = ""
    # `problem` is the first fault of a segment. It is reported only if all index maps are right,
    # since wrong symbols follow from a wrong map.
    segments = iter(group.segments)
    for i, q_index in enumerate(group.q_indices):
        # In version 1 every latent begins and ends a segment.
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
        # The order is forced: the indices need z and the latent before, and y needs the indices.
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
    """Continues both checksums over one latent."""
    # Signed bytes in row, column, channel order, z before y.
    crc_symbols = zlib.crc32(np.ascontiguousarray(s.z, np.int8).tobytes(), crc_symbols)
    crc_symbols = zlib.crc32(np.ascontiguousarray(s.y, np.int8).tobytes(), crc_symbols)
    return zlib.crc32(np.ascontiguousarray(s.index, np.uint8).tobytes(), crc_index), crc_symbols


def _varint(value: int) -> bytes:
    """Encodes a number as LEB128: seven bits per byte, least significant first."""
    out = b""
    # The high bit says that another byte follows.
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _read_varint(data: bytes, at: int, what: str) -> tuple[int, int]:
    """Reads a LEB128 number at a place; returns the number and the place after it.

    Raises:
        MalformedChunk: If it does not end within nine bytes.
    """
    value = 0
    # Nine bytes hold 63 bits; a damaged number must not go on to the end of the payload.
    for i, byte in enumerate(data[at : at + 9]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    raise MalformedChunk(f"{what} does not end within nine bytes")
