"""Two real processes on one machine: the same run, killed, resumed by one, and on another mesh."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from run_processes import ROOT, finish, losses, start

from gnvc_jax.runtime import started_together

STEPS = 8


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses of an uninterrupted run in one process."""
    out = tmp_path_factory.mktemp("alone")
    finish(start(out, 1, "--optim.steps", STEPS))
    return losses(out)


def test_two_processes_train_as_one_and_print_once(alone, tmp_path):
    first, second = finish(start(tmp_path, 2, "--optim.steps", STEPS, "--mesh", "data=2,fsdp=2"))
    assert "on 4 x" in first and "step 8/8" in first
    assert "step" not in second
    assert losses(tmp_path).keys() == alone.keys() == set(range(1, STEPS + 1))
    np.testing.assert_allclose(list(losses(tmp_path).values()), list(alone.values()), rtol=1e-5)


def test_killed_hard_then_resumed_by_one_process_on_another_mesh(alone, tmp_path):
    running = start(tmp_path, 2, "--optim.steps", 10**9, "--mesh", "data=4")
    checkpoints = tmp_path / "checkpoints"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not any(
        p.name.isdigit() for p in (checkpoints.iterdir() if checkpoints.exists() else ())
    ):
        assert all(p.poll() is None for p in running)
        time.sleep(0.02)
    for process in running:
        process.kill()
        process.wait()
    saved = max(int(p.name) for p in checkpoints.iterdir() if p.name.isdigit())
    (output,) = finish(start(tmp_path, 1, "--optim.steps", saved + 4, "--mesh", "data=1,fsdp=2"))
    assert f"step {saved + 4}/{saved + 4}" in output
    found = losses(tmp_path)
    assert found.keys() == set(range(1, saved + 5))  # at most the checkpoint interval was lost
    shared = found.keys() & alone.keys()
    np.testing.assert_allclose(
        [found[k] for k in sorted(shared)], [alone[k] for k in sorted(shared)], rtol=1e-5
    )


def test_who_was_started_with_others():
    shell = {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}  # of an allocation: python, not srun
    assert not started_together({}) and not started_together(shell)
    assert started_together(shell | {"SLURM_STEP_NODELIST": "n[1-2]"})
    assert not started_together({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"})
    assert started_together({"OMPI_COMM_WORLD_SIZE": "2"})
    assert started_together({"KUBERNETES_SERVICE_HOST": "h", "JOB_COMPLETION_INDEX": "0"})


def test_variables_by_hand_come_together():
    environment = os.environ | {"JAX_NUM_PROCESSES": "2", "PYTHONPATH": str(ROOT)}
    code = "from gnvc_jax.runtime import join_processes; join_processes()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert "set all of JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID" in done.stderr
