"""Tiny videos, made with PyAV alone, and ffmpeg's own view of them."""

import subprocess
from fractions import Fraction

import av
import imageio_ffmpeg
import numpy as np
import pytest


@pytest.fixture(scope="session")
def picture():
    """picture(n, h, w): frame n of a smooth moving pattern, uint8 RGB; flat enough to code well."""

    def draw(number: int, height: int = 36, width: int = 52) -> np.ndarray:
        y, x = np.mgrid[:height, :width]
        waves = [
            np.sin((x + 2 * number) / (5 + c)) + np.cos((y - number) / (4 + c)) for c in range(3)
        ]
        return np.uint8(np.clip(120 + 5 * number + 25 * np.stack(waves, -1), 0, 255))

    return draw


@pytest.fixture(scope="session")
def encode(picture):
    """encode(path, codec, pix_fmt, ...): write 20 frames of `picture` with PyAV."""

    def write(
        path,
        codec="libx264",
        pix_fmt="yuv420p",
        options=None,
        frames=20,
        times=None,
        rotation=0,
        flip="",
        tags=None,
        size=(36, 52),
        audio=False,
    ):
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=25, options=options or {})
            stream.height, stream.width = size
            stream.pix_fmt = pix_fmt
            if rotation or flip:
                stream.set_display_rotation(rotation, flip == "hflip", flip == "vflip")
            for field, value in (tags or {}).items():
                setattr(stream.codec_context, field, value)
            if times is not None:
                stream.codec_context.time_base = Fraction(1, 1000)
            if audio:
                sound = container.add_stream("aac", rate=8000, layout="mono")
            for number in range(frames):
                image = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
                frame = image.reformat(format=pix_fmt)
                frame.pts = number if times is None else times[number]
                frame.time_base = Fraction(1, 25 if times is None else 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
            if audio:
                silence = np.zeros((1, 4096), np.float32)
                samples = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
                samples.sample_rate = 8000
                container.mux(sound.encode(samples))
                container.mux(sound.encode())
        return path

    return write


@pytest.fixture(scope="session")
def ffmpeg():
    """ffmpeg(*arguments, data=b""): standard output of the ffmpeg program."""

    def run(*arguments, data: bytes = b"") -> bytes:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *map(str, arguments)]
        return subprocess.run(command, input=data, capture_output=True, check=True).stdout

    return run
