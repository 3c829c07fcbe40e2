"""Rates, share of the peak and goodput against sums done by hand."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
import toy_stage

from gnvc_jax.parallel import MeshConfig, make_mesh
from gnvc_jax.refiner import DiTConfig, RefinerConfig
from gnvc_jax.training import inputs, loop, throughput
from gnvc_jax.training.config import ClipShape, DataConfig, Experiment
from gnvc_jax.training.stages import Stage


def product(experiment):
    """A matrix on the pixels of 8 x 8 frames."""

    def loss(params, constants, batch, key, step):
        return jnp.sum(batch.reshape(-1, 192).astype(jnp.float32) @ params["w"]), {}

    def init(key):
        return {"w": jnp.zeros((192, 16))}

    return Stage(experiment, init, loss, inputs.clips(experiment))


def test_share_of_the_peak(monkeypatch):
    monkeypatch.setitem(throughput.PEAK_FLOPS, "cpu", 1e6)
    stage = product(Experiment(f"{__name__}:product", data=DataConfig(size=(8, 8), batch=4)))
    with jax.set_mesh(make_mesh(MeshConfig(data=4))):
        found = throughput.WorkPerStep(stage).of(stage.experiment.data.largest)
    # Forward, and the gradient of the matrix, by four devices.
    operations = 2 * 2 * (4 * 5) * 192 * 16
    amounts = {"clips": 4, "frames": 20, "gflop": pytest.approx(operations / 1e9)}
    assert found == amounts | {"peak_s": pytest.approx(operations / 4e6)}
    monkeypatch.delitem(throughput.PEAK_FLOPS, "cpu")
    assert throughput.WorkPerStep(stage).of(stage.experiment.data.largest) == amounts


def test_tokens_of_a_clip():
    """Wan: 4 frames and 16 x 16 pixels are a token, and the first frame has tokens of its own."""
    refiner = RefinerConfig(DiTConfig(16, 16, 2, 2, 8, context_every=1), 16)
    experiment = Experiment(f"{__name__}:product", refiner=refiner, data=DataConfig(size=(64, 96)))
    assert experiment.tokens(ClipShape(13, 64, 96)) == 4 * 4 * 6
    assert dataclasses.replace(experiment, refiner=None).tokens(ClipShape(13, 64, 96)) == 0


def test_goodput_of_an_interrupted_run(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(throughput.time, "time", lambda: now)

    clock = throughput.Clock(now)
    now += 10  # compilation
    clock.run()
    now += 50
    assert clock.goodput() == pytest.approx(50 / 60)
    clock.stop()
    saved = json.loads(json.dumps(clock.get_state()))
    now += 5
    clock.run()
    now += 35  # steps that are lost
    assert clock.goodput() == pytest.approx(85 / 100)

    clock = throughput.Clock(**saved)
    now += 100  # nobody is there
    clock.run()
    now += 50
    assert clock.goodput() == pytest.approx(100 / 250)


def test_a_run_writes_its_rates(tmp_path):
    base = toy_stage.experiment()
    run = dataclasses.replace(base.run, out=str(tmp_path), log_every=2)
    experiment = dataclasses.replace(base, run=run)
    loop.train(toy_stage.toy_stage(experiment))
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        assert values["samples_per_s"] * values["step_s"] == pytest.approx(8)
        assert values["frames_per_s"] * values["step_s"] == pytest.approx(8 * 5)
        # x (8, 4) times w (4, 2), and the gradient of w: the data need none.
        assert values["gflop_per_s"] * values["step_s"] == pytest.approx(2 * 2 * 8 * 4 * 2 / 1e9)
        assert 0 < values["goodput"] < 1 and 0 <= values["data_wait"] < 1
        assert "mfu" not in values and "tokens_per_s" not in values
    longer = dataclasses.replace(experiment, optim=dataclasses.replace(base.optim, steps=8))
    loop.train(toy_stage.toy_stage(longer))
    saved = tmp_path / "checkpoints/8/data/data.json"
    position = json.loads(saved.read_text())
    started = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["time"]
    assert position["clock"]["started"] < started  # that of the first start
