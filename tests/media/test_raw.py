"""Raw video: names, sizes, y4m headers; judged by ffmpeg and by the published file names."""

from fractions import Fraction

import numpy as np
import pytest

from gnvc_jax.media.colour import Colour, yuv_to_rgb
from gnvc_jax.media.errors import BadRawSize, NotAVideo, TruncatedVideo, UnsupportedFormat
from gnvc_jax.media.raw import parse_raw_name
from gnvc_jax.media.reader import open_video, probe, read_clip


@pytest.mark.parametrize(
    "name, size, fps, pix_fmt",
    [  # As UVG, MCL-JCV and the HEVC sequences are called
        ("Beauty_1920x1080_120fps_420_8bit_YUV.yuv", (1920, 1080), 120, "yuv420p"),
        ("Beauty_3840x2160_120fps_420_10bit_YUV.yuv", (3840, 2160), 120, "yuv420p10le"),
        ("videoSRC01_1920x1080_30.yuv", (1920, 1080), 30, "yuv420p"),
        ("BQTerrace_1920x1080_60.yuv", (1920, 1080), 60, "yuv420p"),
        ("Kimono1_1920x1080_24.yuv", (1920, 1080), 24, "yuv420p"),
        ("foreman_352x288_29.97Hz_8bit_P420.yuv", (352, 288), Fraction("29.97"), "yuv420p"),
        ("clip_64x48_444.yuv", (64, 48), None, "yuv444p"),
        ("clip_64x48_25_P422.yuv", (64, 48), 25, "yuv422p"),
        ("dir_8x8/grey_64x48_50_400_10bit.yuv", (64, 48), 50, "gray10le"),
        ("clip_64x48_yuv422p10le.yuv", (64, 48), None, "yuv422p10le"),
        ("akiyo.yuv", None, None, "yuv420p"),
    ],
)
def test_raw_file_names_are_parsed(name, size, fps, pix_fmt):
    assert parse_raw_name(name) == (size, fps, pix_fmt)


def raw_frames(pix_fmt, height, width, frames, rng):
    """Random planes and their bytes."""
    bits = 10 if "10" in pix_fmt else 8
    rows = 2 if "420" in pix_fmt else 1
    columns = 1 if "444" in pix_fmt else 2
    shapes = [(height, width)]
    if "gray" not in pix_fmt:
        shapes += [(-(-height // rows), -(-width // columns))] * 2
    dtype = "u1" if bits == 8 else "<u2"
    video = [[rng.integers(0, 2**bits, s).astype(dtype) for s in shapes] for _ in range(frames)]
    return video, b"".join(plane.tobytes() for frame in video for plane in frame), bits


@pytest.mark.parametrize(
    "pix_fmt", ["yuv420p", "yuv422p", "yuv444p", "gray", "yuv420p10le", "yuv444p10le", "gray10le"]
)
def test_planes_are_read_in_file_order(pix_fmt, tmp_path):
    video, data, bits = raw_frames(pix_fmt, 13, 11, 5, np.random.default_rng(0))
    path = tmp_path / "plain.yuv"
    path.write_bytes(data)
    with open_video(path, size=(11, 13), pix_fmt=pix_fmt, fps=50) as reader:
        assert (reader.width, reader.height, reader.frame_count) == (11, 13, 5)
        assert (reader.fps, reader.bit_depth) == (50, bits)
        frames = np.stack(list(reader))
    colour = Colour(full_range=pix_fmt.startswith("gray"))
    expected = [
        yuv_to_rgb(*(f if len(f) == 3 else (f[0], None, None)), colour, bits) for f in video
    ]
    np.testing.assert_array_equal(frames, expected)


def test_size_and_rate_come_from_the_name(tmp_path):
    video, data, _ = raw_frames("yuv420p", 12, 16, 3, np.random.default_rng(1))
    path = tmp_path / "a_16x12_60.yuv"
    path.write_bytes(data)
    info = probe(path)
    assert (info.width, info.height, info.frames, info.fps) == (16, 12, 3, 60)
    np.testing.assert_array_equal(
        read_clip(path, 1, 2, (2, 3, 7, 9)), [yuv_to_rgb(*f)[2:9, 3:12] for f in video[1:]]
    )
    assert probe(path, size=(8, 6)).frames == 12  # what is told wins over the name
    path.write_bytes(data[:-1])
    with pytest.raises(BadRawSize, match=r"a_16x12_60.*863 bytes.*288 bytes"):
        open_video(path)
    (tmp_path / "nameless.yuv").write_bytes(data)
    with pytest.raises(BadRawSize, match="size"):
        open_video(tmp_path / "nameless.yuv")
    with pytest.raises(BadRawSize, match="rgb24"):
        open_video(path, pix_fmt="rgb24")


@pytest.mark.parametrize(
    "pix_fmt", ["yuv420p", "yuv422p", "yuv444p", "gray", "yuv420p10le", "yuv422p12le"]
)
def test_y4m_files_of_ffmpeg_are_read(pix_fmt, tmp_path, ffmpeg):
    path = tmp_path / "a.y4m"
    ffmpeg(
        *"-f lavfi -i testsrc2=size=50x38:rate=30000/1001 -frames:v 4".split(),
        *f"-pix_fmt {pix_fmt} -strict -1 {path}".split(),
    )
    raw = tmp_path / "same_50x38.yuv"
    raw.write_bytes(ffmpeg("-i", path, "-f", "rawvideo", "-"))
    with open_video(path) as video, open_video(raw, pix_fmt=pix_fmt) as same:
        assert (video.fps, video.frame_count) == (Fraction(30000, 1001), 4)
        assert video.bit_depth == same.bit_depth
        frames = np.stack(list(video))
        colour = video.colour
    with open_video(raw, pix_fmt=pix_fmt, colour=colour) as same:
        np.testing.assert_array_equal(frames, np.stack(list(same)))
    np.testing.assert_array_equal(read_clip(path, 2, 2, (5, 4, 9, 8)), frames[2:, 5:14, 4:12])


def test_y4m_headers(tmp_path):
    path, planes = tmp_path / "a.y4m", bytes([60] * 4 + [128] * 2)

    def write(header, frame=b"FRAME\n"):
        path.write_bytes(header + 3 * (frame + planes))
        return path

    assert probe(write(b"YUV4MPEG2 W2 H2 F24:1\n")).colour == Colour()
    full = write(b"YUV4MPEG2 W2 H2 F24:1 Ip C420jpeg XYSCSS=420JPEG XCOLORRANGE=FULL\n")
    assert probe(full).colour.full_range
    assert probe(write(b"YUV4MPEG2 W2 H2 F24:1\n", b"FRAME Ixyz\n")).frames == 3
    assert probe(write(b"YUV4MPEG2 W2 H2 F0:0\n".replace(b"0:0", b"0:1"))).fps == 25
    for header, error in [
        (b"YUV4MPEG2 W2 H2 F24:1 C444alpha\n", UnsupportedFormat),
        (b"YUV4MPEG2 W2 F24:1\n", NotAVideo),
        (b"YUV4MPEG2 Wx H2 F24:1\n", NotAVideo),
        (b"YUV4MPEG2 W0 H2 F24:1\n", UnsupportedFormat),
        (b"YUV4MPEG2 W2 H999999999 F24:1\n", UnsupportedFormat),
        (b"RIFF W2 H2\n", NotAVideo),
    ]:
        with pytest.raises(error, match=r"a\.y4m"):
            probe(write(header))
    with pytest.raises(TruncatedVideo, match="frame 2"):
        whole = write(b"YUV4MPEG2 W2 H2 F24:1\n").read_bytes()
        path.write_bytes(whole[:-1])
        probe(path)
