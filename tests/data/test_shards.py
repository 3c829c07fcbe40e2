"""Shards of videos: whole, resumed, shared, and drawn from as the videos themselves are."""

import csv
import hashlib
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from gnvc_jax import cli
from gnvc_jax.data import shards
from gnvc_jax.data.clips import clip_dataset
from gnvc_jax.data.index import ClipIndex, find_videos
from gnvc_jax.data.left_out import LeftOut, TooMuchLeftOut
from gnvc_jax.data.shards import make_shards, read_shards
from gnvc_jax.errors import UsageError

CLIPS = {"frames": 5, "size": (32, 32), "seed": 3, "downscale_prob": 0.0}


@pytest.fixture(scope="module")
def videos(tmp_path_factory, mapped_video):
    """Three videos, and a file that is none."""
    folder = tmp_path_factory.mktemp("videos")
    for number, frames in enumerate((12, 7, 9)):
        mapped_video(folder / f"v{number}.mkv", number, frames, 40, 48)
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


def pack(videos, folder, limit=1, **options):
    found = sorted(find_videos(videos))
    return make_shards(found, folder, "CC0", limit, progress=False, **options)


def batches(path, count=4, batch=2, **options):
    index = ClipIndex(path, left_out=LeftOut(limit=0.5))
    dataset = iter(clip_dataset(index, batch=batch, **CLIPS, **options))
    return np.stack([next(dataset) for _ in range(count)])


def test_tar_files_hold_the_videos_where_their_descriptions_say(videos, tmp_path):
    failed = pack(videos, tmp_path, 2 * (videos / "v0.mkv").stat().st_size)
    assert [Path(name).name for name in failed] == ["broken.mp4"]
    sources, total = {}, 0
    for path in sorted(tmp_path.glob("*.tar")):
        facts = json.loads(path.with_suffix(".json").read_text())
        assert hashlib.sha256(path.read_bytes()).hexdigest() == facts["sha256"]
        assert path.stat().st_size == facts["bytes"]
        with tarfile.open(path) as tar:
            members = {member.name: member for member in tar}
            for record in facts["records"]:
                member = members.pop(record["key"])
                assert (member.offset_data, member.size) == (record["offset"], record["bytes"])
                sources[record["video"]] = tar.extractfile(member).read()
                beside = tar.extractfile(members.pop(record["key"][:-4] + ".json")).read()
                assert json.loads(beside).items() <= record.items()
            assert not members
        total += facts["frames"]
    assert len(list(tmp_path.glob("*.tar"))) > 1 and total == 12 + 7 + 9
    assert sources == {str(path): path.read_bytes() for path in videos.glob("*.mkv")}
    rows = list(csv.DictReader((tmp_path / "manifest.csv").open()))
    assert [(r["frames"], r["licence"]) for r in rows] == [
        ("12", "CC0"),
        ("7", "CC0"),
        ("9", "CC0"),
    ]
    rows = list(csv.DictReader((tmp_path / "shards.csv").open()))
    assert sum(int(r["videos"]) for r in rows) == 3 and sum(int(r["left_out"]) for r in rows) == 1
    assert sum(float(r["seconds"]) for r in rows) == pytest.approx(28 / 25, abs=0.01)


def test_clips_are_those_of_the_videos(videos, tmp_path):
    pack(videos, tmp_path)
    np.testing.assert_array_equal(batches(tmp_path), batches(videos))


def test_an_interrupted_job_resumes_and_processes_share_it(videos, tmp_path, monkeypatch):
    real, packed = shards._write_shard, []

    def interrupted(videos, folder, name, licence):
        if len(packed) == 1:
            raise KeyboardInterrupt
        packed.append(name)
        real(videos, folder, name, licence)

    monkeypatch.setattr(shards, "_write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(videos, tmp_path)
    with pytest.raises(UsageError, match="1 of 4 shards are there; run make-shards again"):
        ClipIndex(tmp_path)
    monkeypatch.setattr(shards, "_write_shard", lambda *a: (packed.append(a[2]), real(*a)))
    pack(videos, tmp_path, shard=(1, 2))
    pack(videos, tmp_path, shard=(0, 2))
    assert packed == ["shard-00000", "shard-00001", "shard-00003", "shard-00002"]
    pack(videos, tmp_path / "whole")
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    for name in names:  # bytes do not depend on when and by whom they were written
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_other_videos_or_another_licence_need_another_folder(videos, tmp_path):
    pack(videos, tmp_path)
    with pytest.raises(UsageError, match="holds shards of other videos"):
        make_shards([videos / "v0.mkv"], tmp_path, "CC0", 1, progress=False)
    with pytest.raises(UsageError, match="or licence"):
        make_shards(sorted(find_videos(videos)), tmp_path, "CC-BY-4.0", 1, progress=False)
    with pytest.raises(UsageError, match="does not keep shards"):
        ClipIndex(tmp_path, tmp_path / "decoded")


def test_damaged_bytes_are_left_out(videos, tmp_path):
    pack(videos, tmp_path, 10**9)
    (first, *_) = read_shards(tmp_path)
    data = bytearray(Path(first.shard).read_bytes())
    data[first.offset + first.size // 2] ^= 1
    Path(first.shard).write_bytes(data)
    index = ClipIndex(tmp_path, left_out=LeftOut(limit=0.5))
    dataset = iter(clip_dataset(index, batch=4, **CLIPS))
    clips = np.concatenate([next(dataset) for _ in range(4)])
    assert set(index.left_out.read()) == {first.path}
    assert "do not match the checksum" in index.left_out.read()[first.path]
    assert (clips[..., 2] >= 50).all()  # none is of the first video
    index = ClipIndex(tmp_path, left_out=LeftOut(limit=0.1))
    with pytest.raises(TooMuchLeftOut):
        dataset = iter(clip_dataset(index, batch=4, **CLIPS))
        for _ in range(8):
            next(dataset)


def test_mixtures_draw_by_weight_and_resume_with_other_processes(videos, tmp_path):
    pack(videos, tmp_path / "all")
    (tmp_path / "one.txt").write_text(f"{videos / 'v2.mkv'}\n")
    paths, options = [str(tmp_path / "all"), str(tmp_path / "one.txt")], {"weights": (1.0, 3.0)}
    index = ClipIndex(paths)
    assert index.counts == (3, 1)
    whole = batches(paths, count=10, batch=4, **options)
    # The red channel is the column: clips of the list are those of the third video.
    first = whole[:, :, 0, 0, 0, 2].reshape(-1)
    share = np.mean(first >= 100)
    # Three quarters, and what the data set holds of that video.
    assert 0.75 <= share <= 0.75 + 0.25
    assert len(first) == 40 and np.sum(first < 100) <= 10
    alone = iter(clip_dataset(index, batch=4, **CLIPS, **options))
    for _ in range(3):
        next(alone)
    state = alone.get_state()
    parts = []
    for process in range(2):
        dataset = iter(clip_dataset(index, batch=2, shard=(process, 2), **CLIPS, **options))
        dataset.set_state(state)
        parts.append([next(dataset) for _ in range(3)])
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole[3:6])


def test_the_command_packs_and_says_what_is_left_out(videos, tmp_path, capsys):
    command = ["make-shards", "--data", str(videos), "--to", str(tmp_path), "--licence", "CC0"]
    assert cli.main([*command, "--no-progress"]) == 3
    assert "left out" in capsys.readouterr().err
    assert len(read_shards(tmp_path)) == 3
