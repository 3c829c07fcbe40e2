"""The layout of the file: one chunk per group, an index, a footer (docs/bitstream.md, section 2).

`gnvc_jax.bitstream.writer` and `gnvc_jax.bitstream.reader` share these sizes, limits and rows.
"""

import dataclasses
import struct

from gnvc_jax.bitstream.errors import MalformedChunk
from gnvc_jax.bitstream.group import GroupPayload
from gnvc_jax.bitstream.header import Header

MAX_CHUNK = 1 << 28  # bytes of payload
MAX_AUDIO = 1 << 30  # bytes of audio in a stream, seven hours at 320 kb/s
END_MAGIC = b"\x89GNVEND\n"
ENTRY = struct.Struct("<QQIHH")  # offset, first frame, chunk size, frames, mean q_index
INDEX_HEAD = struct.Struct("<QI")  # frames in all, groups
# The footer has a fixed size at the end of the file, so a reader finds the index from there.
FOOTER = struct.Struct("<QII8s")  # index offset, index size, CRC32, magic
CHUNK_OVERHEAD = 12  # bytes of type, length and CRC32


@dataclasses.dataclass(frozen=True)
class IndexEntry:
    """One row of the index.

    Attributes:
        offset: Start of the group's chunk, in bytes from the start of the file.
        first_frame: Number of the first frame of the group.
        size: Size of the whole chunk in bytes.
        n_frames: Number of frames in the group.
        q_index: Mean quality level of the group's latents.
    """

    offset: int
    first_frame: int
    size: int
    n_frames: int
    q_index: int


def index_entry(group: GroupPayload, offset: int, size: int) -> IndexEntry:
    """Describes a group whose chunk of `size` bytes begins at `offset`."""
    mean = round(sum(group.q_indices) / len(group.q_indices))
    return IndexEntry(offset, group.first_frame, size, group.n_frames, mean)


def parse_index(payload: bytes) -> tuple[int, int, list[IndexEntry]]:
    """Parses the payload of an index chunk.

    Returns:
        Number of frames, number of groups, and a row for each group.

    Raises:
        MalformedChunk: If the payload does not have the length that its number of groups asks for.
    """
    if len(payload) < INDEX_HEAD.size:
        raise MalformedChunk(f"index of {len(payload)} bytes")
    total, count = INDEX_HEAD.unpack_from(payload)
    # The payload is read already; a count that is too large allocates nothing.
    if len(payload) != INDEX_HEAD.size + count * ENTRY.size:
        raise MalformedChunk(f"index of {len(payload)} bytes for {count} groups")
    rows = ENTRY.iter_unpack(payload[INDEX_HEAD.size :])
    return total, count, [IndexEntry(*row) for row in rows]


def fits(group: GroupPayload, header: Header) -> bool:
    """Whether a group is as short as the header promises, in latents and in frames."""
    return len(group.q_indices) <= header.gop_latents and group.n_frames <= header.gop_frames
