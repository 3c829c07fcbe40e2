"""Prediction by motion against OpenCV's remap."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from gnvc_jax.motion.warp import dense, predict, to_eight_bits, warp


def smooth(seed: int, h: int, w: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(h, w, 3)).astype(np.float32)
    return cv2.GaussianBlur(noise, None, 1.5)


def test_block_vectors_are_interpolated_as_opencv_does():
    vectors = np.random.default_rng(0).integers(-300, 300, (2, 4, 6, 2)).astype(np.int16)
    got = np.asarray(dense(jnp.asarray(vectors)))
    for ours, field in zip(got, vectors):
        want = cv2.resize(field.astype(np.float32) / 16, None, fx=16, fy=16)
        np.testing.assert_allclose(ours, want, atol=1e-4)


def test_whole_pels_shift_the_picture():
    image = smooth(1, 32, 48)
    displacement = np.zeros((1, 1, 32, 48, 2), np.float32)
    displacement[..., 0], displacement[..., 1] = 3, -2
    got = np.asarray(jax.jit(warp)(image[None], displacement))[0, 0]
    rows, columns = np.clip(np.arange(32) - 2, 0, 31), np.clip(np.arange(48) + 3, 0, 47)
    np.testing.assert_allclose(got, image[rows][:, columns], atol=1e-6)


def test_prediction_matches_opencv_remap():
    """OpenCV's bicubic has a = -3/4 and fractions of 1/32; on smooth pictures that is alike."""
    image = smooth(2, 64, 96)
    vectors = np.random.default_rng(3).integers(-40, 40, (1, 4, 4, 6, 2)).astype(np.int16)
    got = np.asarray(jax.jit(predict)(image[None], vectors))[0]
    x, y = np.meshgrid(np.arange(96, dtype=np.float32), np.arange(64, dtype=np.float32))
    for ours, field in zip(got, vectors[0]):
        d = cv2.resize(field.astype(np.float32) / 16, None, fx=16, fy=16)
        want = cv2.remap(
            image, x + d[..., 0], y + d[..., 1], cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
        )
        assert np.sqrt(np.mean((ours - want) ** 2)) < 0.04 * image.std()
        assert np.sqrt(np.mean((ours - image) ** 2)) > 0.2 * image.std()  # there was motion


def test_gradient_of_a_translation_is_the_exact_adjoint_inside_the_picture():
    image = smooth(4, 64, 64)[None]
    vectors = np.full((1, 4, 4, 4, 2), (37, -22), np.int16)  # 1/16 pel: both fractions are in use
    gradient = np.zeros((1, 4, 64, 64, 3), np.float32)
    gradient[:, :, 16:48, 16:48] = smooth(5, 32, 32)
    got = jax.vjp(lambda x: predict(x, vectors), image)[1](gradient)[0]
    exact = jax.vjp(lambda x: warp(x, dense(jnp.asarray(vectors))), image)[1](gradient)[0]
    np.testing.assert_allclose(got, exact, atol=1e-5 * np.abs(exact).max())


def test_gradient_of_varying_motion_is_close_to_the_adjoint():
    image = smooth(6, 64, 64)[None]
    rows, columns = np.mgrid[:4, :4]
    # A slow zoom: at most 1/8 of a pel per pel.
    vectors = np.stack([columns - 1.5, rows - 1.5], -1)[None, None] * 16 * 2
    vectors = np.repeat(vectors, 4, 1).astype(np.int16)
    gradient = np.stack([smooth(7 + i, 64, 64) for i in range(4)])[None]
    got = jax.vjp(lambda x: predict(x, vectors), image)[1](gradient)[0]
    exact = jax.vjp(lambda x: warp(x, dense(jnp.asarray(vectors))), image)[1](gradient)[0]
    got, exact = (np.asarray(x)[0, 8:-8, 8:-8].ravel() for x in (got, exact))
    assert got @ exact > 0.9 * np.linalg.norm(got) * np.linalg.norm(exact)


def test_rounding_to_eight_bits_passes_gradients_where_it_does_not_clip():
    frames = jnp.asarray([-1.5, -0.3, 0.2, 1.2])
    np.testing.assert_array_equal(jax.grad(lambda x: to_eight_bits(x).sum())(frames), [0, 1, 1, 0])
