"""Runs whose newest checkpoints are damaged or have other shapes."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_stage
from toy_stage import experiment_in

from gnvc_jax.errors import UsageError
from gnvc_jax.training.loop import train
from gnvc_jax.training.run_folder import load_params


@pytest.fixture(scope="module")
def three_checkpoints(tmp_path_factory):
    """A run of 6 steps, saved at 2, 4 and 6."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    experiment = saving(out)
    train(toy_stage.toy_stage(experiment))
    return out


def saving(out):
    base = experiment_in(out)
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
