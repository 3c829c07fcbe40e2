"""Coding with a linear VAE: block motion, levels of a group, strides other than 4 and 8."""

import dataclasses
import io

import cv2
import jax
import numpy as np
import pytest

from gnvc_jax import model as models
from gnvc_jax.bitstream import StreamReader
from gnvc_jax.bitstream.errors import EntropyError, WrongModel
from gnvc_jax.coder import Coder
from gnvc_jax.frames import to_float


@pytest.fixture(scope="module")
def coder(tiny_model):
    return Coder(tiny_model())


@pytest.fixture(scope="module")
def moving(tiny_model):
    """A coder with block motion over a linear VAE, and a model that nothing was trained in."""
    return Coder(tiny_model(motion=True))


def pan(frames: int, h: int, w: int) -> np.ndarray:
    """A window that moves over a smooth random picture."""
    canvas = np.random.default_rng(4).integers(0, 256, (h + 60, w + 60, 3), np.uint8)
    canvas = cv2.GaussianBlur(canvas, None, 3.0)
    return np.stack([canvas[t : t + h, 2 * t : 2 * t + w] for t in range(frames)])


def through(coder, video, qp=10, gop=9):
    """Stream and decoded frames."""
    out = io.BytesIO()
    t, h, w, _ = video.shape
    assert coder.encode_frames(video, out, coder.header(w, h, (25, 1), gop=gop), qp=qp) == t
    with StreamReader(out.getvalue()) as reader:
        return out.getvalue(), np.stack(list(coder.decode_frames(reader)))


@pytest.mark.parametrize(
    # Padded to 64x64 and 64x128, so that two sizes are compiled.
    "shape",
    [(1, 40, 70), (2, 64, 64), (10, 40, 70), (6, 17, 100), (5, 16, 16)],
)
def test_motion_at_any_size_and_length(moving, shape):
    video = pan(*shape)
    stream, frames = through(moving, video)
    assert frames.shape == video.shape and frames.dtype == np.uint8
    with StreamReader(stream) as reader:
        header, groups = reader.header, list(reader.groups())
        fields = [f for g in groups for f in moving.fields(header, g)]
    assert len(fields) == sum(len(g.q_indices) - 1 for g in groups)
    if shape[0] == 10:
        assert any(np.abs(f.coarse).max() > 0 for f in fields)


def test_decoder_and_encoder_agree_on_every_latent(moving):
    """Decoded frames are those that the encoder predicted from, to the bit, group after group."""
    video = pan(18, 64, 64)
    stream, frames = through(moving, video)
    again = Coder(moving.model)
    np.testing.assert_array_equal(through(again, video)[1], frames)
    assert through(again, video)[0] == stream


def test_training_form_gives_the_symbols_of_the_stream(moving):
    """The same integers from the stage's loop over latents and from the coder."""
    from gnvc_jax.codec.model import LatentCodec
    from gnvc_jax.motion import expand
    from gnvc_jax.motion.warp import predict, to_eight_bits
    from gnvc_jax.vae import VAE

    video, model = pan(9, 64, 64), moving.model
    stream, decoded = through(moving, video)
    with StreamReader(stream) as reader:
        group = next(iter(reader.groups()))
        symbols = moving.symbols(reader.header, group)
        fields = moving.fields(reader.header, group)
    vae, codec = VAE(model.vae_config), LatentCodec(model.codec_config)
    params = {"params": jax.tree.map(lambda x: np.asarray(x, np.float32), model.vae)}
    codec_params = {"params": jax.tree.map(jax.numpy.asarray, model.codec)}

    def encode(frames, first):
        latents, _ = vae.apply(params, frames, first, method="encode")
        return ((latents - model.mean) / model.std)[:, 0]

    @jax.jit
    def code(latent, state, q_index, prediction):
        state, coded = codec.apply(
            codec_params,
            latent,
            state,
            q_index[None],
            jax.random.key(0),
            prediction,
            method="train",
        )
        return state, coded

    def scaled(latent):
        return latent * model.std + model.mean

    pixels = video[None].astype(np.float32) / 127.5 - 1
    state = prediction = predicted = None
    for i, s in enumerate(symbols):
        first, part = i == 0, slice(0, 1) if i == 0 else slice(4 * i - 3, 4 * i + 1)
        if not first:
            # The frame that the decoder has: rounded here, one pixel in a million may differ by a
            # step, which moves symbols of fine levels.
            reference = to_eight_bits(to_float(decoded[None, 4 * i - 4]))
            vectors = expand(fields[i - 1])[None]
            predicted = predict(reference, vectors, model.codec_config.motion_kernel)
            prediction = encode(predicted, False)
        latent = encode(pixels[:, part], first)
        state, coded = code(latent, state, jax.numpy.int32(s.q_index), prediction)
        integers = coded.symbols
        # One rounding in a thousand may fall on the other side of a tie.
        for ours, theirs in ((s.y, integers.y), (s.z, integers.z), (s.index, integers.index)):
            assert np.mean(np.asarray(ours) == np.asarray(theirs)[0]) > 0.999
        if first:
            shown = vae.apply(params, scaled(coded.latent)[:, None], method="decode")
        else:
            given = scaled(coded.latent), scaled(prediction), predicted, coded.fresh, coded.detail
            shown = vae.apply(params, *given, method="compensate")
        # The frames of the decoder, before they are rounded.
        exact = 127.5 * (np.clip(shown[0], -1, 1) + 1)
        assert np.abs(exact - decoded[part]).max() < 0.501
    assert any(np.abs(s.y).max() > 0 for s in symbols[1:])


def test_motion_needs_a_model_with_motion(moving, coder):
    stream, _ = through(moving, pan(5, 40, 70))
    with StreamReader(stream) as reader, pytest.raises(WrongModel, match="made with codec"):
        list(coder.decode_frames(reader))
    with StreamReader(stream) as reader:
        with pytest.raises(WrongModel, match="has motion, the loaded model has none"):
            coder.fields(reader.header, next(iter(reader.groups())))


def test_false_motion_is_an_error(moving):
    """Another motion segment under mended checksums: an error of ours, or frames."""
    stream, _ = through(moving, pan(9, 40, 70))
    with StreamReader(stream) as reader:
        header, group = reader.header, next(iter(reader.groups()))
    rng, errors = np.random.default_rng(0), 0
    for size in (0, 3, 4, len(group.motion), 400):
        false = dataclasses.replace(group, motion=rng.bytes(size))
        try:
            for field in moving.fields(header, false):
                assert np.abs(field.coarse).max() <= 127
        except EntropyError:
            errors += 1
    assert errors >= 2


def test_levels_of_a_group_are_those_of_the_model(tiny_model):
    model = tiny_model(motion=True)
    config = dataclasses.replace(model.codec_config, intra_offset=5, level_pattern=(-2, 0, 3))
    coder = Coder(dataclasses.replace(model, codec_config=config))
    stream, _ = through(coder, pan(18, 64, 64), qp=60, gop=17)
    with StreamReader(stream) as reader:
        levels = [g.q_indices for g in reader.groups()]
    assert levels == [(8, 1, 3, 6, 1), (8,)]


def test_strides_are_those_of_the_vae(tiny_codec, start, start_codec):
    """A model with 16 pixels and 2 frames per latent writes streams that it can read."""
    from gnvc_jax.codec.model import LatentCodec
    from gnvc_jax.vae import VAE, VAEConfig, init_vae

    config = VAEConfig(
        multipliers=(1,) * 5, temporal_down=(False, False, False, True), latent_channels=4,
        linear=True,
    )  # fmt: skip
    assert (config.stride, config.temporal_stride) == (16, 2)
    vae = start(lambda key: init_vae(VAE(config), key), "klt")
    codec = start_codec(LatentCodec(tiny_codec))
    model = models.build("wide", config, tiny_codec, vae, codec, np.zeros(4), np.ones(4))
    coder, video = Coder(model), pan(6, 40, 150)
    stream, frames = through(coder, video, gop=5)
    assert frames.shape == video.shape
    with StreamReader(stream) as reader:
        assert (reader.header.latent_stride, reader.header.temporal_stride) == (16, 2)
        assert [len(g.q_indices) for g in reader.groups()] == [3, 1]
    assert coder.reconstruct(video).shape == video.shape
    coder.header(150, 40, (25, 1), gop=3)
    with pytest.raises(ValueError, match=r"gop must be 1 \+ 2k frames in \[1, 511\], got 4"):
        coder.header(150, 40, (25, 1), gop=4)
