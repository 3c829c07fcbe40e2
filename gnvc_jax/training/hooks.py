"""Hooks around the steps of a run: metrics, checkpoints, profiles, and those that a user adds.

A hook is called before and after each step. It is given the run in progress, from which it may read
everything, and writes numbers to the run's log with `TrainingRun.write`. To add your own, pass it
to `gnvc_jax.training.loop.train`:

    class Norm(Hook):
        def after_step(self, run):
            if run.step % 100 == 0:
                run.write({"norm": float(optax.tree.norm(run.state.params))})

    train(stage, hooks=(Norm(),))
"""

import collections
import contextlib
import dataclasses
import faulthandler
import math
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from gnvc_jax.errors import TrainingDiverged
from gnvc_jax.training import inputs
from gnvc_jax.training.bucket_runs import LogCopies, log_folder
from gnvc_jax.training.checkpoints import Checkpoints
from gnvc_jax.training.config import ClipShape, Experiment, RunConfig
from gnvc_jax.training.inputs import Clips
from gnvc_jax.training.levels import LevelSums, Metrics, level_means
from gnvc_jax.training.metrics import Writer
from gnvc_jax.training.stages import Stage
from gnvc_jax.training.state import State
from gnvc_jax.training.throughput import Clock, WorkPerStep, device_memory
from gnvc_jax.training.weights import Statistics

# A run whose gradients stay non-finite this long will not recover.
MAX_SKIPPED_IN_A_ROW = 100

NO_CLIPS = ClipShape(0, 0, 0)  # before the first step

# Names in the log of the amounts of `WorkPerStep` when divided by the time they took.
RATES = {
    "clips": "samples_per_s",
    "frames": "frames_per_s",
    "tokens": "tokens_per_s",
    "gflop": "gflop_per_s",
    "peak_s": "mfu",
}


@dataclasses.dataclass
class TrainingRun:
    """A run in progress.

    Attributes:
        stage: Stage that is trained.
        state: Train state. The next step takes over its arrays: copy what is to outlive it.
        statistics: Statistics that the stage measured when the run began.
        clips: Batches of the run.
        clock: Time that went into steps.
        writer: Log of the run.
        step: Number of steps done.
        shape: Shape of the clips in the step that is about to be done, or was done last;
            zeros before the first one.
        waited: Seconds that this step waited for its batch.
        metrics: Metrics of the last step, which the device may still be working on.
        stopped: Whether the run was asked to stop before its last step.
    """

    stage: Stage
    state: State
    statistics: Statistics
    clips: Clips
    clock: Clock
    writer: Writer
    step: int
    shape: ClipShape = NO_CLIPS
    waited: float = 0.0
    metrics: Metrics = dataclasses.field(default_factory=dict)
    stopped: bool = False

    @property
    def experiment(self) -> Experiment:
        """Experiment of the run."""
        return self.stage.experiment

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.experiment.optim.steps

    @property
    def ending(self) -> bool:
        """Whether no step follows."""
        return self.finished or self.stopped

    def write(self, values: Mapping[str, float]) -> None:
        """Writes numbers to the log, as of the last step."""
        self.writer.write(self.step, values)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps the time of a `with` block out of all rates, which count steps alone."""
        jax.block_until_ready(self.state)  # the step in flight counts
        self.clock.stop()
        yield
        self.clock.run()


class Hook:
    """Base of hooks, called around each step; a subclass overrides the methods that it needs.

    Every process of a run calls its hooks. Communication between processes must be done by all of
    them; files must be written by the first one alone.
    """

    def before_step(self, run: TrainingRun) -> None:
        """Called before step number `run.step + 1`."""

    def after_step(self, run: TrainingRun) -> None:
        """Called after step number `run.step`, for the last time where `run.ending` is true."""

    def close(self) -> None:
        """Called once at the end of the run, also after an error."""


class Profiler(Hook):
    """Traces the steps that `run.profile` names, on the first process only."""

    def __init__(self, config: RunConfig):
        self.first, self.last = config.profile or (0, -1)
        self.folder, self.running = log_folder(config.out) / "profile", False

    def before_step(self, run: TrainingRun) -> None:
        """Starts or ends the trace."""
        wanted = self.first <= run.step + 1 <= self.last and jax.process_index() == 0
        if wanted and not self.running:
            jax.profiler.start_trace(str(self.folder))
            self.running = True
        elif not wanted:
            self.close()

    def close(self) -> None:
        """Writes what was traced, which the device may still be working on."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()


class Watchdog(Hook):
    """Ends the process if a step, and what hooks do after it, takes longer than `run.watchdog_s`.

    A process that waits for another one, or for a device, that will never answer holds a whole pod.
    The stacks of all threads go to stderr, and the exit code is 1, so that whatever started the run
    starts it again, from its newest checkpoint. Steps that are compiled are not watched.
    """

    def __init__(self, config: RunConfig):
        self.seconds, self.compiled = config.watchdog_s, NO_CLIPS

    def before_step(self, run: TrainingRun) -> None:
        """Starts the time of a step anew."""
        self.close()
        if self.compiled == run.shape:
            # A thread outside of Python: it ends a process that holds the interpreter's lock, too.
            faulthandler.dump_traceback_later(self.seconds, exit=True)
        self.compiled = run.shape

    def close(self) -> None:
        """Stops watching."""
        faulthandler.cancel_dump_traceback_later()


class Meter(Hook):
    """Collects the metrics of each step and writes their means every `run.log_every` steps.

    A mean is over the steps where the metric is finite, so that a skipped step spoils none; means
    by quality level are over clips, see `gnvc_jax.training.levels`. Beside means it writes step_s
    (seconds of one step), the RATES of what `WorkPerStep` gives, data_wait (share of the time spent
    waiting for batches), goodput (see `Clock`), device_gib (see `device_memory`), and left_out
    (number of videos that this process could not read, wholly or in part, if any).
    """

    def __init__(self, stage: Stage, clock: Clock):
        self.experiment, self.work, self.clock = stage.experiment, WorkPerStep(stage), clock
        self.left_out = inputs.left_out(stage.experiment)
        self.pending: tuple[int, ClipShape, Metrics] | None = None
        self.skipped = 0
        self.restart()

    def restart(self) -> None:
        """Begins a new mean."""
        self.values, self.done = [], collections.Counter()
        self.waited, self.since = 0.0, self.clock.trained_s()

    def before_step(self, run: TrainingRun) -> None:
        """Counts the work of a step when clips have a new shape, while the clock stands still."""
        # Traces the step on the first call for a shape, hence before the step and not in
        # `after_step`.
        self.work.of(run.shape)
        self.waited += run.waited

    def after_step(self, run: TrainingRun) -> None:
        """Adds the step before this one, while the device works on this one."""
        # Reading metrics waits for their step. Those of the step before are there while the device
        # works on this one; at the end, this step's own are waited for.
        before, self.pending = self.pending, (run.step, run.shape, run.metrics)
        for one in (before, self.pending if run.ending else None):
            if one is not None:
                self.add(run.writer, *one)

    def add(self, writer: Writer, step: int, shape: ClipShape, values: Metrics) -> None:
        """Adds the metrics of one step, and writes the means if it is time.

        Raises:
            TrainingDiverged: If all of the last updates had to be skipped.
        """
        self.values.append(jax.device_get(values))
        self.done.update(self.work.of(shape))
        # Metrics arrive one step late, and so does this decision.
        self.skipped = self.skipped + 1 if self.values[-1]["skipped"] else 0
        if self.skipped == MAX_SKIPPED_IN_A_ROW:
            raise TrainingDiverged(f"step {step}: the last {self.skipped} gradients not finite")
        if step % self.experiment.run.log_every and step != self.experiment.optim.steps:
            return
        seconds = self.clock.trained_s() - self.since
        # The loss is the first of the metrics, the others keep their order.
        keys = sorted(values, key=lambda k: k != "loss")
        means = {}
        for key in keys:
            done = [v[key] for v in self.values]
            by_level = isinstance(values[key], LevelSums)
            means |= level_means(key, done) if by_level else {key: mean_of_finite(done)}
        # Time counts only between `Clock.run` and `Clock.stop`: compilation, evaluation and saving
        # are out.
        rates = {
            "step_s": seconds / len(self.values),
            **{RATES[name]: amount / seconds for name, amount in self.done.items()},
            "data_wait": self.waited / seconds,
            "goodput": self.clock.goodput(),
        }
        count = len(self.left_out.read())
        data = {"left_out": count} if count else {}
        writer.write(step, means | rates | device_memory() | data)
        self.restart()


class SaveCheckpoints(Hook):
    """Saves a checkpoint when it is time, and at the end."""

    def __init__(self, checkpoints: Checkpoints, config: RunConfig):
        self.checkpoints, self.config = checkpoints, config
        self.saved_at = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether it is time for a checkpoint."""
        # By steps if these are set, which several processes need (`loop.check_mesh`), else by time.
        if self.config.checkpoint_every is not None:
            return step % self.config.checkpoint_every == 0
        return time.monotonic() - self.saved_at >= self.config.checkpoint_every_s

    def after_step(self, run: TrainingRun) -> None:
        """Copies the state to the host; it is written in the background."""
        if run.ending or self.is_due(run.step):
            with run.paused():
                # State and place in the data go together: a resumed run takes the very next batch.
                position = run.clips.get_state() | {"clock": run.clock.get_state()}
                self.checkpoints.save(run.step, run.state, position, run.statistics)
            self.saved_at = time.monotonic()


class CopyLogs(Hook):
    """Copies logs of a run in a bucket there: now and then, after a checkpoint, and at the end.

    Lines up to a checkpoint are thus there when a run is resumed from it, even if its process was
    killed. The profile is written after the last copy of a step, so `close` copies once more.
    """

    def __init__(self, saver: SaveCheckpoints, config: RunConfig):
        self.saver, self.saved_at = saver, saver.saved_at
        self.copies = LogCopies(config.out)

    def after_step(self, run: TrainingRun) -> None:
        """Copies if it is time."""
        if self.copies.is_due() or self.saver.saved_at != self.saved_at:
            self.saved_at = self.saver.saved_at
            self.copies.copy()

    def close(self) -> None:
        """Copies what is left."""
        self.copies.copy()


def mean_of_finite(values: Sequence[float]) -> float:
    """Mean of the finite values; NaN if there is none."""
    finite = [x for x in values if np.isfinite(x)]
    return float(np.mean(finite)) if finite else math.nan
