"""Videos whose every pixel says where it is."""

import numpy as np
import pytest

from gnvc_jax.media.writer import open_writer


@pytest.fixture(scope="session")
def mapped_video():
    """mapped_video(path, number, frames, h, w): red column, green row, blue 50 number + frame."""

    def make(path, number, frames, height, width):
        with open_writer(path, width, height, 25) as out:
            for frame in range(frames):
                image = np.empty((height, width, 3), np.uint8)
                image[..., 0] = np.arange(width)
                image[..., 1] = np.arange(height)[:, None]
                image[..., 2] = 50 * number + frame
                out.write(image)
        return path

    return make


@pytest.fixture(scope="session")
def folder(tmp_path_factory, mapped_video):
    """A lossless file of 12 frames, a folder of 30 pictures below it, and a file of 3 frames."""
    root = tmp_path_factory.mktemp("videos")
    (root / "more").mkdir()
    mapped_video(root / "a.mkv", 0, 12, 40, 48)
    mapped_video(root / "more" / "b", 1, 30, 36, 64)
    mapped_video(root / "short.mkv", 4, 3, 40, 48)
    return root
