"""A cache of latents: written once, resumed, checked, read at random."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from gnvc_jax.data.latents import CacheInfo, latent_dataset, read_info, write_latents
from gnvc_jax.data.left_out import LeftOut, TooMuchLeftOut
from gnvc_jax.errors import GnvcError
from gnvc_jax.media.writer import open_writer

INFO = CacheInfo(frames=5, vae="ab", mean=(0.0, 1.0), std=(1.0, 2.0))


def encode(clip):
    """Two latents of two channels: mean colour of 8x8 pixels of the first frame and of the rest."""
    t, h, w, _ = clip.shape
    blocks = clip.reshape(t, h // 8, 8, w // 8, 8, 3).mean((2, 4))[..., :2] / 128
    return np.stack([blocks[0], blocks[1:].mean(0)])


@pytest.fixture
def videos(tmp_path):
    """Three videos of 80 x 56: 12, 5 and 4 frames, and a file that is none."""
    folder = tmp_path / "videos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("a", 12), ("b", 5), ("c", 4)):
        with open_writer(folder / f"{name}.mkv", 80, 56, 25) as out:
            for _ in range(count):
                out.write(rng.integers(0, 256, (7, 10, 3), np.uint8).repeat(8, 0).repeat(8, 1))
    (folder / "d.mp4").write_bytes(b"no video")
    return folder


def arrays(folder, **options):
    batches = iter(latent_dataset(folder, frames=5, size=(16, 32), batch=2, seed=1, **options))
    return [next(batches) for _ in range(6)]


def test_clips_of_videos_come_back_as_latents(videos, tmp_path):
    cache = tmp_path / "cache"
    failed = write_latents(videos, cache, INFO, encode, progress=False)
    assert [os.path.basename(path) for path in failed] == ["d.mp4"]
    counts = {json.loads(p.read_text())["video"][-5]: json.loads(p.read_text())["records"]
              for p in cache.glob("[abc]-*.json")}  # fmt: skip
    assert counts == {"a": 2, "b": 1, "c": 0}
    from gnvc_jax.media.reader import read_clip

    clips = [read_clip(videos / "a.mkv", 0, 5), read_clip(videos / "a.mkv", 5, 5),
             read_clip(videos / "b.mkv", 0, 5)]  # fmt: skip
    whole = [encode(clip[:, :48, :80]).astype(np.float16).astype(np.float32) for clip in clips]
    for batch in arrays(cache):
        assert batch.shape == (2, 2, 2, 4, 2) and batch.dtype == np.float32
        for latents in batch:
            places = [
                (k, y, x)
                for k, full in enumerate(whole)
                for y in range(5)
                for x in range(7)
                if np.array_equal(full[:, y : y + 2, x : x + 4], latents)
            ]
            assert len(places) == 1
    assert not list(cache.glob(".*"))


def test_interrupted_job_resumes_with_missing_videos(videos, tmp_path):
    cache, calls = tmp_path / "cache", []

    def failing(clip):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(clip)

    with pytest.raises(KeyboardInterrupt):
        write_latents(videos, cache, INFO, failing, progress=False)
    assert sorted(p.name[0] for p in cache.glob("*.array_record")) == ["a"]
    assert not list(cache.glob(".*"))
    write_latents(videos, cache, INFO, failing, progress=False)
    assert len(calls) == 4  # only video b was left
    whole = tmp_path / "whole"
    write_latents(videos, whole, INFO, encode, progress=False)
    for a, b in zip(arrays(cache), arrays(whole)):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="holds other latents"):
        write_latents(videos, cache, CacheInfo(9, "ab", (0.0, 1.0), (1.0, 2.0)), encode)


def test_names_with_dots_are_told_apart(videos, tmp_path):
    cache = tmp_path / "cache"
    for number, name in enumerate(("a", "b")):
        (videos / f"{name}.mkv").rename(videos / f"clip.v{number}.mkv")
    write_latents(videos, cache, INFO, encode, progress=False)
    assert len(list(cache.glob("clip.v0-*.array_record"))) == 1
    assert len(list(cache.glob("clip.v1-*.array_record"))) == 1


def test_processes_share_the_videos(videos, tmp_path):
    for i in range(2):
        write_latents(videos, tmp_path / "shared", INFO, encode, (i, 2), progress=False)
    write_latents(videos, tmp_path / "alone", INFO, encode, progress=False)
    names = [sorted(p.name for p in (tmp_path / f).iterdir()) for f in ("shared", "alone")]
    assert names[0] == names[1]


def test_caches_that_do_not_fit_or_are_damaged_are_refused(videos, tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(FileNotFoundError, match="no latents found"):
        read_info(cache)
    write_latents(videos, cache, INFO, encode, progress=False)
    for wrong, message in (
        ({"frames": 9}, "at least 9 frames, found 5"),
        ({"size": (16, 128)}, "latents of"),
    ):
        options = {"frames": 5, "size": (16, 16), "batch": 1, "seed": 0} | wrong
        with pytest.raises(GnvcError, match=message):
            latent_dataset(cache, **options)
    (file,) = cache.glob("b-*.array_record")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(TooMuchLeftOut, match=r"1 of 3 cannot be read, .* 0\.1; .*/b-.*"):
        arrays(cache)
    left_out = LeftOut(limit=0.5)
    assert len(arrays(cache, left_out=left_out)) == 6
    assert list(left_out.reasons) == [str(file)]
    (other,) = cache.glob("a-*.array_record")
    other.write_bytes(other.read_bytes()[:-100])
    with pytest.raises(TooMuchLeftOut, match="none of 3 files"):
        arrays(cache, left_out=LeftOut(limit=1.0))
    (cache / "cache.json").write_text("[]")
    with pytest.raises(ValueError, match="not the description"):
        read_info(cache)


def test_cache_latents_command_fills_a_cache(videos, tmp_path):
    command = [sys.executable, "-m", "gnvc_jax.cli", "cache-latents", "--data", str(videos)]
    command += ["--vae", "small", "--to", str(tmp_path / "cache"), "--frames", "5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3 and "d.mp4" in done.stderr and "Traceback" not in done.stderr
    (batch,) = arrays(tmp_path / "cache")[:1]
    assert batch.shape == (2, 2, 2, 4, 96) and 0.1 < batch.std() < 10
