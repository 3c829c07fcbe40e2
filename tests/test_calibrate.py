"""A codec fitted to a VAE: against eigenvectors, against an ideal coder, and as a command."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import gnvc_jax
from gnvc_jax import calibrate
from gnvc_jax.codec.config import SYMBOL_BOUND
from gnvc_jax.codec.fit import deviation_of_symbols
from gnvc_jax.codec.layers import space_to_depth
from gnvc_jax.codec.model import LatentCodec
from gnvc_jax.codec.scales import export, scale_index_numpy, sigma_from_index
from gnvc_jax.demo import camera_move, write_all
from gnvc_jax.errors import UsageError
from gnvc_jax.model import build
from gnvc_jax.model_file import load_model, save_model
from gnvc_jax.vae import VAEConfig


@pytest.fixture(scope="module")
def latents():
    """Clips (12, 5, 16, 16, 4) whose channels correlate, and which change slowly."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(4, 4))
    steps = (
        rng.normal(size=(12, 5, 16, 16, 4))
        * np.array([1.0, 0.3, 0.3, 0.3, 0.3])[:, None, None, None]
    )
    return (np.cumsum(steps, 1) @ mix).astype(np.float32)


@pytest.fixture(scope="module")
def fitted(tiny_codec, latents, start_codec):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "init_codec", lambda codec, key: start_codec(codec))
        params = calibrate.transforms_from_statistics(tiny_codec, latents)
    return calibrate.tables_from_symbols(tiny_codec, params, latents, progress=False)


def test_transforms_are_the_eigenvectors_of_numpy(latents, fitted):
    coded = {"intra": latents[:, :1], "inter": np.diff(latents, axis=1)}
    for kind, x in coded.items():
        _, vectors = np.linalg.eigh(np.cov(space_to_depth(x).reshape(-1, 16).T))
        basis = fitted[kind]["basis"]
        # The subspaces are the same; single directions of equal variance are not.
        best = vectors[:, ::-1][:, :8]
        np.testing.assert_allclose(np.linalg.svd(best.T @ basis)[1], 1.0, atol=0.05)


def test_rate_is_close_to_that_of_an_ideal_coder(tiny_codec, latents, fitted):
    """Bits of the chosen tables against those of each coefficient's own Gaussian."""
    code = jax.jit(LatentCodec(tiny_codec).apply)
    for q_index in (16, 40, 60):
        levels, key = jnp.full(12, q_index), jax.random.key(0)
        output = code({"params": fitted}, jnp.asarray(latents), levels, key)
        assert np.abs(output.symbols.z).max() == 0
        for kind, part in (("intra", np.s_[:, :1]), ("inter", np.s_[:, 1:])):
            symbols = np.asarray(output.symbols.y[part]).reshape(-1, tiny_codec.y_channels)
            network = export(tiny_codec, fitted[kind]["entropy"]["scales"])
            z, zeros = np.zeros((2, 2, 4), int), np.zeros((8, 8, 8), int)
            index = scale_index_numpy(tiny_codec, network, q_index, z, zeros, zeros)[0, 0]
            rates = []
            for sigma in (sigma_from_index(index.astype(float)),
                          deviation_of_symbols(np.mean(symbols**2, 0))):  # fmt: skip
                mass = norm.cdf(symbols + 0.5, 0, sigma) - norm.cdf(symbols - 0.5, 0, sigma)
                rates.append(-np.log2(np.maximum(mass, 1e-9)).sum())
            assert rates[0] < 1.03 * rates[1]


def test_rare_large_differences_stay_within_the_range_of_symbols(
    tiny_codec, latents, start_codec, monkeypatch
):
    """At the best level, too, where steps are smallest; otherwise quality would fall with rate."""
    monkeypatch.setattr(calibrate, "init_codec", lambda codec, key: start_codec(codec))
    rare = latents.copy()
    rare[3, 2:, 4:6, 4:6] += 200.0
    params = calibrate.transforms_from_statistics(tiny_codec, rare)
    code, key = jax.jit(LatentCodec(tiny_codec).apply), jax.random.key(0)

    def symbols(params):
        output = code({"params": params}, jnp.asarray(rare), jnp.full(12, 63), key)
        return np.abs(output.symbols.y).max()

    assert symbols(params) == SYMBOL_BOUND  # clipped
    assert 0.5 * SYMBOL_BOUND < symbols(calibrate.within_range(params, rare)) < SYMBOL_BOUND


def test_fitted_codec_survives_its_file(tiny_codec, fitted, tmp_path):
    """Transposed arrays, too: the loader compares the contents with the fingerprints."""
    vae = {"klt": {"basis": np.arange(16, dtype=np.float32).reshape(4, 4).T}}
    config, ones = VAEConfig(latent_channels=4, linear=True), np.ones(4)
    save_model(
        tmp_path / "a.safetensors", build("a", config, tiny_codec, vae, fitted, 0 * ones, ones)
    )
    found = load_model(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(found.vae["klt"]["basis"], vae["klt"]["basis"])
    np.testing.assert_allclose(
        found.codec["inter"]["inverse"], fitted["inter"]["inverse"], atol=1e-3
    )


def test_what_does_not_fit_the_vae_is_refused(tmp_path):
    for arguments, message in (
        ({"size": (250, 256)}, "size 256x250: expected multiples of 64"),
        ({"frames": 1}, "frames 1: at least one latent"),
        ({"frames": 6}, "frames 6: expected 1 \\+ 4k"),
    ):
        with pytest.raises(UsageError, match=message):
            calibrate.calibrate(tmp_path, "small", **arguments)


@pytest.mark.slow
def test_command_makes_a_model_that_codes(tmp_path):
    """With the linear VAE of the shipped model; files grow and errors fall with the level."""
    video, path = camera_move(9)[:, :128, :128], tmp_path / "clip.mkv"
    write_all(path, video, 25)
    out = tmp_path / "model.safetensors"
    command = [sys.executable, "-m", "gnvc_jax.cli", "calibrate", "--vae", "small"]
    command += ["--data", str(path), "--out", str(out), "--clips", "8", "--frames", "9"]
    command += ["--size", "128x128", "--no-progress"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == f"{out}\n"
    codec = gnvc_jax.load_pretrained(out)
    assert codec.model.name == "model" and codec.steps == 0
    streams = [codec.encode(video, qp=qp) for qp in (60, 40, 20, 0)]
    errors = [np.mean((codec.decode(s).astype(float) - video) ** 2) for s in streams]
    assert np.all(np.diff([len(s) for s in streams]) > 0)
    assert np.all(np.diff(errors) < 0)
    assert errors[-1] < 0.4 * errors[0]
