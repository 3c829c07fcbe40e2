"""A sweep in several processes: the same records, and ends that are not good."""

import functools
import multiprocessing
import os
import time
from concurrent.futures.process import BrokenProcessPool
from fractions import Fraction

import numpy as np
import pytest

from gnvc_jax.evaluation.clips import Clip, read_clip, write_clip
from gnvc_jax.evaluation.points import AnchorPoint
from gnvc_jax.evaluation.quality import QualityMeter
from gnvc_jax.evaluation.sweep import Sweep
from gnvc_jax.evaluation.workers import run_in_processes

POINTS = [AnchorPoint("x264", "other", size) for size in (900,)]


@pytest.fixture
def clips(tmp_path):
    readers = {}
    for seed, name in enumerate("ab"):
        frames = np.random.default_rng(seed).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
        write_clip(
            Clip(name, np.kron(frames, np.ones((1, 8, 8, 1), np.uint8)), Fraction(25)),
            tmp_path / f"{name}.mkv",
        )
        readers[name] = functools.partial(read_clip, tmp_path / f"{name}.mkv", name)
    return readers | {"c": functools.partial(read_clip, tmp_path / "nowhere.mkv")}


def without_times(records):
    return [{k: v for k, v in r.items() if k not in ("created", "speed")} for r in records]


def test_several_processes_give_the_records_of_one(tmp_path, clips):
    said = []
    sweep = Sweep(tmp_path / "two", QualityMeter(("psnr",)), progress=lambda *v: said.append(v))
    shared = run_in_processes(2, sweep, clips, POINTS)
    alone = Sweep(tmp_path / "one", QualityMeter(("psnr",))).run(clips, POINTS)
    assert without_times(shared) == without_times(alone)
    assert [r["status"] for r in shared] == ["ok", "ok", "failed"]
    label = POINTS[0].label
    assert sorted(said) == [(f"a {label}", "ok"), (f"b {label}", "ok"), ("c", "failed")]


def no_process_left():
    """Whether all ended; the thread of the pool may be a moment behind in taking note of it."""
    for _ in range(100):
        if not multiprocessing.active_children():
            return True
        time.sleep(0.1)
    return False


def test_a_killed_process_is_noticed(tmp_path, clips):
    readers = clips | {"d": functools.partial(os._exit, 1)}
    with pytest.raises(BrokenProcessPool):
        run_in_processes(1, Sweep(tmp_path, QualityMeter(("psnr",))), readers, POINTS)
    assert no_process_left()


def test_an_interruption_ends_the_processes(tmp_path, clips):
    def interrupt(label, status):
        raise KeyboardInterrupt

    readers = {"slow": functools.partial(time.sleep, 600), "c": clips["c"]}
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_in_processes(2, Sweep(tmp_path, QualityMeter(()), progress=interrupt), readers, POINTS)
    assert no_process_left()
    assert time.monotonic() - start < 300
