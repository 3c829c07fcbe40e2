"""Hooks: what they are called with and when, on the toy stage."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import toy_stage

from gnvc_jax.training import stalls, throughput
from gnvc_jax.training.hooks import Hook
from gnvc_jax.training.loop import train


def toy(out, steps=3, **run):
    base = toy_stage.experiment()
    return toy_stage.toy_stage(
        dataclasses.replace(
            base,
            optim=dataclasses.replace(base.optim, steps=steps),
            run=dataclasses.replace(base.run, out=str(out), **run),
        )
    )


class Diary(Hook):
    """Notes each call, and logs the sum of the weights."""

    def __init__(self):
        self.calls, self.losses = [], []

    def before_step(self, run):
        self.calls.append(("before", run.step))

    def after_step(self, run):
        self.calls.append(("after", run.step, int(run.state.step), run.ending))
        self.losses.append(float(run.metrics["loss"]))
        run.write({"sum": float(run.state.params["w"].sum())})

    def close(self):
        self.calls.append("close")


def test_hook_of_a_user_sees_every_step_and_writes_to_the_log(tmp_path):
    diary = Diary()
    state = train(toy(tmp_path), hooks=(diary,))
    assert diary.calls == [
        *(("before", 0), ("after", 1, 1, False)),
        *(("before", 1), ("after", 2, 2, False)),
        *(("before", 2), ("after", 3, 3, True)),
        "close",
    ]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    sums = {line["step"]: line["sum"] for line in lines if "sum" in line}
    assert sums.keys() == {1, 2, 3} and sums[3] == float(state.params["w"].sum())
    # They change nothing of what is trained and logged without them.
    plain = train(toy(tmp_path / "plain"))
    np.testing.assert_array_equal(plain.params["w"], state.params["w"])
    lines = [line for line in lines if "loss" in line]
    assert [line["loss"] for line in lines] == pytest.approx(diary.losses)


def test_hooks_are_closed_after_an_error_and_nothing_is_saved(tmp_path):
    class Failing(Diary):
        def before_step(self, run):
            super().before_step(run)
            if run.step == 1:
                raise RuntimeError("from a hook")

    first, second = Diary(), Failing()
    with pytest.raises(RuntimeError, match="from a hook"):
        train(toy(tmp_path), hooks=(first, second))
    assert first.calls[-2:] == [("before", 1), "close"] and second.calls[-1] == "close"
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]


def test_time_of_a_pause_is_in_no_rate(tmp_path, monkeypatch):
    """A hook that takes a thousand seconds leaves the seconds of steps as they are."""
    passed = [0.0]
    now = time.time
    monkeypatch.setattr(throughput.time, "time", lambda: now() + passed[0])

    class Slow(Hook):
        def after_step(self, run):
            with run.paused():
                passed[0] += 1000.0

    train(toy(tmp_path), hooks=(Slow(),))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step_s"] for line in lines) < 100
    assert lines[-1]["goodput"] < 0.1


HANGING = """
import pathlib, sys, time
from test_hooks import Hook, toy, train

class Hang(Hook):
    def after_step(self, run):
        if run.step == 2:
            time.sleep(300)

train(toy(pathlib.Path(sys.argv[1]), watchdog_s=1.0), hooks=(Hang(),))
"""


def test_a_step_that_hangs_ends_the_process_with_its_stack(tmp_path):
    folders = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
    command = [sys.executable, "-c", HANGING, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": folders}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr and "in after_step" in ended.stderr
    assert "compiled in" in ended.stdout


def test_alarm_says_what_a_run_waits_for(monkeypatch):
    """Steps of 20 s: from 200 s on a wait is a stall, whatever evaluation and compilation take."""
    seconds, heard = [1000.0], []
    for name in ("time", "monotonic"):
        monkeypatch.setattr(stalls.time, name, lambda: seconds[0])
    monkeypatch.setattr(stalls.StallAlarm, "watch", lambda self: None)
    clock = throughput.Clock(0.0)
    alarm, run = stalls.StallAlarm(clock, heard.append), SimpleNamespace(step=0)

    def passes(amount):
        seconds[0] += amount
        alarm.check()

    passes(59)
    assert not heard
    passes(2)  # before anything is known of steps
    assert heard.pop() == "step 1 has waited 61 s for its batch"
    for step in range(6):
        run.step = step
        alarm.before_step(run)
        passes(1000 if step == 0 else 15)
        if step == 0:  # compiled: the clock stood still
            clock.run()
        run.step += 1
        alarm.after_step(run)
        passes(5)
    assert not heard
    passes(196)
    assert heard.pop() == "step 7 has waited 201 s for its batch; a step usually takes 20 s"
    passes(200)
    assert not heard
    passes(2)  # twice as long as when it was said last
    assert len(heard) == 1
    alarm.before_step(run)
    heard.clear()
    passes(201)
    assert heard.pop().startswith("step 7 has waited 201 s for the devices or other processes;")
    clock.stop()
    passes(5000)
    assert not heard
