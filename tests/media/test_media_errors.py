"""Every bad input has its named error, on one line, with the name of the file."""

import pickle
import shutil

import av
import numpy as np
import pytest

from gnvc_jax.media import errors
from gnvc_jax.media.reader import open_video, probe, read_clip
from gnvc_jax.media.writer import open_writer


def read_all(path):
    with open_video(path) as video:
        return sum(1 for _ in video)


@pytest.fixture
def check(tmp_path, monkeypatch):
    """check(name, error, code, reason): reading `name` in the test's folder raises that error."""
    monkeypatch.chdir(tmp_path)

    def run(name, error, code, reason, functions=(read_all, probe)):
        for function in functions:
            with pytest.raises(errors.MediaError, match=reason) as caught:
                function(name)
            assert type(caught.value) is error
            assert caught.value.exit_code == code
            message = str(caught.value)
            assert message.startswith(f"{name}: ") and "\n" not in message

    return run


def test_missing(check):
    check("missing.mp4", errors.MissingInput, 66, "no such file")
    check("missing.yuv", errors.MissingInput, 66, "no such file")


def test_folder_without_frames(check, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "readme.txt").write_text("no frames")
    check("folder", errors.NoFrames, 65, "no PNG")


@pytest.mark.parametrize("name", ["a.mp4", "a.y4m", "a_16x16.yuv"])
def test_empty_file(check, tmp_path, name):
    (tmp_path / name).touch()
    check(name, errors.EmptyInput, 65, "empty")


@pytest.mark.parametrize(
    "content",
    [
        b"junk" * 500,
        b"plain text\n" * 50,
        b"ffconcat version 1.0\nfile 'b.mp4'\n",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nb.mp4\n#EXT-X-ENDLIST\n",
    ],
    ids=["junk", "text", "concat", "playlist"],
)
@pytest.mark.parametrize("name", ["a.mp4", "a.txt", "a.y4m"])
def test_not_a_video(check, tmp_path, encode, content, name):
    encode(tmp_path / "b.mp4", frames=2)
    (tmp_path / name).write_bytes(content)
    check(name, errors.NotAVideo, 65, "YUV4MPEG2" if name == "a.y4m" else "not a video")


def test_sound_only(check, tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    check("a.wav", errors.AudioOnly, 65, "no picture")


def test_truncated(check, tmp_path, encode):
    options = {"g": "4", "bf": "0"}
    whole = encode(tmp_path / "whole.mp4", options=options)
    with (
        av.open(str(whole)) as source,
        av.open(str(tmp_path / "fast.mp4"), "w", options={"movflags": "+faststart"}) as out,
    ):
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    data = (tmp_path / "fast.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: int(len(data) * 0.7)])
    check("a.mp4", errors.TruncatedVideo, 65, r"promises 20 frames, holds \d+")
    # Without its index, which comes last in a file that is not made for streaming, nothing is left.
    (tmp_path / "b.mp4").write_bytes(whole.read_bytes()[:-400])
    check("b.mp4", errors.NotAVideo, 65, "not a video")
    encode(tmp_path / "c.mkv", options=options)
    data = (tmp_path / "c.mkv").read_bytes()
    (tmp_path / "d.mkv").write_bytes(data[: int(len(data) * 0.7)])
    check("d.mkv", errors.TruncatedVideo, 65, r"promises 0.80 s, \d+ frames", [read_all])


def test_damaged(check, tmp_path, encode):
    data = bytearray(encode(tmp_path / "whole.mkv", "ffv1", "bgr0").read_bytes())
    middle = len(data) // 2
    data[middle : middle + len(data) // 8] = bytes(len(data) // 8)
    (tmp_path / "a.mkv").write_bytes(data)
    check("a.mkv", errors.TruncatedVideo, 65, r"after \d+ frames|\d+ frames could", [read_all])


def test_frames_of_different_size(check, tmp_path, encode):
    first = encode(tmp_path / "a.264", frames=3)
    second = encode(tmp_path / "b.264", frames=3, size=(80, 96))
    (tmp_path / "c.264").write_bytes(first.read_bytes() + second.read_bytes())
    check("c.264", errors.UnsupportedFormat, 65, "frame 3 is 96x80", [read_all])


def test_bad_pictures(check, tmp_path, picture):
    from PIL import Image

    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(picture(number)).save(folder / f"{number}.png")
    shutil.copy(folder / "0.png", tmp_path / "whole.png")
    Image.fromarray(picture(1)[:8]).save(folder / "1.png")
    with pytest.raises(errors.UnsupportedFormat, match=r"1\.png: is 52x8"):
        read_all(folder)
    (folder / "1.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300])
    with pytest.raises(errors.TruncatedVideo, match=r"1\.png"):
        read_all(folder)


def test_frames_beyond_the_end(tmp_path, encode):
    path = encode(tmp_path / "a.mp4")
    with pytest.raises(errors.TruncatedVideo, match="frames 18 to 22 asked for, 2 of them"):
        read_clip(path, 18, 5)
    with pytest.raises(ValueError, match="outside"):
        read_clip(path, 0, 1, (0, 0, 37, 10))
    with pytest.raises(ValueError, match="cannot read"):
        read_clip(path, -1, 1)


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(errors.DiskFull("a.mp4", "no\nspace")))
    assert type(error) is errors.DiskFull and str(error) == "a.mp4: no space"
    assert error.exit_code == 74


def test_pictures_of_one_pixel_are_read(tmp_path):
    for name in ("a.y4m", "a.mkv", "frames/"):
        with open_writer(
            tmp_path / name if name[-1] != "/" else f"{tmp_path}/{name}", 1, 1, 25
        ) as out:
            out.write(np.full((1, 1, 3), 200, np.uint8))
        assert read_clip(tmp_path / name, 0, 1).tolist() == [[[[200] * 3]]]
