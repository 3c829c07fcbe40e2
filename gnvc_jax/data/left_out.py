"""What cannot be read is left out and counted; only too much of it is an error.

One damaged or odd video must not end a run of days. Training draws again where reading fails
(`clips.RandomRead`), jobs over many videos go on with the next (`jobs`); `LeftOut` keeps names and
reasons, and decides when it is too much.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

from gnvc_jax.errors import GnvcError

log = logging.getLogger(__name__)

MAX_SHARE = 0.1


class TooMuchLeftOut(GnvcError):
    """More than the accepted share of the data cannot be read."""

    exit_code = 65


@dataclasses.dataclass(eq=False)
class LeftOut:
    """Names and reasons of what was left out.

    Copies in decoding processes share the list by `file`, one JSON object a line.

    Attributes:
        limit: largest share of `total` that may be left out.
        file: where the list is kept; None for a list of this object alone.
        total: number of videos or records that there are.
    """

    limit: float = MAX_SHARE
    file: Path | None = None
    total: int = 0
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)

    def start(self, total: int) -> None:
        """Begin an empty list for so many videos or records; a list for as many goes on."""
        if total == self.total:
            return
        self.total, self.reasons = total, {}
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def add(self, name: str, error: Exception) -> None:
        """Count and log what was left out, once by its name. Raises TooMuchLeftOut."""
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
                f"{self.limit:g}; the last one: {self.reasons[name]}"
            )

    def read(self) -> dict[str, str]:
        """Reasons by name, also those that copies of this object have added."""
        if self.file is None or not self.file.exists():
            return dict(self.reasons)
        lines = self.file.read_text(encoding="utf-8").splitlines()
        entries = (json.loads(line) for line in lines if line.endswith("}"))  # not one half written
        return {entry["name"]: entry["reason"] for entry in entries}


def reason(name: str, error: Exception) -> str:
    """Why something was left out, in one line that names it."""
    text = " ".join(str(error).split())
    text = text if isinstance(error, GnvcError) else f"{type(error).__name__}: {text}"
    return text if name in text else f"{name}: {text}"


def log_left_out(name: str, error: Exception) -> None:
    """A warning; with the traceback of what may as well be a fault of the program."""
    expected = isinstance(error, GnvcError)
    log.warning("left out: %s", reason(name, error), exc_info=None if expected else error)
