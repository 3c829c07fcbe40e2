"""Runs in buckets: what is written to the local disk first, and how it gets into the bucket.

Objects in a bucket cannot be appended to, so logs (metrics.jsonl, events for TensorBoard, profiles,
lists of what was left out) are written to `log_folder` and copied by `LogCopies`. Orbax writes
checkpoints to gs:// itself. It cannot write to s3://, for which `StagedCheckpoints` copies what it
wrote to the local disk.
"""

import atexit
import functools
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax

from gnvc_jax.buckets import (
    AnyPath,
    as_path,
    cache_folder,
    download,
    is_remote,
    remove_folder,
    upload,
)
from gnvc_jax.errors import UsageError

log = logging.getLogger(__name__)

COPY_SECONDS = 60.0  # between copies of logs
COMPLETE = "_CHECKPOINT_METADATA"  # file that Orbax gives each step, here uploaded last


@functools.cache
def log_folder(out: str) -> Path:
    """Folder that logs of a run are written to: the run folder, or a local one for a bucket."""
    if not is_remote(out):
        return Path(out)
    folder = Path(tempfile.mkdtemp(prefix="gnvc-logs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def fetch_log(out: str, name: str) -> Path:
    """Path at which a log is written, with what earlier processes of the run wrote already."""
    path, kept = log_folder(out) / name, as_path(out) / name
    if is_remote(out) and kept.exists():
        path.unlink(missing_ok=True)
        download(kept, path)
    return path


class LogCopies:
    """Copies the files of `log_folder` to a run folder in a bucket whenever they have changed."""

    def __init__(self, out: str):
        self.source, self.target = log_folder(out), as_path(out)
        self.sent: dict[Path, tuple[int, int]] = {}
        self.copied_at = time.monotonic()

    def is_due(self) -> bool:
        """Whether it is time for a copy."""
        return time.monotonic() - self.copied_at >= COPY_SECONDS

    def copy(self) -> None:
        """Copies what has changed; a failure is logged, and the next copy makes up for it."""
        self.copied_at = time.monotonic()
        for file in sorted(self.source.rglob("*")):
            if not file.is_file():
                continue
            facts = file.stat()
            # Read before the upload: what is appended meanwhile is sent by the next one.
            state = facts.st_size, facts.st_mtime_ns
            if self.sent.get(file) == state:
                continue
            try:
                upload(file, self.target / file.relative_to(self.source).as_posix())
            except Exception as error:  # each provider has its own; a log must not end a run
                log.warning("%s: not copied to %s (%s)", file.name, self.target, error)
            else:
                self.sent[file] = state


class StagedCheckpoints:
    """Checkpoints of a run in an s3:// bucket, which Orbax writes to the local disk.

    The bucket decides: what is complete there is downloaded at the start, and each step that Orbax
    has finished is uploaded in the background, its file COMPLETE last. Steps that Orbax has removed
    since are removed there, too.

    Args:
        target: Folder of the checkpoints in the bucket.

    Attributes:
        folder: Folder for Orbax.

    Raises:
        UsageError: If several processes train.
        OSError: If the bucket cannot be read.
    """

    def __init__(self, target: AnyPath):
        if jax.process_count() > 1:
            raise UsageError(
                f"run.out: {target.parent} is on S3, where only a single process can write its "
                "checkpoints; use gs://, or a folder that all hosts see"
            )
        self.target = target
        key = hashlib.sha256(os.fspath(target).encode()).hexdigest()[:24]
        self.folder = cache_folder() / "checkpoints" / key
        # What an earlier process left here may be older than what another machine has uploaded.
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for step in complete_steps(target):
            download(target / str(step), self.folder / str(step))
        self.pool, self.pending = ThreadPoolExecutor(1), None

    def finish(self) -> None:
        """Waits for the upload in progress.

        Raises:
            OSError: If it failed.
        """
        pending: Future | None = self.pending
        self.pending = None
        if pending is not None:
            pending.result()

    def start(self, wait: Callable[[], object]) -> None:
        """Uploads in the background, once `wait` has returned."""
        self.pending = self.pool.submit(lambda: (wait(), self.upload()))

    def upload(self) -> None:
        """Uploads new steps, and removes those that Orbax has removed."""
        there = complete_steps(self.target)
        here = sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit())
        for step in here:
            if step not in there:
                self.upload_step(step)
        for step in there:
            if here and step < here[-1] and step not in here:
                (self.target / str(step) / COMPLETE).unlink()  # first, so that no half is taken
                remove_folder(self.target / str(step))

    def upload_step(self, step: int) -> None:
        """Uploads one step in place of what an interrupted upload may have left."""
        source, target = self.folder / str(step), self.target / str(step)
        if target.exists():
            remove_folder(target)
        # False sorts before True: the file that makes the step count is the last.
        for file in sorted(source.rglob("*"), key=lambda p: p.name == COMPLETE):
            if file.is_file():
                upload(file, target / file.relative_to(source).as_posix())

    def close(self) -> None:
        """Waits for the upload in progress, and removes the local copy."""
        try:
            self.finish()
        finally:
            self.pool.shutdown()
            shutil.rmtree(self.folder, ignore_errors=True)


def complete_steps(folder: AnyPath) -> list[int]:
    """Steps whose checkpoints in an s3:// bucket are complete, in order."""
    names = [path.parent.name for path in folder.glob(f"*/{COMPLETE}")]
    return sorted(int(name) for name in names if name.isdigit())
