"""Warping error against a NumPy twin, and on clips whose answer is known."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, map_coordinates

from gnvc_jax.metrics.warping import valid, warp, warping_error


def texture(h=48, w=64, seed=0):
    noise = np.random.default_rng(seed).normal(size=(h, w, 3))
    return np.clip(128 + 300 * gaussian_filter(noise, (2, 2, 0)), 0, 255).astype(np.uint8)


def pan(frames=4, seed=0):
    wide = texture(48, 64 + 2 * frames, seed)
    return np.stack([wide[:, 2 * t : 2 * t + 64] for t in range(frames)])


def test_warp_is_bilinear():
    rng = np.random.default_rng(0)
    image, flow = rng.normal(size=(9, 11, 2)), rng.uniform(-3, 3, (9, 11, 2))
    rows, columns = np.mgrid[:9, :11]
    places = [rows + flow[..., 1], columns + flow[..., 0]]
    expected = [map_coordinates(image[..., c], places, order=1, mode="nearest") for c in (0, 1)]
    np.testing.assert_allclose(warp(image, flow), np.stack(expected, -1), atol=1e-5)


def test_mask_leaves_out_what_leaves_the_picture_and_what_disagrees():
    flow = np.zeros((20, 20, 2), np.float32)
    flow[..., 0] = 4.0  # to the right
    keep = np.asarray(valid(flow, -flow))
    assert keep[:, :16].all() and not keep[:, 16:].any()
    assert not np.asarray(valid(flow, flow))[:, :16].any()
    flow[:, 10:, 0] = 0.0
    assert not np.asarray(valid(flow, -flow))[:, 9].any()  # border of the motion


def test_known_clips():
    source = pan()
    same = warping_error(source, source)
    assert same["e_warp_ratio"] == 1 and same["e_warp"] < 1e-3
    rng = np.random.default_rng(1)
    noisy = np.clip(source + rng.normal(0, 8, source.shape), 0, 255).astype(np.uint8)
    # Two independent noises of 8/255; bilinear warping averages some of the second.
    noise = (8 / 255) ** 2
    assert noise < warping_error(source, noisy)["e_warp"] - same["e_warp"] < 2.1 * noise
    still = np.repeat(source[:1], 3, 0)
    assert warping_error(still, still)["e_warp_ratio"] == 1
    assert warping_error(still, noisy[:3])["e_warp_ratio"] == np.inf
    blurred = gaussian_filter(noisy, (0, 2, 2, 0))
    assert warping_error(noisy, blurred)["e_warp_ratio"] < 0.5
    with pytest.raises(ValueError, match="2 frames"):
        warping_error(source[:1], source[:1])
