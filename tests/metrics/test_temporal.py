"""Temporal measures against their formulas in float64 and against what they are meant to notice."""

import jax
import numpy as np
import pytest

from gnvc_jax.metrics.temporal import drift, seam, temporal

measure = jax.jit(temporal)
T, H, W = 6, 37, 50


def moving_texture(seed=0):
    texture = np.random.default_rng(seed).uniform(30, 220, (H, W + T, 3))
    texture = (texture + np.roll(texture, 1, 0) + np.roll(texture, 1, 1)) / 3
    return np.stack([texture[:, t : t + W] for t in range(T)])


def as_bytes(video):
    return np.clip(video, 0, 255).round().astype(np.uint8)


def reference(x, y):
    x, y = (v.astype(np.float64) @ [0.2126, 0.7152, 0.0722] for v in (x, y))
    dx, dy = np.diff(x, axis=0), np.diff(y, axis=0)
    error = (dy - dx)[:, : H // 16 * 16, : W // 16 * 16]
    blocks = [
        error[:, i : i + 16, j : j + 16].mean((1, 2))
        for i in range(0, H - 15, 16)
        for j in range(0, W - 15, 16)
    ]
    return {
        "tpsnr": 10 * np.log10(255**2 / np.mean((dy - dx) ** 2)),
        "ti_ratio": dy.std((1, 2)).mean() / dx.std((1, 2)).mean(),
        "pulse": np.sqrt(np.mean(np.square(blocks))),
    }


def test_agrees_with_the_formulas():
    x = moving_texture()
    y = x * 0.9 + np.random.default_rng(1).normal(0, 12, x.shape)
    x, y = as_bytes(x), as_bytes(y)
    got = measure(x, y)
    for name, value in reference(x, y).items():
        assert got[name] == pytest.approx(value, rel=1e-5), name


def test_a_perfect_copy_has_ideal_values():
    x = as_bytes(moving_texture())
    got = measure(x, x)
    assert (got["tpsnr"], got["ti_ratio"], got["pulse"]) == (100, 1, 0)


def test_each_metric_detects_its_distortion():
    rng = np.random.default_rng(2)
    x = moving_texture()
    frozen = np.repeat(x[:1], T, axis=0)
    noisy = x + rng.normal(0, 20, x.shape)
    breathing = x + 10 * (-1.0) ** np.arange(T)[:, None, None, None]
    frozen, noisy, breathing = (
        measure(as_bytes(x), as_bytes(y)) for y in (frozen, noisy, breathing)
    )
    assert frozen["ti_ratio"] == 0
    assert noisy["ti_ratio"] > 1.1
    assert breathing["ti_ratio"] == pytest.approx(1, abs=0.05)
    assert breathing["pulse"] > 5 * noisy["pulse"] > 0


def test_still_source_has_no_ratio():
    x = as_bytes(np.repeat(moving_texture()[:1], T, axis=0))
    assert np.isnan(measure(x, x)["ti_ratio"])


def test_rejects_clips_that_are_too_small():
    x = as_bytes(moving_texture())
    for bad in (x[:1], x[:, :15]):
        with pytest.raises(ValueError, match="needs 2 frames"):
            temporal(bad, bad)
    with pytest.raises(ValueError, match="expected two"):
        temporal(x, x[..., :1])


def test_a_seam_is_where_the_error_jumps():
    x = np.full((12, 32, 32, 3), 100.0)
    wobble = 2 * np.sin(np.arange(12))[:, None, None, None]
    groups = x + wobble + 20 * (np.arange(12) // 4 % 2)[:, None, None, None]
    starts = [0, 4, 8]
    at_borders = seam(measure(as_bytes(x), as_bytes(groups))["changes"], starts)
    smooth = seam(measure(as_bytes(x), as_bytes(x + wobble))["changes"], starts)
    assert at_borders > 20
    assert 0.2 < smooth < 4
    assert seam(measure(as_bytes(x), as_bytes(x + 7))["changes"], starts) == 1
    changes = np.array([1.0, 2.0, 9.0, 3.0])
    assert seam(changes, [0, 3]) == 9 / 2
    assert np.isnan(seam(changes, [0])) and np.isnan(seam(changes, [0, 1, 2, 3, 4]))
    assert seam(np.array([0.0, 1.0, 0.0]), [2]) == np.inf


def test_drift_is_the_slope_of_the_psnr():
    falling = [40 - 0.25 * t for t in range(32)]
    assert drift(falling) == pytest.approx({"psnr_slope": -0.25, "psnr_end_change": -6})
    assert drift([30] * 16) == pytest.approx({"psnr_slope": 0, "psnr_end_change": 0}, abs=1e-9)
    assert np.isnan(list(drift([30]).values())).all()
