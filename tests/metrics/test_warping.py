"""Warping error against a NumPy twin, and on clips whose answer is known."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, map_coordinates

from gnvc_jax.metrics.warping import flow_of_dis, valid, warp, warping_error


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


def test_mask_excludes_pixels_that_leave_the_frame_or_are_occluded():
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


def save_flow(folder, flows):
    folder.mkdir()
    for t, pair in enumerate(flows):
        for way, flow in zip(("forward", "backward"), pair):
            header = b"PIEH" + np.array(flow.shape[1::-1], "<i4").tobytes()  # Middlebury's format
            data = header + flow.astype("<f4").tobytes()
            (folder / f"{way}_{t:05d}.flo").write_bytes(data)


def test_flow_files_of_the_user_are_used(tmp_path):
    source = pan()
    output = np.clip(source + np.random.default_rng(0).normal(0, 9, source.shape), 0, 255)
    output = output.astype(np.uint8)
    save_flow(tmp_path / "dis", flow_of_dis(source))
    expected = warping_error(source, output)
    assert warping_error(source, output, tmp_path / "dis") == pytest.approx(expected, rel=1e-6)
    true = np.zeros((48, 64, 2), np.float32)
    true[..., 0] = -2  # the picture moves to the left
    save_flow(tmp_path / "true", [(true, -true)] * 3)
    assert warping_error(source, output, tmp_path / "true")["e_warp_source"] < 1e-9


def test_flow_files_of_another_size_are_refused(tmp_path):
    source, folder = pan(), tmp_path / "flow"
    save_flow(folder, [(np.zeros((48, 60, 2)), np.zeros((48, 60, 2)))])
    with pytest.raises(ValueError, match=r"forward_00000\.flo: flow of 60x48, the clip is 64x48"):
        warping_error(source, source, folder)
    (folder / "forward_00000.flo").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"forward_00000\.flo: no \.flo file"):
        warping_error(source, source, folder)
    with pytest.raises(FileNotFoundError, match=r"forward_00000\.flo missing"):
        warping_error(source, source, tmp_path)
