"""Alarm for stalls: a warning while a step, or the wait for a batch, takes far longer than before.

A run that waits for a bucket, a worker process or another host looks like one that computes. The
alarm says which it is, while it lasts, on stderr of the process that it concerns; `run.watchdog_s`
ends what never ends.
"""

import collections
import dataclasses
import math
import statistics
import sys
import threading
import time
from collections.abc import Callable

import jax

from gnvc_jax.training.hooks import Hook, TrainingRun
from gnvc_jax.training.throughput import Clock

FACTOR = 10  # times the median of the last steps, waiting for their batches included
LAST = 101  # steps that the median is of
KNOWN = 5  # steps before which there is no median to compare with
# Seconds below which nothing is a stall.
LEAST_S = 60.0


def warn(text: str) -> None:
    """Prints a line to stderr, as any process may."""
    host = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
    print(f"warning: {host}{text}", file=sys.stderr, flush=True)


@dataclasses.dataclass
class Wait:
    """What a run waits for.

    Attributes:
        what: It, in words.
        now: Clock that counts.
        since: Time of that clock when the wait began.
        limit: Seconds from which on it is a stall.
    """

    what: str
    now: Callable[[], float]
    since: float
    limit: float


class StallAlarm(Hook):
    """Warns of stalls from a thread of its own; the last of the hooks, so that it sees their end.

    Compilation, saving and evaluation stop the clock and are no stalls. A stall that lasts is
    reported again each time that it has become twice as long.

    Args:
        clock: Clock of the run.
        say: Function that is given the warnings.
    """

    def __init__(self, clock: Clock, say: Callable[[str], None] = warn):
        self.clock, self.say = clock, say
        self.seconds = collections.deque[float](maxlen=LAST)  # of the last steps
        self.began, self.step, self.wait = clock.trained_s(), 0, self.for_input()
        self.closed = threading.Event()
        threading.Thread(target=self.watch, name="stall alarm", daemon=True).start()

    def for_input(self) -> Wait:
        """The wait for a batch, which begins."""
        return Wait("its batch", time.monotonic, time.monotonic(), self.limit())

    def limit(self) -> float:
        """Seconds from which on a wait is a stall."""
        return max(LEAST_S, FACTOR * self.usual()) if self.known else LEAST_S

    @property
    def known(self) -> bool:
        """Whether there are enough steps to say what is usual."""
        return len(self.seconds) >= KNOWN

    def usual(self) -> float:
        """Median of the seconds of the last steps."""
        return statistics.median(self.seconds)

    def before_step(self, run: TrainingRun) -> None:
        """Notes that the batch has come, and that the step computes from here on."""
        now, limit = self.clock.trained_s, self.limit() if self.known else math.inf
        self.step, self.wait = run.step, Wait("the devices or other processes", now, now(), limit)

    def after_step(self, run: TrainingRun) -> None:
        """Takes the time of the step, which includes the wait for its batch."""
        now = self.clock.trained_s()
        self.seconds.append(now - self.began)
        self.began, self.step, self.wait = now, run.step, self.for_input()

    def check(self) -> None:
        """Warns if the run has stood still for too long."""
        wait = self.wait  # the loop may put another one in its place at any time
        if (waited := wait.now() - wait.since) > wait.limit:
            usual = f"; a step usually takes {self.usual():.3g} s" if self.known else ""
            self.say(f"step {self.step + 1} has waited {waited:.0f} s for {wait.what}{usual}")
            wait.limit = 2 * waited

    def watch(self) -> None:
        """Checks every few seconds until the hook is closed."""
        while not self.closed.wait(5.0):
            self.check()

    def close(self) -> None:
        """Ends the thread."""
        self.closed.set()
