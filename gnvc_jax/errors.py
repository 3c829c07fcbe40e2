"""Errors that are not faults of the program.

The programs report a `GnvcError` in one line and end with its exit code. Any other exception is a
fault of the program or of a library, and keeps its traceback. Rooms with many kinds of errors have
a module of their own for them: `bitstream.errors`, `media.errors`, `porting.errors`.
"""


class GnvcError(Exception):
    """Base of all: input, settings or weights are wrong; the message says which and why."""

    exit_code = 1


class UsageError(GnvcError, ValueError):
    """An argument or a setting that is out of range, unknown, or does not fit the others."""

    exit_code = 2


class TrainingDiverged(GnvcError, FloatingPointError):
    """The gradients of a run stay non-finite."""
