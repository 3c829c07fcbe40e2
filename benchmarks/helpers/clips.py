"""The part of a clip that benchmarks code."""

import itertools
from pathlib import Path

import numpy as np

from gnvc_jax.media.reader import open_video

SIDE = 256


def load(path: Path, count: int) -> tuple[np.ndarray, tuple[int, int]]:
    """The middle SIDE x SIDE pixels of the first frames of a video, and its frame rate."""
    with open_video(str(path)) as video:
        top, left = (video.height - SIDE) // 2, (video.width - SIDE) // 2
        frames = [
            frame[top : top + SIDE, left : left + SIDE] for frame in itertools.islice(video, count)
        ]
        return np.stack(frames), video.fps.as_integer_ratio()
