"""The public loaders, against what diffusers gave with the same weights and against the coder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

import gnvc_jax
from gnvc_jax.api import with_refiner
from gnvc_jax.errors import UsageError
from gnvc_jax.functions import CodecFunctions
from gnvc_jax.model_file import save_model
from gnvc_jax.porting.port import port


def last(x):
    return rearrange(x, "b c t h w -> b t h w c")


@pytest.fixture
def model_file(tiny_model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, tiny_model(3, refiner=True))
    return path


def test_ported_vae_gives_normalised_latents_of_the_reference(public, golden, tmp_path):
    arrays, config, _ = golden("vae")
    port(public("vae"), tmp_path / "ported", progress=False)
    vae = gnvc_jax.load_vae(tmp_path / "ported")
    mean, std = np.asarray(config["latents_mean"]), np.asarray(config["latents_std"])
    # The golden video leaves [-1, 1], which is only checked outside of `jit`.
    latents = jax.jit(vae.encode)(last(arrays["video"]))
    expected = (last(arrays["latents"]) - mean) / std
    np.testing.assert_allclose(latents, expected, atol=1e-4 * np.abs(expected).max())
    decoded = vae.decode(expected, frames=9, size=(24, 40))
    expected = np.clip(last(arrays["decoded"]), -1, 1)
    np.testing.assert_allclose(decoded, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["dit", "vace"])
def test_ported_refiner_starts_as_the_reference(name, public, golden, tmp_path):
    """Its velocity is the DiT's with the sign changed, whatever the codec's features are."""
    arrays, _, _ = golden(name)
    port(public(name), tmp_path / "ported", progress=False)
    refiner = gnvc_jax.load_refiner(tmp_path / "ported", features=3, context_every=1)
    state = last(arrays["hidden_states"])
    tau = 1.0 - arrays["timestep"] / 1000.0
    text = arrays["encoder_hidden_states"]
    refiner = type(refiner)(refiner.config, refiner.params, text)
    features = np.random.default_rng(0).normal(size=(*state.shape[:-1], 3)).astype(np.float32)
    got = refiner.velocity(
        state, tau.astype(np.float32), state, features, np.full(state.shape[:2], 20)
    )
    if name == "dit":
        expected = -last(arrays["output"])
        np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())
    assert np.isfinite(got).all()


def test_ported_dit_refines_without_context_blocks(public, golden, tmp_path):
    """For zero-shot refinement: its own velocity, at its own cost, with nothing that is new."""
    arrays, _, _ = golden("dit")
    port(public("dit"), tmp_path / "ported", progress=False)
    refiner = gnvc_jax.load_refiner(tmp_path / "ported", features=3, context_every=0)
    assert set(refiner.params) == {"dit", "quality"} and not refiner.config.dit.context_every
    refiner = type(refiner)(refiner.config, refiner.params, arrays["encoder_hidden_states"])
    state, tau = last(arrays["hidden_states"]), np.float32(1.0 - arrays["timestep"] / 1000.0)
    features = np.ones((*state.shape[:-1], 3), np.float32)
    got = refiner.velocity(state, tau, 0 * state, features, np.full(state.shape[:2], 20))
    expected = -last(arrays["output"])
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


def test_only_a_refiner_of_the_same_latents_is_taken(public, tiny_model, model_file, tmp_path):
    """Of a model, its VAE and its codec; what does not fit is said before weights are read."""
    public("vae")
    port(public("dit"), tmp_path / "ported", progress=False)
    model = tiny_model(0)
    with pytest.raises(UsageError, match="latents of 16 channels, those of test have 4; use the"):
        with_refiner(model, tmp_path / "ported")
    with pytest.raises(UsageError, match="test normalises latents unlike the vae in"):
        wide = dataclasses.replace(model.vae_config, latent_channels=16)
        statistics = {"mean": np.zeros(16), "std": np.ones(16)}
        with_refiner(dataclasses.replace(model, vae_config=wide, **statistics), tmp_path / "ported")
    with pytest.raises(UsageError, match=r"flow time in \[0, 1\), got 1"):
        with_refiner(model, model_file, start=1.0)
    wide = dataclasses.replace(model.codec_config, width=12)
    with pytest.raises(UsageError, match="takes 8 features of a codec, test has 12"):
        with_refiner(dataclasses.replace(model, codec_config=wide), model_file)
    # A refiner that was trained for another model of the same VAE keeps what it was trained for.
    taken, trained = with_refiner(model, model_file), tiny_model(3, refiner=True)
    assert taken.refiner_config == trained.refiner_config
    assert taken.fingerprints == model.fingerprints != trained.fingerprints


def test_refiner_of_a_model_file_refines_as_the_coder_does(model_file, tiny_model):
    refiner = gnvc_jax.load_refiner(model_file)
    rng = np.random.default_rng(1)
    decoded = rng.normal(size=(1, 3, 8, 8, 4)).astype(np.float32)
    features = rng.normal(size=(1, 3, 8, 8, refiner.config.features)).astype(np.float32)
    got = refiner.refine(decoded, features, q_index=[40, 12, 12], steps=2, seed=5)
    functions = CodecFunctions(tiny_model(3, refiner=True))
    levels = jnp.asarray([[40, 12, 12]])
    expected = functions.refine(jnp.asarray(decoded), jnp.asarray(features), levels, 5, 2)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.abs(got - decoded).max() > 1e-3
    one = refiner.refine(decoded, features, q_index=12, steps=2, seed=5)
    assert np.abs(got - one).max() > 1e-3
    np.testing.assert_array_equal(refiner.refine(decoded, steps=0), decoded)


def test_vae_of_a_model_file_codes_video_of_any_size(model_file):
    vae = gnvc_jax.load_vae(model_file)
    video = np.random.default_rng(2).integers(0, 256, (6, 20, 36, 3), np.uint8)
    latents = vae.encode(video)
    assert latents.shape == (1, 3, 3, 5, 4)
    frames = vae.decode(latents, frames=6, size=(20, 36))
    assert frames.shape == (1, 6, 20, 36, 3)
    whole = vae.decode(latents)
    assert whole.shape == (1, 9, 24, 40, 3)
    np.testing.assert_array_equal(frames, whole[:, :6, :20, :36])
    # Floats of the same values, with the axis of a batch.
    again = vae.encode(video[None] / np.float32(127.5) - 1)
    np.testing.assert_allclose(again, latents, atol=1e-4)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.zeros((5, 16, 16), np.uint8), "expected \\(frames, height, width, 3\\)"),
        (np.zeros((5, 16, 16, 4), np.uint8), "expected \\(frames, height, width, 3\\)"),
        (np.zeros((0, 16, 16, 3), np.uint8), "expected \\(frames, height, width, 3\\)"),
        (np.zeros((5, 16, 16, 3), np.int32), "int32, expected uint8, or float"),
        (np.full((1, 16, 16, 3), 255.0), "values in \\[255, 255\\], expected \\[-1, 1\\]"),
        (np.full((1, 16, 16, 3), np.nan), "expected \\[-1, 1\\]"),
    ],
)
def test_what_is_no_video_is_refused(model_file, video, message):
    with pytest.raises(UsageError, match=message):
        gnvc_jax.load_vae(model_file).encode(video)


def test_what_a_folder_or_model_lacks_is_named(public, tiny_model, tmp_path):
    port(public("vae"), tmp_path / "ported", progress=False)
    with pytest.raises(FileNotFoundError, match="holds vae, but no ported dit"):
        gnvc_jax.load_refiner(tmp_path / "ported")
    save_model(tmp_path / "plain.safetensors", tiny_model(0))
    with pytest.raises(UsageError, match="this model has no refiner"):
        gnvc_jax.load_refiner(tmp_path / "plain.safetensors")
    with pytest.raises(
        FileNotFoundError, match=r"neither a shipped model \(small\) nor a model file nor a run"
    ):
        gnvc_jax.load_vae(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"expected \(b, n, h, w, 4\)"):
        gnvc_jax.load_vae(tmp_path / "plain.safetensors").decode(np.zeros((1, 2, 8, 8, 5)))
