"""Account of data that cannot be read; too much of it is an error.

One damaged or unusual video must not end a run of days. Training draws again if reading fails
(`gnvc_jax.data.clips.RandomRead`), jobs over many videos go on with the next
(`gnvc_jax.data.jobs`). `LeftOut` keeps names and reasons, and decides when it is too much.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

from gnvc_jax.errors import GnvcError

log = logging.getLogger(__name__)

MAX_SHARE = 0.1  # share of the data that may be left out by default


class TooMuchLeftOut(GnvcError):
    """More than the accepted share of the data cannot be read."""

    exit_code = 65


@dataclasses.dataclass(eq=False)
class LeftOut:
    """Names of data that were left out, with the reasons.

    Copies in decoding processes share the list through `file`, one JSON object per line.

    Attributes:
        limit: Largest share of `total` that may be left out.
        file: File that keeps the list; None to keep it in this object alone.
        total: Number of videos or files in all.
        reasons: Reasons by name, as far as this object has added them.
    """

    limit: float = MAX_SHARE
    file: Path | None = None
    total: int = 0
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)

    def start(self, total: int) -> None:
        """Begins an empty list for `total` videos; a list for the same number is continued."""
        if total == self.total:
            return
        self.total, self.reasons = total, {}
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def add(self, name: str, error: Exception) -> None:
        """Counts and logs data that was left out, once per name.

        Raises:
            TooMuchLeftOut: If more than the accepted share was left out.
        """
        if name not in self.reasons:
            self.reasons[name] = reason(name, error)
            log_left_out(name, error)
            if self.file is not None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with open(self.file, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"name": name, "reason": self.reasons[name]}) + "\n")
        known = self.read()
        if len(known) > self.limit * self.total:
            raise TooMuchLeftOut(
                f"{len(known)} of {self.total} cannot be read, more than the accepted share of "
                f"{self.limit:g}; the last one was {self.reasons[name]}"
            )

    def read(self) -> dict[str, str]:
        """Reads reasons by name, including those that copies of this object have added."""
        if self.file is None or not self.file.exists():
            return dict(self.reasons)
        lines = self.file.read_text(encoding="utf-8").splitlines()
        entries = (json.loads(line) for line in lines if line.endswith("}"))  # skips a partial line
        return {entry["name"]: entry["reason"] for entry in entries}


def reason(name: str, error: Exception) -> str:
    """Says in one line, which names it, why something was left out."""
    text = " ".join(str(error).split())
    text = text if isinstance(error, GnvcError) else f"{type(error).__name__}: {text}"
    return text if name in text else f"{name}: {text}"


def log_left_out(name: str, error: Exception) -> None:
    """Logs a warning; with a traceback unless the error is of a kind that data can cause."""
    expected = isinstance(error, GnvcError)
    log.warning("left out: %s", reason(name, error), exc_info=None if expected else error)
