"""Files and videos in buckets of real servers: written whole, copied once, found, read in part."""

import json
import shutil

import numpy as np
import pytest

from gnvc_jax import buckets, cli
from gnvc_jax.buckets import as_path, local_copy, stamp
from gnvc_jax.data.clips import clip_dataset
from gnvc_jax.data.index import ClipIndex
from gnvc_jax.errors import UsageError
from gnvc_jax.files import atomic_output, write_json
from gnvc_jax.media.reader import open_video, read_clip
from gnvc_jax.media.writer import open_writer


def video(path, frames=9):
    pixels = np.random.default_rng(0).integers(0, 256, (frames, 32, 48, 3), np.uint8)
    with open_writer(path, 48, 32, 25) as out:
        for frame in pixels:
            out.write(frame)
    return pixels


def test_files_videos_and_clips_in_a_bucket(bucket, tmp_path):
    path = as_path(bucket) / "a" / "b.json"
    assert not path.exists()
    with pytest.raises(KeyError), atomic_output(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert not path.exists()
    write_json(path, {"x": 1})
    old = stamp(path)
    first = local_copy(path)
    assert json.loads(first.read_text()) == {"x": 1} and local_copy(path) == first
    write_json(path, {"x": 2})
    assert stamp(path) != old
    assert json.loads(local_copy(path).read_text()) == {"x": 2}
    assert json.loads((local_copy(path.parent) / "b.json").read_text()) == {"x": 2}
    with pytest.raises(FileNotFoundError, match=r"none\.json: no such"):
        local_copy(f"{bucket}/none.json")

    # A folder of videos, decoded at random and from a cache in the bucket.
    pixels = video(tmp_path / "clip.mkv")
    for name in ("v/clip.mkv", "v/deeper/clip.mkv", "v/.hidden/clip.mkv", "v/notes.json"):
        buckets.upload(tmp_path / "clip.mkv", as_path(f"{bucket}/{name}"))
    with open_video(f"{bucket}/v/clip.mkv") as opened:
        np.testing.assert_array_equal(np.stack(list(opened)), pixels)
    listed = as_path(f"{bucket}/list.txt")
    listed.write_text(f"v/clip.mkv\n{bucket}/v/deeper/clip.mkv\n")
    options = {"frames": 5, "size": (16, 16), "batch": 2, "seed": 3}
    batches = []
    for source, cache in ((f"{bucket}/v", None), (listed, f"{bucket}/decoded")):
        index = ClipIndex(source, cache)
        assert [v.path for v in index] == [f"{bucket}/v/{p}clip.mkv" for p in ("", "deeper/")]
        batches.append(next(iter(clip_dataset(index, **options))))
    np.testing.assert_array_equal(*batches)
    (one, _) = ClipIndex(f"{bucket}/v", f"{bucket}/decoded")
    crop = (3, 5, 16, 20)
    assert one.decoded is not None and one.decoded.startswith(bucket)
    np.testing.assert_array_equal(
        one.read(2, 4, crop), read_clip(tmp_path / "clip.mkv", 2, 4, crop)
    )


def test_shards_in_a_bucket_are_read_in_place(bucket, tmp_path):
    for name in ("a", "b"):
        video(tmp_path / f"{name}.mkv")
        buckets.upload(tmp_path / f"{name}.mkv", as_path(f"{bucket}/v/{name}.mkv"))
    command = ["make-shards", "--data", f"{bucket}/v", "--to", f"{bucket}/s", "--licence", "CC0"]
    assert cli.main([*command, "--no-progress"]) == 0
    shutil.rmtree(tmp_path / "cache")
    crop = (3, 5, 16, 20)
    found = [one.read(2, 4, crop) for one in ClipIndex(f"{bucket}/s")]
    assert not (tmp_path / "cache").exists()  # no shard was copied
    for name, frames in zip("ab", found, strict=True):
        np.testing.assert_array_equal(frames, read_clip(tmp_path / f"{name}.mkv", 2, 4, crop))


def test_least_recently_used_copies_make_room(bucket, monkeypatch):
    path = as_path(bucket)
    for name in "abc":
        (path / name).write_text(name)
    a, b = local_copy(path / "a"), local_copy(path / "b")
    assert local_copy(path / "a") == a  # b is now the one that was used longest ago
    usage = buckets.shutil.disk_usage(a)
    # One byte too few is free, which any copy makes up for.
    full = usage._replace(free=buckets.FREE_SHARE * usage.total)
    monkeypatch.setattr(buckets.shutil, "disk_usage", lambda _: full)
    c = local_copy(path / "c")
    assert a.exists() and c.exists() and not b.exists()
    assert local_copy(path / "b").read_text() == "b"


def test_what_cannot_be_reached_is_one_sentence(bucket, monkeypatch):
    other = f"{bucket.partition('://')[0]}://no-such-bucket-here/run"
    with pytest.raises(UsageError, match=f"{other}: the bucket cannot be reached"):
        buckets.check_bucket(as_path(other))
    buckets.check_bucket(as_path(f"{bucket}/not/yet/there"))
    monkeypatch.setattr(buckets.importlib.util, "find_spec", lambda _: None)
    buckets._prepare.cache_clear()
    with pytest.raises(UsageError, match=r"needs the package .*fs; pip install 'gnvc-jax\[bucket"):
        as_path(bucket)
    buckets._prepare.cache_clear()


def test_other_schemes_are_names_of_files(tmp_path):
    assert not buckets.is_remote("http://a/b") and not buckets.is_remote(tmp_path)
    assert local_copy("-").name == "-"
