"""The linear transform under a small VAE, against its definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnvc_jax.vae import VAE, VAEConfig, init_vae, klt
from gnvc_jax.vae.head import fade_at_copies

CONFIG = VAEConfig(
    multipliers=(1, 1), latent_channels=6, temporal_down=(True,), patch=2, linear=True, head=5
)
STRIDES = (CONFIG.latent_channels, CONFIG.stride, CONFIG.temporal_stride)


@pytest.fixture(scope="module")
def video():
    """Smooth pictures under noise, more blocks than values per block."""
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(6, 2, 8, 8, 3))
    smooth = coarse.repeat(3, 1)[:, :5].repeat(6, 2).repeat(6, 3)[:, :, :48, :48]
    return (0.3 * smooth + 0.05 * rng.normal(size=smooth.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def fitted(video):
    moments = klt.moments_of_blocks(*STRIDES[1:])
    for half in np.array_split(video, 2):  # in batches, as they come
        klt.count_blocks(moments, half, *STRIDES[1:])
    return klt.fit(moments, STRIDES[0])


def transform(fitted, method, x, first=True):
    module = klt.BlockTransform(*STRIDES)
    return jax.jit(lambda x: module.apply({"params": fitted}, x, first, method=method))(x)


def test_no_linear_code_of_this_size_has_a_smaller_error(video, fitted):
    """Eckart and Young: the error is the sum of the singular values that were left out."""
    back = transform(fitted, "inverse", transform(fitted, "forward", video))
    for frames, part, got in ((1, video[:, ::2], None), (2, video[:, 1:], back[:, 1:])):
        blocks = np.asarray(klt.to_blocks(part, frames, CONFIG.stride), np.float64)
        blocks = blocks.reshape(-1, blocks.shape[-1])
        values = np.linalg.svd(blocks - blocks.mean(0), compute_uv=False)
        best = np.sum(values[6:] ** 2) / blocks.size
        if got is None:
            basis, offset = fitted["first_basis"], fitted["first_offset"]
            rest = blocks - offset - (blocks - offset) @ basis @ basis.T
            assert np.mean(rest**2) == pytest.approx(best, rel=1e-4)
        else:
            assert np.mean((got - part) ** 2) == pytest.approx(best, rel=1e-4)


def test_later_latents_have_unit_mean_square(video, fitted):
    latents = transform(fitted, "forward", video)[:, 1:]
    assert np.mean(np.square(latents)) == pytest.approx(1.0, rel=1e-3)


def test_a_still_scene_has_the_same_latents_in_both_kinds(video, fitted):
    still = np.repeat(video[:, :1], 3, 1)
    first, later = np.moveaxis(np.asarray(transform(fitted, "forward", still)), 1, 0)
    alike = np.sum(first * later) / np.sqrt(np.sum(first**2) * np.sum(later**2))
    assert alike > 0.95


def test_untrained_linear_vae_is_the_transform(video, fitted):
    vae = VAE(CONFIG)
    params = init_vae(vae, jax.random.key(0)) | {"klt": fitted}
    out = jax.jit(lambda p, v: vae.apply({"params": p}, v))(params, video)
    back = transform(fitted, "inverse", transform(fitted, "forward", video))
    np.testing.assert_allclose(out, back, atol=1e-5)


def test_transform_gets_no_gradient(video, fitted):
    vae = VAE(CONFIG)
    params = init_vae(vae, jax.random.key(0)) | {"klt": fitted}
    loss = jax.jit(jax.grad(lambda p: jnp.mean((vae.apply({"params": p}, video) - video) ** 2)))
    grads = loss(params)
    assert all(np.all(g == 0) for g in jax.tree.leaves(grads["klt"]))
    assert any(np.any(g != 0) for g in jax.tree.leaves(grads["head"]))


def test_compensation_copies_or_replaces(fitted):
    """What is not fresh stays to the last bit of detail; what is fresh is the decoded latent."""
    rng = np.random.default_rng(5)
    predicted = rng.normal(0, 0.3, (1, 2, 8, 8, 3)).astype(np.float32)
    vae = VAE(CONFIG)
    shapes = jax.eval_shape(lambda key: init_vae(vae, key), jax.random.key(0))
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)
    params["klt"] = fitted
    prediction = transform(fitted, "forward", predicted, first=False)[:, 0]
    side = prediction.shape[1]
    fresh = np.zeros((1, side, side, 1), np.float32)
    fresh[:, :, side // 2 :] = 1
    latent = prediction + fresh * rng.normal(size=prediction.shape).astype(np.float32)
    arguments = latent, prediction, predicted, fresh, 1 - fresh

    @functools.partial(jax.jit, static_argnums=0)
    def compensate(cleaned, *args):
        return vae.apply({"params": params}, *args, cleaned, method="compensate")

    got = compensate(None, *arguments)
    np.testing.assert_allclose(got[:, :, :, :4], predicted[:, :, :, :4], atol=1e-5)
    plain = transform(fitted, "inverse", latent[:, None], first=False)
    once = compensate(0, *arguments)  # without the head
    np.testing.assert_allclose(once[:, :, :, 4:], plain[:, :, :, 4:], atol=1e-5)
    assert np.abs(got - once)[:, :, :, 4:].max() > 1e-3


def test_a_step_at_the_edge_of_a_copy_becomes_a_ramp():
    """A row of blocks of four pixels: two copied ones, two that get brighter by 8."""
    fresh = np.zeros((1, 1, 4, 1), np.float32)
    fresh[:, :, 2:] = 1
    means = np.broadcast_to(8 * fresh, (1, 1, 1, 4, 3))
    fade = np.asarray(fade_at_copies(jnp.asarray(means), jnp.asarray(fresh), 4))
    faded = means.repeat(4, 2).repeat(4, 3) + fade
    # The ramp from 0 at 5.5 to 8 at 9.5 is 1, 3, 5, 7; 1/2 and 3/2 pixels from the edge it counts
    # by 3/4 and 1/4.
    expected = [0] * 6 + [0.25, 2.25, 5.75, 7.75] + [8] * 6
    np.testing.assert_allclose(faded[0, 0, 0, :, 0], expected, atol=1e-5)
    assert np.all(faded == faded[..., :1, :, :1])  # rows and colours are alike


def test_nothing_fades_where_all_is_coded_or_copied():
    means = np.random.default_rng(8).normal(size=(1, 2, 2, 2, 3)).astype(np.float32)
    for value in (0.0, 1.0):
        fresh = jnp.full((1, 2, 2, 1), value)
        assert not np.any(fade_at_copies(jnp.asarray(means), fresh, 4))


def test_compensation_is_that_of_two_inverse_transforms(fitted):
    """Detail of any weight, and block means that fade, from the frames of both latents."""
    rng = np.random.default_rng(9)
    predicted = rng.normal(0, 0.3, (1, 2, 8, 8, 3)).astype(np.float32)
    prediction = transform(fitted, "forward", predicted, first=False)[:, 0]
    side = prediction.shape[1]
    fresh = (rng.random((1, side, side, 1)) < 0.5).astype(np.float32)
    detail = rng.random((1, side, side, 1)).astype(np.float32)
    latent = prediction + rng.normal(size=prediction.shape).astype(np.float32)
    vae = VAE(dataclasses.replace(CONFIG, fade=True, head=0))
    arguments = latent, prediction, predicted, fresh, detail
    got = jax.jit(lambda p, *args: vae.apply({"params": p}, *args, method="compensate"))(
        {"klt": fitted}, *arguments
    )
    after, before = (
        np.asarray(transform(fitted, "inverse", x[:, None], first=False))
        for x in (latent, prediction)
    )
    pixels = 8 // side
    weights = detail.repeat(pixels, 1).repeat(pixels, 2)[:, None]
    blocks = (after - before).reshape(1, 2, side, pixels, side, pixels, 3).mean((3, 5))
    fade = fade_at_copies(jnp.asarray(blocks), jnp.asarray(fresh), pixels)
    want = after + weights * (predicted - before) + fade
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_added_latents_are_those_of_the_sum(video, fitted, first):
    vae = VAE(CONFIG)
    params = init_vae(vae, jax.random.key(0)) | {"klt": fitted}
    frames = video[:1, : 3 if first else 2, :8, :8]
    rng = np.random.default_rng(6)

    latents = transform(fitted, "forward", frames, first)
    change = rng.normal(size=latents.shape).astype(np.float32)
    add = jax.jit(lambda *args: vae.apply({"params": params}, *args, first, method="add_latents"))
    got = add(frames, change)
    before, after = (transform(fitted, "inverse", x, first) for x in (latents, latents + change))
    expected = frames + after - before
    np.testing.assert_allclose(got, expected, atol=1e-5)
