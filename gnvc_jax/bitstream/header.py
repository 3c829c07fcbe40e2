"""The file header: every field, its range, and its bytes (docs/bitstream.md, section 1).

`Header.pack` makes the bytes, `read_header` reads and checks them. Both enforce the same limits, so
what is written can be read. `check_picture` lets a caller check a frame size before encoding.
"""

import dataclasses
import struct
import zlib
from collections.abc import Callable

from gnvc_jax.bitstream.errors import (
    HeaderCorrupt,
    LimitExceeded,
    ModelCorrupt,
    NotThisFormat,
    Truncated,
    UnsupportedVersion,
    WrongModel,
)

# As in PNG: a byte that is not ASCII, both kinds of line end, and the end-of-file mark of DOS. A
# transfer as text damages one of them.
MAGIC = b"\x89GNV\r\n\x1a\n"
VERSION = (2, 0)  # major and minor version of new streams
READABLE = (1, 2)  # major versions
# In groups: magic, versions; header size, required flags, optional flags, width, height, frame
# rate; frame count; group sizes; strides, channels, bit depth; colour; channels of y and z;
# fingerprints; CRC32 of the tables; k_skip, scales, bound, entropy format; reserved.
FIXED = struct.Struct("<8sHHIIIIIIIQHH4B4BHH32s16sI4BQ")  # all but the entries and the CRC32
UNKNOWN_COUNT = 2**64 - 1  # frame count in a stream that was written to a pipe
MAX_HEADER = 65536  # bytes
MAX_SIDE, MIN_SIDE, MAX_PIXELS = 16384, 16, 1 << 27
MIN_FPS, MAX_FPS = 0.001, 1000
NO_REFINEMENT = 1  # optional flag
assert FIXED.size == 128


def check_picture(width: int, height: int, fps: tuple[int, int]) -> None:
    """Checks that a stream can hold frames of this size in pixels and at this rate.

    Raises:
        LimitExceeded: If it cannot.
    """
    if not MIN_SIDE <= min(width, height) <= max(width, height) <= MAX_SIDE:
        raise LimitExceeded(
            f"the frame size (width x height) is {width}x{height}; each side must be in"
            f" [{MIN_SIDE}, {MAX_SIDE}] pixels"
        )
    if width * height > MAX_PIXELS:
        raise LimitExceeded(
            f"the frame size (width x height) is {width}x{height}; frames may have at most"
            f" {MAX_PIXELS} pixels"
        )
    # Each number of the fraction must fit into 32 bits.
    if not (all(1 <= part < 1 << 32 for part in fps) and MIN_FPS <= fps[0] / fps[1] <= MAX_FPS):
        raise LimitExceeded(
            f"the frame rate is {fps[0]}/{fps[1]}; it must be in [{MIN_FPS}, {MAX_FPS}] per second"
        )


@dataclasses.dataclass(frozen=True)
class Header:
    """The fields of a file header.

    Attributes:
        width, height: Display size in pixels.
        fps: Frames per second, numerator and denominator.
        gop_latents, gop_frames: Largest number of latents and of frames in a group.
        y_channels, z_channels: Channels of the symbols and of the hyperlatent.
        k_skip: Elements with a smaller scale index carry no symbol.
        codec_fingerprint, vae_fingerprint, tables_crc: Identify the model.
        frame_count: Number of frames, None if it was not known when writing began.
        latent_stride: Pixels per latent position in each direction.
        latent_channels: Channels of the latents.
        temporal_stride: Frames per latent after the first.
        bit_depth: Bits per sample of the source, for information.
        colour: H.273 code points: primaries, transfer, matrix, full range.
        refine: Whether decoders should refine; False where added detail would mislead.
        extra: Entries by type (a number), free for applications.
        version: Major version of the file that the header was read from.
    """

    width: int
    height: int
    fps: tuple[int, int]
    gop_latents: int
    gop_frames: int
    y_channels: int
    z_channels: int
    k_skip: int
    codec_fingerprint: bytes
    vae_fingerprint: bytes
    tables_crc: int
    frame_count: int | None = None
    latent_stride: int = 8
    latent_channels: int = 16
    temporal_stride: int = 4
    bit_depth: int = 8
    colour: tuple[int, int, int, int] = (1, 1, 1, 0)
    refine: bool = True
    extra: dict[int, bytes] = dataclasses.field(default_factory=dict)
    version: int = VERSION[0]

    def check(self) -> None:
        """Checks all fields.

        Raises:
            LimitExceeded: If a field is out of range.
        """

        def limit(name: str, value: int, low: int, high: int) -> None:
            if not low <= value <= high:
                raise LimitExceeded(f"header field {name} is {value}, allowed {low}..{high}")

        check_picture(self.width, self.height, self.fps)
        limit("gop_latents", self.gop_latents, 1, 256)
        limit("latent_stride", self.latent_stride, 1, 64)
        limit("temporal_stride", self.temporal_stride, 1, 16)
        limit("gop_frames", self.gop_frames, 1, self.temporal_stride * (self.gop_latents - 1) + 1)
        limit("latent_channels", self.latent_channels, 1, 255)
        limit("y_channels", self.y_channels, 4, 512)
        limit("z_channels", self.z_channels, 1, 512)
        limit("k_skip", self.k_skip, 0, 64)
        limit("colour range", self.colour[3], 0, 1)
        limit("length of codec_fingerprint", len(self.codec_fingerprint), 32, 32)
        limit("length of vae_fingerprint", len(self.vae_fingerprint), 16, 16)
        if self.frame_count is not None:
            limit("frame_count", self.frame_count, 1, 2**48)

    def pack(self) -> bytes:
        """Packs the header into bytes, with their CRC32.

        Raises:
            LimitExceeded: If a field is out of range or the header is too large.
        """
        self.check()
        entries = sum(4 + len(data) for data in self.extra.values())
        # Entries are padded to whole words; the CRC32 takes the last four bytes.
        size = FIXED.size + entries + -entries % 4 + 4
        if size > MAX_HEADER:
            raise LimitExceeded(f"header of {size} bytes, allowed {MAX_HEADER}")
        extra = b"".join(
            struct.pack("<HH", kind, len(data)) + data for kind, data in sorted(self.extra.items())
        )
        count = UNKNOWN_COUNT if self.frame_count is None else self.frame_count
        optional = 0 if self.refine else NO_REFINEMENT
        data = FIXED.pack(
            MAGIC, *VERSION, size, 0, optional, self.width, self.height, *self.fps, count,
            self.gop_latents, self.gop_frames, self.latent_stride, self.latent_channels,
            self.temporal_stride, self.bit_depth, *self.colour, self.y_channels, self.z_channels,
            self.codec_fingerprint, self.vae_fingerprint, self.tables_crc,
            self.k_skip, 64, 127, 1, 0,
        ) + extra + bytes(-entries % 4)  # fmt: skip
        return data + struct.pack("<I", zlib.crc32(data))

    def check_model(self, codec: bytes, vae: bytes, tables_crc: int) -> None:
        """Checks that the stream was made with a model.

        Args:
            codec, vae: Fingerprints of the loaded model.
            tables_crc: CRC32 of the loaded model's tables.

        Raises:
            WrongModel: If a fingerprint differs.
            ModelCorrupt: If only the tables differ.
        """
        for name, ours, theirs in (
            ("codec", codec, self.codec_fingerprint),
            ("VAE", vae, self.vae_fingerprint),
        ):
            if ours != theirs:
                raise WrongModel(
                    f"made with {name} {theirs.hex()[:8]}, the loaded model is {ours.hex()[:8]}"
                )
        if tables_crc != self.tables_crc:
            raise ModelCorrupt(
                f"tables have CRC32 {tables_crc:08x}, the stream needs {self.tables_crc:08x}"
            )


def read_header(read: Callable[[int], bytes]) -> tuple[Header, int]:
    """Reads and checks a header.

    Args:
        read: Function that returns the next n bytes, fewer only at the end of the file.

    Returns:
        The header, and its size in bytes.

    Raises:
        BitstreamError: If the header is damaged; see docs/bitstream.md, section 6, for the kinds.
    """
    # The smallest header. If the file is something else, no more is read of it.
    data = read(FIXED.size + 4)
    if data[: len(MAGIC)] != MAGIC:
        hint = " (line ends were converted)" if data[:4] == MAGIC[:4] else ""
        raise NotThisFormat(f"begins with {data[:8].hex(' ') or 'nothing'}, not a gnvc file{hint}")
    if len(data) < FIXED.size + 4:
        raise NotThisFormat(f"only {len(data)} bytes, a header has {FIXED.size + 4}")
    fields = FIXED.unpack_from(data)
    major, minor, size, required, optional = fields[1:6]
    # The version comes first: another one may give every other field another meaning.
    if major not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise UnsupportedVersion(f"version {major}.{minor}, this reader knows {known}")
    if not FIXED.size + 4 <= size <= MAX_HEADER or size % 4:
        raise LimitExceeded(f"header field header_size is {size}, allowed 132..{MAX_HEADER}")
    data += read(size - len(data))
    if len(data) < size:
        raise Truncated(f"ends inside the header: {size - len(data)} bytes missing")
    # Once the CRC32 is right, the bytes are as written: other faults are not damage.
    found, expected = zlib.crc32(data[:-4]), struct.unpack("<I", data[-4:])[0]
    if found != expected:
        raise HeaderCorrupt(f"header has CRC32 {found:08x}, expected {expected:08x}")
    if required:
        raise UnsupportedVersion(f"unknown required flags {required:#x}")
    # The constants of `tables` and `plain`; a stream with others could not be decoded.
    scales, bound, entropy_format = fields[-4:-1]
    if (scales, bound, entropy_format) != (64, 127, 1):
        raise UnsupportedVersion(
            f"entropy format {entropy_format} with {scales} scales and bound {bound}, expected 1, "
            "64, 127"
        )
    header = Header(
        width=fields[6], height=fields[7], fps=fields[8:10],
        frame_count=None if fields[10] == UNKNOWN_COUNT else fields[10],
        gop_latents=fields[11], gop_frames=fields[12], latent_stride=fields[13],
        latent_channels=fields[14], temporal_stride=fields[15], bit_depth=fields[16],
        colour=fields[17:21], y_channels=fields[21], z_channels=fields[22],
        codec_fingerprint=fields[23], vae_fingerprint=fields[24], tables_crc=fields[25],
        k_skip=fields[26], refine=not optional & NO_REFINEMENT,
        extra=_read_extra(data[FIXED.size : -4]), version=major,
    )  # fmt: skip
    header.check()
    return header, size


def _read_extra(data: bytes) -> dict[int, bytes]:
    """Reads the entries for applications, without the padding."""
    extra, at = {}, 0
    while at + 4 <= len(data):
        kind, length = struct.unpack_from("<HH", data, at)
        if at + 4 + length > len(data):
            raise LimitExceeded(
                f"header entry {kind} has {length} bytes, {len(data) - at - 4} left"
            )
        # Type 0 with length 0 is padding.
        if kind or length:
            extra[kind] = data[at + 4 : at + 4 + length]
        at += 4 + length
    return extra
