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
    got = np.asarray(jax.jit(warp)(image[None], displacement, -0.5))[0, 0]
    rows, columns = np.clip(np.arange(32) - 2, 0, 31), np.clip(np.arange(48) + 3, 0, 47)
    np.testing.assert_allclose(got, image[rows][:, columns], atol=1e-6)


def test_prediction_matches_opencv_remap():
    """OpenCV's bicubic has a = -3/4; its fractions are rounded to 1/32."""
    image = smooth(2, 64, 96)
    vectors = np.random.default_rng(3).integers(-40, 40, (1, 4, 4, 6, 2)).astype(np.int16)
    got = np.asarray(jax.jit(predict)(image[None], vectors, -0.75))[0]
    x, y = np.meshgrid(np.arange(96, dtype=np.float32), np.arange(64, dtype=np.float32))
    for ours, field in zip(got, vectors[0]):
        d = cv2.resize(field.astype(np.float32) / 16, None, fx=16, fy=16)
        want = cv2.remap(
            image, x + d[..., 0], y + d[..., 1], cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
        )
        assert np.sqrt(np.mean((ours - want) ** 2)) < 0.01 * image.std()
        assert np.sqrt(np.mean((ours - image) ** 2)) > 0.2 * image.std()  # there was motion


def test_at_a_half_the_kernel_is_exact_for_parabolas():
    x = np.arange(24, dtype=np.float32)
    image = np.broadcast_to((0.02 * x**2 - 0.3 * x + 1)[:, None, None], (24, 24, 1))
    displacement = np.zeros((1, 1, 24, 24, 2), np.float32)
    displacement[..., 1] = np.linspace(0.05, 0.95, 24)
    y = x[:, None] + displacement[0, 0, :, :, 1]
    inner = slice(2, -3)  # beyond the edges the picture is no parabola
    got = np.asarray(jax.jit(warp)(image[None], displacement, -0.5))[0, 0, inner, :, 0]
    np.testing.assert_allclose(got, (0.02 * y**2 - 0.3 * y + 1)[inner], atol=1e-4)


def test_eight_bits_are_the_values_of_a_decoder():
    frames = np.linspace(-1.2, 1.2, 1001, dtype=np.float32)
    values = np.clip(np.rint((frames + 1) * 127.5), 0, 255)
    np.testing.assert_allclose(to_eight_bits(jnp.asarray(frames)), values / 127.5 - 1, atol=1e-6)
