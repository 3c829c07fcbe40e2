"""The start from statistics: against eigenvectors, against theory of quantisers, and as a codec."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy.integrate import quad

from gnvc_jax.codec.config import CodecConfig
from gnvc_jax.codec.fit import (
    deviation_of_symbols,
    init_from_statistics,
    quantiser_step,
    whitening,
    worth_of_step,
)
from gnvc_jax.codec.model import LatentCodec, init_codec
from gnvc_jax.codec.quality import POSITIONS, interpolate_levels
from gnvc_jax.codec.scales import export, scale_index_numpy, sigma_from_index
from gnvc_jax.coder import Coder
from gnvc_jax.model import build
from gnvc_jax.moments import Moments
from gnvc_jax.training.config import DataConfig, Experiment, OptimConfig
from gnvc_jax.training.networks import make_networks
from gnvc_jax.training.stages import make_stage
from gnvc_jax.training.stages.transform import TransformLoss, fit_to_clips
from gnvc_jax.vae import VAEConfig, init_vae

CONFIG = CodecConfig(
    latent_channels=3, intra_width=8, width=8, intra_analysis=1, intra_synthesis=1, y_channels=8,
    z_channels=4, scale_width=8, entropy_width=16, k_skip=0, inter_context=1, inter_analysis=1,
    inter_synthesis=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    """All zeros: what is looked at below is set by the fit."""
    shapes = jax.eval_shape(lambda key: init_codec(LatentCodec(CONFIG), key), jax.random.key(0))
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


@pytest.fixture(scope="module")
def cells():
    """Vectors (400, 12) of unequal directions."""
    rng = np.random.default_rng(0)
    mix, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    return rng.normal(size=(4000, 12)) * np.geomspace(10.0, 0.05, 12) @ mix


@pytest.fixture(scope="module")
def started(params, cells):
    moments = Moments(12)
    for part in np.array_split(cells, 7):
        moments.add(part)
    return init_from_statistics(
        params, CONFIG, "intra", moments, np.array([4.0, 1.0, 0.01]), 0.1, 10.0
    )


def test_fitted_basis_is_the_eigenvectors_of_numpy(cells, started):
    _, vectors = np.linalg.eigh(np.cov(cells.T))
    best = vectors[:, ::-1][:, :8]
    np.testing.assert_allclose(np.abs(best.T @ started["basis"]), np.eye(8), atol=1e-3)
    np.testing.assert_array_equal(started["inverse"], started["basis"].T)


def test_quantiser_step_minimises_rate_distortion_cost():
    """Rate and distortion of an entropy coded uniform quantiser of a Gaussian, by integration."""
    worth, sigma = 0.5, 40.0

    def cost(step):
        edges = (np.arange(-400, 402) - 0.5) * step
        from scipy.stats import norm

        mass = np.diff(norm.cdf(edges, scale=sigma))
        rate = -np.sum(mass * np.log2(np.maximum(mass, 1e-300)))
        error = 0.0
        for centre in np.arange(-60, 61) * step:
            error += quad(
                lambda x, c=centre: (x - c) ** 2 * norm.pdf(x, scale=sigma),
                centre - step / 2,
                centre + step / 2,
            )[0]
        return rate + worth * error

    steps = quantiser_step(np.array([worth])) * np.array([0.6, 0.8, 1.0, 1.25, 1.6])
    assert np.argmin([cost(step) for step in steps]) == 2


def test_fitted_table_index_matches_the_standard_deviation(cells, started):
    """The integer network gives every coefficient the table of its deviation, at every level."""
    deviations = np.sqrt(np.linalg.eigvalsh(np.cov(cells.T))[::-1][:8])
    network = export(CONFIG, started["entropy"]["scales"])
    steps = quantiser_step(0.1 * 100.0**POSITIONS)
    rng = np.random.default_rng(1)
    nothing = np.zeros((4, 4, 8), int)
    for q_index in (0, 8, 40, 56):
        z = rng.integers(-15, 16, (1, 1, 4))
        index = scale_index_numpy(CONFIG, network, q_index, z, nothing, nothing)
        assert (index == index[:1, :1]).all()  # nothing else is known yet
        step = np.exp(interpolate_levels(np.log(steps)[:, None])[q_index, 0])
        want = np.clip(deviations / step, 0.11, 16.0)
        np.testing.assert_allclose(sigma_from_index(index[0, 0].astype(float)), want, rtol=0.05)


def test_worth_of_a_step_undoes_the_step_of_a_worth():
    assert worth_of_step(quantiser_step(np.array(3.7))) == pytest.approx(3.7)


@pytest.mark.parametrize("sigma", [0.2, 0.5, 1.0, 4.0, 12.0])
def test_deviation_of_symbols_is_that_of_the_gaussian_that_was_rounded(sigma):
    symbols = np.round(np.random.default_rng(0).normal(0.0, sigma, 400_000))
    assert deviation_of_symbols(np.mean(symbols**2)) == pytest.approx(sigma, rel=0.03)


def test_whitening_equalises_channel_variances():
    white = whitening(np.array([4.0, 1.0, 1e-6]))
    assert white[1] / white[0] == pytest.approx(2.0, rel=0.2)
    assert white[2] < 10 * white[1]  # a channel that hardly varies is not blown up


def test_fitted_model_codes_without_training(start, start_codec):
    """More bytes and a better picture from level to level, and symbols in both kinds of latents."""
    rng = np.random.default_rng(2)
    canvas = rng.normal(size=(4, 40, 40, 3)).repeat(4, 1).repeat(4, 2)
    canvas = np.clip(128 + 40 * (canvas + np.roll(canvas, 1, 1) + np.roll(canvas, 1, 2)), 0, 255)
    clips = np.stack([canvas[:, t : t + 128, t : t + 128] for t in range(5)], 1).astype(np.uint8)
    vectors = np.zeros((4, 1, 4, 8, 8, 2), np.int16)
    vectors[...] = 16 * np.arange(1, 5)[:, None, None, None]
    experiment = Experiment(
        stage="transform",
        vae=VAEConfig(latent_channels=24, linear=True, head=4),
        codec=dataclasses.replace(CONFIG, latent_channels=24, y_channels=32, motion="blocks"),
        loss=TransformLoss(),
        data=DataConfig(size=(128, 128), batch=4),
        optim=OptimConfig(),
    )
    stage, networks = make_stage(experiment), make_networks(experiment)
    params = {"vae": start(lambda key: init_vae(networks.vae, key), "last")}
    params["codec"] = start_codec(networks.codec)
    batches = [{"video": clips, "vectors": vectors}]
    params = fit_to_clips(networks, experiment.loss, params, batches)
    statistics = stage.measure()
    model = build("fit", experiment.vae, experiment.codec, params["vae"], params["codec"],
                  statistics["mean"], statistics["std"])  # fmt: skip
    from gnvc_jax.pretrained import Codec

    codec, video = Codec(model), clips[0]
    assert isinstance(codec, Coder)
    streams = [codec.encode(video, qp=qp) for qp in (63, 48, 32, 16, 0)]
    errors = [np.mean((codec.decode(s).astype(float) - video) ** 2) for s in streams]
    assert np.all(np.diff([len(s) for s in streams]) > 0)
    assert np.all(np.diff(errors) < 0)
    assert errors[-1] < 0.3 * errors[0]
