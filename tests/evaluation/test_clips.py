"""Finding, identifying, reading and writing clips."""

from fractions import Fraction

import numpy as np
import pytest

from gnvc_jax.evaluation.anchors import to_raw
from gnvc_jax.evaluation.clips import Clip, find_clips, read_clip, write_clip
from gnvc_jax.files import write_whole


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_finds_videos_and_frame_folders(tmp_path):
    touch(tmp_path, "a.mkv", "deep/b.MP4", "deep/notes.txt", "c/im1.png", "c/im2.png", "d.y4m")
    assert find_clips([tmp_path]) == {
        "a": tmp_path / "a.mkv",
        "d": tmp_path / "d.y4m",
        "b": tmp_path / "deep/b.MP4",
        "c": tmp_path / "c",
    }
    one = {"a": tmp_path / "a.mkv"}
    assert find_clips([tmp_path / "a.mkv", tmp_path / "a.mkv"]) == one
    assert find_clips([tmp_path / "c"]) == {"c": tmp_path / "c"}


def test_a_picture_beside_videos_is_not_a_clip(tmp_path, caplog):
    touch(tmp_path, "v1.mp4", "v2.flv", "001.png", ".thumbnails/1.png")
    assert list(find_clips([tmp_path])) == ["v1", "v2"]
    assert "001.png" not in caplog.text and "PNG pictures beside videos" in caplog.text


def test_equal_clip_names_are_made_unique(tmp_path):
    touch(tmp_path, "x/a.mkv", "y/a.mkv", "y/a.mp4")
    clips = find_clips([tmp_path])
    assert len(clips) == 3
    assert list(clips)[:2] == ["a", "y_a"]


def test_missing_paths_and_empty_folders_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match="no videos"):
        find_clips([tmp_path])
    with pytest.raises(FileNotFoundError, match="no such file"):
        find_clips([tmp_path / "missing"])


def test_clip_hash_depends_on_content_only():
    frames = np.zeros((2, 4, 6, 3), np.uint8)
    same = Clip("other", frames.copy(), Fraction(25))
    assert Clip("a", frames, Fraction(25)).sha256 == same.sha256
    other = {
        Clip("a", frames, Fraction(24)).sha256,
        Clip("a", frames + 1, Fraction(25)).sha256,
        Clip("a", frames.reshape(2, 6, 4, 3), Fraction(25)).sha256,
    }
    assert len(other | {same.sha256}) == 4


def test_written_clips_are_read_back_exactly(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (5, 18, 35, 3), dtype=np.uint8)
    clip = Clip("a", frames, Fraction(30000, 1001))
    write_clip(clip, tmp_path / "a.mkv")
    back = read_clip(tmp_path / "a.mkv")
    assert back.name == "a"
    assert float(back.fps) == pytest.approx(float(clip.fps), rel=1e-3)
    np.testing.assert_array_equal(back.frames, frames)
    np.testing.assert_array_equal(read_clip(tmp_path / "a.mkv", frames=2).frames, frames[:2])


def test_full_range_returns_the_code_values(tmp_path):
    """What DCVC's figures do to UVG: code values in, scaled to RGB, the same code values out."""
    luma = np.add.outer(np.arange(32), np.arange(48)).astype(np.uint8) + 40
    planes = luma.tobytes() + bytes([130] * 384) + bytes([120] * 384)
    path = tmp_path / "Ramp_48x32_25fps_420_8bit_YUV.yuv"
    path.write_bytes(planes)
    limited, full = read_clip(path), read_clip(path, full_range=True)
    assert limited.frames.std() > 1.15 * full.frames.std()  # 255 / 219
    back = np.frombuffer(to_raw(full.frames, full.colour), np.uint8).astype(int)
    assert np.abs(back - np.frombuffer(planes, np.uint8)).max() <= 1
    assert np.abs(np.frombuffer(to_raw(full.frames), np.uint8) - back).max() >= 10


def test_long_clip_names_are_shortened(tmp_path):
    for name in ("v" * 251, "w" * 251, "ü" * 125):
        (tmp_path / f"{name}.mkv").touch()
    clips = find_clips([tmp_path])
    assert len(clips) == 3 and {p.suffix for p in clips.values()} == {".mkv"}
    for name in clips:
        write_whole(tmp_path / "out" / f"{name}__svtav1-at-0.125x-gnvc-qp63-steps100.json", "{}")
