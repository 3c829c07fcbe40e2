"""Sweeps over several processes: clips are divided, points of a clip stay together.

Points of a clip share its encoding and its anchors, which are kept in the memory of a process. All
processes write to the same folder of records; no two of them have the same clip.
"""

import copy
import itertools
import multiprocessing
import queue
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor

from gnvc_jax.evaluation.clips import Clip
from gnvc_jax.evaluation.points import Point
from gnvc_jax.evaluation.sweep import Sweep
from gnvc_jax.runtime import use_compilation_cache

POLL_SECONDS = 0.2


def run_in_processes(
    processes: int,
    sweep: Sweep,
    clips: Mapping[str, Callable[[], Clip]],
    points: Sequence[Point],
    anchors: Sequence[str] = (),
) -> list[dict]:
    """Runs `sweep.run(clips, points, anchors)` in several processes, one clip at a time in each.

    Everything must be picklable except `sweep.progress`, which is called in this process. An
    exception ends the processes at once; what they finished is on record.

    Args:
        processes: Number of processes.
        sweep: Sweep to run.
        clips: Functions that read the clips, by name.
        points: Ways of coding.
        anchors: Names of standard codecs.

    Raises:
        BrokenProcessPool: If a process was killed.
    """
    # New processes rather than copies: a fork of a process that runs JAX can hang.
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    silent = copy.copy(sweep)
    silent.progress = _silent
    before = set(multiprocessing.active_children())
    with ProcessPoolExecutor(processes, context, _start, (said, silent, points, anchors)) as pool:
        try:
            parts = [pool.submit(_run, name, read) for name, read in clips.items()]
            # Progress arrives by a queue; this process alone writes to the terminal.
            while not all(part.done() for part in parts) or not said.empty():
                try:
                    sweep.progress(*said.get(timeout=POLL_SECONDS))
                except queue.Empty:
                    pass
            return list(itertools.chain.from_iterable(part.result() for part in parts))
        except BaseException:
            # An executor would wait for the clips that are under way, which may take hours.
            pool.shutdown(wait=False, cancel_futures=True)
            ours = set(multiprocessing.active_children()) - before
            for process in ours:
                process.terminate()
            for process in ours:
                process.join()
            raise


def _silent(label: str, status: str) -> None:
    """Stands in for a progress function that cannot be pickled."""


def _start(
    said: "multiprocessing.Queue", sweep: Sweep, points: Sequence[Point], anchors: Sequence[str]
) -> None:
    """Prepares `_run` in a new process."""
    global _work
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(1))  # quietly, with temporary files removed
    use_compilation_cache()
    sweep.progress = lambda *values: said.put(values)
    _work = sweep, points, anchors


def _run(name: str, read: Callable[[], Clip]) -> list[dict]:
    sweep, points, anchors = _work
    return sweep.run({name: read}, points, anchors)
