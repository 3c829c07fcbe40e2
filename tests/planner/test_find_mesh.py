"""The search for a mesh, on eight simulated devices."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from gnvc_jax import cli
from gnvc_jax.parallel import MeshConfig
from gnvc_jax.planner import find_mesh, training
from gnvc_jax.planner.chips import CHIPS
from gnvc_jax.training import inputs
from gnvc_jax.training.config import DataConfig, Experiment
from gnvc_jax.training.stages import Stage

V5P = CHIPS["v5p"]


def matrix_stage(experiment):
    """One matrix on the bytes of a frame of eight pixels by eight."""

    def loss(params, constants, batch, key, step):
        x = batch.reshape(batch.shape[0], -1).astype(jnp.float32)
        return jnp.mean((x @ params["matrix"]) ** 2), {}

    def init(key):
        return {"matrix": jax.random.normal(key, (192, 64))}

    return Stage(experiment, init, loss, inputs.clips(experiment), trainable=("matrix",))


@pytest.fixture
def experiment():
    data = DataConfig(frames=1, size=(8, 8), batch=8)
    return Experiment(f"{__name__}:matrix_stage", data=data)


def test_candidates_are_all_ways_to_divide_the_devices(experiment):
    found = [one.mesh for one in find_mesh.candidates(experiment, 8)]
    # Without a refiner: 8 = data * fsdp.
    assert sorted((mesh.data, mesh.fsdp) for mesh in found) == [(1, 8), (2, 4), (4, 2), (8, 1)]
    assert {(mesh.context, mesh.tensor) for mesh in found} == {(1, 1)}


def test_what_is_estimated_to_be_sent(experiment):
    """A ring all-reduce of n devices sends 2 (n - 1) / n of the array."""

    def sent(trained, fixed, **mesh):
        one = dataclasses.replace(experiment, mesh=MeshConfig(**mesh))
        return find_mesh.estimated_bytes(one, trained, fixed)

    assert sent(1000, 0, data=1) == 0
    assert sent(1000, 500, data=8) == 2 * 1000 * 7 / 8  # fixed parameters have no gradient
    # Gathered forward and backward, and gradients scattered.
    assert sent(1000, 500, data=1, fsdp=8) == (2 * 1500 + 1000) * 7 / 8
    assert sent(1000, 0, data=2, fsdp=4) == 3000 * 3 / 4 + 2 * 1000 / 4 / 2


def test_the_compiled_order_is_that_of_the_estimate_and_the_best_is_the_fastest(experiment):
    plans = list(find_mesh.find_mesh_for(experiment, jax.devices(), V5P, compilations=3))
    compiled = [one for one in plans if "clips_per_s" in one]
    assert len(compiled) == 3
    # The same as planning each by itself.
    mesh = MeshConfig(**compiled[1]["mesh"])
    alone = training.plan_for(dataclasses.replace(experiment, mesh=mesh), jax.devices(), V5P)
    assert alone["peak_bytes"] == compiled[1]["peak_bytes"]
    best = find_mesh.cheapest(plans)
    assert best is not None
    assert best["clips_per_s"][0] == max(one["clips_per_s"][0] for one in compiled)
    described = find_mesh.line({"topology": "v5p:2x2x2"} | compiled[0])
    assert described.startswith("v5p:2x2x2: ") and "remat none: peak 0.0 GiB" in described
    text = find_mesh.summary(plans)
    assert text.count("\n") == 5 and f"fsdp={best['mesh']['fsdp']}" in text.splitlines()[-1]


def test_what_cannot_work_is_not_compiled(experiment):
    three = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, batch=3))
    plans = list(find_mesh.find_mesh_for(three, jax.devices(), V5P, compilations=0))
    assert not any(one["fits"] for one in plans)
    assert any("data.batch 3 is not a multiple of 8" in one["reason"] for one in plans)
    assert find_mesh.cheapest(plans) is None
    small = dataclasses.replace(V5P, memory=1000)
    first, *_ = find_mesh.find_mesh_for(experiment, jax.devices(), small, compilations=0)
    assert "state and batch alone take" in first["reason"]
    assert find_mesh.line({"topology": "v5p:2x2x2"} | first).endswith(first["reason"])


def test_more_is_computed_again_until_a_mesh_fits(experiment, tiny_model, monkeypatch):
    """Compilation is replaced: with all activations kept nothing fits, with fewer all does."""
    model = tiny_model(refiner=True)
    data = dataclasses.replace(experiment.data, size=(16, 16))
    networks = {"vae": model.vae_config, "refiner": model.refiner_config}
    refiner = dataclasses.replace(experiment, data=data, **networks)
    tried = []

    def plan_for(one, devices, chip, clips):
        tried.append((one.mesh, one.compute.remat))
        return {"fits": one.compute.remat != "none", "clips_per_s": [1.0, 2.0]}

    monkeypatch.setattr(find_mesh, "plan_for", plan_for)
    monkeypatch.setattr(find_mesh, "impossible", lambda *_: None)
    monkeypatch.setattr(find_mesh, "state_bytes", lambda _: (1000, 0))
    plans = list(find_mesh.find_mesh_for(refiner, jax.devices(), V5P, compilations=5))
    assert [remat for _, remat in tried] == ["none", "matmuls", "none", "matmuls", "none"]
    assert tried[0][0] == tried[1][0] != tried[2][0]
    assert find_mesh.cheapest(plans) is plans[1]
    # Ways to write 8 as a product of four factors in order: three twos in four places.
    assert len({one.mesh for one in find_mesh.candidates(refiner, 8)}) == 20


def test_the_batch_grows_with_the_devices_that_divide_clips(experiment):
    for one in find_mesh.candidates(experiment, 8, per_device=2):
        assert one.data.batch == 2 * one.mesh.data * one.mesh.fsdp


def test_a_given_mesh_and_a_search_contradict_each_other(capsys):
    args = "plan --config small/codec --topology v5e:2x2 --find-mesh 2 --mesh fsdp=2"
    assert cli.main(args.split()) == 2
    assert "leave out --mesh" in capsys.readouterr().err
