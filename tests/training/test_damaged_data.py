"""A run over videos of which one is damaged."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import toy_stage

from gnvc_jax.data import index
from gnvc_jax.data.left_out import TooMuchLeftOut
from gnvc_jax.media.writer import open_writer
from gnvc_jax.training import inputs
from gnvc_jax.training.config import DataConfig
from gnvc_jax.training.loop import train
from gnvc_jax.training.stages import Stage


def brightness(experiment):
    """Learns the mean of all pixels; reads videos as every stage does."""

    def loss(params, constants, batch, key, step):
        return jnp.mean((params["w"] - batch.astype(jnp.float32) / 255) ** 2), {}

    return Stage(experiment, lambda key: {"w": jnp.zeros(())}, loss, inputs.clips(experiment))


@pytest.fixture
def experiment(tmp_path):
    """Twelve videos, one of them damaged in its last quarter, another wholly."""
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for number in range(12):
        with open_writer(tmp_path / "data" / f"{number:02}.mkv", 16, 16, 25) as out:
            for _ in range(24):
                out.write(rng.integers(0, 256, (16, 16, 3), np.uint8))
    half = tmp_path / "data" / "03.mkv"
    data = bytearray(half.read_bytes())
    for at in range(len(data) * 3 // 4, len(data) * 3 // 4 + 300):
        data[at] ^= 255
    half.write_bytes(data)
    (tmp_path / "data" / "07.mkv").write_bytes(b"no video")
    base = toy_stage.experiment()
    return dataclasses.replace(
        base,
        data=DataConfig(
            path=str(tmp_path / "data"),
            size=(16, 16),
            batch=8,
            clip_length_schedule=((10, 9),),
            max_left_out=0.2,
        ),
        optim=dataclasses.replace(base.optim, steps=20),
        run=dataclasses.replace(base.run, out=str(tmp_path / "run"), log_every=10),
    )


def test_the_run_goes_on_and_says_what_it_left_out(experiment, tmp_path, monkeypatch):
    probed = []
    probe = index.probe
    monkeypatch.setattr(index, "probe", lambda path: probed.append(path) or probe(path))
    assert train(brightness(experiment)) is not None
    assert len(probed) == 12  # once a run, although clips change their length
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["left_out"] for line in lines] == [2, 2]
    lines = (tmp_path / "run" / "left_out-0.jsonl").read_text().splitlines()
    found = {json.loads(line)["name"][-6:]: json.loads(line)["reason"] for line in lines}
    assert sorted(found) == ["03.mkv", "07.mkv"] and all(found.values())


def test_more_than_the_accepted_share_ends_the_run(experiment):
    few = dataclasses.replace(experiment.data, max_left_out=0.1)
    experiment = dataclasses.replace(experiment, data=few)
    with pytest.raises(TooMuchLeftOut, match=r"2 of 12 cannot be read, more than .* 0\.1"):
        train(brightness(experiment))
