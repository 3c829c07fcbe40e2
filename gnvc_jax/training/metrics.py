"""Writers of training metrics: the console, a file of JSON lines, TensorBoard.

A writer has three methods: write(step, values) with a flat dict of floats, show(step, images) with
images by name, and close(). A name with a slash, such as norm/grad_codec, is one of a group of
details, which the console leaves out. A writer that keeps what earlier runs wrote is made with the
step that the run starts after, and drops what comes later: it will be written again.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from gnvc_jax.files import write_whole
from gnvc_jax.training.bucket_runs import fetch_log, log_folder
from gnvc_jax.training.config import Experiment


def say(text: str) -> None:
    """Prints a line once, not by every process."""
    if jax.process_index() == 0:
        print(text, flush=True)


class Writer(Protocol):
    """Interface of all writers."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values as of a step."""
        ...

    def show(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes images, uint8 (h, w, 3) each, where the writer can."""
        ...

    def close(self) -> None:
        """Ends writing."""
        ...


class Console:
    """One line per write: step, values but for details, time left."""

    def __init__(self, steps: int):
        self.steps = steps

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Prints the line."""
        shown = (f"{k} {v:.4g}" for k, v in values.items() if "/" not in k)
        parts = [f"step {step}/{self.steps}", *shown]
        if seconds := values.get("step_s"):
            left = round((self.steps - step) * seconds)
            parts.append(f"eta {left // 3600}:{left // 60 % 60:02}:{left % 60:02}")
        print("  ".join(parts), flush=True)

    def show(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing: the console stays open."""


class JsonLines:
    """The primary record: one JSON object per write, with step and Unix time.

    A value that is not finite becomes null, since JSON has no NaN and many readers refuse it.
    """

    def __init__(self, path: Path, step: int):
        # A line that a crash has cut short does not end with a brace.
        lines = path.read_text().splitlines() if path.exists() else []
        # Steps after the checkpoint will be done, and written, again.
        kept = [x for x in lines if x.endswith("}") and json.loads(x)["step"] <= step]
        write_whole(path, "".join(x + "\n" for x in kept))
        self.file = path.open("a")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends the object."""
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        record = {"step": step, "time": time.time(), **finite}
        self.file.write(json.dumps(record, allow_nan=False) + "\n")
        self.file.flush()  # so that a crash loses no line

    def show(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


class TensorBoard:
    """Scalars and images for TensorBoard."""

    def __init__(self, folder: Path, step: int):
        from tensorboardX import SummaryWriter  # slow to import, and off by default

        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one scalar for each value."""
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def show(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Adds the images."""
        for name, image in images.items():
            self.writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Writes what is left."""
        self.writer.close()


class Many:
    """Several writers as one."""

    def __init__(self, writers: Sequence[Writer]):
        self.writers = writers

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes to each."""
        for writer in self.writers:
            writer.write(step, values)

    def show(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Shows images in each."""
        for writer in self.writers:
            writer.show(step, images)

    def close(self) -> None:
        """Closes each."""
        for writer in self.writers:
            writer.close()


def make_writer(experiment: Experiment, step: int) -> Writer:
    """Makes the writers that the experiment asks for; only the first process writes.

    Args:
        experiment: Experiment.
        step: Step that the run starts after.
    """
    out = experiment.run.out
    if jax.process_index() != 0:
        return Many([])
    writers: list[Writer] = [
        Console(experiment.optim.steps),
        JsonLines(fetch_log(out, "metrics.jsonl"), step),
    ]
    if experiment.run.tensorboard:
        writers.append(TensorBoard(log_folder(out) / "tensorboard", step))
    return Many(writers)
