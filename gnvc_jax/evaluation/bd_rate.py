"""Bjøntegaard delta rate: how much more rate one codec needs than another for the same quality.

It is the mean, over the quality interval that both curves cover, of the difference in log rate,
with curves interpolated by piecewise cubics (pchip), as in the common test conditions of JVET and
AOM. The package bjontegaard computes it. Nothing is extrapolated.
"""

import csv
import io
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import bjontegaard

from gnvc_jax.evaluation.records import curve_of, means

MIN_POINTS = 4  # per curve; with fewer, the interpolation says more than the measurements
MEASURES = {  # name: section and field of a record, whether larger is better
    "PSNR": ("quality", "psnr_rgb", True),
    "MS-SSIM": ("quality", "ms_ssim_rgb_db", True),
    "VMAF": ("quality", "vmaf", True),
    "LPIPS alex": ("quality", "lpips_alex", False),
    "LPIPS vgg": ("quality", "lpips_vgg", False),
    "DISTS": ("quality", "dists", False),
}
FIGURES = ("bd_rate_percent", "bd_rate_clips_percent")
COLUMNS = ("measure", "curve", "against", *FIGURES, "clips", "note")


def bd_rate(
    anchor: Sequence[tuple[float, float]], test: Sequence[tuple[float, float]]
) -> tuple[float | None, str]:
    """Computes the BD-rate of one curve against another.

    Args:
        anchor: (rate, quality) pairs in any order; larger quality is better.
        test: (rate, quality) pairs, likewise.

    Returns:
        Percentage of rate that `test` needs more than `anchor`, and a note on what was left out; or
        None, and the reason why there is no such number.
    """
    # Interpolation needs rate as a function of quality, so both must rise together.
    kept = [rising(points) for points in (anchor, test)]
    dropped = len(anchor) + len(test) - sum(map(len, kept))
    if min(map(len, kept)) < MIN_POINTS:
        return None, f"fewer than {MIN_POINTS} rising points"
    (low_a, high_a), (low_b, high_b) = ((p[0][1], p[-1][1]) for p in kept)
    if min(high_a, high_b) <= max(low_a, low_b):
        return None, "no overlap"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a small overlap, which the note reports
        value = _delta(bjontegaard.bd_rate, *kept)
    # Quality that both cover, and the share of it in what either covers.
    common = min(high_a, high_b) - max(low_a, low_b)
    share = common / (max(high_a, high_b) - min(low_a, low_b))
    # With less than three quarters, much of the curves plays no part in the number.
    notes = [f"{share:.0%} overlap"] if share < 0.75 else []
    notes += [f"{dropped} points that do not rise left out"] if dropped else []
    return value, ", ".join(notes)


def _delta(
    function: Callable, anchor: Sequence[tuple[float, float]], test: Sequence[tuple[float, float]]
) -> float:
    """Calls a function of the package bjontegaard on two curves of (rate, quality) pairs."""
    columns = [column for points in (anchor, test) for column in zip(*points)]
    return float(function(*columns, method="pchip", require_matching_points=False))


def rising(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Sorts points by rate and drops those that cost more than another and are no better."""
    kept: list[tuple[float, float]] = []
    # Of points with the same rate, the best one comes first and is kept.
    for rate, quality in sorted(points, key=lambda p: (p[0], -p[1])):
        if not kept or (rate > kept[-1][0] and quality > kept[-1][1]):
            kept.append((rate, quality))
    return kept


def bd_quality(
    anchor: Sequence[tuple[float, float]], test: Sequence[tuple[float, float]]
) -> float | None:
    """Mean difference of `test` minus `anchor` at the same rate, over the log rates in common.

    Args:
        anchor: (rate, value) pairs in any order.
        test: (rate, value) pairs in any order.

    Returns:
        The difference; None for fewer than MIN_POINTS rates, or if no rates are in common.
    """
    kept = [sorted(dict(points).items()) for points in (anchor, test)]
    if min(map(len, kept)) < MIN_POINTS:
        return None
    if min(p[-1][0] for p in kept) <= max(p[0][0] for p in kept):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _delta(bjontegaard.bd_psnr, *kept)


def bd_table(records: Sequence[dict]) -> list[dict]:
    """BD-rates of each of our curves against every other curve, for each measure.

    Args:
        records: Records of a sweep.

    Returns:
        Rows with COLUMNS. bd_rate_percent is the BD-rate of curves of means over clips,
        bd_rate_clips_percent the mean of the BD-rates of single clips, and `clips` how many clips
        have one.
    """
    done = complete(records)
    ours = {curve_of(r) for r in done if r["codec"]["codec"] == "gnvc"}
    clips = dict.fromkeys(r["clip"] for r in done)
    rows = []
    for measure, (_, _, more_is_better) in MEASURES.items():
        # Distances are negated, so that larger is better for every measure.
        sign = 1.0 if more_is_better else -1.0
        mean = curves(done, measure, sign)
        single = [curves([r for r in done if r["clip"] == clip], measure, sign) for clip in clips]
        # Both directions, since either of two curves of ours may be the reference.
        for name, against in itertools.permutations(mean, 2):
            if name in ours:
                value, note = bd_rate(mean[against], mean[name])
                each = [bd_rate(c.get(against, ()), c.get(name, ()))[0] for c in single]
                each = [x for x in each if x is not None]
                own = sum(each) / len(each) if each else None
                count = f"{len(each)} of {len(clips)}"
                rows.append(dict(zip(COLUMNS, (measure, name, against, value, own, count, note))))
    return rows


def complete(
    records: Sequence[dict], measured: Callable[[dict], bool] = lambda record: True
) -> list[dict]:
    """Selects the records of points that have a file for every clip, so that means are comparable.

    Args:
        records: Records of a sweep.
        measured: Whether a record has the value in question; clips without any such record do not
            count.
    """
    done = [r for r in records if r["status"] == "ok" and r["rate"]["bpp"] is not None]
    done = [r for r in done if measured(r)]
    clips = len({r["clip"] for r in done})
    whole = {label for label, mean in means(done).items() if mean["clips"] == clips}
    return [r for r in done if r["point"] in whole]


def curves(
    records: Sequence[dict], measure: str, sign: float = 1.0
) -> dict[str, list[tuple[float, float]]]:
    """Curves of a measure, as means over the clips that have it.

    Args:
        records: Records of a sweep.
        measure: One of MEASURES.
        sign: Factor of the measure.

    Returns:
        (bpp, sign x measure) pairs by curve. Points that were not measured on all clips are left
        out.
    """
    section, field, _ = MEASURES[measure]
    # PSNR of a perfect frame is infinite, and of no use on a curve.
    done = complete(records, lambda r: _finite(r[section].get(field)))
    curve = {r["point"]: curve_of(r) for r in done}
    found: dict[str, list[tuple[float, float]]] = {}
    for label, mean in means(done).items():
        pair = mean["rate"]["bpp"], sign * mean[section][field]
        found.setdefault(curve[label], []).append(pair)
    return found


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def bd_csv(rows: Sequence[dict]) -> str:
    """The rows of `bd_table` as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    for row in rows:
        figures: dict[Any, str] = {k: "" if row[k] is None else f"{row[k]:.2f}" for k in FIGURES}
        writer.writerow(row | figures)
    return text.getvalue()
