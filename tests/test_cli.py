"""The command line: a round trip, and one line and an exit code for everything that goes wrong."""

import io

import av
import numpy as np
import pytest

from gnvc_jax import cli
from gnvc_jax.model import save_model


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model):
    """A folder with a model, a video, and a stream of it made by the command line."""
    folder = tmp_path_factory.mktemp("cli")
    save_model(folder / "m.safetensors", tiny_model())
    save_model(folder / "other.safetensors", tiny_model(1))
    rng = np.random.default_rng(0)
    with av.open(str(folder / "clip.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 70, 40, "yuv420p"
        for _ in range(6):
            picture = rng.integers(0, 256, (40, 70, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            for packet in stream.encode(frame):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("not a video\n" * 100)
    args = ("encode", folder / "clip.mp4", folder / "clip.gnvc", "--gop", 5, "--qp", 20)
    assert run(*args, "--model", folder / "m.safetensors") == 0
    stream = (folder / "clip.gnvc").read_bytes()
    (folder / "short.gnvc").write_bytes(stream[: len(stream) // 2])
    flipped = bytearray(stream)
    flipped[200] ^= 4
    (folder / "flipped.gnvc").write_bytes(flipped)
    return folder


def run(*args) -> int:
    return cli.main([str(a) for a in args])


def test_round_trip(place, capsys):
    out = place / "decoded.mkv"
    assert run("decode", place / "clip.gnvc", out, "--model", place / "m.safetensors") == 0
    with av.open(str(out)) as video:
        frames = [f for f in video.decode(video=0)]
    assert len(frames) == 6 and (frames[0].width, frames[0].height) == (70, 40)
    capsys.readouterr()
    assert run("info", place / "clip.gnvc") == 0
    text = capsys.readouterr().out
    assert "70x40, 6 frames, 25.000 frames/s" in text and "audio is not carried" in text
    size = (place / "clip.gnvc").stat().st_size
    assert f"{size} bytes" in text and f"{8 * size / (6 * 70 * 40):.5f} bpp" in text


WRONG = [
    ("encode absent.mp4 o.gnvc", 66, "absent.mp4"),
    ("encode empty.mp4 o.gnvc", None, "empty.mp4"),
    ("encode text.mp4 o.gnvc", 65, "text.mp4"),
    ("encode clip.mp4 clip.gnvc", 73, "clip.gnvc"),
    ("encode clip.mp4 nowhere/o.gnvc", 73, "nowhere/o.gnvc"),
    ("encode clip.mp4 o.gnvc --qp 64", 2, "qp 64"),
    ("encode clip.mp4 o.gnvc --gop 6", 2, "gop 6"),
    ("encode clip.mp4 o.gnvc --size 12", 2, "--size 12"),
    ("decode absent.gnvc o.mkv", 66, "absent.gnvc"),
    ("decode clip.mp4 o.mkv", 10, "not a gnvc file"),
    ("decode short.gnvc o.mkv", 20, "short.gnvc"),
    ("decode flipped.gnvc o.mkv", 21, "flipped.gnvc"),
    ("decode clip.gnvc o.mkv --model other.safetensors", 14, "made with codec"),
    ("decode clip.gnvc o.mkv --model absent", 66, "absent"),
    ("decode clip.gnvc o.mkv --model text.mp4", 15, "not a model file"),
    ("decode clip.gnvc clip.mp4", 73, "clip.mp4"),
    ("info text.mp4", 10, "not a gnvc file"),
]


@pytest.mark.parametrize(("line", "code", "text"), WRONG, ids=[w[0] for w in WRONG])
def test_wrong_use_is_one_line_and_leaves_nothing(place, monkeypatch, capsys, line, code, text):
    monkeypatch.chdir(place)
    before = {p.name: p.stat().st_mtime_ns for p in place.iterdir()}
    command = line.split()
    if command[0] != "info" and "--model" not in command:
        command += ["--model", "m.safetensors"]
    got = run(*command)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert got == code if code else got > 0
    assert error.startswith("gnvc: ") and text in error
    assert {p.name: p.stat().st_mtime_ns for p in place.iterdir()} == before


def test_tolerant_decoding_keeps_the_frame_count(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    args = ("decode", "flipped.gnvc", "t.mkv", "--model", "m.safetensors", "--tolerant")
    assert run(*args) == cli.EXIT_DAMAGED
    assert "replaced" in capsys.readouterr().err


def test_counting_output_knows_its_size():
    out = cli.Counting(io.BytesIO())
    out.write(b"123")
    out.write(b"45")
    assert out.tell() == 5
