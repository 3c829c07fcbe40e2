"""Bjøntegaard delta rate: how much more one codec spends than another for the same quality.

The mean over the common interval of quality of the difference in log rate, curves interpolated by
piecewise cubics (pchip), as in JVET and AOM conditions; by the package bjontegaard. Nothing is
extrapolated.
"""

import csv
import io
import itertools
import math
import warnings
from collections.abc import Sequence

import bjontegaard

from gnvc_jax.evaluation.records import curve_of, means

MIN_POINTS = 4  # of each curve; with fewer the interpolation says more than the measurements
MEASURES = {  # name: section and field of a record, whether more is better
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
    """Percent of rate that `test` takes more than `anchor`, and a note.

    anchor, test: (rate, quality) pairs in any order, more quality is better. None where it cannot
    be said, with the reason as the note; otherwise the note tells what was left out.
    """
    kept = [rising(points) for points in (anchor, test)]
    dropped = len(anchor) + len(test) - sum(map(len, kept))
    if min(map(len, kept)) < MIN_POINTS:
        return None, f"fewer than {MIN_POINTS} rising points"
    (low_a, high_a), (low_b, high_b) = ((p[0][1], p[-1][1]) for p in kept)
    if min(high_a, high_b) <= max(low_a, low_b):
        return None, "no overlap"
    columns = [column for points in kept for column in zip(*points)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a small overlap, which the note tells
        value = bjontegaard.bd_rate(*columns, method="pchip", require_matching_points=False)
    common = min(high_a, high_b) - max(low_a, low_b)
    share = common / (max(high_a, high_b) - min(low_a, low_b))
    notes = [f"{share:.0%} overlap"] if share < 0.75 else []
    notes += [f"{dropped} points that do not rise left out"] if dropped else []
    return float(value), ", ".join(notes)


def rising(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points by rate, without those that cost more than another and are no better."""
    kept: list[tuple[float, float]] = []
    for rate, quality in sorted(points, key=lambda p: (p[0], -p[1])):
        if not kept or (rate > kept[-1][0] and quality > kept[-1][1]):
            kept.append((rate, quality))
    return kept


def bd_quality(
    anchor: Sequence[tuple[float, float]], test: Sequence[tuple[float, float]]
) -> float | None:
    """Mean of what `test` has more than `anchor` at the same rate, over the common log rates.

    anchor, test: (rate, value) pairs in any order. None for fewer than MIN_POINTS rates, or none in
    common.
    """
    kept = [sorted(dict(points).items()) for points in (anchor, test)]
    if min(map(len, kept)) < MIN_POINTS:
        return None
    if min(p[-1][0] for p in kept) <= max(p[0][0] for p in kept):
        return None
    columns = [column for points in kept for column in zip(*points)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(bjontegaard.bd_psnr(*columns, method="pchip", require_matching_points=False))


def bd_table(records: Sequence[dict]) -> list[dict]:
    """One row (see COLUMNS) per measure, curve of ours and other curve with files, as `bd_rate`.

    bd_rate_percent is that of the curves of means over clips, bd_rate_clips_percent the mean of the
    figures of single clips, of which so many (`clips`) have one.
    """
    done = complete(records)
    ours = {curve_of(r) for r in done if r["codec"]["codec"] == "gnvc"}
    clips = dict.fromkeys(r["clip"] for r in done)
    rows = []
    for measure, (_, _, more_is_better) in MEASURES.items():
        sign = 1.0 if more_is_better else -1.0
        mean = curves(done, measure, sign)
        single = [curves([r for r in done if r["clip"] == clip], measure, sign) for clip in clips]
        for name, against in itertools.permutations(mean, 2):
            if name in ours:
                value, note = bd_rate(mean[against], mean[name])
                each = [bd_rate(c.get(against, ()), c.get(name, ()))[0] for c in single]
                each = [x for x in each if x is not None]
                own = sum(each) / len(each) if each else None
                count = f"{len(each)} of {len(clips)}"
                rows.append(dict(zip(COLUMNS, (measure, name, against, value, own, count, note))))
    return rows


def complete(records: Sequence[dict], measured=lambda record: True) -> list[dict]:
    """The records of points with files that are there for all clips, so that means compare.

    measured: whether a record has what is asked for; clips without any such record do not count.
    """
    done = [r for r in records if r["status"] == "ok" and r["rate"]["bpp"] is not None]
    done = [r for r in done if measured(r)]
    clips = len({r["clip"] for r in done})
    whole = {label for label, mean in means(done).items() if mean["clips"] == clips}
    return [r for r in done if r["point"] in whole]


def curves(
    records: Sequence[dict], measure: str, sign: float = 1.0
) -> dict[str, list[tuple[float, float]]]:
    """(bpp, sign x measure) of the points of every curve, means over the clips that have it.

    Points that are not measured on all of these are left out, and curves without points.
    """
    section, field, _ = MEASURES[measure]
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
        figures = {k: "" if row[k] is None else f"{row[k]:.2f}" for k in FIGURES}
        writer.writerow(row | figures)
    return text.getvalue()
