"""The paper's figures beside those of a run: which sequences, which curves, what is missing."""

import math
from pathlib import Path

import pytest

from gnvc_jax.evaluation import paper
from gnvc_jax.evaluation.clips import find_clips
from gnvc_jax.evaluation.tables import markdown

UVG = [f"{name}_1920x1080_120fps_420_8bit_YUV" for name in paper.SEQUENCES["uvg"]]


def record(point, codec, bpp, lpips, steps=None, clip="Beauty", decode=48.0):
    return {
        "clip": clip,
        "point": point,
        "status": "ok",
        "source": {"frames": 96, "width": 1920, "height": 1080},
        "codec": {"codec": codec, "steps": steps, "gop": 25, "parameters": 2_000_000_000},
        "rate": {"bytes": 1, "bpp": bpp, "kbps": 1.0},
        "quality": {"lpips_alex": lpips},
        "temporal": {"e_warp": bpp / 10},
        "speed": {"encode_seconds": 9.6, "decode_seconds": decode},
    }


def records():
    """VVC at our rates and at 32 times these; it takes ten times ours for the same LPIPS.

    Without refinement LPIPS is 0.1 more at every rate.
    """
    made = []
    for k in range(4):
        rate = 0.01 * 2.0**k
        own = 0.5 - 0.1 * k
        made += [
            record(f"gnvc-qp{k}-steps5", "gnvc", rate, own, 5),
            record(f"gnvc-qp{k}-steps0", "gnvc", rate, own + 0.1, 0),
        ]
        made += [
            record(f"vvc{n}-{k}", "vvc", n * rate, own - 0.1 * math.log2(n / 10)) for n in (1, 32)
        ]
    return made


def rows_of(name, figure, made=None):
    rows = paper.beside(made or records(), name, True)["rows"]
    return [r for r in rows if r["figure"].startswith(figure)]


def find_clips_in(folder, names):
    for name in names:
        (folder / name).parent.mkdir()
        (folder / name).touch()
    return find_clips([folder])


def test_sequences_are_recognised_by_file_name(tmp_path):
    clips = {name: Path(name) for name in [*reversed(UVG), "another"]}
    assert list(paper.sequences("uvg", clips)) == UVG
    more = find_clips_in(
        tmp_path, ["a/Jockey_1920x1080_120fps.yuv", "b/Jockey_1920x1080_120fps.yuv"]
    )
    with pytest.raises(ValueError, match=r"uvg: several clips for Jockey: .*/a/Jockey.*/b/Jockey"):
        paper.sequences("uvg", {k: v for k, v in clips.items() if "Jockey" not in k} | more)
    del clips[UVG[2]]
    with pytest.raises(ValueError, match="uvg: no HoneyBee"):
        paper.sequences("uvg", clips)
    assert [len(names) for names in paper.SEQUENCES.values()] == [5, 30, 7]


def test_bd_rates_are_put_beside_table_3():
    found = {r["curve"]: r for r in rows_of("uvg", "BD-rate LPIPS alex")}
    assert found["gnvc, 5 steps"]["measured"] == [pytest.approx(-90, abs=0.1)]
    assert "overlap" in found["gnvc, 5 steps"]["note"]
    assert dict(found["gnvc, 5 steps"]["published"])["GNVC-VD"] == -86.5
    (vgg,) = rows_of("uvg", "BD-rate LPIPS vgg")
    assert vgg["measured"] == [] and "needs LPIPS vgg" in vgg["note"]
    assert rows_of("mcl-jcv", "BD-rate DISTS") == []
    equal = [r for r in records() if not r["point"].startswith("vvc32")]
    found = {r["curve"]: r for r in rows_of("uvg", "BD-rate LPIPS alex", equal)}
    assert found["gnvc, 5 steps"]["measured"] == []
    assert found["gnvc, 5 steps"]["note"].startswith("no overlap")


def test_gain_of_refinement_is_put_beside_table_4():
    (row,) = rows_of("uvg", "rise of LPIPS alex")
    assert row["curve"] == "gnvc, 5 steps" and row["measured"] == [pytest.approx(0.1)]
    plain = [r for r in records() if r["codec"]["steps"] != 0]
    (row,) = rows_of("uvg", "rise of LPIPS alex", plain)
    assert row["measured"] == [] and "--steps 0" in row["note"]


def test_ranges_over_the_rates():
    for row in rows_of("hevc-b", "E_warp"):
        assert row["measured"] == pytest.approx([0.001 * 255**2, 0.008 * 255**2])
    (clip_f,) = rows_of("hevc-b", "CLIP-F")
    assert clip_f["measured"] == [] and dict(clip_f["published"])["GNVC-VD"] == 0.982
    assert rows_of("uvg", "E_warp") == []
    made = [*records(), *(r | {"clip": "Jockey"} for r in records())]
    made[0] = record("gnvc-qp0-steps5", "gnvc", 0.01, 0.5, 5, decode=96.0)
    low = {r["curve"]: r["measured"][0] for r in rows_of("uvg", "decode", made)}
    assert low == {"gnvc, 5 steps": pytest.approx(750), "gnvc, 0 steps": pytest.approx(500)}
    assert rows_of("uvg", "parameters")[0]["measured"] == [pytest.approx(2.0)]


def test_differences_to_the_setup_of_the_paper():
    made = [record("gnvc-qp0", "gnvc", 0.1, 0.5, clip=name) for name in paper.SEQUENCES["hevc-b"]]
    assert paper.beside(made, "hevc-b", True)["differs"] == []
    made[1]["source"] = {"frames": 8, "width": 416, "height": 240}
    made[2]["codec"]["gop"] = 97
    differs = paper.beside(made[1:], "hevc-b", False)["differs"]
    assert differs == ["4 of 5 sequences", "8 frames", "416x240", "groups of 97", "limited range"]


def test_the_table():
    made = records()
    text = markdown(made, paper.beside(made, "uvg", False))
    assert "Beside the figures of GNVC-VD's paper, uvg (not as there: 1 of 7 sequences, " in text
    line = next(x for x in text.splitlines() if "BD-rate LPIPS alex" in x and "5 steps" in x)
    assert "GNVC-VD -86.5, GLC-Video -60.0, DCVC-RT -30.7 | gnvc, 5 steps | -90.0 |" in line
    assert "| decode a frame, ms (Table 7) | GNVC-VD 1557 | gnvc, 5 steps | 500 to 500 |" in text
    assert "Beside the figures" not in markdown(made)
