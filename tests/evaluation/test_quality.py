"""All metrics together: caps of identical clips, batches, missing ones."""

import hashlib

import numpy as np
import pytest
from safetensors.numpy import save_file
from skimage.metrics import peak_signal_noise_ratio

from gnvc_jax.evaluation import quality
from gnvc_jax.evaluation.quality import QualityMeter
from gnvc_jax.media.colour import rgb_to_yuv420
from gnvc_jax.metrics.backbones import TORCH_INDEX, load_weights


def clip(t=3, h=32, w=48, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (t, h, w, 3), dtype=np.uint8)


def test_identical_clips_give_the_best_value_of_every_metric():
    x = clip(2, 164, 170)
    q = QualityMeter(("psnr", "ms_ssim", "lpips_alex", "temporal"))(x, x)
    assert q.quality["psnr_rgb"] == q.quality["apsnr_rgb"] == 100
    assert q.quality["ms_ssim_rgb"] == pytest.approx(1, abs=1e-6)
    assert q.quality["lpips_alex"] == pytest.approx(0, abs=1e-9)
    flat = {"psnr_slope": 0, "psnr_end_change": None, "seam": None}
    assert q.temporal == pytest.approx({"tpsnr": 100, "ti_ratio": 1, "pulse": 0} | flat, abs=1e-6)
    assert q.missing == {}


@pytest.mark.parametrize("count", [3, 8, 11])
def test_batch_size_does_not_change_values(count):
    x, y = clip(count), clip(count, seed=1)
    q = QualityMeter(("psnr",))(x, y)
    expected = [peak_signal_noise_ratio(a, b) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(q.frames["psnr_rgb"], expected, atol=1e-5)
    assert q.quality["psnr_rgb"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert q.quality["apsnr_rgb"] == pytest.approx(peak_signal_noise_ratio(x, y), abs=1e-5)


def test_metrics_that_cannot_be_measured_are_null_with_a_reason(monkeypatch):
    def no_weights(net, path):
        raise FileNotFoundError(f"no LPIPS weights for {net}")

    monkeypatch.setattr(quality, "load_weights", no_weights)
    quality._weights.cache_clear()
    x = clip(1)
    q = QualityMeter(("psnr", "ms_ssim", "lpips_vgg", "temporal"))(x, x)
    assert q.quality == {
        "psnr_rgb": 100,
        "apsnr_rgb": 100,
        "ms_ssim_rgb": None,
        "ms_ssim_rgb_db": None,
        "lpips_vgg": None,
    }
    assert set(q.temporal.values()) == {None}
    assert "161" in q.missing["ms_ssim"]
    assert "no LPIPS weights for vgg" in q.missing["lpips_vgg"]
    assert set(q.missing) == {"ms_ssim", "lpips_vgg", "temporal"}


def save_alex(path, scale):
    """LPIPS on AlexNet as `gnvc port` writes it, its linear weights times `scale`."""
    weights = load_weights("alex")
    tensors = {f"lin{k}.model.1.weight": scale * x for k, x in enumerate(weights["lins"])}
    for index, layer in zip(TORCH_INDEX["alex"], weights["backbone"]):
        tensors[f"features.{index}.weight"] = layer["kernel"].transpose(3, 2, 0, 1)
        tensors[f"features.{index}.bias"] = layer["bias"]
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path)


def test_weight_files_of_the_user_are_used(tmp_path):
    x, y = clip(1, 64, 64), clip(1, 64, 64, seed=1)
    published = QualityMeter(("lpips_alex",))(x, y).quality["lpips_alex"]
    path = tmp_path / "alex.safetensors"
    save_alex(path, 2)
    own = QualityMeter(("lpips_alex",), {"lpips_alex": path})
    assert own(x, y).quality["lpips_alex"] == pytest.approx(2 * published, rel=1e-5)
    assert own.identity()["weights"] == {
        "lpips_alex": hashlib.sha256(path.read_bytes()).hexdigest()
    }


def test_a_missing_weight_file_is_reported_and_other_metrics_are_measured(tmp_path):
    x, path = clip(1, 64, 64), tmp_path / "vgg.safetensors"
    q = QualityMeter(("psnr", "dists"), {"dists": path})(x, x)
    assert q.missing == {"dists": f"file {path} missing"}
    assert q.quality["psnr_rgb"] == 100 and q.quality["dists"] is None


def test_rejects_clips_that_do_not_fit():
    with pytest.raises(ValueError, match="cannot compare"):
        QualityMeter(("psnr",))(clip(3), clip(2))
    with pytest.raises(ValueError, match="unknown metric 'fvd'"):
        QualityMeter(("fvd",))


def test_yuv_psnr_weights_planes_6_1_1():
    x, y = clip(2), clip(2, seed=1)
    q = QualityMeter(("psnr_yuv",))(x, y)
    planes = [zip(rgb_to_yuv420(a), rgb_to_yuv420(b), strict=True) for a, b in zip(x, y)]
    expected = np.array([[peak_signal_noise_ratio(*pair) for pair in frame] for frame in planes])
    by_plane = [q.quality[f"psnr_{name}"] for name in "yuv"]
    np.testing.assert_allclose(by_plane, expected.mean(0), atol=1e-5)
    np.testing.assert_allclose(q.frames["psnr_yuv"], expected @ (0.75, 0.125, 0.125), atol=1e-5)
