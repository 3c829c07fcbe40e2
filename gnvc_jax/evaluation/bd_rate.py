"""Bjøntegaard delta rate: how much more one codec spends than another for the same quality.

The mean over the common interval of quality of the difference in log rate, curves interpolated by
piecewise cubics (pchip), as in JVET and AOM conditions; by the package bjontegaard. Curves are
means over clips. Nothing is extrapolated.
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
COLUMNS = ("measure", "curve", "against", "bd_rate_percent", "note")


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


def bd_table(records: Sequence[dict]) -> list[dict]:
    """One row (see COLUMNS) per measure, curve of ours and other curve with files, as `bd_rate`.

    Points that were not measured on all clips are left out, since their means are of other clips.
    """
    done = [r for r in records if r["status"] == "ok" and r["rate"]["bpp"] is not None]
    clips = len({r["clip"] for r in done})
    curve = {r["point"]: curve_of(r) for r in done}
    ours = {curve_of(r) for r in done if r["codec"]["codec"] == "gnvc"}
    points = {k: m for k, m in means(done).items() if m["clips"] == clips}
    names = list(dict.fromkeys(curve[label] for label in points))
    rows = []
    for measure, (section, field, more_is_better) in MEASURES.items():
        sign = 1.0 if more_is_better else -1.0
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for label, mean in points.items():
            if (value := mean[section].get(field)) is not None and math.isfinite(value):
                found[curve[label]].append((mean["rate"]["bpp"], sign * value))
        for name, against in itertools.permutations(names, 2):
            if name in ours and found[name] and found[against]:
                value, note = bd_rate(found[against], found[name])
                rows.append(dict(zip(COLUMNS, (measure, name, against, value, note))))
    return rows


def bd_csv(rows: Sequence[dict]) -> str:
    """The rows of `bd_table` as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    for row in rows:
        value = row["bd_rate_percent"]
        writer.writerow(row | {"bd_rate_percent": "" if value is None else f"{value:.2f}"})
    return text.getvalue()
