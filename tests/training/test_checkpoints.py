"""Saving and resuming: what is kept, and which configurations may go on with it."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import toy_stage
from toy_stage import experiment_in

from gnvc_jax.codec.config import CodecConfig
from gnvc_jax.errors import UsageError
from gnvc_jax.parallel import MeshConfig, make_mesh
from gnvc_jax.training.checkpoints import Checkpoints
from gnvc_jax.training.config import ComputeConfig, Policy
from gnvc_jax.training.loop import train
from gnvc_jax.training.run_folder import load_params, load_statistics
from gnvc_jax.training.state import abstract_state, init_state

ROOT = Path(__file__).parents[2]


def test_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(experiment_in(tmp_path))
    for step in (1, 2, 3):
        checkpoints.save(step, {"x": jnp.full(3, step)}, {"next": step})
    checkpoints.save(3, {"x": jnp.zeros(3)}, {"next": -1})  # saved already: left alone
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    again = Checkpoints(experiment_in(tmp_path))
    like = {"x": jax.ShapeDtypeStruct((3,), jnp.int32, sharding=jnp.zeros(3).sharding)}
    state, data = again.restore(again.latest(), like)
    assert state["x"].tolist() == [3, 3, 3] and data == {"next": 3}
    again.close()


def test_some_are_kept_for_good(tmp_path):
    """Those at least `keep_every` steps after the one kept before, beside the newest."""
    experiment = experiment_in(tmp_path)
    run = dataclasses.replace(experiment.run, keep=1, keep_every=4)
    checkpoints = Checkpoints(dataclasses.replace(experiment, run=run))
    for step in (2, 4, 7, 9, 12, 13):
        checkpoints.save(step, {"x": jnp.full(3, step)}, {"next": step})
    checkpoints.close()
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert kept == [2, 7, 12, 13]


def test_statistics_stay_those_of_the_start(tmp_path):
    """What a run measured comes back from its checkpoints, not from the data of the moment."""

    measured, seen = [], []

    def measuring(experiment):
        def measure():
            measured.append(1)
            return {"mean": np.float32([len(measured), 0.1])}

        def constants(statistics):
            seen.append(statistics["mean"])
            return {"scale": jnp.float32(1)}

        stage = toy_stage.toy_stage(experiment)
        return dataclasses.replace(stage, measure=measure, constants=constants)

    experiment = experiment_in(tmp_path / "run")
    experiment = dataclasses.replace(
        experiment, optim=dataclasses.replace(experiment.optim, steps=2)
    )
    train(measuring(experiment))
    longer = dataclasses.replace(experiment, optim=dataclasses.replace(experiment.optim, steps=3))
    train(measuring(longer))
    assert len(measured) == 1 and len(seen) == 2
    np.testing.assert_array_equal(seen, np.float32([[1, 0.1]] * 2))
    np.testing.assert_array_equal(load_statistics(tmp_path / "run")["mean"], np.float32([1, 0.1]))


def test_checkpoints_of_earlier_versions_are_read(tmp_path):
    """They were written by Orbax's older interface; a run goes on from them, and adds new ones."""
    experiment = experiment_in(tmp_path)
    stage = toy_stage.toy_stage(experiment)
    params = stage.init(jax.random.key(1))
    state = init_state(experiment.optim, params, jax.random.key(2))
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        data=ocp.args.JsonSave({"next": 7}),
        statistics=ocp.args.JsonSave({"mean": [1.0, 0.5]}),
        config=ocp.args.JsonSave({}),
    )
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(3, args=items)
    np.testing.assert_array_equal(load_statistics(tmp_path)["mean"], np.float32([1.0, 0.5]))
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path, params), params)
    mesh = make_mesh(MeshConfig(data=1))
    with jax.set_mesh(mesh), closing(Checkpoints(experiment)) as checkpoints:
        assert checkpoints.latest() == 3
        restored = checkpoints.restore_newest(abstract_state(stage, mesh))
        assert restored is not None
        found, data = restored
        assert data == {"next": 7}
        plain = [dataclasses.replace(x, key=jax.random.key_data(x.key)) for x in (found, state)]
        jax.tree.map(np.testing.assert_array_equal, *plain)
        checkpoints.save(4, found, {"next": 8})
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path, params), params)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]


def test_unfinished_checkpoint_is_ignored(tmp_path):
    checkpoints = Checkpoints(experiment_in(tmp_path))
    checkpoints.save(1, {"x": jnp.zeros(3)}, {})
    checkpoints.close()
    assert checkpoints.latest() == 1
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp-123" / "state").mkdir(parents=True)
    with closing(Checkpoints(experiment_in(tmp_path))) as again:
        assert again.latest() == 1


def test_foreign_run_folder_is_refused(tmp_path):
    base = experiment_in(tmp_path)
    never_ran = dataclasses.replace(base, optim=dataclasses.replace(base.optim, lr=9.0))
    Checkpoints(never_ran).close()
    first = Checkpoints(base)
    first.save(1, {"w": jnp.zeros(1)}, {})
    first.close()
    Checkpoints(
        dataclasses.replace(
            base,
            optim=dataclasses.replace(base.optim, steps=9),
            run=dataclasses.replace(base.run, log_every=7),
        )
    ).close()
    other = dataclasses.replace(
        base,
        optim=dataclasses.replace(base.optim, lr=3.0),
        data=dataclasses.replace(base.data, size=(8, 16)),
    )
    with pytest.raises(ValueError, match=r"data.size was .*; optim.lr was 0.1, is 3.0"):
        Checkpoints(other)


def test_a_resumed_run_may_move_and_compute_differently(tmp_path):
    """What it trains on and what it is stay as they were, groups that were None included."""
    base = experiment_in(tmp_path)
    with closing(Checkpoints(base)) as first:
        first.save(1, {"w": jnp.zeros(1)}, {})

    def with_data(**changes):
        return dataclasses.replace(base, data=dataclasses.replace(base.data, **changes))

    compute = ComputeConfig(dtype="bfloat16", remat="full", vae=Policy(remat="full"))
    for moved in (
        with_data(path="elsewhere", workers=3, decode_cache="cache"),
        dataclasses.replace(base, compute=compute),
        base,
    ):
        Checkpoints(moved).close()
    for other, told in (
        (dataclasses.replace(base, codec=CodecConfig()), "codec was None, is set"),
        (with_data(seed=5), "data.seed was 0, is 5"),
    ):
        with pytest.raises(UsageError, match=told):
            Checkpoints(other)
    with closing(Checkpoints(experiment_in(tmp_path / "b", codec=CodecConfig()))) as first:
        first.save(1, {"w": jnp.zeros(1)}, {})
    with pytest.raises(UsageError, match=r"codec.width was 256, is None"):
        Checkpoints(experiment_in(tmp_path / "b"))


def test_terminated_run_saves_and_continues(tmp_path):
    """SIGTERM to a real process: exit code 75, a checkpoint, and no step lost or done twice."""
    command = [sys.executable, str(ROOT / "train.py"), "--config", toy_stage.__file__]
    command += ["--run.out", str(tmp_path), "--optim.steps", "1000000000"]
    paths = [str(ROOT), str(Path(toy_stage.__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}

    def steps_done():
        log = tmp_path / "metrics.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        return [int(line.split('"step": ')[1].split(",")[0]) for line in lines]

    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    while process.poll() is None and len(steps_done()) < 3:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    reached = max(steps_done())
    assert f"stopped after step {reached} of" in output
    assert "the same command continues" in output

    experiment = experiment_in(tmp_path)
    optim = dataclasses.replace(experiment.optim, steps=reached + 2)
    train(toy_stage.toy_stage(dataclasses.replace(experiment, optim=optim)))
    assert steps_done() == list(range(1, reached + 3))
