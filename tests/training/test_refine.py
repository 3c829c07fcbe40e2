"""The stage `refine`: what it shows to its losses, and what these are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gnvc_jax
from gnvc_jax.demo import camera_move
from gnvc_jax.metrics.backbones import load_weights
from gnvc_jax.metrics.dists import load_dists
from gnvc_jax.refiner import DiTConfig, RefinerConfig
from gnvc_jax.training.config import DataConfig, Experiment, InitConfig
from gnvc_jax.training.networks import init_networks, make_networks
from gnvc_jax.training.stages.refine import RefinedFrames, RefineLoss, refine_loss, refined_frames

DIT = DiTConfig(24, 24, 2, 1, 8, 96, text_length=0, context_every=1, context_channels=96)


@pytest.fixture(scope="module")
def experiment():
    model = gnvc_jax.load_pretrained("small").model
    return Experiment(
        stage="refine",
        vae=model.vae_config,
        codec=model.codec_config,
        refiner=RefinerConfig(DIT, model.codec_config.width, 3, 1, noise=0.0, deviation=0.5),
        loss=RefineLoss(),
        data=DataConfig(size=(64, 64), frames=13, batch=1),
        init=InitConfig(run="a codec"),
    )


def test_untrained_refiner_leaves_frames_as_they_are(experiment):
    """In whatever window; one with random weights in its last layer changes them."""
    networks, model = make_networks(experiment), gnvc_jax.load_pretrained("small").model
    params = init_networks(networks, jax.random.key(0))
    params |= jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), {"vae": model.vae, "codec": model.codec}
    )
    constants = {"white": np.full((2, 96), 2.0, np.float32), "text": None}
    batch = {
        "video": camera_move(13)[None, :, 64:128, 64:128],
        "vectors": np.zeros((1, 3, 4, 4, 4, 2), np.int16),
        "q_index": np.array([30]),
    }

    @jax.jit
    def show(params, batch, key):
        return refined_frames(networks, experiment.loss, params, constants, batch, key)

    for seed in range(3):
        frames = show(params, batch, jax.random.key(seed))
        assert frames.refined.shape == (1, 8, 64, 64, 3)
        np.testing.assert_allclose(frames.refined, frames.decoded, atol=1e-5)
        np.testing.assert_allclose(frames.first[0], frames.first[1], atol=1e-5)
        # Decoded frames are those of the source that they stand for.
        assert np.mean((frames.decoded - frames.source) ** 2) < 0.05
    head = params["refiner"]["dit"]["head"]["kernel"]
    head = head + np.random.default_rng(0).normal(0, 0.1, head.shape).astype(np.float32)
    params["refiner"]["dit"]["head"]["kernel"] = head
    frames = show(params, batch, jax.random.key(0))
    assert np.abs(frames.refined - frames.decoded).max() > 1e-2


def test_loss_of_perfect_frames_is_zero_and_that_of_others_is_not():
    rng = np.random.default_rng(1)
    source = np.float32(camera_move(9)[None, :, :64, :64]) / 127.5 - 1
    constants = {"alex": load_weights("alex"), "dists": load_dists()}

    def loss(weights, noise, error):
        refined = source + noise * rng.normal(size=source.shape).astype(np.float32)
        first = refined[:, :1], source[:, :1], source[:, :1]
        frames = RefinedFrames(
            refined[:, 1:], source[:, 1:], source[:, 1:], first, jnp.full((1,), error)
        )
        return float(refine_loss(weights, constants, frames, jax.random.key(0))[0])

    assert loss(RefineLoss(), 0.0, 0.0) == pytest.approx(0.0, abs=1e-5)
    nothing = RefineLoss(0.0, 0.0, 0.0, 0.0, 0.0)
    for term in ("squared", "lpips", "dists", "temporal", "latent"):
        assert loss(dataclasses.replace(nothing, **{term: 1.0}), 0.05, 1.0) > 1e-3, term
