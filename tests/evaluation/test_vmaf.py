"""VMAF: order, caps, sizes and errors; the numbers are libvmaf's own."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from gnvc_jax.evaluation import vmaf as module
from gnvc_jax.evaluation.vmaf import vmaf


def clip(t=3, h=49, w=64):
    noise = np.random.default_rng(0).normal(size=(t, h, w, 3))
    return np.clip(128 + 500 * gaussian_filter(noise, (0, 2, 2, 0)), 0, 255).astype(np.uint8)


def test_order_and_odd_sizes():
    source = clip()
    blurred = gaussian_filter(source, (0, 2, 2, 0))
    same, worse = vmaf(source, source), vmaf(source, blurred)
    assert {k: v.shape for k, v in same.items()} == {"vmaf": (3,), "vmaf_neg": (3,)}
    assert (same["vmaf"] > 90).all() and (worse["vmaf"] < same["vmaf"] - 10).all()


def test_named_errors(monkeypatch):
    with pytest.raises(ValueError, match="at least 16"):
        vmaf(clip(1, 8, 64), clip(1, 8, 64))
    monkeypatch.setattr(module, "MODELS", {"vmaf": "no_such_model"})
    with pytest.raises(ValueError, match="libvmaf of ffmpeg"):
        vmaf(clip(1), clip(1))
