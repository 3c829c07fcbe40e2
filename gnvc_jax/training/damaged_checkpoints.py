"""Damage to checkpoints: how it shows, and how it is reported in one line.

    try:
        with quiet_failure():
            read(folder)
    except DAMAGE as error:
        log.warning("checkpoint %s is damaged: %s", folder, first_line(error))

Whether to fall back to an older checkpoint is up to the caller.
"""

import asyncio
import contextlib
from collections.abc import Iterator

# Exceptions of Orbax for files that are cut, changed or gone; their contents carry checksums. Orbax
# raises ValueError for another structure or shape, too, so these are compared before arrays are
# read. What differs is a UsageError, which is no damage: older checkpoints would raise it as well.
DAMAGE = (ValueError, OSError, KeyError)


class PatientLoop(asyncio.SelectorEventLoop):
    """An event loop that lets its tasks end before it is closed."""

    def close(self) -> None:
        """Closes the loop after its tasks."""
        if not self.is_closed() and (tasks := asyncio.all_tasks(self)):
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        super().close()


@contextlib.contextmanager
def quiet_failure() -> Iterator[None]:
    """Lets a restore inside fail with its exception alone.

    Orbax reads all arrays at once. Where one fails, it closes the loop while others are in flight,
    and each of these would print a traceback to say that the loop is closed.
    """
    usual, asyncio.new_event_loop = asyncio.new_event_loop, PatientLoop
    try:
        yield
    finally:
        asyncio.new_event_loop = usual


def first_line(error: BaseException) -> str:
    """First line of the message of an exception."""
    return str(error).partition("\n")[0] or type(error).__name__
