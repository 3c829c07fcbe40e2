"""The sweep with a codec of a few lines: records, resuming, failures, anchors, tables."""

import csv
import dataclasses
import io
import json
from fractions import Fraction

import numpy as np
import pytest

from gnvc_jax.evaluation.clips import Clip
from gnvc_jax.evaluation.points import CodedClip
from gnvc_jax.evaluation.quality import QualityMeter
from gnvc_jax.evaluation.sweep import Sweep
from gnvc_jax.evaluation.tables import write_results


@dataclasses.dataclass(frozen=True)
class Quantiser:
    """Drops the low bits; the "file" is the high bits."""

    bits: int
    calls: list
    fails: bool = False
    suffix = ".q"

    @property
    def label(self):
        return f"q{self.bits}"

    def identity(self):
        return {"codec": "quantiser", "bits": self.bits}

    def code(self, clip):
        self.calls.append((clip.name, self.label))
        if self.fails:
            raise RuntimeError("out of luck\nsecond line")
        kept = clip.frames >> (8 - self.bits)
        return CodedClip(kept << (8 - self.bits), bytes(self.bits * 100), 1.5, 0.5, {"note": "x"})


class Lossless(Quantiser):
    label = "lossless"

    def code(self, clip):
        return CodedClip(clip.frames, None)


def make_clip(name, seed=0):
    frames = np.random.default_rng(seed).integers(0, 256, (4, 32, 40, 3), dtype=np.uint8)
    return Clip(name, frames, Fraction(25))


@pytest.fixture(scope="module")
def meter():
    return QualityMeter(("psnr", "ms_ssim", "temporal"))


CLIPS = {name: (lambda n=name, s=seed: make_clip(n, s)) for seed, name in enumerate("ab")}


def test_rate_comes_from_the_file_on_disk(tmp_path, meter):
    (record,) = Sweep(tmp_path, meter).run({"a": CLIPS["a"]}, [Quantiser(4, [])])
    assert (tmp_path / "bitstreams/a__q4.q").stat().st_size == record["rate"]["bytes"] == 400
    assert record["rate"]["bpp"] == pytest.approx(8 * 400 / (4 * 32 * 40))
    assert record["rate"]["kbps"] == pytest.approx(8 * 400 * 25 / 4 / 1000)
    error = make_clip("a").frames & 15
    expected = [10 * np.log10(255**2 / np.mean(e.astype(float) ** 2)) for e in error]
    assert record["quality"]["psnr_rgb"] == pytest.approx(np.mean(expected), abs=1e-4)
    frames = json.loads((tmp_path / "frames/a__q4.json").read_text())
    np.testing.assert_allclose(frames["psnr_rgb"], expected, atol=1e-4)
    assert record["schema"] == "gnvc-eval/1"
    assert record["source"]["frames"] == 4
    assert record["codec"] == {"label": "q4", "codec": "quantiser", "bits": 4, "note": "x"}
    assert record["speed"]["encode_seconds"] == 1.5
    assert json.loads((tmp_path / "records/a__q4.json").read_text()) == record


def test_lossless_points_without_file_reach_the_caps(tmp_path, meter):
    (record,) = Sweep(tmp_path, meter).run({"a": CLIPS["a"]}, [Lossless(8, [])], ["x264"])
    assert record["quality"]["psnr_rgb"] == 100
    assert record["rate"] == {"bytes": None, "bpp": None, "kbps": None}
    assert not (tmp_path / "bitstreams").exists()


def test_records_are_kept_until_their_key_changes(tmp_path, meter):
    calls, seen = [], []
    points = [Quantiser(2, calls), Quantiser(4, calls)]

    def sweep(meter=meter, clips=CLIPS, **options):
        calls.clear()
        seen.clear()
        progress = lambda label, status: seen.append((label, status))  # noqa: E731
        return Sweep(tmp_path, meter, progress=progress, **options).run(clips, points)

    first = sweep()
    assert len(calls) == 4
    assert sweep() == first
    assert calls == []
    assert seen[0] == ("a q2", "kept")
    (tmp_path / "records/b__q2.json").unlink()
    (tmp_path / "records/b__q4.json").write_text("{")
    sweep()
    assert calls == [("b", "q2"), ("b", "q4")]
    sweep(clips={"a": CLIPS["a"], "b": lambda: make_clip("b", 7)})  # other frames
    assert calls == [("b", "q2"), ("b", "q4")]
    sweep(meter=QualityMeter(("psnr",)))
    assert len(calls) == 4
    sweep(meter=QualityMeter(("psnr",)), force=True)
    assert len(calls) == 4


def test_failures_are_recorded_and_retried(tmp_path, meter):
    calls = []

    def unreadable():
        raise OSError("c.mkv: not a video")

    clips = {"c": unreadable, **CLIPS}
    for _ in range(2):
        calls.clear()
        records = Sweep(tmp_path, meter).run(clips, [Quantiser(2, calls, True), Quantiser(3, [])])
        assert [r["status"] for r in records] == ["failed", "failed", "ok", "failed", "ok"]
        assert calls == [("a", "q2"), ("b", "q2")]
    assert records[0]["error"] == "c.mkv: not a video"
    assert records[1]["error"] == "RuntimeError: out of luck"
    table = write_results(tmp_path, records, ["eval.py"], {})
    assert "- c: c.mkv: not a video" in table
    assert "- a q2: RuntimeError: out of luck" in table


def test_a_codec_that_loses_a_frame_fails(tmp_path, meter):
    class Short(Quantiser):
        def code(self, clip):
            return CodedClip(clip.frames[:-1], b"1")

    (record,) = Sweep(tmp_path, meter).run({"a": CLIPS["a"]}, [Short(2, [])])
    assert record["status"] == "failed"
    assert "(4, 32, 40, 3) went in, (3, 32, 40, 3) came out" in record["error"]


def test_anchors_follow_the_rates_of_the_points(tmp_path, meter):
    asked = []

    def anchor_point(codec, like, size):
        asked.append((codec, like, size))
        return dataclasses.replace(Quantiser(8 - len(asked), []), fails=False)

    points = [Quantiser(2, []), Quantiser(3, [], True), Lossless(8, [])]
    records = Sweep(tmp_path, meter).run({"a": CLIPS["a"]}, points, ["x264", "x265"], anchor_point)
    assert asked == [("x264", "q2", 200), ("x265", "q2", 200)]
    assert [r["point"] for r in records] == ["q2", "q3", "lossless", "q7", "q6"]
    asked.clear()
    sweep = Sweep(tmp_path, meter, anchor_rates=(1.0, 2.5))
    sweep.run({"a": CLIPS["a"]}, points[:1], ["x264"], anchor_point)
    assert asked == [("x264", "q2", 200), ("x264", "2.5x-q2", 500)]


def test_real_anchor_at_a_matched_rate(tmp_path, meter):
    records = Sweep(tmp_path, meter).run({"a": CLIPS["a"]}, [Quantiser(8, [])], ["x264"])
    anchor = records[1]
    assert anchor["point"] == "x264-at-q8"
    assert anchor["codec"]["target_bytes"] == 800
    floor = anchor["codec"]["at_floor"]
    assert anchor["rate"]["bytes"] > 800 if floor else abs(anchor["rate"]["bytes"] - 800) < 40
    assert (tmp_path / "bitstreams/a__x264-at-q8.h264").exists()


def test_result_files(tmp_path, meter):
    records = Sweep(tmp_path, meter).run(CLIPS, [Quantiser(2, []), Quantiser(5, [])])
    table = write_results(tmp_path, records, ["eval.py", "--x"], {"backend": "cpu"})
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["schema"] == "gnvc-eval/1"
    assert results["command"] == ["eval.py", "--x"]
    assert results["records"] == records
    quality = [r["quality"]["psnr_rgb"] for r in records if r["point"] == "q5"]
    mean = results["means"]["q5"]
    assert mean["clips"] == 2
    assert mean["quality"]["psnr_rgb"] == pytest.approx(np.mean(quality))
    assert mean["quality"]["ms_ssim_rgb"] is None

    rows = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert [row["point"] for row in rows] == ["q2", "q5", "q2", "q5"]
    assert float(rows[1]["rate.bytes"]) == 500
    assert float(rows[1]["quality.psnr_rgb"]) == quality[0]

    assert (tmp_path / "results.md").read_text() == table
    assert f"| q5 | 2 | 500 | {8 * 500 / 5120:.5f} |" in table
    assert "MS-SSIM" not in table.split("Not measured")[0]
    assert "ms_ssim: sides must be at least 161" in table


def test_seams_are_those_of_the_groups(tmp_path, meter):
    class Grouped(Quantiser):
        def code(self, clip):
            coded = super().code(clip)
            frames = coded.frames.copy()
            frames[2:] -= np.minimum(frames[2:], 90)  # darker from the second group on
            return dataclasses.replace(coded, frames=frames, starts=[0, 2])

    (record,) = Sweep(tmp_path, meter).run({"a": CLIPS["a"]}, [Grouped(4, [])])
    assert record["temporal"]["seam"] > 2
    assert record["temporal"]["psnr_slope"] < -1
