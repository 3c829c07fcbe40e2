"""The stages on real files, with networks as small as they get."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from gnvc_jax.frames import to_float
from gnvc_jax.media.writer import open_writer
from gnvc_jax.model_file import load_model
from gnvc_jax.parallel import MeshConfig
from gnvc_jax.pretrained import load_pretrained
from gnvc_jax.training import stages
from gnvc_jax.training.config import (
    DataConfig,
    EvaluationConfig,
    Experiment,
    InitConfig,
    OptimConfig,
    RunConfig,
)
from gnvc_jax.training.release import release
from gnvc_jax.training.stages import make_stage
from gnvc_jax.training.stages.codec import CodecLoss
from gnvc_jax.training.stages.pixel import PixelLoss
from gnvc_jax.training.stages.vae import VAELoss
from gnvc_jax.vae import VAEConfig, klt

ROOT = Path(__file__).parents[2]
VAE = VAEConfig(
    base=4,
    multipliers=(1, 1, 1),
    blocks=1,
    latent_channels=4,
    temporal_down=(True, True),
    patch=2,
    linear=True,
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
        mesh=MeshConfig(data=1),
        optim=OptimConfig(lr=1e-3, warmup=1, steps=2),
        run=RunConfig(out=str(tmp_path / "vae"), log_every=1),
    )


def test_a_linear_encoder_is_fitted_to_the_clips(vae_experiment, monkeypatch):
    monkeypatch.setattr("gnvc_jax.training.stages.vae.KLT_BLOCKS", 4000)
    stage = make_stage(vae_experiment)
    params = stages.start(stage, jax.jit(stage.init)(jax.random.key(0)), {})["vae"]
    video = np.asarray(to_float(next(iter(stage.data.batches(stage.experiment.data.shape_at(0))))))

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
def test_from_clips_to_a_model_that_codes(vae_experiment, clips, tiny_codec, tmp_path):
    """train.py vae -> codec -> pixel -> release -> encode -> decode, each in its own process."""
    vae = dataclasses.replace(
        vae_experiment, data=dataclasses.replace(vae_experiment.data, batch=2)
    )
    codec = dataclasses.replace(
        vae,
        stage="codec",
        codec=tiny_codec,
        init=InitConfig(vae=vae.run.out),
        loss=CodecLoss(),
        run=dataclasses.replace(vae.run, out=str(tmp_path / "codec")),
        evaluate=EvaluationConfig(every=1, data=str(clips), frames=5, clips=1),
    )
    pixel = dataclasses.replace(
        codec,
        stage="pixel",
        train=("codec/", "vae/klt"),
        init=InitConfig(run=codec.run.out),
        loss=PixelLoss(lpips_net="alex"),
        run=dataclasses.replace(codec.run, out=str(tmp_path / "pixel")),
    )

    def run(experiment: Experiment, *command: str) -> str:
        config = tmp_path / f"{experiment.stage}.py"
        config.write_text(
            "from gnvc_jax.codec.config import CodecConfig\n"
            "from gnvc_jax.parallel import MeshConfig\n"
            "from gnvc_jax.training.config import *\n"
            "from gnvc_jax.training.stages.codec import CodecLoss\n"
            "from gnvc_jax.training.stages.pixel import PixelLoss\n"
            "from gnvc_jax.training.stages.vae import VAELoss\n"
            "from gnvc_jax.vae import VAEConfig\n"
            f"experiment = {experiment!r}\n"
        )
        # One device, and no optimisation: two steps do not repay what compilation costs even so.
        env = os.environ | {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        command = [sys.executable, *command, "--config", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for experiment, metric in ((vae, "psnr"), (codec, "eval_score"), (pixel, "eval_score")):
        assert metric in run(experiment, "train.py")
    assert load_model(Path(codec.run.out, "best.safetensors")).codec_config == tiny_codec
    model = tmp_path / "m.safetensors"
    release(pixel.run.out, model)
    coder = load_pretrained(model)
    video = np.random.default_rng(2).integers(0, 256, (6, 64, 64, 3), np.uint8)
    assert coder.decode(coder.encode(video, qp=10)).shape == video.shape
