"""The paper's figures beside those of a run: which sequences, which curves, what is missing."""

from pathlib import Path

import pytest

from gnvc_jax.evaluation import paper
from gnvc_jax.evaluation.tables import markdown

UVG = [f"{name}_1920x1080_120fps_420_8bit_YUV" for name in paper.SEQUENCES["uvg"]]


def record(point, codec, bpp, lpips, steps=None, clip="Beauty", decode=48.0):
    return {
        "clip": clip,
        "point": point,
        "status": "ok",
        "source": {"frames": 96},
        "codec": {"codec": codec, "steps": steps, "parameters": 2_000_000_000},
        "rate": {"bytes": 1, "bpp": bpp, "kbps": 1.0},
        "quality": {"lpips_alex": lpips},
        "temporal": {"e_warp": bpp / 10},
        "speed": {"encode_seconds": 9.6, "decode_seconds": decode},
    }


def records():
    """Refinement takes 0.1 from LPIPS at every rate; VVC takes four times the rate of that."""
    made = []
    for k in range(4):
        rate, lpips = 0.01 * 2.0**k, 0.5 - 0.1 * k
        made += [
            record(f"gnvc-qp{k}-steps5", "gnvc", rate, lpips, 5),
            record(f"gnvc-qp{k}-steps0", "gnvc", rate, lpips + 0.1, 0),
            record(f"vvc-at-gnvc-qp{k}", "vvc", 4 * rate, lpips),
        ]
    return made


def rows_of(name, figure, made=None):
    return [r for r in paper.beside(made or records(), name) if r["figure"].startswith(figure)]


def test_sequences_are_told_by_their_names():
    clips = {name: Path(name) for name in [*reversed(UVG), "another"]}
    assert list(paper.sequences("uvg", clips)) == UVG
    with pytest.raises(ValueError, match="uvg: several clips for Jockey: Jockey_1920"):
        paper.sequences("uvg", clips | {"jockey": Path("jockey")})
    del clips[UVG[2]]
    with pytest.raises(ValueError, match="uvg: no HoneyBee"):
        paper.sequences("uvg", clips)
    assert [len(names) for names in paper.SEQUENCES.values()] == [5, 30, 7]


def test_rates_stand_beside_table_3():
    found = {r["curve"]: r for r in rows_of("uvg", "BD-rate LPIPS alex")}
    assert found["gnvc, 5 steps"]["measured"] == [pytest.approx(-75)]
    assert dict(found["gnvc, 5 steps"]["published"])["GNVC-VD"] == -86.5
    (vgg,) = rows_of("uvg", "BD-rate LPIPS vgg")
    assert vgg["measured"] == [] and "needs LPIPS vgg" in vgg["note"]
    assert rows_of("mcl-jcv", "BD-rate DISTS") == []


def test_what_refinement_gains_stands_beside_table_4():
    (row,) = rows_of("uvg", "LPIPS alex lost")
    assert row["curve"] == "gnvc, 5 steps" and row["measured"] == [pytest.approx(0.1)]
    plain = [r for r in records() if r["codec"]["steps"] != 0]
    (row,) = rows_of("uvg", "LPIPS alex lost", plain)
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


def test_the_table():
    made = records()
    text = markdown(made, {"set": "uvg", "rows": paper.beside(made, "uvg")})
    line = next(x for x in text.splitlines() if "BD-rate LPIPS alex" in x and "5 steps" in x)
    assert "GNVC-VD -86.5, GLC-Video -60.0, DCVC-RT -30.7 | gnvc, 5 steps | -75.0 |" in line
    assert "| decode a frame, ms (Table 7) | GNVC-VD 1557 | gnvc, 5 steps | 500 to 500 |" in text
    assert "Beside the figures" not in markdown(made)
