"""Writing a stream: header, one chunk per group, index and footer.

Groups go in as payloads of `encode_group`. Nothing is ever patched, so that a stream can be written
into a pipe.
"""

import dataclasses
import struct
import zlib
from typing import BinaryIO

from gnvc_jax.bitstream.container import (
    CHUNK_OVERHEAD,
    END_MAGIC,
    ENTRY,
    FOOTER,
    INDEX_HEAD,
    MAX_AUDIO,
    MAX_CHUNK,
    IndexEntry,
    fits,
    index_entry,
)
from gnvc_jax.bitstream.errors import LimitExceeded
from gnvc_jax.bitstream.group import parse_group
from gnvc_jax.bitstream.header import Header


class StreamWriter:
    """Writes the header at once, groups as they come, and index and footer on close.

    Args:
        file: File to write to; it need not be able to seek.
        header: Header of the stream.
    """

    def __init__(self, file: BinaryIO, header: Header) -> None:
        self.file, self.header = file, header
        self.entries: list[IndexEntry] = []
        self.frames = 0
        data = header.pack()
        file.write(data)
        self.offset = len(data)

    @property
    def closed_size(self) -> int:
        """Size in bytes that the file would have if it were closed now."""
        index = CHUNK_OVERHEAD + INDEX_HEAD.size + ENTRY.size * len(self.entries)
        return self.offset + index + FOOTER.size

    def write_group(self, payload: bytes) -> None:
        """Appends a group, see `encode_group`.

        Raises:
            ValueError: If the group does not continue the stream.
        """
        # A writer refuses what its own reader would refuse.
        group = parse_group(payload, temporal_stride=self.header.temporal_stride)
        if (group.number, group.first_frame) != (len(self.entries), self.frames):
            raise ValueError(f"group {group.number} does not follow group {len(self.entries) - 1}")
        if not fits(group, self.header):
            raise ValueError(f"group {group.number} is longer than the header allows")
        entry = index_entry(group, self.offset, len(payload) + CHUNK_OVERHEAD)
        self._chunk(b"GOPC", payload)
        self.entries.append(entry)
        self.frames += group.n_frames

    def write_audio(self, audio: bytes) -> None:
        """Writes an audio track, before the first group.

        Raises:
            LimitExceeded: If it is larger than a reader accepts.
        """
        if len(audio) > MAX_AUDIO:
            raise LimitExceeded(f"audio of {len(audio)} bytes > {MAX_AUDIO}")
        for start in range(0, len(audio), MAX_CHUNK):
            self._chunk(b"audi", audio[start : start + MAX_CHUNK])

    def close(self) -> None:
        """Writes index and footer; the file itself stays open.

        Raises:
            ValueError: If the header promised another number of frames.
        """
        if self.header.frame_count not in (None, self.frames):
            raise ValueError(
                f"{self.frames} frames were written, the header says {self.header.frame_count}"
            )
        at = self.offset
        # The offsets are known only now, which is why the index comes last: nothing is patched.
        rows = [ENTRY.pack(*dataclasses.astuple(entry)) for entry in self.entries]
        self._chunk(b"INDX", INDEX_HEAD.pack(self.frames, len(rows)) + b"".join(rows))
        # The footer's CRC32 covers where the index is, and the index chunk has its own.
        head = struct.pack("<QI", at, self.offset - at)
        self.file.write(FOOTER.pack(at, self.offset - at, zlib.crc32(head), END_MAGIC))

    def _chunk(self, kind: bytes, payload: bytes) -> None:
        if len(payload) > MAX_CHUNK:
            raise LimitExceeded(f"chunk {kind!r}: {len(payload)} bytes > {MAX_CHUNK}")
        # The CRC32 covers type and length, too: a damaged length must not pass for a whole chunk.
        data = kind + struct.pack("<I", len(payload)) + payload
        self.file.write(data + struct.pack("<I", zlib.crc32(data)))
        self.offset += len(data) + 4
