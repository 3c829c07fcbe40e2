"""Errors of reading and writing videos, each with the exit code of the program.

The codes follow sysexits.h:

====  =========  ==================================================================
code  name       raised as
====  =========  ==================================================================
65    DATAERR    EmptyInput, NoFrames, NotAVideo, AudioOnly, TruncatedVideo,
                 DamagedVideo, UnsupportedFormat, BadRawSize
66    NOINPUT    MissingInput
73    CANTCREAT  OutputExists, UnwritableOutput
74    IOERR      WriteFailed, DiskFull
====  =========  ==================================================================

Every message is one line, ``NAME: REASON``.
"""

from __future__ import annotations

import errno
import os

from gnvc_jax.errors import GnvcError


class MediaError(GnvcError):
    """A video that cannot be read or written.

    Attributes:
        name: Path of the video.
        reason: Reason of the failure, in one line.
        exit_code: Exit code of the program.
    """

    exit_code = 65

    def __init__(self, name: str | os.PathLike, reason: str):
        self.name = os.fspath(name)
        self.reason = " ".join(str(reason).split())
        super().__init__(f"{self.name}: {self.reason}")

    def __reduce__(self) -> tuple:  # errors cross process boundaries in data workers
        return type(self), (self.name, self.reason)


class MissingInput(MediaError):
    """The input does not exist or may not be read."""

    exit_code = 66


class EmptyInput(MediaError):
    """The input has no bytes."""


class NoFrames(MediaError):
    """A folder without frames, or a video stream of which no frame could be decoded."""


class NotAVideo(MediaError):
    """The bytes are not a video in a format that can be read."""


class AudioOnly(MediaError):
    """The container has sound but no pictures."""


class TruncatedVideo(MediaError):
    """The file promises more frames than can be read from it."""


class DamagedVideo(MediaError):
    """The decoder could not decode a part of the video, or had to make it up."""


class UnsupportedFormat(MediaError):
    """A video whose pixel format or size is not supported."""


class BadRawSize(MediaError):
    """A raw file whose size or format is unknown, or that is not a whole number of frames."""


class OutputExists(MediaError):
    """The output exists, and overwriting was not requested."""

    exit_code = 73


class UnwritableOutput(MediaError):
    """The output cannot be created."""

    exit_code = 73


class WriteFailed(MediaError):
    """Writing started but could not be finished."""

    exit_code = 74


class DiskFull(WriteFailed):
    """The file system, or the user's share of it, has no space left."""


def read_error(name: str | os.PathLike, error: OSError) -> MediaError:
    """Error for an OSError that occurred while reading `name`."""
    if isinstance(error, FileNotFoundError):
        return MissingInput(name, "no such file or folder")
    return MissingInput(name, f"cannot be read ({error.strerror or error})")


def write_error(name: str | os.PathLike, error: OSError) -> MediaError:
    """Error for an OSError that occurred while writing `name`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(name, "no space left on the device")
    if isinstance(error, BrokenPipeError):
        return WriteFailed(name, "the reading end of the pipe was closed")
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return UnwritableOutput(name, "the folder to write to does not exist")
    if isinstance(error, (PermissionError, IsADirectoryError)) or error.errno == errno.EROFS:
        return UnwritableOutput(name, f"cannot be written ({error.strerror or error})")
    return WriteFailed(name, f"writing failed ({error.strerror or error})")
