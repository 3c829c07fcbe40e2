"""Folders of PNG images as videos.

`open_folder` streams the images in natural order as a `VideoReader`, `read_folder_clip` reads a few
of them. All have the size of the first. PNG is the lossless form in which test sequences are often
given, in RGB, so no colour conversion takes place.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from gnvc_jax.media.colour import RGB
from gnvc_jax.media.errors import NoFrames, TruncatedVideo, UnsupportedFormat
from gnvc_jax.media.video import DEFAULT_FPS, Crop, VideoInfo, VideoReader, crop_frame


def frame_files(path: str | os.PathLike) -> list[Path]:
    """Lists the .png files of a folder in natural order: 2 before 10.

    Raises:
        NoFrames: If there is none.
    """
    files = [
        file
        for file in Path(path).iterdir()
        if file.suffix.lower() == ".png" and not file.name.startswith(".")
    ]
    if not files:
        raise NoFrames(path, "the folder has no PNG frames")
    return sorted(
        files,
        # Every other part is a number of ASCII digits; str.isdigit would accept other digits, too.
        key=lambda file: [
            int(part) if place % 2 else part
            for place, part in enumerate(re.split(r"([0-9]+)", file.name))
        ],
    )


def _read(file: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    try:
        with Image.open(file, formats=["PNG"]) as image:
            # Pillow would clip these to 8 bits rather than scale them.
            if image.mode.startswith(("I", "F")):
                raise UnsupportedFormat(file, "16-bit grey images are not supported")
            if size is not None and image.size != size:
                raise UnsupportedFormat(
                    file,
                    f"is {image.width}x{image.height}, the first frame {size[0]}x{size[1]}",
                )
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise TruncatedVideo(file, f"truncated or damaged PNG image ({error})") from None


def open_folder(path: str | os.PathLike, fps: Fraction | None = None) -> VideoReader:
    """Opens a folder of images for reading, in order; alpha is dropped."""
    files = frame_files(path)
    height, width = _read(files[0]).shape[:2]
    info = VideoInfo(
        name=os.fspath(path),
        width=width,
        height=height,
        fps=DEFAULT_FPS if fps is None else fps,
        frames=len(files),
        colour=RGB,
        bit_depth=8,
        has_audio=False,
    )

    def frames() -> Iterator[np.ndarray]:
        for file in files:
            yield _read(file, (width, height))

    return VideoReader(info, frames(), lambda: None)


def read_folder_clip(
    path: str | os.PathLike, start: int, count: int, crop: Crop | None = None
) -> np.ndarray:
    """Reads frames start .. start + count - 1 as uint8 RGB (count, h, w, 3)."""
    files = frame_files(path)[start : start + count]
    if len(files) < count:
        raise TruncatedVideo(
            path, f"frames {start} to {start + count - 1} asked for, {len(files)} of them found"
        )
    return np.stack([crop_frame(_read(file), crop) for file in files])
