"""The stage `refine`: what it shows to its losses, and what these are."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gnvc_jax
from gnvc_jax import cli
from gnvc_jax.cache_coded import cache_coded
from gnvc_jax.data.latents import read_info
from gnvc_jax.demo import camera_move
from gnvc_jax.errors import UsageError
from gnvc_jax.media.writer import open_writer
from gnvc_jax.pretrained import Codec
from gnvc_jax.refiner import DiTConfig, RefinerConfig
from gnvc_jax.training.config import DataConfig, Experiment, InitConfig
from gnvc_jax.training.discriminator import AdversarialConfig, init_discriminator
from gnvc_jax.training.networks import init_networks, make_networks
from gnvc_jax.training.stages.refine import (
    CODEC_METRICS,
    RefinedFrames,
    RefineLoss,
    from_cache,
    refine_loss,
    refine_stage,
    refined_frames,
    rolled_out,
)

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


def random_parameters(networks):
    """Random values in all parameters, also in those that training starts at zero."""
    shapes = jax.eval_shape(lambda key: init_networks(networks, key), jax.random.key(0))
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda x: jnp.asarray(draw(0, 0.1, x.shape), jnp.float32), shapes)


def test_untrained_refiner_leaves_frames_as_they_are(experiment, rolled):
    """In whatever window; one with random weights in its last layer changes them."""
    networks, model = make_networks(experiment), gnvc_jax.load_pretrained("small").model
    params = random_parameters(networks) | {"vae": model.vae, "codec": model.codec}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    head = params["refiner"]["dit"]["head"]
    last, head["kernel"] = head["kernel"], jnp.zeros_like(head["kernel"])
    head["bias"] = jnp.zeros_like(head["bias"])
    constants = {"white": np.full((2, 96), 2.0, np.float32), "text": None}
    batch = {
        "video": camera_move(13)[None, :, 64:128, 64:128],
        "vectors": np.zeros((1, 3, 4, 4, 4, 2), np.int16),
        "motion_bits": np.zeros((1, 3), np.float32),
        "q_index": np.array([30]),
    }

    @jax.jit
    def show(params, batch, key):
        coded = rolled_out(networks, experiment.loss, params, batch, key)
        return refined_frames(networks, params, constants, coded, key)

    for seed in range(3):
        frames = show(params, batch, jax.random.key(seed))
        assert frames.refined.shape == (1, 8, 64, 64, 3)
        np.testing.assert_allclose(frames.refined, frames.decoded, atol=1e-5)
        np.testing.assert_allclose(frames.first[0], frames.first[1], atol=1e-5)
        # Decoded frames are those of the source that they stand for.
        assert np.mean((frames.decoded - frames.source) ** 2) < 0.05
    head["kernel"] = last
    frames = show(params, batch, jax.random.key(0))
    assert np.abs(frames.refined - frames.decoded).max() > 1e-2


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_codec_gets_gradients_of_refined_frames_only_where_its_loss_has_a_weight(
    experiment, weight, rolled
):
    loss = dataclasses.replace(experiment.loss, codec=weight)
    narrow = {"intra_width": 8, "width": 8, "scale_width": 8, "entropy_width": 8, "z_channels": 4}
    codec = dataclasses.replace(experiment.codec, **narrow)
    refiner = dataclasses.replace(experiment.refiner, features=8)
    small = dataclasses.replace(experiment, codec=codec, refiner=refiner, loss=loss)
    trainable = refine_stage(small).trainable
    networks = make_networks(small)
    params = random_parameters(networks)
    constants = {"white": np.full((2, 96), 2.0, np.float32), "text": None}

    @jax.jit
    def gradient(codec, batch, key):
        """Of the error of refined frames alone, without the codec's own loss."""

        def error(codec):
            coded = rolled_out(networks, loss, params | {"codec": codec}, batch, key)
            found = refined_frames(networks, params, constants, coded, key)
            return jnp.mean((found.refined - found.source) ** 2)

        return jax.grad(error)(codec)

    batch = {
        "video": camera_move(13)[None, :, 64:128, 64:128],
        "vectors": np.zeros((1, 3, 4, 4, 4, 2), np.int16),
        "motion_bits": np.zeros((1, 3), np.float32),
        "q_index": np.array([60]),
    }
    found = gradient(params["codec"], batch, jax.random.key(1))
    trained = any(np.any(x) for x in jax.tree.leaves(found))
    assert trained == ("codec/" in trainable) == bool(weight)


@pytest.fixture(scope="module")
def coded_folder(tmp_path_factory):
    """A clip of 17 frames of which the shipped model coded two parts of 64x64."""
    folder = tmp_path_factory.mktemp("coded")
    with open_writer(folder / "a.mkv", 96, 96, 25) as out:
        for frame in camera_move(17)[:, 40:136, 40:136]:
            out.write(frame)
    arguments = ["--data", folder / "a.mkv", "--to", folder / "cache", "--frames", 17]
    arguments += ["--size", 64, "--parts", 2]
    assert cli.main(["cache-coded", *map(str, arguments)]) == 0
    return folder


def test_refiner_trains_on_what_the_decoder_shows(experiment, coded_folder):
    """Frames of a cache, changed by a refiner as the stage does, against `decode` of a stream."""
    cache, model = coded_folder / "cache", gnvc_jax.load_pretrained("small").model
    # Windows of latents 0 to 2 and 2 to 4: latents 0 and 1 are in one of them only.
    refiner = dataclasses.replace(model.refiner_config, window=3, overlap=1)
    codec = Codec(dataclasses.replace(model, refiner_config=refiner))
    assert read_info(cache).codec == codec.model.fingerprints[0].hex()
    data = DataConfig(latents=str(cache), frames=17, size=(64, 64), batch=2)
    start = InitConfig(model="small")
    given = dataclasses.replace(experiment, data=data, init=start, refiner=refiner)
    stage = refine_stage(given)
    batch = next(iter(stage.data.batches(data.shape_at(0))))
    for name, shape in stage.data.shapes(data.shape_at(0)).items():
        assert (batch[name].shape, batch[name].dtype) == (shape.shape, shape.dtype), name
    assert (batch["video"][0] != batch["video"][1]).any()
    video, levels = batch["video"][0], batch["levels"][0]
    stream = codec.encode(video, qp=63 - int(levels[-1]), gop=17)
    np.testing.assert_array_equal(codec.decode(stream, steps=0), batch["frames"][0])
    constants, parts = {"white": model.white, "text": None}, {"vae": model.vae}
    parts |= {"refiner": model.refiner}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), parts)
    networks = make_networks(given)
    show = jax.jit(lambda key: refined_frames(networks, params, constants, from_cache(batch), key))
    keys = (jax.random.key(seed) for seed in range(20))
    found = next(x for x in map(show, keys) if jnp.abs(x.first[0] - x.first[1]).max() > 1e-3)
    frames = jnp.concatenate([found.first[0], found.refined[:, :4]], axis=1)[0]
    shown = np.clip((np.asarray(frames) + 1) * 127.5, 0, 255)
    theirs = codec.decode(stream, steps=1)[:5]
    assert np.abs(shown - theirs).max() < 1.0  # rounding, half floats
    assert np.abs(theirs.astype(int) - batch["frames"][0, :5]).max() > 2


def test_coded_clips_of_another_model_or_with_a_codec_to_train_are_refused(
    experiment, coded_folder, tmp_path
):
    data = DataConfig(latents=str(coded_folder / "cache"), frames=17, size=(64, 64), batch=1)
    given = dataclasses.replace(experiment, data=data, init=InitConfig(model="small"))
    trained = dataclasses.replace(given, loss=RefineLoss(codec=1.0))
    for wrong in (trained, dataclasses.replace(given, init=InitConfig(run="a run"))):
        with pytest.raises(UsageError, match=r"loss\.codec = 0, and init\.model"):
            refine_stage(wrong)
    facts = json.loads((coded_folder / "cache" / "cache.json").read_text())
    (tmp_path / "cache.json").write_text(json.dumps(facts | {"codec": "00"}))
    other = dataclasses.replace(given, data=dataclasses.replace(data, latents=str(tmp_path)))
    with pytest.raises(UsageError, match="that the codec of the experiment coded, found others"):
        refine_stage(other).data.batches(data.shape_at(0))
    longer = dataclasses.replace(data, frames=21)
    with pytest.raises(UsageError, match="expected clips of at least 21 frames, found 17"):
        refine_stage(given).data.batches(longer.shape_at(0))
    with pytest.raises(UsageError, match="multiple of 64, got 96"):
        cache_coded(coded_folder / "a.mkv", tmp_path / "new", "small", 17, 96)


def distance_of_means(weights, x, y):
    """In place of the networks of LPIPS and DISTS, which have tests of their own."""
    assert x.ndim == 4 and x.shape == y.shape
    return weights * jnp.abs(x.mean((1, 2, 3)) - y.mean((1, 2, 3)))


def test_loss_is_zero_for_perfect_frames_and_the_weighted_sum_of_its_terms_for_others(monkeypatch):
    for name in ("lpips", "dists"):
        monkeypatch.setattr(f"gnvc_jax.training.stages.refine.{name}", distance_of_means)
    rng, weights = np.random.default_rng(1), RefineLoss(codec=0.5)
    adversarial = AdversarialConfig(weight=0.05, warmup=0, width=4, downscale=2)
    judge = init_discriminator(adversarial, jax.random.key(1))["discriminator"]
    source = np.float32(camera_move(9)[None, :, :64, :64]) / 127.5 - 1
    constants = {"alex": 3.0, "dists": 5.0}

    @functools.partial(jax.jit, static_argnums=2)
    def loss(refined, error, weights=weights, seed=0):
        first = refined[:, :1], source[:, :1], source[:, :1]
        codec = jnp.float32(7.0), {name: jnp.ones(()) for name in CODEC_METRICS}
        pair = refined[:, 1:], source[:, 1:], source[:, 1:]
        frames = RefinedFrames(*pair, first, error, codec, jnp.array([20]))
        return refine_loss(weights, constants, frames, jax.random.key(seed), judge, jnp.int32(0))

    # What is left is the loss of the codec.
    assert loss(source, jnp.zeros(1))[0] == pytest.approx(0.5 * 7.0, abs=1e-5)
    noise = 0.05 * rng.normal(1.0, size=source.shape).astype(np.float32)
    total, terms = loss(source + noise, jnp.ones(1))
    squared = np.mean((np.clip(source + noise, -1, 1) - source) ** 2)
    temporal = np.mean(np.diff(noise[:, 1:], axis=1) ** 2)
    assert terms["temporal"] == pytest.approx(temporal, rel=1e-3)
    means = np.abs((np.clip(source + noise, -1, 1) - source).mean((0, 2, 3, 4)))  # of each frame
    assert terms["lpips"] == pytest.approx(3.0 * means.mean(), rel=1e-3)
    # DISTS sees a quarter of one of the frames, with values from 0 to 1.
    change = np.clip(source + noise, -1, 1) - source
    quarters = [
        np.abs(change[:, :, top : top + 32, left : left + 32].mean((0, 2, 3, 4)))
        for top in range(33)
        for left in range(33)
    ]
    assert np.isclose(terms["dists"], 5.0 * np.stack(quarters) / 2, rtol=1e-3).any()
    expected = (
        weights.squared * squared
        + weights.lpips * terms["lpips"]
        + weights.dists * terms["dists"]
        + weights.temporal * temporal
        + weights.latent
        + 0.5 * 7.0
    )
    assert float(total) == pytest.approx(float(expected), rel=1e-3)
    # Losses may see a part of the frames: here, where all of the error is.
    corner = np.zeros_like(noise)
    corner[:, :, :40, :40] = noise[:, :, :40, :40]
    part = dataclasses.replace(weights, part=40)
    errors = [loss(source + corner, jnp.ones(1), part, seed)[1]["temporal"] for seed in range(30)]
    whole = np.mean(np.diff(corner[:, 1:, :40, :40], axis=1) ** 2)
    assert max(errors) <= 1.1 * whole and min(errors) < 0.6 * whole
    # A discriminator adds its verdict of refined frames.
    against = dataclasses.replace(weights, adversarial=adversarial)
    more, found = loss(source + noise, jnp.ones(1), against)
    assert float(more - total) == pytest.approx(0.05 * float(found["generator"]), rel=1e-2)
    assert found.keys() - terms.keys() == {"generator", "discriminator"}
    # The only clip is of the second band of levels; the codec's loss is not part of its mean.
    np.testing.assert_array_equal(terms["levels/loss"].count, [0, 1, 0, 0])
    np.testing.assert_allclose(terms["levels/loss"].total, [0, total - 3.5, 0, 0], rtol=1e-5)
