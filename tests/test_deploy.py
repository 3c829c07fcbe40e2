"""Files under deploy/: what can be checked of them without a cluster."""

import math
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from gnvc_jax import shipped_configs
from gnvc_jax.training import config as configs

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(0, 0, False), (1, 0, True), (75, 3, True), (2, 0, False), (1, 100, False)],
)
def test_slurm_job_goes_back_to_the_queue_after_a_failure(tmp_path, status, restarts, requeued):
    """With stand-ins for Slurm's commands that write down how they were called."""
    calls = tmp_path / "calls"
    for name, code in (("srun", status), ("scontrol", 0)):
        command = tmp_path / name
        command.write_text(f'#!/bin/sh\necho {name} "$@" >> {calls}\nexit {code}\n')
        command.chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_RESTART_COUNT": str(restarts)}
    script = ["bash", str(DEPLOY / "train.sbatch"), "--config", "wan_1_3b/latent"]
    assert subprocess.run(script, env=environment).returncode == status
    lines = calls.read_text().splitlines()
    assert lines[0] == "srun --kill-on-bad-exit=1 gnvc train --config wan_1_3b/latent"
    assert lines[1:] == (["scontrol requeue 7"] if requeued else [])


def test_job_set_fits_its_slices():
    """Chips of the topology, hosts, mesh and batch agree, and the settings are those of a run."""
    job = yaml.safe_load((DEPLOY / "jobset.yaml").read_text())["spec"]["replicatedJobs"][0]
    inner = job["template"]["spec"]
    pod = inner["template"]["spec"]
    shape = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = job["replicas"] * math.prod(map(int, shape.split("x")))
    container = pod["containers"][0]
    per_host = container["resources"]["limits"]["google.com/tpu"]
    assert job["replicas"] * inner["completions"] * per_host == chips
    assert inner["parallelism"] == inner["completions"]
    command, *settings = container["args"]
    assert command == "train"
    options = dict(one.removeprefix("--").split("=", 1) for one in settings)
    experiment = configs.load(shipped_configs.find_config(options.pop("config")))
    flat = [word for name, value in options.items() for word in (f"--{name}", value)]
    experiment = configs.override(experiment, flat)
    mesh = experiment.mesh
    assert mesh.data * mesh.fsdp == chips and mesh.data % job["replicas"] == 0
    assert experiment.data.batch % chips == 0
    assert experiment.run.checkpoint_every and experiment.run.watchdog_s


def test_image_has_what_the_package_is_built_from():
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert all((ROOT / path).exists() for path in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {"pyproject.toml", "requirements.txt", "gnvc_jax", "configs"}
    assert needed | set(project["project"]["license-files"]) <= set(copied)
    extras = project["project"]["optional-dependencies"]
    install = next(line for line in lines if line.startswith("RUN pip install"))
    assert re.search(r"\.\[\$ACCELERATOR,buckets,eval\]", install)
    assert {"tpu", "gpu", "buckets", "eval"} <= set(extras)
