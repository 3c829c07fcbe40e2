"""PSNR against scikit-image."""

import jax
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from gnvc_jax.metrics.psnr import decibels, mean_squared_error, psnr


def frames(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("shape", [(3, 24, 40, 3), (2, 15, 11, 1), (1, 300, 1100, 3)])
def test_agrees_with_scikit_image(shape):
    x, y = frames(*shape), frames(*shape, seed=1)
    y[0] = np.where(frames(*shape[1:], seed=2) < 9, y[0], x[0])  # a nearly identical frame
    expected = [peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(jax.jit(psnr)(x, y), expected, atol=1e-5)


def test_identical_and_opposite_frames():
    black, white = np.zeros((1, 64, 64, 3), np.uint8), np.full((1, 64, 64, 3), 255, np.uint8)
    np.testing.assert_array_equal(psnr(black, white), 0)
    np.testing.assert_array_equal(psnr(white, white), 100)
    np.testing.assert_array_equal(mean_squared_error(black, white), 255**2)


def test_decibels_of_the_mean_error_are_not_the_mean_decibels():
    mse = np.array([1.0, 100.0])
    assert decibels(mse.mean()) == pytest.approx(10 * np.log10(255**2 / 50.5), abs=1e-5)
    assert decibels(mse).mean() > decibels(mse.mean()) + 6


def test_rejects_wrong_input():
    x = frames(1, 8, 8, 3)
    with pytest.raises(TypeError, match="uint8"):
        psnr(x, x.astype(np.float32))
    with pytest.raises(ValueError, match="8, 8"):
        psnr(x, x[:, :4])
    with pytest.raises(ValueError, match="b, h, w, c"):
        psnr(x[0], x[0])
