"""Audio on the command line: it goes along from video to stream and back."""

import re

import av
import numpy as np
import pytest

from gnvc_jax import cli
from gnvc_jax.model_file import save_model


def run(*args) -> int:
    return cli.main([str(a) for a in args])


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model):
    """A folder with a model."""
    folder = tmp_path_factory.mktemp("audio")
    save_model(folder / "m.safetensors", tiny_model())
    return folder


@pytest.fixture(scope="module")
def sound(place):
    """A video of ten frames with half a second of sound."""
    path = place / "sound.mp4"
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=20)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = out.add_stream("aac", rate=8000, layout="mono")
        for value in range(10):
            frame = np.full((48, 64, 3), 20 * value, np.uint8)
            out.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(video.encode())
        noise = np.random.default_rng(3).uniform(-0.3, 0.3, (1, 4000)).astype(np.float32)
        samples = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
        samples.sample_rate = 8000
        out.mux(audio.encode(samples))
        out.mux(audio.encode())
    return path


def audio_packets(path) -> list[bytes]:
    with av.open(str(path)) as video:
        return [bytes(p) for p in video.demux(*video.streams.audio) if p.size]


def test_audio_goes_along(place, sound, capsys):
    model = ("--model", place / "m.safetensors")
    assert run("encode", sound, place / "sound.gnvc", *model, "--qp", 40) == 0
    assert "bytes of audio" in capsys.readouterr().err
    assert run("decode", place / "sound.gnvc", place / "sound.mkv", *model) == 0
    packets = audio_packets(place / "sound.mkv")
    assert len(packets) >= 4 and packets == audio_packets(sound)[: len(packets)]
    assert run("info", place / "sound.gnvc") == 0
    text = capsys.readouterr().out
    assert re.search(r"audio +\d+ bytes", text)
    # The rate is that of the pictures alone.
    assert run("encode", sound, place / "silent.gnvc", *model, "--qp", 40, "--no-audio") == 0
    assert run("info", place / "silent.gnvc") == 0
    silent = capsys.readouterr().out
    assert abs(bpp(text) - bpp(silent)) < 8 * 20 / (10 * 64 * 48)


def bpp(text: str) -> float:
    return float(re.search(r"([\d.]+) bpp", text).group(1))


def test_audio_is_not_carried_at_another_speed(place, sound, capsys):
    arguments = "encode", sound, place / "fast.gnvc", "--model", place / "m.safetensors"
    assert run(*arguments, "--qp", 40, "--fps", 40, "--frames", 5) == 0
    assert "the audio was left out" in capsys.readouterr().err
