"""Reading a stream, forward or by the number of a group, also one that is damaged.

Nothing is decoded here: groups come out as `GroupPayload`. Only random access needs a file that can
seek; reading forward, a reader can step over damaged groups.
"""

import functools
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, TypeGuard, overload

from gnvc_jax.bitstream.container import (
    CHUNK_OVERHEAD,
    END_MAGIC,
    FOOTER,
    MAX_AUDIO,
    MAX_CHUNK,
    IndexEntry,
    fits,
    index_entry,
    parse_index,
)
from gnvc_jax.bitstream.errors import (
    BitstreamError,
    ChecksumMismatch,
    IndexRebuilt,
    LimitExceeded,
    MalformedChunk,
    Truncated,
)
from gnvc_jax.bitstream.group import GroupPayload, claimed_frames, parse_group
from gnvc_jax.bitstream.header import read_header

# A claimed length makes a reader allocate no more than this before the bytes are there.
BLOCK = 1 << 20  # largest number of bytes that is read at once


def is_audio(error: BitstreamError) -> TypeGuard[ChecksumMismatch]:
    """Whether an error is a damaged chunk of audio, which no group depends on."""
    return isinstance(error, ChecksumMismatch) and error.kind == b"audi"


class StreamReader:
    """Reads a stream from a path, bytes, or an open binary file.

    No memory is allocated by a field before the field has been checked. `groups()` reads forward
    and needs no index; `group(n)` needs a file that can seek.

    Attributes:
        header: The header.

    Raises:
        BitstreamError: If the header is damaged; one of its kinds.
    """

    def __init__(self, source: str | Path | bytes | BinaryIO) -> None:
        if isinstance(source, bytes):
            source = io.BytesIO(source)
        self.owned = isinstance(source, str | Path)
        self.file: BinaryIO = open(source, "rb") if isinstance(source, str | Path) else source
        try:
            # Opening fails at once for a file of another kind.
            self.header, self.start = read_header(self._read)
        except BitstreamError:
            self.close()
            raise
        self._audio = bytearray()
        self.total = self.header.frame_count  # None until the index, read forward, has said it

    def __enter__(self) -> "StreamReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def audio(self) -> bytes:
        """The audio track, empty if there is none; known once `groups` has yielded."""
        return bytes(self._audio)

    def close(self) -> None:
        """Closes the file if it was opened here."""
        if self.owned:
            self.file.close()

    @overload
    def groups(self, tolerant: Literal[False] = False) -> Iterator[GroupPayload]: ...

    @overload
    def groups(self, tolerant: bool) -> Iterator[GroupPayload | BitstreamError]: ...

    def groups(self, tolerant: bool = False) -> Iterator[GroupPayload | BitstreamError]:
        """Yields the groups in order, each checked.

        Warns with IndexRebuilt if only the index is damaged.

        Args:
            tolerant: Yield an error in place of each lost group instead of raising it; the last one
                stands for all that cannot be found. Its `n_frames` comes from the groups around it,
                from the header or index, or else from the first fields of the damaged group.

        Raises:
            BitstreamError: If the stream is damaged; Truncated at the end of a file that ends
                early.
        """
        if not tolerant:
            yield from self._groups(None)
            return
        # Errors wait here until the next whole group tells how many frames are missing before it.
        lost: list[BitstreamError] = []
        frames = 0
        try:
            for group in self._groups(lost):
                yield from self._share(lost, group.first_frame - frames)
                frames = group.first_frame + group.n_frames
                yield group
        except BitstreamError as error:
            lost.append(error)
        # What was lost at the end, where only the total tells: from the header, or the index.
        yield from self._share(lost, None if self.total is None else self.total - frames)

    def _share(self, lost: list[BitstreamError], missing: int | None) -> Iterator[BitstreamError]:
        """Takes the errors out of `lost`, each with its share of the missing frames."""
        while lost:
            # Of several groups in a row, each takes as many frames as a group can have.
            error = lost.pop(0)
            if missing is not None:
                error.n_frames = max(0, min(missing, self.header.gop_frames))
                missing -= error.n_frames
            yield error

    def _groups(self, lost: list[BitstreamError] | None) -> Iterator[GroupPayload]:
        """Yields the groups in order.

        Args:
            lost: List that errors are added to if reading can step over them; None to raise them.
        """
        at, number, frames = self.start, 0, 0
        self._audio.clear()
        while True:
            if self.file.seekable():  # the caller may have read elsewhere in between
                self.file.seek(at)
            try:
                kind, payload, size = self._read_chunk(at, number)
            except BitstreamError as error:
                if isinstance(error, ChecksumMismatch) and error.kind == b"INDX":
                    warnings.warn(f"index unusable ({error})", IndexRebuilt, stacklevel=2)
                    self._check_total(frames, frames)
                    return
                # A tolerant reader steps over the chunk if it can find the next one.
                after = None if lost is None else self._after(at, number, error)
                if lost is None or after is None:
                    raise
                lost.append(error)
                if is_audio(error):
                    at = after
                    self._audio.clear()
                else:
                    # Where the next group begins is not known any more: it will be believed.
                    at, number, frames = after, number + 1, None
                continue
            if kind == b"GOPC":
                try:
                    # The bytes are whole, but the fields may still contradict each other. The next
                    # chunk follows all the same.
                    group = self._check(self._parse(payload), number, frames)
                except MalformedChunk as error:
                    if lost is None:
                        raise
                    lost.append(error)
                    frames = None
                else:
                    frames = group.first_frame + group.n_frames
                    yield group
                number += 1
            elif kind == b"INDX":
                self._check_end(payload, number, frames)
                return
            elif kind == b"audi":
                # A pipe has no size that would limit what is kept.
                if len(self._audio) + len(payload) > MAX_AUDIO:
                    raise LimitExceeded(f"audio of more than {MAX_AUDIO} bytes")
                self._audio += payload
            # Types that begin with a lower-case letter may be skipped by readers.
            elif kind[:1].isupper() and kind != b"META":
                raise MalformedChunk(f"unknown chunk {kind!r} at offset {at}")
            at += size

    def _parse(self, payload: bytes) -> GroupPayload:
        return parse_group(payload, self.header.version, self.header.temporal_stride)

    def _check(self, group: GroupPayload, number: int, frames: int | None) -> GroupPayload:
        """Checks a group's number, its first frame (unless `frames` is None), and its length."""
        if group.number != number:
            raise MalformedChunk(f"group number {group.number} where {number} was expected")
        if frames is not None and group.first_frame != frames:
            raise MalformedChunk(
                f"group {number} begins at frame {group.first_frame}, expected {frames}"
            )
        if not fits(group, self.header):
            raise MalformedChunk(f"group {number} is longer than the header allows")
        return group

    def _check_end(self, payload: bytes, groups: int, frames: int | None) -> None:
        self.total, count = parse_index(payload)[:2]
        if count != groups:
            raise MalformedChunk(f"index lists {count} groups, {groups} are there")
        self._check_total(self.total, frames)

    def _check_total(self, total: int | None, frames: int | None) -> None:
        known = self.header.frame_count
        if frames is not None and (total != frames or known not in (None, frames)):
            raise MalformedChunk(f"index says {total} frames, header {known}, groups {frames}")

    def _after(self, at: int, number: int, error: BitstreamError) -> int | None:
        """Offset of the chunk after a damaged group, None if nothing tells where it is.

        The index tells, if there is one; otherwise the length that the damaged chunk claims, whose
        field may of course be what is damaged.
        """
        if is_audio(error):
            return at + error.size
        # `_groups` seeks before each chunk, so reading the index here does no harm.
        entries = self._stored_index if self.file.seekable() else []
        # If the index puts this group elsewhere, one of the two is wrong and neither is believed.
        if isinstance(entries, list) and number < len(entries):
            return at + entries[number].size if entries[number].offset == at else None
        if isinstance(error, ChecksumMismatch) and error.kind == b"GOPC":
            return at + error.size
        return None

    def _read_chunk(self, at: int, number: int) -> tuple[bytes, bytes, int]:
        """Reads type, payload and size of the chunk at the current position."""

        def truncated(missing: int, kind: bytes = b"", start: bytes = b"") -> Truncated:
            error = Truncated(
                f"ends at offset {at} + {missing} missing bytes; {number} complete groups"
            )
            error.n_frames = self._claimed_frames(kind, start, number)
            return error

        # The length is checked against the limit and the rest of the file before it is believed.
        head = self._read(8)
        if len(head) < 8:
            raise truncated(8 - len(head))
        kind, length = head[:4], struct.unpack("<I", head[4:])[0]
        if length > MAX_CHUNK:
            raise LimitExceeded(f"chunk {kind!r} at offset {at}: {length} bytes > {MAX_CHUNK}")
        left = self._left()
        if left is not None and length + 4 > left:
            raise truncated(length + 4 - left, kind, self._read(min(left, length)))
        body = self._read(length + 4)
        if len(body) < length + 4:
            raise truncated(length + 4 - len(body), kind, body)
        # Only now are the bytes known to be what was written.
        found, expected = zlib.crc32(head + body[:-4]), struct.unpack("<I", body[-4:])[0]
        if found != expected:
            error = ChecksumMismatch(
                f"chunk {kind!r} (group {number}) at offset {at}: CRC32 {found:08x}, expected "
                f"{expected:08x}"
            )
            error.kind, error.size = kind, length + CHUNK_OVERHEAD
            error.n_frames = self._claimed_frames(kind, body, number)
            raise error
        return kind, body[:-4], length + CHUNK_OVERHEAD

    def _claimed_frames(self, kind: bytes, start: bytes, number: int) -> int:
        """Number of frames that the head of a damaged group claims, 0 if that is not plausible."""
        if kind != b"GOPC":
            return 0
        # The fields of a damaged group may be damaged themselves, hence the limit.
        frames = claimed_frames(start, number, self.header.version)
        return frames if frames is not None and frames <= self.header.gop_frames else 0

    def _read(self, size: int) -> bytes:
        """Reads `size` bytes, fewer only at the end of the file.

        It reads in blocks: a pipe may return less at once, and no memory is allocated for a length
        that is only claimed.
        """
        data = bytearray()
        while len(data) < size and (block := self.file.read(min(size - len(data), BLOCK))):
            data += block
        return bytes(data)

    def _left(self) -> int | None:
        """Number of bytes after the current position, None if the file cannot tell."""
        if not self.file.seekable():
            return None
        here = self.file.tell()
        end = self.file.seek(0, io.SEEK_END)
        self.file.seek(here)
        return end - here

    def index(self) -> list[IndexEntry]:
        """Places of all groups. A damaged index is rebuilt by a scan, with a warning."""
        return self._index

    @functools.cached_property
    def _index(self) -> list[IndexEntry]:
        stored = self._stored_index
        if isinstance(stored, list):
            return stored
        warnings.warn(f"index unusable ({stored}); scanning", IndexRebuilt, stacklevel=3)
        return self._scan()

    @functools.cached_property
    def _stored_index(self) -> list[IndexEntry] | BitstreamError:
        try:
            return self._read_index()
        except BitstreamError as error:
            return error

    def _scan(self) -> list[IndexEntry]:
        # Up to the first damage, beyond which chunk borders are not known.
        entries, at = [], self.start
        try:
            while True:
                self.file.seek(at)
                kind, payload, size = self._read_chunk(at, len(entries))
                if kind == b"GOPC":
                    entries.append(index_entry(self._parse(payload), at, size))
                at += size
        except BitstreamError:
            return entries

    def _read_index(self) -> list[IndexEntry]:
        end = self.file.seek(0, io.SEEK_END)
        if end < self.start + FOOTER.size:
            raise Truncated("no footer")
        # Footer, then index, then the places that it names: each is checked before it is used.
        self.file.seek(end - FOOTER.size)
        at, size, crc, magic = FOOTER.unpack(self.file.read(FOOTER.size))
        if magic != END_MAGIC or zlib.crc32(struct.pack("<QI", at, size)) != crc:
            raise ChecksumMismatch("footer damaged")
        if not self.start <= at <= end - FOOTER.size:
            raise MalformedChunk(f"index offset {at} is outside the file")
        self.file.seek(at)
        kind, payload, _ = self._read_chunk(at, 0)
        if kind != b"INDX":
            raise MalformedChunk(f"chunk {kind!r} where the index should be")
        entries = parse_index(payload)[2]
        for n, entry in enumerate(entries):
            if entry.offset < self.start or entry.offset + entry.size > at:
                raise MalformedChunk(f"index puts group {n} outside the file")
        return entries

    def group(self, number: int) -> GroupPayload:
        """Reads one group by its number.

        Raises:
            IndexError: If there is no such group.
            BitstreamError: If the group is damaged; one of its kinds.
        """
        if not 0 <= number < len(self.index()):
            raise IndexError(f"group {number}: the stream has {len(self.index())}")
        # Nothing before this group is read; the group must be the one that the index promises.
        entry = self.index()[number]
        self.file.seek(entry.offset)
        kind, payload, _ = self._read_chunk(entry.offset, number)
        if kind != b"GOPC":
            raise MalformedChunk(f"chunk {kind!r} where group {number} should be")
        return self._check(self._parse(payload), number, entry.first_frame)
