"""The stages on real files, with networks as small as they get."""

import dataclasses
import sys

import jax
import numpy as np
import pytest

from gnvc_jax.media.writer import open_writer
from gnvc_jax.pretrained import load_pretrained
from gnvc_jax.training import release
from gnvc_jax.training.config import DataConfig, Experiment, OptimConfig, RunConfig
from gnvc_jax.training.loop import train
from gnvc_jax.training.stages import make_stage
from gnvc_jax.training.stages.codec import CodecLoss
from gnvc_jax.training.stages.pixel import PixelLoss
from gnvc_jax.training.stages.vae import VAELoss, pixels
from gnvc_jax.vae import VAEConfig, klt

VAE = VAEConfig(
    base=4,
    multipliers=(1, 1, 1),
    blocks=1,
    latent_channels=4,
    temporal_down=(True, True),
    patch=2,
    linear_encoder=True,
)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two videos of moving noise, smooth and rough."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for number, size in enumerate((8, 2)):
        noise = rng.integers(0, 256, (160 // size, 160 // size, 3), np.uint8)
        canvas = noise.repeat(size, 0).repeat(size, 1)
        with open_writer(folder / f"{number}.mkv", 96, 80, 25) as out:
            for t in range(30):
                out.write(canvas[t : t + 80, 2 * t : 2 * t + 96])
    return folder


@pytest.fixture
def vae_experiment(clips, tmp_path):
    return Experiment(
        stage="vae",
        vae=VAE,
        loss=VAELoss(kl=0.0, lpips=0.0),
        data=DataConfig(path=str(clips), frames=5, size=(64, 64), batch=8),
        optim=OptimConfig(lr=1e-3, warmup=1, steps=2),
        run=RunConfig(out=str(tmp_path / "vae"), log_every=1),
    )


def test_a_linear_encoder_is_fitted_to_the_clips(vae_experiment, monkeypatch):
    monkeypatch.setattr("gnvc_jax.training.stages.vae.KLT_BLOCKS", 4000)
    stage = make_stage(vae_experiment)
    params = stage.warm_start(jax.jit(stage.init)(jax.random.key(0)))
    video = np.asarray(pixels(next(iter(stage.dataset()))))

    def error(fitted):
        transform = klt.BlockTransform(4, VAE.stride, VAE.temporal_stride)
        latents = transform.apply({"params": fitted}, video, True, method="forward")
        back = transform.apply({"params": fitted}, latents, True, method="inverse")
        return np.mean((np.asarray(back) - video) ** 2)

    blocks = params["klt"]["later_offset"].size
    basis, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(blocks, 4)))
    other = params["klt"] | {"later_basis": basis.astype(np.float32)}
    assert error(params["klt"]) < 0.75 * error(other)


@pytest.mark.slow
def test_from_clips_to_a_model_that_codes(
    vae_experiment, tiny_codec, tmp_path, monkeypatch, capsys
):
    """vae -> codec -> pixel -> release -> encode -> decode."""
    train(vae_experiment, make_stage(vae_experiment))
    codec = dataclasses.replace(
        vae_experiment,
        stage="codec",
        codec=tiny_codec,
        loss=CodecLoss(vae=vae_experiment.run.out, statistics_batches=1),
        run=dataclasses.replace(vae_experiment.run, out=str(tmp_path / "codec")),
    )
    train(codec, make_stage(codec))
    pixel = dataclasses.replace(
        codec,
        stage="pixel",
        loss=PixelLoss(vae=vae_experiment.run.out, statistics_batches=1),
        init_from=codec.run.out,
        run=dataclasses.replace(codec.run, out=str(tmp_path / "pixel")),
    )
    train(pixel, make_stage(pixel))
    assert "psnr_highest" in capsys.readouterr().out

    config = tmp_path / "config.py"
    config.write_text(
        "from gnvc_jax.training.config import *\n"
        "from gnvc_jax.training.stages.pixel import PixelLoss\n"
        "from gnvc_jax.vae import VAEConfig\n"
        f"experiment = {pixel!r}\n"
    )
    model = tmp_path / "m.safetensors"
    arguments = ["release", "--config", str(config), "--name", "mine", "--out", str(model)]
    monkeypatch.setattr(sys, "argv", arguments)
    release.main()
    coder = load_pretrained(model)
    video = np.random.default_rng(2).integers(0, 256, (6, 64, 64, 3), np.uint8)
    assert coder.decode(coder.encode(video, qp=10)).shape == video.shape
