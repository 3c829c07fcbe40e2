"""Many videos to streams: manifest, going on, failures, processes; the coder is a stand-in."""

import csv
import types

import jax
import numpy as np
import pytest

from gnvc_jax.corpus import encode_all
from gnvc_jax.demo import write_all


class Stand:
    """A coder whose streams are the bytes of the first pixel of each frame."""

    model = types.SimpleNamespace(fingerprints=(b"\x01", b"\x02"))

    def __init__(self):
        self.calls = 0

    def header(self, width, height, fps, **_):
        return width, height

    def encode_frames(self, frames, out, header, qp):
        self.calls += 1
        rows = [frame[0, 0].tobytes() for frame in frames]
        out.write(b"".join(rows))
        return len(rows)


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for i, count in enumerate((3, 5, 4)):
        video = np.full((count, 32, 48, 3), 40 * i, np.uint8)
        write_all(folder / f"v{i}.mkv", video, 25)
    return folder


def manifest(folder):
    return list(csv.DictReader((folder / "manifest.csv").read_text().splitlines()))


def test_streams_manifest_and_going_on(clips, tmp_path):
    out, coder = tmp_path / "out", Stand()
    (clips / "v1.mkv").rename(clips / "later.bin")
    assert encode_all(clips, out, coder, 24, progress=False) == {}
    (clips / "later.bin").rename(clips / "v1.mkv")
    (clips / "broken.mkv").write_bytes(b"no video")
    failed = encode_all(clips, out, coder, 24, progress=False)
    assert [path.rpartition("/")[2] for path in failed] == ["broken.mkv"]
    assert coder.calls == 3  # the two that were there are not done again
    rows = manifest(out)
    assert [row["frames"] for row in rows] == ["3", "5", "4"]
    for row in rows:
        data = (out / row["stream"]).read_bytes()
        assert len(data) == int(row["bytes"]) == 3 * int(row["frames"])
        assert float(row["bpp"]) == pytest.approx(8 * 3 / (32 * 48))
    encode_all(clips, out, coder, 30, progress=False)
    assert coder.calls == 6  # another level is another stream
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_processes_share_the_videos(clips, tmp_path, monkeypatch):
    coder = Stand()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for number, done in ((1, 1), (0, 3)):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        encode_all(clips, tmp_path / "out", coder, 24, progress=False)
        assert coder.calls == len(manifest(tmp_path / "out")) == done


def test_an_interrupted_video_leaves_no_row(clips, tmp_path, monkeypatch):
    class Interrupted(Stand):
        def encode_frames(self, *args):
            if self.calls:
                raise KeyboardInterrupt
            return super().encode_frames(*args)

    with pytest.raises(KeyboardInterrupt):
        encode_all(clips, tmp_path / "out", Interrupted(), 24, progress=False)
    assert len(list((tmp_path / "out").glob("*.json"))) == 1
    assert len(list((tmp_path / "out").glob("*.gnvc"))) == 1
