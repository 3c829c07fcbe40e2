"""A sweep whose clips are shared among processes."""

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
    """The result of `sweep.run(clips, points, anchors)`, a clip at a time in each process.

    Everything must be picklable but `sweep.progress`, which is called here. An exception ends the
    processes at once; what they finished is on record. Raises BrokenProcessPool if one is killed.
    """
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    silent = copy.copy(sweep)
    silent.progress = None
    before = set(multiprocessing.active_children())
    with ProcessPoolExecutor(processes, context, _start, (said, silent, points, anchors)) as pool:
        try:
            parts = [pool.submit(_run, name, read) for name, read in clips.items()]
            while not all(part.done() for part in parts) or not said.empty():
                try:
                    sweep.progress(*said.get(timeout=POLL_SECONDS))
                except queue.Empty:
                    pass
            return list(itertools.chain.from_iterable(part.result() for part in parts))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            ours = set(multiprocessing.active_children()) - before
            for process in ours:
                process.terminate()
            for process in ours:
                process.join()
            raise


def _start(said, sweep: Sweep, points: Sequence[Point], anchors: Sequence[str]) -> None:
    """Makes `_run` ready in a new process."""
    global _work
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(1))  # quietly, and temporary files are removed
    use_compilation_cache()
    sweep.progress = lambda *values: said.put(values)
    _work = sweep, points, anchors


def _run(name: str, read: Callable[[], Clip]) -> list[dict]:
    sweep, points, anchors = _work
    return sweep.run({name: read}, points, anchors)
