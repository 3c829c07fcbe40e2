"""Writers: what comes back is what went in, and a failure leaves nothing behind."""

import os
import resource
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import gnvc_jax
from gnvc_jax.media.colour import BT709, RGB, Colour, rgb_to_yuv420
from gnvc_jax.media.errors import OutputExists, UnwritableOutput, WriteFailed
from gnvc_jax.media.reader import open_video, probe, read_clip
from gnvc_jax.media.writer import open_writer

ROOT = Path(gnvc_jax.__file__).parents[1]
NTSC = Fraction(30000, 1001)


def write(path, frames, fps=NTSC, **options):
    height, width = frames[0].shape[:2]
    with open_writer(path, width, height, fps, **options) as out:
        for frame in frames:
            out.write(frame)
    return path


@pytest.fixture
def frames(picture):
    noise = np.random.default_rng(0).integers(0, 256, (36, 52, 3), dtype=np.uint8)
    return np.stack([*(picture(n) for n in range(6)), noise])


@pytest.mark.parametrize("name", ["a.mkv", "frames/", "frames"])
@pytest.mark.parametrize("size", [(36, 52), (35, 51), (1, 1)])
def test_lossless_outputs(name, size, tmp_path, frames):
    part = frames[:, : size[0], : size[1]]
    write(f"{tmp_path}/{name}", part)
    path = tmp_path / name
    assert os.listdir(tmp_path) == [name.rstrip("/")]
    with open_video(path) as video:
        np.testing.assert_array_equal(np.stack(list(video)), part)
        assert video.fps == (NTSC if name == "a.mkv" else 25)
    np.testing.assert_array_equal(read_clip(path, 2, 3), part[2:5])
    if path.is_dir():
        assert sorted(os.listdir(path)) == [f"{n:06d}.png" for n in range(1, 8)]
        np.testing.assert_array_equal(np.asarray(Image.open(path / "000003.png")), part[2])


@pytest.mark.parametrize("fps", [NTSC, Fraction(24000, 1001), 25, 59.94, Fraction(120)])
def test_frame_rate_round_trip(fps, tmp_path, frames):
    for name in ("a.mp4", "a.mkv", "a.y4m"):
        path = write(tmp_path / name, frames, fps)
        assert probe(path).fps == Fraction(fps).limit_denominator(100_000)
        assert probe(path).frames == len(frames)


@pytest.mark.parametrize("colour", [None, RGB, Colour("bt601"), Colour("bt709", full_range=True)])
def test_mp4_for_players(colour, tmp_path, frames, ffmpeg):
    path = write(tmp_path / "a.mp4", frames, colour=colour)
    expected = BT709 if colour in (None, RGB) else colour
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        tags = context.color_primaries, context.color_trc, context.colorspace
        assert (*tags, context.color_range - 1) == expected.code_points
        pix_fmt = "yuvj420p" if expected.full_range else "yuv420p"  # ffmpeg's name of the same
        assert (context.name, context.pix_fmt) == ("h264", pix_fmt)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    y = np.frombuffer(ffmpeg("-i", path, "-f", "rawvideo", "-pix_fmt", pix_fmt, "-"), np.uint8)
    y = y.reshape(7, -1)[:6, : 36 * 52].astype(float)
    wanted = np.stack([rgb_to_yuv420(f, expected)[0].ravel() for f in frames[:6]])
    assert np.square(y - wanted).mean() < 2.0  # 45 dB
    if colour is None:
        error = read_clip(path, 0, 6) - frames[:6].astype(float)
        assert np.square(error).mean() < 20  # 35 dB: what 4:2:0 leaves


PQ = {  # H.273: BT.2020 primaries, PQ, as YUV and as RGB
    "yuv": Colour("bt2020", primaries=9, transfer=16),
    "rgb": Colour("rgb", True, primaries=9, transfer=16),
}


@pytest.mark.parametrize("colour", PQ.values(), ids=PQ)
def test_hdr_tags_are_kept_or_their_loss_is_noted(colour, tmp_path, frames):
    for name in ("a.mkv", "a.mp4", "a.y4m", "frames"):
        with open_writer(tmp_path / name, 52, 36, 25, colour=colour) as out:
            out.write(frames[0])
        if name in ("a.mkv", "a.mp4"):
            assert not out.notes
            with av.open(str(tmp_path / name)) as container:
                frame = next(container.decode(video=0))
            assert (frame.color_primaries, frame.color_trc) == (9, 16)
            found = probe(tmp_path / name).colour
            assert found == PQ["rgb" if name == "a.mkv" else "yuv"]
        else:
            assert ["HDR" in note for note in out.notes] == [True]
    np.testing.assert_array_equal(read_clip(tmp_path / "a.mkv", 0, 1), frames[:1])


def test_odd_sides_of_mp4_are_padded(tmp_path, frames):
    path = write(tmp_path / "a.mp4", frames[:6, :35, :51])
    clip = read_clip(path, 0, 6)
    assert clip.shape == (6, 36, 52, 3)
    assert np.abs(clip[:, :35, :51].astype(float) - frames[:6, :35, :51]).mean() < 4
    assert np.abs(clip[:, 35].astype(float) - clip[:, 34]).mean() < 4


@pytest.mark.parametrize("chroma, pix_fmt", [("420", "yuv420p"), ("444", "yuv444p")])
@pytest.mark.parametrize("full_range", [False, True])
def test_y4m_is_what_ffmpeg_reads(chroma, pix_fmt, full_range, tmp_path, frames, ffmpeg):
    colour = Colour(full_range=full_range)
    path = write(tmp_path / "a.y4m", frames[:, :35, :51], chroma=chroma, colour=colour)
    raw = tmp_path / "a_51x35.yuv"
    raw.write_bytes(ffmpeg("-i", path, "-f", "rawvideo", "-"))
    with open_video(raw, pix_fmt=pix_fmt, colour=colour) as same, open_video(path) as video:
        assert video.colour == colour and video.fps == NTSC
        ours = np.stack(list(video))
        np.testing.assert_array_equal(ours, np.stack(list(same)))
    limit = 1.5 if chroma == "444" else 60
    assert np.square(ours.astype(float) - frames[:, :35, :51]).mean(axis=(1, 2, 3))[0] < limit
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).color_range == 1 + full_range


def test_a_pipe_carries_the_video(tmp_path, frames):
    source = write(tmp_path / "a.mkv", frames)
    program = (
        "import sys; from gnvc_jax.media.reader import open_video; "
        "from gnvc_jax.media.writer import open_writer\n"
        "with open_video(sys.argv[1]) as v, "
        "open_writer(sys.argv[2], v.width, v.height, v.fps, chroma='444') as out:\n"
        "    for frame in v: out.write(frame)"
    )
    command = [sys.executable, "-c", program]
    first = subprocess.Popen([*command, source, "-"], stdout=subprocess.PIPE, cwd=ROOT)
    subprocess.run([*command, "-", tmp_path / "out.mkv"], stdin=first.stdout, cwd=ROOT, check=True)
    first.stdout.close()
    assert first.wait() == 0
    assert probe(tmp_path / "out.mkv").fps == NTSC
    write(tmp_path / "straight.y4m", frames, chroma="444")
    np.testing.assert_array_equal(
        read_clip(tmp_path / "out.mkv", 0, 7), read_clip(tmp_path / "straight.y4m", 0, 7)
    )


# What must not happen


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.y4m", "frames"])
def test_existing_outputs_are_kept_unless_forced(name, tmp_path, frames):
    path = write(tmp_path / name, frames[:3])
    with pytest.raises(OutputExists, match="not overwritten") as caught:
        write(path, frames)
    assert caught.value.exit_code == 73
    assert probe(path).frames == 3
    write(path, frames[:2], force=True)
    assert probe(path).frames == 2
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.y4m", "frames"])
def test_a_failure_leaves_existing_files_unchanged(name, tmp_path, frames):
    def fail(path, error, force):
        with open_writer(path, 52, 36, 25, force=force) as out:
            out.write(frames[0])
            raise error

    path = tmp_path / name
    for error in (RuntimeError("elsewhere"), KeyboardInterrupt(), FileNotFoundError("other.bin")):
        with pytest.raises(type(error)) as caught:
            fail(path, error, False)
        assert caught.value is error  # not taken for an error of this output
        assert os.listdir(tmp_path) == []
    write(path, frames[:3])
    with pytest.raises(RuntimeError):
        fail(path, RuntimeError(), True)
    assert os.listdir(tmp_path) == [name] and probe(path).frames == 3
    with pytest.raises(WriteFailed, match="no frames"), open_writer(path, 52, 36, 25, force=True):
        pass
    assert os.listdir(tmp_path) == [name] and probe(path).frames == 3


def test_forcing_replaces_numbered_frames_only(tmp_path, frames):
    folder = tmp_path / "frames"
    write(folder, frames)
    (folder / "notes.txt").write_text("keep")
    write(folder, frames[:2], force=True)
    assert sorted(os.listdir(folder)) == ["000001.png", "000002.png", "notes.txt"]
    os.rename(folder / "000001.png", folder / "holiday.png")
    with pytest.raises(OutputExists, match="not numbered frames"):
        write(folder, frames, force=True)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", frames)
    assert probe(tmp_path / "empty").frames == 7


def test_unwritable_outputs(tmp_path, frames):
    (tmp_path / "file").write_text("a file")
    for name, reason in [
        ("missing/a.mp4", "folder to write to does not exist"),
        ("file/a.mp4", "folder to write to does not exist"),
        ("a.docx", "must be .*, got .docx"),
        ("file", "not a folder"),
    ]:
        with pytest.raises(UnwritableOutput, match=reason) as caught:
            write(tmp_path / name, frames)
        assert caught.value.exit_code == 73
    assert os.listdir(tmp_path) == ["file"]


def test_frames_of_wrong_shape_or_type_are_refused(tmp_path, frames):
    for bad in (frames[0][:8], frames[0].astype(np.float32), frames[0][..., 0]):
        with pytest.raises(ValueError, match=r"a\.mkv: expected a frame"):
            with open_writer(tmp_path / "a.mkv", 52, 36, 25) as out:
                out.write(bad)
    assert os.listdir(tmp_path) == []


WRITE_NOISE = """
import sys, signal
import numpy as np
from gnvc_jax.media.errors import MediaError
from gnvc_jax.media.writer import open_writer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    rng = np.random.default_rng(0)
    with open_writer(sys.argv[1], 128, 128, 25) as out:
        for _ in range(40):
            out.write(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8))
except MediaError as error:
    print(type(error).__name__, error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.y4m", "frames"])
def test_a_file_that_cannot_grow(name, tmp_path):
    limit = 40_000  # bytes in a file
    done = subprocess.run(
        [sys.executable, "-c", WRITE_NOISE, tmp_path / name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 74, done.stderr
    assert "WriteFailed" in done.stderr and "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_device():
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", WRITE_NOISE, "-"],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 74
    assert done.stderr.strip() == "DiskFull -: no space left on the device"
