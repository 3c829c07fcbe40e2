"""One group of latents <-> the payload of a GOPC chunk.

Payload, little-endian: u32 group number, u64 first frame, u16 frames, u16 latents, u32 CRC32 of all
index maps, u32 CRC32 of all symbols (z, then y, latent by latent), u8[16] drift signature; per
latent u8 kind (0 intra, 1 predicted), u8 q_index, LEB128 length; then the segments in order.
"""

import dataclasses
import math
import struct
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from gnvc_jax.bitstream.entropy import EntropyCoder, LatentDecoder
from gnvc_jax.bitstream.errors import (
    Desynchronised,
    EntropyError,
    LimitExceeded,
    MalformedChunk,
)
from gnvc_jax.bitstream.tables import QUALITIES

FIXED = struct.Struct("<IQHHII16s")
MAX_LATENTS = 256
MEMORY_LIMIT = 4 << 30
SORT_BYTES = 40  # per y element while one latent is sorted and decoded

# (kind, q_index, z, previous y or None, previous index or None) -> table indices, uint8
ScaleIndex = Callable[[int, int, np.ndarray, np.ndarray | None, np.ndarray | None], np.ndarray]


@dataclasses.dataclass(frozen=True)
class LatentSymbols:
    """The integers of one latent.

    z int8 (h, w, cz); y int8 (4h, 4w, cy); index uint8 like y, which follows from z and from y and
    index of the latent before.
    """

    kind: int
    q_index: int
    z: np.ndarray
    y: np.ndarray
    index: np.ndarray


@dataclasses.dataclass(frozen=True)
class Group:
    """A parsed payload: what the group says of itself, and its segments still coded."""

    number: int
    first_frame: int
    n_frames: int
    crc_index: int
    crc_symbols: int
    drift: bytes
    kinds: tuple[int, ...]
    q_indices: tuple[int, ...]
    segments: tuple[bytes, ...]


def encode_group(
    latents: Sequence[LatentSymbols],
    coder: EntropyCoder,
    scale_index: ScaleIndex,
    *,
    number: int,
    first_frame: int,
    n_frames: int,
    drift: bytes = bytes(16),
) -> bytes:
    """Payload of a group. It is decoded again before it is returned.

    Raises RuntimeError if the decoder's path does not give the same symbols back.
    """
    crc_index = crc_symbols = 0
    entries, segments = b"", []
    for s in latents:
        crc_index, crc_symbols = _update(crc_index, crc_symbols, s)
        segments.append(coder.encode(s.kind, s.q_index, s.z, s.y, s.index))
        entries += bytes([s.kind, s.q_index]) + _varint(len(segments[-1]))
    fixed = FIXED.pack(number, first_frame, n_frames, len(latents), crc_index, crc_symbols, drift)
    payload = fixed + entries + b"".join(segments)
    z_shape, y_shape = latents[0].z.shape, latents[0].y.shape
    again = decode_group(parse_group(payload), coder, scale_index, z_shape, y_shape)
    for number_, (a, b) in enumerate(zip(latents, again, strict=True)):
        if not (np.array_equal(a.z, b.z) and np.array_equal(a.y, b.y)):
            raise RuntimeError(f"group {number}, latent {number_}: does not decode to its symbols")
    return payload


def parse_group(payload: bytes) -> Group:
    """Read the fields of a payload and check that they agree; nothing is decoded.

    Raises MalformedChunk.
    """
    if len(payload) < FIXED.size:
        raise MalformedChunk(f"group payload of {len(payload)} bytes, expected >= {FIXED.size}")
    number, first, n_frames, count, crc_index, crc_symbols, drift = FIXED.unpack_from(payload)

    def wrong(what: str) -> MalformedChunk:
        return MalformedChunk(f"group {number}: {what}")

    if not 1 <= count <= MAX_LATENTS:
        raise wrong(f"{count} latents, expected 1..{MAX_LATENTS}")
    if not 1 <= n_frames <= 4 * (count - 1) + 1:
        raise wrong(f"{n_frames} frames in {count} latents")
    kinds, q_indices, lengths = [], [], []
    at = FIXED.size
    for i in range(count):
        if at + 2 > len(payload):
            raise wrong(f"ends inside the entry of latent {i}")
        kind, q_index = payload[at], payload[at + 1]
        if kind != (i > 0):
            raise wrong(f"latent {i} has kind bits {kind:#x}, expected {int(i > 0)}")
        if q_index >= QUALITIES:
            raise wrong(f"latent {i} has q_index {q_index}, expected 0..{QUALITIES - 1}")
        length, at = _read_varint(payload, at + 2, wrong)
        kinds.append(kind)
        q_indices.append(q_index)
        lengths.append(length)
    if at + sum(lengths) != len(payload):
        raise wrong(f"segments of {sum(lengths)} bytes, {len(payload) - at} are there")
    segments = []
    for i, length in enumerate(lengths):
        if length % 4:
            raise wrong(f"latent {i} has a segment of {length} bytes, not whole words")
        segments.append(payload[at : at + length])
        at += length
    return Group(
        number, first, n_frames, crc_index, crc_symbols, drift,
        tuple(kinds), tuple(q_indices), tuple(segments),
    )  # fmt: skip


def claimed_frames(start: bytes, number: int) -> int | None:
    """Frames of group `number` by the beginning of its payload, the rest of which is damaged.

    None if the fixed fields are cut off or contradict each other.
    """
    if len(start) < FIXED.size:
        return None
    found, _, n_frames, count = FIXED.unpack_from(start)[:4]
    plausible = found == number and count <= MAX_LATENTS and 1 <= n_frames <= 4 * (count - 1) + 1
    return n_frames if plausible else None


def decode_group(
    group: Group,
    coder: EntropyCoder,
    scale_index: ScaleIndex,
    z_shape: tuple[int, int, int],
    y_shape: tuple[int, int, int],
    memory_limit: int = MEMORY_LIMIT,
) -> list[LatentSymbols]:
    """All integers of a group.

    LimitExceeded if they need more than memory_limit bytes; a few bytes of stream can claim any
    picture size, so this is known before anything is allocated.

    The indices of a latent need the symbols of the one before, so both checksums can only be
    compared at the end. A wrong index map is reported first, as Desynchronised, because wrong
    symbols follow from it; EntropyError means that the indices were right and the symbols are not.
    """
    z_size, y_size = math.prod(z_shape), math.prod(y_shape)
    need = len(group.kinds) * (z_size + 2 * y_size) + SORT_BYTES * y_size
    if need > memory_limit:
        raise LimitExceeded(
            f"group {group.number} needs {need >> 20} MiB of memory, allowed {memory_limit >> 20}"
        )
    crc_index = crc_symbols = 0
    latents: list[LatentSymbols] = []
    problem = ""
    for i, (kind, q_index, segment) in enumerate(
        zip(group.kinds, group.q_indices, group.segments, strict=True)
    ):
        if len(segment) > 4 * (z_size + y_size) + 64:
            raise MalformedChunk(f"group {group.number}, latent {i}: {len(segment)} bytes")
        before = latents[-1] if latents else None
        try:
            decoder = LatentDecoder(coder, kind, q_index, segment)
        except EntropyError as error:
            raise EntropyError(f"group {group.number}, latent {i}: {error}") from error
        z = decoder.z(z_shape)
        index = scale_index(kind, q_index, z, before and before.y, before and before.index)
        latents.append(LatentSymbols(kind, q_index, z, decoder.y(index), index))
        crc_index, crc_symbols = _update(crc_index, crc_symbols, latents[-1])
        try:
            decoder.finish()
        except EntropyError as error:
            problem = problem or f"latent {i}: {error}"
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


def _update(crc_index: int, crc_symbols: int, s: LatentSymbols) -> tuple[int, int]:
    crc_symbols = zlib.crc32(np.ascontiguousarray(s.z, np.int8).tobytes(), crc_symbols)
    crc_symbols = zlib.crc32(np.ascontiguousarray(s.y, np.int8).tobytes(), crc_symbols)
    return zlib.crc32(np.ascontiguousarray(s.index, np.uint8).tobytes(), crc_index), crc_symbols


def _varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _read_varint(data: bytes, at: int, wrong: Callable[[str], Exception]) -> tuple[int, int]:
    value = 0
    for i, byte in enumerate(data[at : at + 5]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    raise wrong("a length does not end within five bytes")
