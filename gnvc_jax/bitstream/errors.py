"""Everything that can be wrong with a stream: one class and one exit code each.

The table in docs/bitstream.md, section 6, says when a reader raises which. Exit codes from 10 are
about headers and models, from 20 about the contents.
"""

from gnvc_jax.errors import GnvcError


class BitstreamError(GnvcError):
    """Base of all stream errors.

    Attributes:
        exit_code: Exit code of the command line.
        n_frames: Number of frames that a tolerant reader lost to this error, as far as the file
            tells.
    """

    exit_code = 1
    n_frames: int = 0


class NotThisFormat(BitstreamError):
    """The file does not begin with the magic bytes, or is shorter than any header."""

    exit_code = 10


class UnsupportedVersion(BitstreamError):
    """A newer major version or an unknown required flag."""

    exit_code = 11


class HeaderCorrupt(BitstreamError):
    """The header's CRC32 does not match."""

    exit_code = 12


class LimitExceeded(BitstreamError):
    """A field is outside its documented range."""

    exit_code = 13


class WrongModel(BitstreamError):
    """The stream was made with another model."""

    exit_code = 14


class ModelCorrupt(BitstreamError):
    """The model's integer tables are damaged or not the ones the stream was made with."""

    exit_code = 15


class DeviceNotExact(BitstreamError):
    """The integer self-test gives wrong results on this device."""

    exit_code = 16


class Truncated(BitstreamError):
    """The file ends inside a header, chunk or segment."""

    exit_code = 20


class ChecksumMismatch(BitstreamError):
    """A chunk's CRC32 does not match.

    Attributes:
        kind: Type that the damaged chunk claims.
        size: Whole size in bytes that it claims.
    """

    exit_code = 21
    kind: bytes = b""
    size: int = 0


class MalformedChunk(BitstreamError):
    """The fields of a chunk contradict each other."""

    exit_code = 22


class Desynchronised(BitstreamError):
    """The table indices computed here are not the encoder's: arithmetic differs."""

    exit_code = 23


class EntropyError(BitstreamError):
    """Decoded symbols are not the encoder's, although all table indices are."""

    exit_code = 24


class IndexRebuilt(UserWarning):
    """The index at the end of the file was missing or damaged; the chunks were scanned instead."""
