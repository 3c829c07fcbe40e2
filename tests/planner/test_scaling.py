"""Scaling experiments: sizes, the fit of efficiencies, and the command on forced devices."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gnvc_jax.errors import UsageError
from gnvc_jax.parallel import MeshConfig
from gnvc_jax.planner import scaling_report
from gnvc_jax.planner.chips import compact_topology
from gnvc_jax.planner.efficiency import fit, predict
from gnvc_jax.planner.scaling import sized
from gnvc_jax.planner.scaling_results import Results
from gnvc_jax.training.config import DataConfig, Experiment

ROOT = Path(__file__).parents[2]
BASE = Experiment("vae", data=DataConfig(batch=8))


def test_tori_are_as_compact_as_they_can_be():
    found = [compact_topology("v5p", n) for n in (4, 8, 32, 512, 4096)]
    assert found == ["v5p:2x2x1", "v5p:2x2x2", "v5p:2x4x4", "v5p:8x8x8", "v5p:16x16x16"]
    assert [compact_topology("v5e", n) for n in (1, 8, 256)] == ["v5e:1x1", "v5e:2x4", "v5e:16x16"]


def test_batches_grow_with_the_chips_in_weak_scaling_only():
    found = sized(BASE, 4, 2, "weak")
    assert (found.mesh.data, found.data.batch) == (4, 16)
    found = sized(BASE, 4, 2, "strong", per_chip=2)
    assert (found.mesh.data, found.data.batch) == (8, 8)
    with pytest.raises(UsageError, match="8 clips on 3 chips give no whole number on 4"):
        sized(BASE, 4, 3, "weak")


def test_mesh_that_does_not_divide_the_devices_is_refused():
    base = dataclasses.replace(BASE, mesh=MeshConfig(fsdp=4))
    assert sized(base, 8, 8, "weak").mesh.data == 2
    with pytest.raises(UsageError, match="2 devices: must be a multiple"):
        sized(base, 2, 2, "weak")


KINDS = ("compute", "all-gather", "all-reduce")


def steps_of(count, efficiencies, seed=0):
    """Seconds at peak of random points, and of their steps with these efficiencies."""
    rng = np.random.default_rng(seed)
    planned = [dict(zip(KINDS, rng.uniform(0.01, 1.0, 3))) for _ in range(count)]
    return planned, [sum(p[k] / efficiencies[k] for k in KINDS) for p in planned]


def test_fit_finds_the_efficiency_of_each_collective():
    truth = dict(zip(KINDS, (0.5, 0.3, 0.8)))
    planned, measured = steps_of(6, truth)
    found = fit(planned, measured)
    assert found.shares == pytest.approx(truth) and found.points == 6 and found.error < 1e-9
    (other,), (expected,) = steps_of(1, truth, seed=1)
    assert predict(found, other) == pytest.approx(expected)
    # A collective that was not measured cannot be predicted.
    assert predict(found, other | {"all-to-all": 1.0}) is None


def test_fit_divides_no_further_than_the_points_allow():
    truth = dict(zip(KINDS, (0.5, 0.4, 0.4)))
    planned, measured = steps_of(3, truth)  # as many points as resources
    found = fit(planned, measured)
    assert found.shares == pytest.approx({"compute": 0.5, "communication": 0.4})
    assert predict(found, planned[0] | {"all-to-all": 0.4}) == pytest.approx(measured[0] + 1)
    # Compute and communication that rise together cannot be told apart.
    alike = [{"compute": float(n), "all-gather": 2.0 * n} for n in (1, 2, 3)]
    assert fit(alike, [6.0, 12.0, 18.0]).shares == pytest.approx({"step": 0.5})


def test_a_resource_that_measured_steps_leave_no_time_for_has_no_efficiency():
    planned = [{"compute": 1.0, "all-gather": x} for x in (0.1, 0.5, 0.9)]
    found = fit(planned, [2.0, 1.9, 1.8])  # faster with more communication
    assert found.shares == {"compute": pytest.approx(0.5, rel=0.1), "all-gather": None}


def point(chips, seconds, device="TPU v5p", measured=True):
    plan = {
        "topology": f"{chips} x {device}",
        "mesh": {"data": chips},
        "batch": 8 * chips,
        "step_s": [0.1, 0.2],
        "clips_per_s": [40.0 * chips, 80.0 * chips],
        "mfu_bound": 0.4,
        "fits": True,
        "seconds_at_peak": {"compute": 0.1, "all-reduce": 0.02 * (1 - 1 / chips)},
    }
    figures = {"step_s": seconds, "samples_per_s": 8 * chips / seconds, "goodput": 0.5, "mfu": 0.2}
    run = {"measured": {"device": device, "data_wait": 0.1} | figures} if measured else {}
    return {"chips": chips, "plan": plan} | run


def test_table_plot_and_fit_of_measured_and_planned_points(tmp_path):
    facts = {"chip": "v5p"}
    results = Results(tmp_path, facts)
    for chips in (1, 2, 4):
        results.add(point(chips, 0.2 + 0.04 * (1 - 1 / chips)))  # 0.1 / 0.5 + 0.02 (...) / 0.5
    results.add(point(64, 1.0, measured=False))
    text = results.report()
    lines = [line for line in text.splitlines() if re.match(r"\| \d", line)]
    rows = [line.strip("| ").split(" | ") for line in lines]
    assert [row[0] for row in rows] == ["1", "2", "4", "64"]
    assert rows[2][4:] == ["0.1–0.2", "0.23", "0.23", "139", "34.8", "20%", "50%", "10%"]
    assert rows[3][4:] == ["0.1–0.2", "0.239", "–", "–", "–", "≤ 40%", "–", "–"]
    assert "3 points on TPU v5p: compute 0.5, all-reduce 0.5." in text
    assert (tmp_path / "scaling.md").read_text() == text + "\n"
    assert "<svg" in (tmp_path / "scaling.svg").read_text()
    # They are kept, and those of another experiment are not mixed with them.
    again = Results(tmp_path, facts)
    assert again.has(4, True) and again.has(64, False) and not again.has(64, True)
    with pytest.raises(UsageError, match="choose another --out"):
        Results(tmp_path, {"chip": "v5e"})


def test_nothing_follows_from_another_device_for_a_planned_chip():
    points = [point(n, 1.0, "cpu") for n in (1, 2)] + [point(64, 1.0, measured=False)]
    assert "None of these devices is a v5p" in scaling_report.efficiency_text(points, "v5p")
    found = scaling_report.fitted(points)
    assert scaling_report.expected(points, found, "v5p")[2] is None


def test_command_measures_plans_and_fits_on_forced_devices(tmp_path):
    stages = ROOT / "tests/training"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(stages)]),
    }
    command = [sys.executable, "-m", "gnvc_jax.cli", "scaling"]
    command += ["--config", str(stages / "toy_stage.py")]
    command += ["--chips", "1,2,4", "--axis", "weak", "--measure", "--steps", "3"]
    command += ["--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "scaling.json").read_text())
    assert [p["chips"] for p in found["points"]] == [1, 2, 4]
    for chips, one in zip((1, 2, 4), found["points"]):
        assert one["plan"]["batch"] == 8 * chips and one["plan"]["devices"] == chips
        assert one["measured"]["device"] == "cpu" and one["measured"]["step_s"] > 0
        sent = sum(c["sent"] for c in one["plan"]["collectives"])
        assert (sent > 0) == (chips > 1)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "scaling.json",
        "scaling.md",
        "scaling.svg",
    ]
    assert "None of these devices is a v5p" in done.stdout
