"""Inputs that people met in the field; pictures and times are judged by ffmpeg."""

import itertools
import subprocess
from fractions import Fraction

import av
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from gnvc_jax.media.errors import DamagedVideo, NotAVideo, TruncatedVideo, UnsupportedFormat
from gnvc_jax.media.reader import open_video, probe, read_clip


def read(path, **options):
    """All frames, the reader, and the duration in seconds at its rate."""
    with open_video(path, **options) as video:
        frames = np.stack(list(video))
    return frames, video, float(len(frames) / video.fps)


def rgb_by_ffmpeg(ffmpeg, path, size=(36, 52), scale=""):
    """The pictures that the program shows, uint8 (t, h, w, 3)."""
    filters = ["-vf", f"scale=flags=accurate_rnd+full_chroma_int+bilinear{scale}"]
    data = ffmpeg(
        "-i", path, *filters, *"-fps_mode passthrough -f rawvideo -pix_fmt rgb24 -".split()
    )
    return np.frombuffer(data, np.uint8).reshape(-1, *size, 3)


def mean_error(ours, theirs):
    return np.abs(ours.astype(float) - theirs).mean()


# Pictures


@pytest.mark.parametrize("flip", ["", "hflip", "vflip"])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("suffix", ["mp4", "mov"])
def test_rotation_and_mirroring_equal_those_of_ffmpeg(
    suffix, degrees, flip, tmp_path, encode, ffmpeg
):
    path = tmp_path / f"a.{suffix}"
    encode(path, options={"crf": "10"}, frames=3, rotation=degrees, flip=flip)
    size = (52, 36) if degrees in (90, 270) else (36, 52)
    ours, video, _ = read(path)
    theirs = rgb_by_ffmpeg(ffmpeg, path, size, ":in_color_matrix=bt709")
    assert (video.height, video.width) == size
    assert mean_error(ours, theirs) < 4 < mean_error(ours[:, ::-1], theirs)
    np.testing.assert_array_equal(read_clip(path, 1, 2, (4, 2, 20, 18)), ours[1:3, 4:24, 2:20])


def test_other_angles_are_refused(tmp_path, encode):
    path = encode(tmp_path / "a.mp4", frames=2, rotation=30)
    with pytest.raises(UnsupportedFormat, match=r"a\.mp4: is rotated by an angle"):
        read(path)


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize(
    "form", ["565be", "565le", "555be", "555le", "444be", "444le", "48be", "24"]
)
def test_packed_rgb_formats_equal_those_of_ffmpeg(form, order, tmp_path, ffmpeg):
    path = tmp_path / "a.nut"
    source = "testsrc2=s=52x36:r=25:d=0.08"
    ffmpeg("-f", "lavfi", "-i", source, "-c:v", "rawvideo", "-pix_fmt", order + form, path)
    ours, video, _ = read(path)
    assert video.colour.matrix == "rgb"
    np.testing.assert_array_equal(ours, rgb_by_ffmpeg(ffmpeg, path))


@pytest.mark.parametrize(
    "codec, pix_fmt",
    [("rawvideo", f) for f in ("gray", "ya8", "monow", "monob")]
    + [("png", f) for f in ("ya8", "ya16be", "gray16be")],
)
def test_untagged_grey_has_full_range(codec, pix_fmt, tmp_path, ffmpeg):
    path = tmp_path / "a.nut"
    source = "testsrc2=s=56x36:r=25:d=0.08"
    ffmpeg("-f", "lavfi", "-i", source, "-c:v", codec, "-pix_fmt", pix_fmt, path)
    ours, video, _ = read(path)
    assert video.colour.full_range
    assert np.abs(ours.astype(int) - rgb_by_ffmpeg(ffmpeg, path, (36, 56))).max() <= 1


@pytest.mark.parametrize("size, matrix", [((36, 52), "bt601"), ((720, 1280), "bt709")])
def test_yuv_tagged_as_rgb_has_the_matrix_of_its_size(size, matrix, tmp_path, encode, ffmpeg):
    plain = encode(tmp_path / "plain.mp4", frames=2, size=size)
    path = tmp_path / "a.mp4"
    ffmpeg("-i", plain, "-c", "copy", "-bsf:v", "h264_metadata=matrix_coefficients=0", path)
    ours, video, _ = read(path)
    assert video.colour.matrix == matrix
    assert any("tagged as RGB" in note for note in video.notes)
    theirs = rgb_by_ffmpeg(ffmpeg, plain, size, f":in_color_matrix={matrix}")
    other = {"bt601": "bt709", "bt709": "bt601"}[matrix]
    wrong = rgb_by_ffmpeg(ffmpeg, plain, size, f":in_color_matrix={other}")
    assert mean_error(ours, theirs) < 0.7 * mean_error(ours, wrong)


@pytest.mark.parametrize("codec, pix_fmt", [("png", "ya16be"), ("png", "rgb48be")])
def test_conversion_of_pixel_formats_is_deterministic(codec, pix_fmt, tmp_path, ffmpeg):
    path = tmp_path / "a.nut"
    source = "testsrc2=s=56x36:r=25:d=0.04"
    ffmpeg("-f", "lavfi", "-i", source, "-c:v", codec, "-pix_fmt", pix_fmt, path)
    assert len({read(path)[0].tobytes() for _ in range(30)}) == 1


def test_a_change_from_rgb_to_yuv_is_an_error(tmp_path, encode):
    first = encode(tmp_path / "a.264", "libx264rgb", "bgr24", frames=3)
    second = encode(tmp_path / "b.264", frames=3)
    (tmp_path / "c.264").write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(UnsupportedFormat, match=r"c\.264: frame 3 is YUV, the first one RGB"):
        read(tmp_path / "c.264")


def test_changes_of_colour_range_are_followed(tmp_path, encode):
    tags = {"color_primaries": 1, "color_trc": 1, "colorspace": 1}
    first = encode(tmp_path / "a.264", frames=2, tags=tags | {"color_range": 1})
    second = encode(tmp_path / "b.264", frames=2, tags=tags | {"color_range": 2})
    path = tmp_path / "c.264"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    parts = [read(part)[0] for part in (first, second)]
    np.testing.assert_array_equal(read(path)[0], np.concatenate(parts))


def test_animated_webp_is_refused_by_name(tmp_path, picture):
    images = [Image.fromarray(picture(n)) for n in range(3)]
    images[0].save(tmp_path / "a.webp", save_all=True, append_images=images[1:], duration=40)
    with pytest.raises(UnsupportedFormat, match=r"a\.webp: animated WebP .* not supported"):
        read(tmp_path / "a.webp")
    images[0].save(tmp_path / "b.webp", lossless=True)
    assert read(tmp_path / "b.webp")[0].shape == (1, 36, 52, 3)


def test_digits_of_other_scripts_sort_as_letters(tmp_path, picture):
    names = ["1x2.png", "1\u0e532.png", "10x2.png", "2\u00b2.png"]
    for number, name in enumerate(names):
        Image.fromarray(picture(number)).save(tmp_path / name)
    frames, _, _ = read(tmp_path)
    np.testing.assert_array_equal(frames, [picture(n) for n in (0, 1, 3, 2)])


# Times

VARIABLE = [round(1000 * n / 30) for n in range(12)] + [400 + 200 * n for n in range(8)]


def duration_by_ffmpeg(path):
    with av.open(str(path)) as container:
        return container.duration / av.time_base


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.ts", "a.mp4", "a.mov", "a.flv"])
def test_variable_rate_is_read_at_its_mean(name, tmp_path, encode):
    codec = "libvpx-vp9" if name == "a.webm" else "libx264"
    path = encode(tmp_path / name, codec, times=VARIABLE)
    frames, video, seconds = read(path)
    assert len(frames) == 20
    # The last frame may count with its own duration or not at all.
    assert 1.75 < seconds < 2.05
    assert any("frame rate varies" in note for note in video.notes)
    assert probe(path).fps == video.fps
    assert read(path, fps=30)[1].fps == 30


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.ts", "a.mp4", "a.avi", "a.264"])
def test_constant_rate_is_exact_and_needs_no_note(name, tmp_path, encode):
    codec = {"a.webm": "libvpx-vp9", "a.avi": "mpeg4"}.get(name, "libx264")
    _, video, _ = read(encode(tmp_path / name, codec))
    assert (video.fps, video.notes) == (25, [])


def test_clocks_that_jump_do_not_change_the_rate(tmp_path, encode):
    part = encode(tmp_path / "a.ts").read_bytes()
    (tmp_path / "b.ts").write_bytes(part + part)
    frames, video, _ = read(tmp_path / "b.ts")
    assert (len(frames), video.fps) == (40, 25)
    encode(tmp_path / "c.ts", times=[40 * n + (n > 9) * 3_600_000 for n in range(20)])
    assert read(tmp_path / "c.ts")[1].fps > 1


@pytest.mark.parametrize("suffix", ["ts", "mp4", "mkv"])
def test_single_frame_keeps_its_duration(suffix, tmp_path, ffmpeg):
    path = tmp_path / f"a.{suffix}"
    source = "testsrc2=s=52x36:r=25:d=0.04"
    ffmpeg("-f", "lavfi", "-i", source, "-c:v", "libx264", "-pix_fmt", "yuv420p", path)
    assert read(path)[2] == pytest.approx(0.04)


@pytest.mark.parametrize("options, seconds", [({"duration": 1000}, 1.0), ({}, 0.1)])
def test_single_picture_of_a_gif_keeps_its_duration(options, seconds, tmp_path, picture):
    # Without a duration in the file, players show a picture for a tenth of a second.
    Image.fromarray(picture(0)).save(tmp_path / "a.gif", **options)
    assert read(tmp_path / "a.gif")[2] == pytest.approx(seconds)


@pytest.mark.parametrize("dropped", [[1, 3, 9], [17, 18, 19]])
def test_dropped_frames_of_avi_do_not_count(dropped, tmp_path, encode, ffmpeg):
    path = tmp_path / "a.avi"
    whole = encode(tmp_path / "whole.avi", "mjpeg", "yuvj420p")
    chosen = "+".join(f"eq(n,{n})" for n in dropped)
    ffmpeg("-i", whole, "-c", "copy", "-bsf:v", f"noise=drop='{chosen}'", path)
    frames, video, seconds = read(path)
    assert len(frames) == video.frame_count == probe(path).frames == 17
    assert seconds == pytest.approx(duration_by_ffmpeg(path), rel=0.01)
    kept = [n for n in range(20) if n not in dropped]
    np.testing.assert_array_equal(frames, read(whole)[0][kept])


@pytest.mark.parametrize("rate", ["F0:0", "F25:0", "F0:1", ""])
def test_y4m_without_a_rate_has_25_or_what_is_asked_for(rate, tmp_path):
    path = tmp_path / "a.y4m"
    path.write_bytes(f"YUV4MPEG2 W4 H2 {rate} Cmono\nFRAME\n".encode() + bytes(range(8)))
    assert probe(path).fps == 25
    assert probe(path, fps=Fraction(24000, 1001)).fps == Fraction(24000, 1001)


def test_y4m_with_an_invalid_rate(tmp_path):
    path = tmp_path / "a.y4m"
    path.write_bytes(b"YUV4MPEG2 W4 H2 F25 Cmono\nFRAME\n" + bytes(8))
    with pytest.raises(NotAVideo, match=r"a\.y4m: .* no valid size and rate"):
        probe(path)


@pytest.mark.parametrize("fps", [0, -25])
def test_rate_must_be_positive(fps, tmp_path, encode):
    path = encode(tmp_path / "a.mp4", frames=1)
    with pytest.raises(ValueError, match="must be positive, got"):
        open_video(path, fps=fps)


# Damage


def invert(path, where, count=40):
    """Inverts bytes of the packet of frame `where`."""
    with av.open(str(path)) as container:
        data = [bytes(p) for p in container.demux(video=0) if p.size][where]
    whole = bytearray(path.read_bytes())
    middle = data[len(data) // 4 :][:60]
    start = bytes(whole).index(middle)
    whole[start : start + count] = bytes(255 - b for b in whole[start : start + count])
    path.write_bytes(whole)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.avi"])
def test_damage_that_the_decoder_flags_is_an_error(name, tmp_path, encode):
    codec = "mpeg4" if name == "a.avi" else "libx264"
    options = {"g": "10", "bf": "0", "crf": "1", "x264-params": "scenecut=0"}
    path = encode(tmp_path / name, codec, options=options if codec == "libx264" else {"g": "10"})
    whole, _, _ = read(path)
    invert(path, 10)
    with pytest.raises(DamagedVideo, match=rf"{name}: damaged: .* frame"):
        read(path)
    with open_video(path) as video:  # what comes before is good
        np.testing.assert_array_equal(list(itertools.islice(video, 10)), whole[:10])
    frames, video, _ = read(path, tolerant=True)
    assert video.damaged
    assert any("of 20 frames" in note or "could not be decoded" in note for note in video.notes)
    assert 19 <= len(frames) <= 20
    np.testing.assert_array_equal(frames[:10], whole[:10])


CUT = {  # name: encoder, options of ffmpeg
    "fragments.mp4": ("libx264", "-movflags frag_keyframe+empty_moov"),
    "live.webm": ("libvpx-vp9", "-f webm -live 1"),
    "live.mkv": ("libx264", "-f matroska -live 1"),
    "recording.ts": ("mpeg2video", ""),
    "stream.flv": ("flv", ""),
    "bare.264": ("libx264", ""),
    "web.ogv": ("libtheora", "-page_duration 1"),
}


@pytest.mark.parametrize("name", CUT)
def test_cut_recordings_are_read_up_to_the_cut_with_a_note(name, tmp_path, ffmpeg):
    codec, options = CUT[name]
    path = tmp_path / name
    source = "testsrc2=s=96x64:r=25:d=0.8"
    common = f"-pix_fmt yuv420p -g 8 -bf 0 -c:v {codec} {options}".split()
    ffmpeg("-f", "lavfi", "-i", source, *common, path)
    whole, video, _ = read(path)
    assert (len(whole), video.notes) == (20, [])
    data = path.read_bytes()
    size = int(len(data) * 0.6)
    path.write_bytes(data[: size + (size % 188 == 0)])
    frames, video, _ = read(path)
    assert 5 < len(frames) < 16
    assert any("data is missing" in note for note in video.notes) and not video.damaged
    np.testing.assert_array_equal(frames, whole[: len(frames)])
    with open_video(path) as video:
        assert sum(1 for _ in video) == len(frames)


def test_cut_gif_is_noted(tmp_path, picture):
    images = [Image.fromarray(picture(n)) for n in range(10)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=40)
    assert read(tmp_path / "a.gif")[1].notes == []
    data = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(data[: len(data) // 2])
    frames, video, _ = read(tmp_path / "a.gif")
    assert len(frames) < 10 and any("data is missing" in note for note in video.notes)


def test_damaged_matroska_structure_is_noted(tmp_path, encode):
    path = encode(tmp_path / "a.mkv", options={"g": "5"}, audio=True)
    assert read(path)[1].notes == []
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [bytes(p) for p in container.demux(video=0) if p.size]
    block = bytes(data).index(packets[10]) - 8  # its header
    data[block : block + 6] = bytes(255 - b for b in data[block : block + 6])
    path.write_bytes(data)
    with open_video(path) as video:
        assert any("data may be missing" in note for note in video.notes)


def test_truncated_files_are_read_up_to_the_end_if_tolerant(tmp_path, encode, ffmpeg):
    whole = tmp_path / "whole.mp4"
    ffmpeg("-i", encode(tmp_path / "a.mp4"), "-c", "copy", "-movflags", "+faststart", whole)
    path = tmp_path / "cut.mp4"
    path.write_bytes(whole.read_bytes()[:-900])
    with pytest.raises(TruncatedVideo):
        read(path)
    frames, video, _ = read(path, tolerant=True)
    assert video.damaged and 1 <= len(frames) < 20
    assert any("truncated: promises 20 frames" in note for note in video.notes)


# Choices and notes


@pytest.fixture
def two_streams(tmp_path, encode):
    """make(default): a .mkv of a small stream and a larger one, of which one may be the default."""

    def make(default):
        parts = [
            encode(tmp_path / "s.mkv", size=(32, 32)),
            encode(tmp_path / "l.mkv", size=(64, 96)),
        ]
        command = [imageio_ffmpeg.get_ffmpeg_exe(), *"-v error -y".split()]
        command += itertools.chain(*(("-i", part) for part in parts))
        command += "-map 0 -map 1 -c copy -disposition:0 0 -disposition:1 0".split()
        if default is not None:
            command += [f"-disposition:{default}", "default"]
        subprocess.run([*command, tmp_path / "two.mkv"], check=True)
        return tmp_path / "two.mkv"

    return make


@pytest.mark.parametrize("default, width", [(None, 96), (1, 96), (0, 32)])
def test_default_stream_or_the_largest_is_read(default, width, two_streams):
    path = two_streams(default)
    _, video, _ = read(path)
    assert video.width == width
    assert any("2 video streams" in note for note in video.notes)
    for number, other in enumerate((32, 96)):
        _, video, _ = read(path, stream=number)
        assert (video.width, video.notes) == (other, [])
        assert probe(path, stream=number).width == other
    with pytest.raises(NotAVideo, match=r"two\.mkv: has no video stream 2; there are 2"):
        read(path, stream=2)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.y4m"])
def test_pixels_that_are_not_square_are_noted(name, tmp_path, ffmpeg):
    path = tmp_path / name
    source = "testsrc2=s=52x36:r=25:d=0.08,setsar=16/15,format=yuv420p"
    ffmpeg("-f", "lavfi", "-i", source, path)
    _, video, _ = read(path)
    assert video.notes == ["pixels are not square (16:15); their shape is not carried"]
