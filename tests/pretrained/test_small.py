"""The model that ships with the package."""

import cv2
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

import gnvc_jax
from gnvc_jax.demo import camera_move
from gnvc_jax.pretrained import FOLDER, names


@pytest.fixture(scope="module")
def codec():
    return gnvc_jax.load_pretrained("small")


def test_what_ships_is_small_and_has_a_card():
    assert names() == ["small"]
    assert (FOLDER / "small.safetensors").stat().st_size <= 24e6
    assert (FOLDER / "small.md").read_text().startswith("# small")


def test_rate_and_quality_follow_the_level(codec):
    """A photograph in motion: fewer bytes and a worse picture from each level to the next."""
    video = camera_move(9)[:, 64:192, 64:192]
    sizes, psnrs = [], []
    for qp in (0, 16, 32, 48, 63):
        stream = codec.encode(video, qp=qp)
        decoded = codec.decode(stream)
        assert decoded.shape == video.shape
        sizes.append(len(stream))
        psnrs.append(peak_signal_noise_ratio(video, decoded))
    assert np.all(np.diff(sizes) < 0), sizes
    assert np.all(np.diff(psnrs) < 0), psnrs
    assert psnrs[0] > 21 and psnrs[-1] > 17, psnrs


def test_a_still_scene_keeps_its_quality(codec):
    """Errors of a long group do not pile up where nothing moves."""
    video = np.repeat(camera_move(1)[:, 64:192, 64:192], 41, axis=0)
    decoded = codec.decode(codec.encode(video, qp=40))
    psnrs = [peak_signal_noise_ratio(video[0], frame) for frame in decoded]
    assert psnrs[-1] > psnrs[1] - 0.1, psnrs[::4]


def test_a_slow_pan_keeps_its_quality(codec):
    """A quarter of a pel per latent: rounded vectors must not leave the picture behind."""
    picture = camera_move(1)[0, 64:192, 64:200]
    moves = [np.float32([[1, 0, -0.06 * t], [0, 1, 0]]) for t in range(41)]
    flags = {"dsize": (128, 128), "flags": cv2.INTER_CUBIC}
    video = np.stack([cv2.warpAffine(picture, move, **flags) for move in moves])
    decoded = codec.decode(codec.encode(video, qp=50))
    psnrs = [peak_signal_noise_ratio(*pair) for pair in zip(video, decoded)]
    assert psnrs[-1] > psnrs[1] - 0.5, psnrs[::4]


def test_effort_makes_files_smaller(codec):
    video = camera_move(9)[:, :128, :128]
    assert len(codec.encode(video, qp=32, effort=1)) < len(codec.encode(video, qp=32))


def test_colours_stay(codec):
    """Flat pictures come back with their mean colour."""
    for colour in ((200, 60, 60), (60, 160, 60), (128, 128, 128), (40, 60, 180)):
        video = np.full((5, 128, 128, 3), colour, np.uint8)
        decoded = codec.decode(codec.encode(video, qp=24))
        np.testing.assert_allclose(decoded.mean((0, 1, 2)), colour, atol=12)


@pytest.mark.parametrize(
    ("video", "reason"),
    [
        (np.zeros((1, 32, 32, 3)), "float64, expected uint8"),
        (np.zeros((1, 32, 32, 3), np.uint16), "uint16, expected uint8"),
        (np.zeros((32, 32, 3), np.uint8), r"video is \(32, 32, 3\)"),
        (np.zeros((1, 3, 32, 32), np.uint8), r"video is \(1, 3, 32, 32\)"),
    ],
)
def test_video_that_is_not_uint8_rgb_is_refused(codec, video, reason):
    with pytest.raises(ValueError, match=reason):
        codec.encode(video)
