"""Which videos are found, and what is kept of them on disk."""

import errno
import logging
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import gnvc_jax
from gnvc_jax.data import index as index_module
from gnvc_jax.data.index import ClipIndex, Video
from gnvc_jax.media.errors import DiskFull, MediaError, MissingInput, NoFrames
from gnvc_jax.media.reader import read_clip


def test_folder_is_searched_with_subfolders(folder):
    index = ClipIndex(folder)
    assert [video for video in index] == [
        Video(str(folder / "a.mkv"), 12, 48, 40, Fraction(25)),
        Video(str(folder / "more" / "b"), 30, 64, 36, Fraction(25)),
        Video(str(folder / "short.mkv"), 3, 48, 40, Fraction(25)),
    ]
    assert len(index) == 3 and index[1].frames == 30


def test_a_list_and_a_single_file(folder, tmp_path):
    (folder / "train.txt").write_text("# chosen\nmore/b\n\na.mkv\n")
    assert [Path(v.path).name for v in ClipIndex(folder / "train.txt")] == ["a.mkv", "b"]
    os.remove(folder / "train.txt")
    assert [v.frames for v in ClipIndex(folder / "a.mkv")] == [12]


def test_unreadable_files_are_reported_and_left_out(folder, tmp_path, caplog):
    data = (folder / "a.mkv").read_bytes()
    (tmp_path / "bad.mp4").write_bytes(b"junk" * 100)
    (tmp_path / "empty.mkv").touch()
    (tmp_path / "good.mkv").write_bytes(data)
    (tmp_path / "half.mkv").write_bytes(data[: len(data) // 2])
    (tmp_path / "notes.md").write_text("no video")
    with caplog.at_level(logging.WARNING):
        index = ClipIndex(tmp_path, tmp_path / "cache")
    assert [Path(v.path).name for v in index] == ["good.mkv"]
    reported = "\n".join(record.getMessage() for record in caplog.records)
    assert all(name in reported for name in ("bad.mp4", "empty.mkv"))
    assert "notes.md" not in reported
    assert not [name for name in os.listdir(tmp_path / "cache") if name.endswith(".tmp")]


def test_no_readable_video_is_an_error(tmp_path):
    with pytest.raises(MissingInput):
        ClipIndex(tmp_path / "missing")
    with pytest.raises(NoFrames, match="no readable video"):
        ClipIndex(tmp_path)


def test_decoded_frames_are_cached(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = ClipIndex(folder, cache)
    assert len(list(cache.glob("*.npy"))) == 3
    for video in first:
        whole = read_clip(video.path, 0, video.frames)
        np.testing.assert_array_equal(np.load(video.decoded), whole)
        crop = (3, 5, 20, 30)
        np.testing.assert_array_equal(video.read(1, 2, crop), read_clip(video.path, 1, 2, crop))

    def fail(*_, **__):
        raise AssertionError("looked at the video again")

    monkeypatch.setattr(index_module, "open_video", fail)
    monkeypatch.setattr(index_module, "probe", fail)
    assert ClipIndex(folder, cache).videos == first.videos
    monkeypatch.undo()
    (cache / "index.json").write_text("{not json")
    assert ClipIndex(folder, cache).videos == first.videos


def test_a_changed_file_is_decoded_again(tmp_path, mapped_video):
    path, cache = tmp_path / "a.mkv", tmp_path / "cache"
    mapped_video(path, 0, 4, 16, 16)
    assert ClipIndex(path, cache)[0].frames == 4
    path.unlink()
    mapped_video(path, 1, 6, 16, 16)
    video = ClipIndex(path, cache)[0]
    assert video.frames == 6
    assert video.read(0, 6, (0, 0, 1, 1))[:, 0, 0, 2].tolist() == [50, 51, 52, 53, 54, 55]


def test_unwritable_cache_is_an_error(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MediaError, match="file") as caught:
        ClipIndex(folder, tmp_path / "file")
    assert caught.value.exit_code in (73, 74)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(DiskFull):
        ClipIndex(folder, tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == ["index.json"]


def test_jax_is_not_needed_to_read_videos():
    program = (
        "import sys, gnvc_jax.data.index, gnvc_jax.media.writer; sys.exit('jax' in sys.modules)"
    )
    root = Path(gnvc_jax.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", program], cwd=root).returncode == 0
