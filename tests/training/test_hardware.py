"""One experiment on a laptop, on one GPU and on a pod."""

import dataclasses
import inspect
from typing import get_args

import pytest

from gnvc_jax import cli
from gnvc_jax.commands.training import Hardware, load_experiment, train
from gnvc_jax.parallel import MeshConfig
from gnvc_jax.planner import training as planner
from gnvc_jax.training import config, hardware


def of(name, devices, batch):
    """(batch, accumulate) of an experiment with a batch of so many clips."""
    experiment = config.Experiment("mine:stage", data=config.DataConfig(batch=batch))
    fitted = hardware.fit(experiment, hardware.HARDWARE[name], devices)
    return fitted.data.batch, fitted.optim.accumulate


@pytest.mark.parametrize(
    "name, devices, batch, expected",
    [
        ("laptop", 1, 8, (8, 1)),
        ("laptop", 1, 20, (21, 3)),  # three parts of seven
        ("gpu", 1, 64, (64, 4)),
        ("gpu", 4, 64, (64, 1)),
        ("gpu", 4, 6, (8, 1)),  # two clips on each device
        ("pod", 64, 8, (64, 1)),  # one
        ("pod", 64, 1024, (1024, 2)),
    ],
)
def test_batch_is_split_into_what_devices_hold(name, devices, batch, expected):
    assert of(name, devices, batch) == expected
    total, accumulate = expected
    assert total // (devices * accumulate) <= hardware.HARDWARE[name].clips


def test_only_what_depends_on_hardware_changes():
    plain = load_experiment("wan_1_3b/latent", ())
    fitted = load_experiment("wan_1_3b/latent", (), "pod", 32)
    before, after = (config.flatten(dataclasses.asdict(x)) for x in (plain, fitted))
    changed = {k: v for k, v in after.items() if v != before[k]}
    assert changed == {"mesh.fsdp": 16, "data.batch": 32}  # this config has dtype and remat of pods
    fitted = load_experiment("wan_1_3b/latent", (), "laptop")
    assert fitted.compute == config.ComputeConfig() and fitted.mesh == MeshConfig()
    assert dataclasses.replace(fitted, compute=plain.compute) == plain


def test_settings_override_the_hardware():
    args = ["--compute.dtype", "float32", "--data.batch", "48", "--mesh", "fsdp=2"]
    found = load_experiment("wan_1_3b/latent", args, "gpu", 1)
    assert found.compute.dtype == "float32" and found.compute.remat == "attention"
    assert (found.data.batch, found.mesh.fsdp) == (48, 2)


def test_choices_of_the_option_are_the_rows_of_the_table():
    assert get_args(Hardware) == tuple(hardware.HARDWARE)
    assert inspect.signature(train).parameters["hardware"].annotation == Hardware | None


def test_plans_are_for_the_devices_of_each_topology(monkeypatch, capsys):
    planned = []

    def plan(experiment, topology, clips, per_device):
        planned.append((experiment.data.batch, experiment.compute.dtype, experiment.mesh.fsdp))
        return {"topology": topology, "fits": True}

    monkeypatch.setattr(planner, "plan", plan)
    monkeypatch.setattr(planner, "report", str)
    monkeypatch.setattr(planner, "table", str)
    args = ["plan", "--config", "small/codec", "--hardware", "pod", "--topology"]
    assert cli.main([*args, "v5p:2x2x4", "v5p:4x4x4"]) == 0
    assert planned == [(16, "bfloat16", 16), (64, "bfloat16", 16)]
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--config", "small/codec", "--hardware", "phone"])
    assert stop.value.code == 2 and "phone" in capsys.readouterr().err
