"""Checkpoint folders: retention, foreign configurations, weights for the next stage."""

import dataclasses
import json
import os
import shutil
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

from gnvc_jax.codec.config import CodecConfig
from gnvc_jax.errors import UsageError
from gnvc_jax.parallel import MeshConfig, make_mesh
from gnvc_jax.training import stages
from gnvc_jax.training.checkpoints import Checkpoints, load_params, load_statistics
from gnvc_jax.training.config import ComputeConfig, InitConfig, Policy
from gnvc_jax.training.loop import train
from gnvc_jax.training.state import abstract_state, init_state
from gnvc_jax.training.weights import origins

ROOT = Path(__file__).parents[2]


def toy(out, **changes):
    base = toy_stage.experiment()
    run = dataclasses.replace(base.run, out=str(out), keep=2)
    return dataclasses.replace(base, run=run, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the toy stage and its last state."""
    out = tmp_path_factory.mktemp("runs") / "toy"
    experiment = toy(out)
    return out, train(toy_stage.toy_stage(experiment))


def test_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(toy(tmp_path))
    for step in (1, 2, 3):
        checkpoints.save(step, {"x": jnp.full(3, step)}, {"next": step})
    checkpoints.save(3, {"x": jnp.zeros(3)}, {"next": -1})  # saved already: left alone
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    again = Checkpoints(toy(tmp_path))
    like = {"x": jax.ShapeDtypeStruct((3,), jnp.int32, sharding=jnp.zeros(3).sharding)}
    state, data = again.restore(again.latest(), like)
    assert state["x"].tolist() == [3, 3, 3] and data == {"next": 3}
    again.close()


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

    experiment = toy(tmp_path / "run")
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
    experiment = toy(tmp_path)
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
    checkpoints = Checkpoints(toy(tmp_path))
    checkpoints.save(1, {"x": jnp.zeros(3)}, {})
    checkpoints.close()
    assert checkpoints.latest() == 1
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp-123" / "state").mkdir(parents=True)
    with closing(Checkpoints(toy(tmp_path))) as again:
        assert again.latest() == 1


def test_foreign_run_folder_is_refused(tmp_path):
    base = toy(tmp_path)
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
    base = toy(tmp_path)
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
    with closing(Checkpoints(toy(tmp_path / "b", codec=CodecConfig()))) as first:
        first.save(1, {"w": jnp.zeros(1)}, {})
    with pytest.raises(UsageError, match=r"codec.width was 256, is None"):
        Checkpoints(toy(tmp_path / "b"))


@pytest.fixture(scope="module")
def three_checkpoints(tmp_path_factory):
    """A run of 6 steps, saved at 2, 4 and 6."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    experiment = saving(out)
    train(toy_stage.toy_stage(experiment))
    return out


def saving(out):
    base = toy(out)
    run = dataclasses.replace(base.run, checkpoint_every=2, keep=3)
    return dataclasses.replace(base, run=run, optim=dataclasses.replace(base.optim, steps=6))


def damage(checkpoint, how):
    """Cut, changed or missing files, as crashes and full disks leave them."""
    names = {"index": "manifest.ocdbt", "list": "_METADATA", "arrays": "d/*"}
    files = list((checkpoint / "state").glob(names.get(how, "*")))
    if how == "place":
        files = [checkpoint / "data" / "data.json"]
    assert files
    for file in files:
        if how == "all":
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:40])


@pytest.mark.parametrize("how", ["index", "list", "arrays", "place", "all"])
def test_a_damaged_newest_checkpoint_falls_back(three_checkpoints, tmp_path, how, caplog, capfd):
    """To the one before, with a warning; the run ends as if nothing had been."""
    out = tmp_path / "run"
    shutil.copytree(three_checkpoints, out)
    damage(out / "checkpoints" / "6", how)
    wanted = load_params(three_checkpoints, toy_shapes())
    if how != "place":  # of no concern to the next stage
        found = load_params(out, toy_shapes())
        assert not np.array_equal(found["w"], wanted["w"])
        assert f"checkpoint {out / 'checkpoints' / '6'} is damaged" in caplog.text
    caplog.clear()
    experiment = saving(out)
    train(toy_stage.toy_stage(experiment))
    assert f"checkpoint {out / 'checkpoints' / '6'} is damaged" in caplog.text
    assert "the run goes on from checkpoint 4" in caplog.text
    assert "Traceback" not in capfd.readouterr().err
    names = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert names[:3] == ["2", "4", "6"] and names[3].startswith("damaged-6-")
    jax.tree.map(np.testing.assert_array_equal, load_params(out, toy_shapes()), wanted)


def test_a_run_without_a_whole_checkpoint_says_so(three_checkpoints, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(three_checkpoints, out)
    for step in (2, 4, 6):
        damage(out / "checkpoints" / str(step), "index")
    experiment = saving(out)
    with pytest.raises(UsageError, match="checkpoints: no checkpoint in it can be read"):
        train(toy_stage.toy_stage(experiment))
    with pytest.raises(UsageError, match=f"{out}: no checkpoint in it can be read"):
        load_params(out, toy_shapes())
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["2", "4", "6"]


def test_a_state_of_other_shapes_is_no_damage(three_checkpoints, tmp_path):
    """The model was changed under a run: nothing is set aside, and the difference is named."""
    out = tmp_path / "run"
    shutil.copytree(three_checkpoints, out)
    stage = toy_stage.toy_stage(saving(out))

    for changes, told in (
        ({"extra": jnp.zeros(3)}, r"ema/extra has shape None, expected \(3,\)"),
        ({"w": jnp.zeros((4, 3))}, r"ema/w has shape \(4, 2\), expected \(4, 3\)"),
    ):
        with pytest.raises(UsageError, match=f"{out / 'checkpoints' / '6'}: parameter {told}"):
            train(dataclasses.replace(stage, init=lambda key, c=changes: toy_stage.init(key) | c))
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["2", "4", "6"]


def toy_shapes():
    return jax.eval_shape(toy_stage.init, jax.random.key(0))


def test_a_run_does_not_start_from_itself(tmp_path):
    with pytest.raises(UsageError, match=r"init\.run: .* is run\.out too"):
        toy(tmp_path / "run", init=InitConfig(run=str(tmp_path / "other" / ".." / "run")))
    for name, start in (("a", "b"), ("b", "a")):
        facts = {"stage": "pixel", "init": {"run": str(tmp_path / start)}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(facts))
    with pytest.raises(UsageError, match=r"its init\.run leads back to"):
        origins(InitConfig(run=str(tmp_path / "a")))


def test_what_a_run_does_not_name_is_as_for_the_run_before(tmp_path):
    for name, init in (
        ("codec", {"vae": "weights", "prompt": "old.npy"}),
        ("latent", {"dit": "dit", "run": str(tmp_path / "codec")}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"stage": name, "init": init}))
    runs = tuple(str(tmp_path / name) for name in ("codec", "latent"))
    found = origins(InitConfig(prompt="new.npy", run=runs[1]))
    assert found == ("weights", "dit", "new.npy", None, runs, None, frozenset())


def test_new_stage_starts_from_averaged_weights(finished, tmp_path):
    out, state = finished
    following = toy(tmp_path, init=InitConfig(run=str(out)))
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    start = stages.start(toy_stage.toy_stage(following), zeros, {})
    jax.tree.map(np.testing.assert_array_equal, start, state.ema)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.ema)
    on_host = load_params(out, like=abstract)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(on_host))
    jax.tree.map(np.testing.assert_array_equal, on_host, state.ema)


def test_weights_that_do_not_fit_are_refused(finished, tmp_path):
    out, state = finished
    with pytest.raises(FileNotFoundError, match="nowhere: no checkpoint"):
        load_params(tmp_path / "nowhere", like=state.params)
    with pytest.raises(ValueError, match="parameter extra has shape None, expected"):
        load_params(out, like={**state.params, "extra": jnp.zeros(1)})
    for w in (jnp.zeros((4, 3)), np.zeros((4, 3)), jax.ShapeDtypeStruct((4, 3), jnp.float32)):
        with pytest.raises(ValueError, match=r"parameter w has shape \(4, 2\), expected \(4, 3\)"):
            load_params(out, like={**state.params, "w": w})


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

    experiment = toy(tmp_path)
    optim = dataclasses.replace(experiment.optim, steps=reached + 2)
    train(toy_stage.toy_stage(dataclasses.replace(experiment, optim=optim)))
    assert steps_done() == list(range(1, reached + 3))
