"""The VAE: size, causality, and equality of the whole-clip and streaming drivers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnvc_jax.vae import (
    VAE,
    VAEConfig,
    decode_clip,
    decode_stream,
    encode_clip,
    encode_stream,
    init_vae,
    layers,
    pad_video,
)
from gnvc_jax.vae.config import WAN22

TINY = VAEConfig(base=4, multipliers=(1, 2, 2, 2), blocks=1, latent_channels=4)
# Pixels folded into channels, shortcuts, and a wider decoder, as in Wan2.2; and as the shipped
# model: a linear transform.
WAN22_LIKE = VAEConfig(4, (1, 2, 2), 1, 4, (True, True), patch=2, shortcuts=True, decoder_base=6)
LINEAR = VAEConfig(latent_channels=4, linear=True, head=6)


@pytest.fixture(scope="module", params=[TINY, WAN22_LIKE, LINEAR], ids=["wan", "wan22", "linear"])
def model(request):
    """A tiny VAE in which every parameter, biases and last convolutions included, matters."""
    vae = VAE(request.param)
    shapes = jax.eval_shape(lambda key: init_vae(vae, key), jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        scale = 0.1 if leaf.ndim <= 1 else leaf.size**-0.5 * leaf.shape[-1] ** 0.5
        mean = path[-1].key == "gamma" or path[-1].key.endswith("scale")
        return rng.normal(mean, scale, leaf.shape).astype(np.float32)

    return vae, jax.tree_util.tree_map_with_path(draw, shapes)


def clip(frames: int, h: int = 16, w: int = 24) -> jax.Array:
    return jax.random.uniform(jax.random.key(frames), (1, frames, h, w, 3), minval=-1, maxval=1)


def test_full_size_has_as_many_parameters_as_wan():
    params = jax.eval_shape(lambda key: init_vae(VAE(VAEConfig()), key), jax.random.key(0))

    def count(tree):
        return sum(x.size for x in jax.tree.leaves(tree))

    assert count(params) == 126_892_531
    assert count(params["encoder"]) == 53_595_872
    assert count(params["decoder"]) == 73_295_331
    assert (count(params["quant"]), count(params["post_quant"])) == (1_056, 272)
    params = jax.eval_shape(lambda key: init_vae(VAE(WAN22), key), jax.random.key(0))
    assert count(params) == 704_688_668  # of diffusers' model


@pytest.mark.parametrize(
    "frames",
    [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 5)), 17],
)
def test_streaming_equals_whole_clip(model, frames):
    vae, params = model
    video = clip(frames)
    whole = jax.jit(lambda v: encode_clip(vae, params, v))(video)
    stream = jax.jit(lambda v: encode_stream(vae, params, v))(video)
    assert whole.shape == (1, 1 + -(-(frames - 1) // 4), 2, 3, 4)
    np.testing.assert_allclose(stream, whole, atol=1e-5)
    size = video.shape[2:4]
    a = jax.jit(lambda z: decode_clip(vae, params, z, frames, size))(whole)
    b = jax.jit(lambda z: decode_stream(vae, params, z, frames, size))(whole)
    assert a.shape == video.shape
    np.testing.assert_allclose(b, a, atol=1e-5)
    assert np.std(a) > 0.01  # not trivially equal


def test_odd_sizes_are_padded_and_cropped(model):
    vae, params = model
    video = clip(3, 13, 27)
    latents = jax.eval_shape(lambda v: encode_clip(vae, params, v), video)
    assert latents.shape == (1, 2, 2, 4, 4)
    decoded = jax.eval_shape(lambda z: decode_clip(vae, params, z, 3, (13, 27)), latents)
    assert decoded.shape == video.shape
    padded = pad_video(video)
    assert padded.shape == (1, 5, 16, 32, 3)
    np.testing.assert_array_equal(padded[:, 4, 15, 31], video[:, 2, 12, 26])


def test_a_hundred_frames_stream(model):
    vae, params = model
    video = clip(100, 8, 8)
    latents = jax.eval_shape(lambda v: encode_stream(vae, params, v), video)
    assert latents.shape[1] == 26
    out = jax.eval_shape(lambda z: decode_stream(vae, params, z, 100, (8, 8)), latents)
    assert out.shape == video.shape


def test_latents_never_see_the_future(model):
    """d latent_k / d frame_t is zero for t > 4k and not zero for t = 4k (and back in decode)."""
    vae, params = model
    video = clip(9)

    @jax.jit
    def influence(k):
        return jax.grad(lambda v: jnp.sum(encode_clip(vae, params, v)[:, k] ** 2))(video)

    for k in range(3):
        reach = np.abs(influence(k)).max(axis=(0, 2, 3, 4))
        assert np.all(reach[4 * k + 1 :] == 0) and reach[4 * k] > 0

    latents = jax.jit(lambda v: encode_clip(vae, params, v))(video)

    @jax.jit
    def seen(t):
        return jax.grad(lambda z: jnp.sum(vae.apply({"params": params}, z, method="decode")[:, t]))(
            latents
        )

    for t, last in ((0, 0), (1, 1), (4, 1), (5, 2)):
        reach = np.abs(seen(t)).max(axis=(0, 2, 3, 4))
        assert np.all(reach[last + 1 :] == 0) and reach[last] > 0


def test_gradient_is_finite_where_all_channels_are_zero(model):
    vae, params = model
    black = jnp.zeros((1, 1, 8, 8, 3))
    grads = jax.jit(jax.grad(lambda p: jnp.sum(encode_clip(vae, p, black) ** 2)))(params)
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grads))


def test_an_untrained_network_treats_frames_one_by_one():
    kernel = layers.last_tap_init(jax.random.key(0), (3, 3, 3, 4, 5))
    assert np.all(kernel[:2] == 0) and np.std(kernel[2]) > 0.1


def test_config_rejects_a_wrong_number_of_temporal_flags():
    with pytest.raises(ValueError, match="temporal_down must have one entry"):
        VAEConfig(temporal_down=(True, True))


def test_config_rejects_shortcuts_between_widths_that_do_not_divide():
    with pytest.raises(ValueError, match="divide four times the one before, got"):
        VAEConfig(multipliers=(1, 3, 3, 3), shortcuts=True)
