"""BD-rate against algebra and the package's own results; what is not printed."""

import bjontegaard
import numpy as np
import pytest

from gnvc_jax.evaluation.bd_rate import bd_csv, bd_quality, bd_rate, bd_table, rising

# Rates and PSNR of two codecs as published in ITU-T VCEG-M33's sheet, used by many ports.
ANCHOR = [(686.76, 40.28), (309.58, 37.18), (157.11, 34.24), (85.95, 31.42)]
TEST = [(893.34, 40.39), (407.8, 37.21), (204.93, 34.17), (112.75, 31.24)]


def test_equals_the_package_on_a_published_pair():
    value, note = bd_rate(ANCHOR, TEST)
    columns = [column for points in (ANCHOR, TEST) for column in zip(*sorted(points))]
    assert value == pytest.approx(bjontegaard.bd_rate(*columns, method="pchip"))
    assert 30 < value < 35 and note == ""


def test_a_constant_factor_is_exact_and_lower_is_better_works():
    base = [(2.0**k, float(k)) for k in range(5)]
    half = [(rate / 2, quality) for rate, quality in base]
    assert bd_rate(base, half)[0] == pytest.approx(-50)
    assert bd_rate(half, base)[0] == pytest.approx(100)


def test_no_bd_rate_without_enough_points_or_overlap():
    low = [(r, q - 10) for r, q in ANCHOR]
    assert bd_rate(ANCHOR, low) == (None, "no overlap")
    assert bd_rate(ANCHOR, TEST[:1]) == (None, "fewer than 4 rising points")
    value, note = bd_rate(ANCHOR, [*TEST, (900.0, 30.0)])
    assert value == pytest.approx(bd_rate(ANCHOR, TEST)[0])
    assert note == "1 points that do not rise left out"
    shifted = [(r, q + 5) for r, q in TEST]
    assert "overlap" in bd_rate(ANCHOR, shifted)[1]
    assert rising([(2, 1), (1, 1), (1, 0.5), (3, 4)]) == [(1, 1), (3, 4)]


def test_quality_at_the_same_rate():
    offset = [(rate * 2, quality - 0.25) for rate, quality in ANCHOR]
    same = [(rate, quality + 0.25) for rate, quality in ANCHOR]
    assert bd_quality(ANCHOR, same) == pytest.approx(0.25)
    columns = [column for points in (ANCHOR, offset) for column in zip(*sorted(points))]
    known = bjontegaard.bd_psnr(*columns, "pchip", require_matching_points=False, min_overlap=0)
    assert bd_quality(ANCHOR, offset) == pytest.approx(known)
    assert bd_quality(ANCHOR, TEST[:3]) is None
    assert bd_quality(ANCHOR, [(rate + 1e6, quality) for rate, quality in TEST]) is None


def record(clip, point, codec, bpp, lpips, steps=None):
    return {
        "clip": clip,
        "point": point,
        "status": "ok",
        "codec": {"codec": codec, "steps": steps},
        "rate": {"bpp": bpp},
        "quality": {"lpips_alex": lpips},
        "temporal": {},
    }


def test_table_pairs_curves_and_leaves_out_unfinished_points():
    rates = np.array([0.01, 0.02, 0.04, 0.08])
    records = [
        record(clip, f"{codec}{k}", codec, float(scale * rate), 0.5 - 0.1 * k)
        for clip in "ab"
        for codec, scale in (("gnvc", 1.0), ("x265", 2.0))
        for k, rate in enumerate(rates)
    ]
    records.append(record("a", "gnvc9", "gnvc", 0.2, 0.05))  # not measured on b
    records.append(record("a", "vae", "vae", None, 0.01))
    rows = bd_table(records)
    assert [(r["curve"], r["against"]) for r in rows] == [("gnvc", "x265")]
    assert rows[0]["bd_rate_percent"] == pytest.approx(-50)
    assert bd_csv(rows).splitlines()[1] == "LPIPS alex,gnvc,x265,-50.00,-50.00,2 of 2,"


def test_mean_of_bd_rates_of_clips_is_reported_separately():
    """A clip at a hundred times the rate decides the mean curve; each counts the same alone."""
    records = [
        record(clip, f"{codec}{k}", codec, scale * factor * 0.01 * 2.0**k, 0.5 - 0.1 * k)
        for clip, scale, gain in (("a", 1.0, 0.5), ("b", 100.0, 0.8))
        for codec, factor in (("gnvc", gain), ("x265", 1.0))
        for k in range(4)
    ]
    (row,) = bd_table(records)
    assert row["bd_rate_percent"] == pytest.approx(100 * (80.5 / 101 - 1))
    assert row["bd_rate_clips_percent"] == pytest.approx((-50 - 20) / 2)
    far = [r | {"quality": {"lpips_alex": 9.0}} if r["clip"] == "b" else r for r in records]
    (row,) = bd_table(far)
    assert row["clips"] == "1 of 2" and row["bd_rate_clips_percent"] == pytest.approx(-50)


def test_clips_without_a_metric_are_excluded_from_its_bd_rate():
    """Rates, too: else the clip's rate would stand beside the quality of others."""
    records = [
        record(clip, f"{codec}{k}", codec, scale * factor * 2.0**k, value and value - 0.1 * k)
        for clip, scale, value in (("a", 0.01, 0.5), ("small", 1.0, None))
        for codec, factor in (("gnvc", 0.5 if clip == "a" else 7.0), ("x265", 1.0))
        for k in range(4)
    ]
    (row,) = bd_table(records)
    assert row["bd_rate_percent"] == pytest.approx(-50) and row["clips"] == "1 of 2"
