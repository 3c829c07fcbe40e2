"""SSIM and MS-SSIM against scikit-image and a float64 formula."""

import jax
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity

from gnvc_jax.metrics.ms_ssim import ms_ssim, ssim

jitted = jax.jit(ms_ssim, static_argnames="data_range")


def pair(h, w, noise=25.0, seed=0):
    """(2, h, w, 3) uint8: smooth shapes with texture, and a noisy, darker copy."""
    rng = np.random.default_rng(seed)
    x = 128 + 900 * gaussian_filter(rng.normal(size=(2, h, w, 3)), (0, 6, 6, 0.5))
    x += rng.normal(0, 8, x.shape)
    y = 0.9 * x + rng.normal(0, noise, x.shape)
    return tuple(np.clip(a, 0, 255).round().astype(np.uint8) for a in (x, y))


def reference_ms_ssim(x, y):
    """The definition, in float64, for one frame with even sides at every scale."""
    values = []
    for plane in range(x.shape[-1]):
        a, b = x[..., plane].astype(np.float64), y[..., plane].astype(np.float64)
        product = 1.0
        for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
            if scale:
                a, b = (
                    p.reshape(p.shape[0] // 2, 2, p.shape[1] // 2, 2).mean((1, 3)) for p in (a, b)
                )
            ma, mb, aa, bb, ab = (
                gaussian_filter(p, 1.5, truncate=3.5)[5:-5, 5:-5]
                for p in (a, b, a * a, b * b, a * b)
            )
            term = (2 * (ab - ma * mb) + 7.65**2) / (aa - ma**2 + bb - mb**2 + 7.65**2)
            if scale == 4:
                term *= (2 * ma * mb + 2.55**2) / (ma**2 + mb**2 + 2.55**2)
            product *= max(term.mean(), 0) ** weight
        values.append(product)
    return np.mean(values)


def test_ssim_agrees_with_scikit_image():
    x, y = pair(48, 70)
    expected = []
    for a, b in zip(x, y, strict=True):
        _, full = structural_similarity(
            a,
            b,
            data_range=255,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )
        expected.append(full[5:-5, 5:-5].mean())
    assert 0.05 < expected[0] < 0.95
    np.testing.assert_allclose(jax.jit(ssim)(x, y), expected, atol=1e-5)


@pytest.mark.parametrize(("h", "w"), [(176, 208), (256, 256)])
def test_ms_ssim_agrees_with_its_definition(h, w):
    x, y = pair(h, w)
    expected = [reference_ms_ssim(a, b) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(jitted(x, y), expected, atol=1e-5)


def test_odd_sides_and_data_range():
    x, y = pair(177, 209)
    value = jitted(x, y)
    even = [reference_ms_ssim(a, b) for a, b in zip(x[:, 1:, 1:], y[:, 1:, 1:], strict=True)]
    np.testing.assert_allclose(value, even, atol=0.01)
    scaled = jitted(x / np.float32(255), y / np.float32(255), data_range=1.0)
    np.testing.assert_allclose(scaled, value, atol=1e-5)


def test_identical_is_one_and_opposite_is_zero():
    x, _ = pair(176, 208)
    np.testing.assert_allclose(jitted(x, x), 1, atol=1e-6)
    np.testing.assert_array_equal(jitted(x, 255 - x), 0)


def test_gradient_agrees_with_differences_and_stays_finite():
    x, y = (a[:1].astype(np.float64) for a in pair(176, 176))
    gradient = jax.jit(jax.grad(lambda y, x: ms_ssim(x, y).sum()))
    step = 0.1 * (x - y) / np.abs(x - y).max()
    expected = (reference_ms_ssim(x[0], (y + step)[0]) - reference_ms_ssim(x[0], (y - step)[0])) / 2
    assert np.sum(gradient(y, x) * step) == pytest.approx(expected, rel=1e-3)
    for other in (x, 255 - x):
        assert np.isfinite(gradient(other, x)).all()


def test_names_the_shortest_side():
    x = np.zeros((1, 160, 256, 3), np.uint8)
    with pytest.raises(ValueError, match="at least 161, got 160x256"):
        ms_ssim(x, x)
    with pytest.raises(ValueError, match="at least 11"):
        ssim(x[:, :10], x[:, :10])
    with pytest.raises(ValueError, match="expected two"):
        ms_ssim(x, x[..., :1])
