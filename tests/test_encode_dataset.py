"""Many videos to streams: manifest, going on, failures, processes; the coder is a stand-in."""

import csv
import errno
import types

import av
import jax
import numpy as np
import pytest

from gnvc_jax import encode_dataset
from gnvc_jax.demo import write_all
from gnvc_jax.encode_dataset import encode_all
from gnvc_jax.errors import UsageError


class Stand:
    """A coder whose streams are the bytes of the first pixel of each frame."""

    model = types.SimpleNamespace(
        fingerprints=(b"\x01", b"\x02"), vae_config=types.SimpleNamespace(temporal_stride=4)
    )

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


def add_sound(path):
    """Puts a tenth of a second of silence beside the pictures of a video."""
    silence = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
    silence.sample_rate = 8000
    with av.open(str(path)) as video, av.open(str(path.with_stem("sound")), "w") as out:
        pictures = out.add_stream_from_template(video.streams.video[0])
        sound = out.add_stream("pcm_s16le", rate=8000, layout="mono")
        for packet in video.demux(video=0):
            if packet.dts is not None:
                packet.stream = pictures
                out.mux(packet)
        out.mux(sound.encode(silence))
    path.unlink()


def test_missing_audio_is_named(clips, tmp_path, caplog):
    add_sound(clips / "v0.mkv")
    encode_all(clips, tmp_path / "out", Stand(), 24, progress=False)
    said = [r.getMessage() for r in caplog.records if "audio is not carried" in r.getMessage()]
    assert len(said) == 1 and "sound.mkv" in said[0]


def manifest(folder):
    return list(csv.DictReader((folder / "manifest.csv").read_text().splitlines()))


def test_streams_and_manifest_are_written_and_resumed(clips, tmp_path):
    out, coder = tmp_path / "out", Stand()
    (clips / "v1.mkv").rename(clips / "later.bin")
    assert encode_all(clips, out, coder, 24, progress=False) == {}
    (clips / "later.bin").rename(clips / "v1.mkv")
    (clips / "broken.mkv").write_bytes(b"no video")
    failed = encode_all(clips, out, coder, 24, progress=False)
    assert [path.rpartition("/")[2] for path in failed] == ["broken.mkv"]
    assert coder.calls == 3  # the two that were there are not done again
    rows = [row for row in manifest(out) if not row["left_out"]]
    assert [row["frames"] for row in rows] == ["3", "5", "4"]
    for row in rows:
        data = (out / row["stream"]).read_bytes()
        assert len(data) == int(row["bytes"]) == 3 * int(row["frames"])
        assert float(row["bpp"]) == pytest.approx(8 * 3 / (32 * 48))
    encode_all(clips, out, coder, 30, progress=False)
    assert coder.calls == 6  # another level is another stream
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_bad_videos_are_left_out_and_listed_in_the_manifest(clips, tmp_path):
    class Odd(Stand):
        def encode_frames(self, frames, out, header, qp):
            if header == (64, 64):
                raise RuntimeError("an odd one")
            return super().encode_frames(frames, out, header, qp)

    (clips / "a.mkv").write_bytes(b"no video")
    write_all(clips / "b.mkv", np.zeros((2, 8, 8, 3), np.uint8), 25)  # smaller than streams hold
    write_all(clips / "c.mkv", np.zeros((2, 64, 64, 3), np.uint8), 25)
    (clips / "list.txt").write_text("\n".join([*(p.name for p in clips.glob("*.mkv")), "gone.mp4"]))
    out = tmp_path / "out"
    failed = encode_all(clips / "list.txt", out, Odd(), 24, progress=False)
    assert sorted(p.rpartition("/")[2] for p in failed) == ["a.mkv", "b.mkv", "c.mkv", "gone.mp4"]
    rows = {row["video"].rpartition("/")[2]: row for row in manifest(out)}
    assert len(rows) == 7 and all(failed[k] for k in failed)
    for path, reason in failed.items():
        assert rows[path.rpartition("/")[2]]["left_out"] == reason and path in reason
    assert "RuntimeError: an odd one" in rows["c.mkv"]["left_out"]
    assert [rows[f"v{i}.mkv"]["frames"] for i in range(3)] == ["3", "5", "4"]
    # What is repaired or gone is listed no more.
    write_all(clips / "a.mkv", np.zeros((2, 32, 48, 3), np.uint8), 25)
    (clips / "b.mkv").unlink()
    assert [p.rpartition("/")[2] for p in encode_all(clips, out, Odd(), 24, progress=False)] == [
        "c.mkv"
    ]
    rows = {row["video"].rpartition("/")[2]: row["left_out"] for row in manifest(out)}
    assert sorted(rows) == ["a.mkv", "c.mkv", "v0.mkv", "v1.mkv", "v2.mkv"]
    assert [name for name, reason in rows.items() if reason] == ["c.mkv"]


def test_wrong_settings_raise_instead_of_leaving_out_videos(clips, tmp_path):
    for qp, gop in ((64, 5), (24, 6)):
        with pytest.raises(UsageError):
            encode_all(clips, tmp_path / "out", Stand(), qp, gop, progress=False)


def test_a_full_disk_ends_the_job(clips, tmp_path, monkeypatch):
    def write(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(encode_dataset, "write_whole", write)
    with pytest.raises(OSError, match="No space"):
        encode_all(clips, tmp_path / "out", Stand(), 24, progress=False)


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
