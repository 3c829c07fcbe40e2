"""Readers of video files: every frame, in order, exact; judged by ffmpeg and Pillow."""

import os
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

import gnvc_jax
from gnvc_jax.media.colour import BT709, RGB, Colour, rgb_to_yuv420, yuv_to_rgb
from gnvc_jax.media.reader import open_video, probe, read_clip

# name: encoder, pixel format, options; B-frames and several key frames where the codec has them
FORMATS = {
    "b_frames.mp4": ("libx264", "yuv420p", {"bf": "3", "g": "8"}),
    "open_gop.mkv": ("libx264", "yuv420p", {"bf": "2", "g": "6", "x264-params": "open-gop=1"}),
    "hidden.webm": ("libvpx-vp9", "yuv420p", {"g": "8", "lag-in-frames": "10", "cpu-used": "8"}),
    "mpeg4.avi": ("mpeg4", "yuv420p", {"bf": "2", "g": "8"}),
    "stream.ts": ("mpeg2video", "yuv420p", {"bf": "2", "g": "8"}),
    "bare.264": ("libx264", "yuv420p", {"bf": "3", "g": "8"}),
    "ten_bit.mkv": ("ffv1", "yuv420p10le", {}),
    "chroma.mkv": ("ffv1", "yuv422p", {}),
    "full.mkv": ("ffv1", "yuv444p", {}),
}


def frames_of(path, **options):
    with open_video(path, **options) as video:
        return np.stack(list(video))


def planes_by_ffmpeg(ffmpeg, path, pix_fmt, size=(36, 52)):
    """The program's decoded planes, [frame][plane]."""
    data = ffmpeg(*f"-i {path} -fps_mode passthrough -f rawvideo -pix_fmt {pix_fmt} -".split())
    samples = np.frombuffer(data, "<u2" if "10" in pix_fmt else "u1")
    rows = -(-size[0] // (2 if "420" in pix_fmt else 1))
    columns = -(-size[1] // (1 if "444" in pix_fmt else 2))
    cuts = np.cumsum([size[0] * size[1], rows * columns])
    return [
        [p.reshape(s) for p, s in zip(np.split(f, cuts), (size, (rows, columns), (rows, columns)))]
        for f in samples.reshape(-1, cuts[0] + 2 * rows * columns)
    ]


@pytest.mark.parametrize("name", FORMATS)
def test_frames_equal_those_of_ffmpeg(name, tmp_path, encode, ffmpeg):
    codec, pix_fmt, options = FORMATS[name]
    path = encode(tmp_path / name, codec, pix_fmt, options)
    expected = [
        yuv_to_rgb(*planes, BT709, 10 if "10" in pix_fmt else 8)
        for planes in planes_by_ffmpeg(ffmpeg, path, pix_fmt)
    ]
    np.testing.assert_array_equal(frames_of(path), expected)
    info = probe(path)
    assert (info.frames, info.width, info.height, info.fps) == (20, 52, 36, 25)
    assert (info.bit_depth, info.has_audio) == (10 if "10" in pix_fmt else 8, False)
    assert info.colour == BT709


@pytest.mark.parametrize("name", FORMATS)
def test_random_access_equals_iteration(name, tmp_path, encode):
    codec, pix_fmt, options = FORMATS[name]
    path = encode(tmp_path / name, codec, pix_fmt, options)
    whole = frames_of(path)
    for start, count in [(0, 1), (0, 20), (7, 3), (8, 8), (13, 4), (19, 1)]:
        clip = read_clip(path, start, count, (3, 5, 17, 30))
        np.testing.assert_array_equal(clip, whole[start : start + count, 3:20, 5:35])
    np.testing.assert_array_equal(read_clip(path, 5, 2), whole[5:7])


def test_a_variable_frame_rate_is_passed_through(tmp_path, encode, picture):
    times = [40 * n + (170 if n > 11 else 0) + 7 * (n % 3) for n in range(20)]
    path = encode(tmp_path / "vfr.mkv", "ffv1", "bgr0", times=times)
    expected = [picture(n) for n in range(20)]
    np.testing.assert_array_equal(frames_of(path), expected)
    np.testing.assert_array_equal(read_clip(path, 10, 4), expected[10:14])
    assert probe(path).frames == 20


def test_frames_cut_by_an_edit_list_are_not_counted(tmp_path, encode, ffmpeg):
    source = encode(tmp_path / "a.mp4", options={"bf": "2", "g": "10"})
    path = tmp_path / "cut.mp4"
    ffmpeg("-ss", "0.56", "-i", source, "-c", "copy", path)
    shown = len(planes_by_ffmpeg(ffmpeg, path, "yuv420p"))
    assert 0 < shown < 20
    assert len(frames_of(path)) == probe(path).frames == shown
    np.testing.assert_array_equal(read_clip(path, 1, 3), frames_of(path)[1:4])


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_pictures_that_lost_their_references_are_not_counted(suffix, tmp_path, encode, ffmpeg):
    # Cut without decoding, an open GOP begins with pictures that refer to the part cut off.
    source = encode(tmp_path / "a.mp4", "mpeg2video", options={"bf": "2", "g": "6"})
    path = tmp_path / f"cut.{suffix}"
    ffmpeg(
        *f"-ss 0.5 -i {source} -c copy -use_editlist 0".split()[: 8 if suffix == "mp4" else 6], path
    )
    shown = len(planes_by_ffmpeg(ffmpeg, path, "yuv420p"))
    with av.open(str(path)) as container:
        assert shown < sum(packet.size > 0 for packet in container.demux(video=0))
    whole = frames_of(path)
    assert len(whole) == probe(path).frames == shown
    np.testing.assert_array_equal(read_clip(path, 0, 2), whole[:2])
    np.testing.assert_array_equal(read_clip(path, shown - 3, 3), whole[-3:])


@pytest.mark.parametrize("angle", [90, 180, -90])
def test_rotation_is_applied(angle, tmp_path, encode, ffmpeg):
    path = encode(tmp_path / "turned.mp4", options={"crf": "5"}, rotation=angle, frames=4)
    info = probe(path)
    turned = abs(angle) == 90
    assert (info.height, info.width) == ((52, 36) if turned else (36, 52))
    data = ffmpeg(*f"-i {path} -f rawvideo -pix_fmt rgb24 -".split())
    theirs = np.frombuffer(data, np.uint8).reshape(-1, info.height, info.width, 3)
    ours = frames_of(path)
    # Their matrix and chroma filter differ; a picture turned the wrong way is off by 30 levels.
    assert np.abs(ours.astype(int) - theirs).mean() < 6
    np.testing.assert_array_equal(read_clip(path, 1, 2, (4, 2, 20, 18)), ours[1:3, 4:24, 2:20])


def test_tags_choose_the_conversion(tmp_path, encode, ffmpeg):
    tags = {"colorspace": 6, "color_primaries": 6, "color_trc": 6, "color_range": 2}
    path = encode(tmp_path / "tagged.mp4", tags=tags, frames=3)
    info = probe(path)
    assert info.colour.code_points == (6, 6, 6, 1)
    planes = planes_by_ffmpeg(ffmpeg, path, "yuv420p")
    expected = [yuv_to_rgb(*p, Colour("bt601", full_range=True)) for p in planes]
    np.testing.assert_array_equal(frames_of(path), expected)
    told = Colour("bt2020")
    np.testing.assert_array_equal(
        frames_of(path, colour=told), [yuv_to_rgb(*p, told) for p in planes]
    )


def test_yuvj_is_full_range_and_grey_is_grey(tmp_path, encode):
    path = encode(tmp_path / "jpeg.mkv", "mjpeg", "yuvj420p", frames=2)
    assert probe(path).colour.full_range
    path = encode(tmp_path / "grey.mkv", "ffv1", "gray", frames=2)
    with open_video(path) as video:
        frame = next(video)
    assert video.colour.full_range and (frame == frame[..., :1]).all() and np.ptp(frame) > 50


@pytest.mark.parametrize("codec, pix_fmt", [("ffv1", "bgr0"), ("libx264rgb", "bgr24")])
def test_rgb_is_passed_through(codec, pix_fmt, tmp_path, encode, picture):
    options = {"qp": "0"} if codec == "libx264rgb" else {}
    path = encode(tmp_path / "rgb.mkv", codec, pix_fmt, options)
    np.testing.assert_array_equal(frames_of(path), [picture(n) for n in range(20)])
    assert probe(path).colour == RGB


def test_gif_equals_pillow(tmp_path, picture):
    images = [Image.fromarray(picture(n)).quantize(64) for n in range(5)]
    images[0].save(
        tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=40, disposal=1
    )
    with Image.open(tmp_path / "a.gif") as gif:
        expected = []
        for n in range(gif.n_frames):
            gif.seek(n)
            expected.append(np.asarray(gif.convert("RGB")))
    np.testing.assert_array_equal(frames_of(tmp_path / "a.gif"), expected)
    np.testing.assert_array_equal(read_clip(tmp_path / "a.gif", 2, 2), expected[2:4])
    assert probe(tmp_path / "a.gif").frames == 5


def test_audio_is_detected(tmp_path, encode):
    path = encode(tmp_path / "sound.mp4", audio=True)
    info = probe(path)
    assert info.has_audio and info.frames == 20 and len(frames_of(path)) == 20


def test_a_folder_of_pictures_is_sorted_by_number(tmp_path, picture):
    for number in range(12):
        Image.fromarray(picture(number)).save(tmp_path / f"im{number}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    expected = [picture(n) for n in range(12)]
    np.testing.assert_array_equal(frames_of(tmp_path), expected)
    np.testing.assert_array_equal(
        read_clip(tmp_path, 8, 3, (1, 2, 9, 10)), np.stack(expected[8:11])[:, 1:10, 2:12]
    )
    info = probe(tmp_path, fps=Fraction(30000, 1001))
    assert (info.frames, info.fps, info.colour) == (12, Fraction(30000, 1001), RGB)


def test_unusual_file_names_are_accepted(tmp_path, encode, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.rename(encode(tmp_path / "a.mp4", frames=3), "pipe:b %d é.mp4")
    assert probe("pipe:b %d é.mp4").frames == 3


def test_standard_input_is_read_as_y4m(tmp_path, encode):
    path = encode(tmp_path / "a.mp4", frames=4)
    program = (
        "import sys, numpy as np; from gnvc_jax.media.reader import open_video\n"
        "video = open_video('-'); assert video.frame_count is None\n"
        "print(video.width, video.height, video.fps, file=sys.stderr)\n"
        "sys.stdout.buffer.write(np.stack(list(video)).tobytes())"
    )
    source = subprocess.Popen(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path, "-f", "yuv4mpegpipe", "-"],
        stdout=subprocess.PIPE,
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        stdin=source.stdout,
        capture_output=True,
        check=True,
        cwd=Path(gnvc_jax.__file__).parents[1],
    )
    source.stdout.close()
    assert source.wait() == 0
    assert done.stderr.split() == [b"52", b"36", b"25"]
    assert done.stdout == frames_of(path).tobytes()


def test_reader_memory_does_not_grow(tmp_path, picture):
    # 400 frames of 52x36 are 2.2 MB; reading them one by one must not keep them.
    planes = b"".join(map(bytes, rgb_to_yuv420(picture(0))))
    path = tmp_path / "long_52x36.yuv"
    path.write_bytes(planes * 400)
    tracemalloc.start()
    with open_video(path) as video:
        assert sum(1 for _ in video) == 400
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 800_000
