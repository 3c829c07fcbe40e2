"""What GNVC-VD's paper measured, beside the same of a run on the same sequences.

Its Figure 4 are the curves of LPIPS and DISTS, which every run draws; here are the tables. The
paper names neither the network of LPIPS, nor flow and scale of E_warp (taken to be that of 0..255).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from gnvc_jax.evaluation.bd_rate import bd_quality, bd_table, complete, curves
from gnvc_jax.evaluation.records import curve_of

SEQUENCES = {  # of 1920x1080
    "hevc-b": ("BQTerrace", "BasketballDrive", "Cactus", "Kimono", "ParkScene"),
    "mcl-jcv": tuple(f"videoSRC{n:02d}" for n in range(1, 31)),
    "uvg": tuple("Beauty Bosphorus HoneyBee Jockey ReadySteadyGo ShakeNDry YachtRide".split()),
}
ANCHOR = "vvc"  # VVenC; the paper's is VTM-17.0
MEASURES = {"LPIPS": ("LPIPS alex", "LPIPS vgg"), "DISTS": ("DISTS",)}
BD_RATE = {  # Table 3, per cent against VTM-17.0
    ("hevc-b", "LPIPS"): {"GNVC-VD": -89.4, "GLC-Video": -79.1, "DCVC-RT": -20.9},
    ("hevc-b", "DISTS"): {"GNVC-VD": -94.5, "GLC-Video": -94.8, "DCVC-RT": 15.4},
    ("mcl-jcv", "LPIPS"): {"GNVC-VD": -90.8, "GLC-Video": -74.8},
    ("uvg", "LPIPS"): {"GNVC-VD": -86.5, "GLC-Video": -60.0, "DCVC-RT": -30.7},
    ("uvg", "DISTS"): {"GNVC-VD": -96.1, "GLC-Video": -10.3, "DCVC-RT": 2.03},
}
WITHOUT_REFINEMENT = {  # Table 4, BD-quality
    ("hevc-b", "LPIPS"): 0.181,
    ("hevc-b", "DISTS"): 0.132,
    ("uvg", "LPIPS"): 0.159,
}
OVER_TIME = {  # Table 2: field of a record's "temporal", factor, format; published on HEVC-B
    "E_warp": ("e_warp", 255.0**2, ".1f", {"GNVC-VD": 66.6, "GLC-Video": 86.5, "HEVC": 23.3}),
    "CLIP-F": ("clip_f", 1.0, ".3f", {"GNVC-VD": 0.982, "GLC-Video": 0.979, "HEVC": 0.982}),
}
PARAMETERS = 2.3e9  # Table 6, without text encoder
# A frame on one A800: decoding from Table 7, encoding as VoRTeC's authors quote it.
MILLISECONDS = {"encode": 153.0, "decode": 1557.0}


def sequences(name: str, clips: Mapping[str, Path]) -> dict[str, Path]:
    """The clips of a set (`SEQUENCES`), told by how their names begin, in its order.

    Raises ValueError where one is not there or there several times.
    """
    chosen = {}
    for sequence in SEQUENCES[name]:
        found = [clip for clip in clips if clip.lower().startswith(sequence.lower())]
        if len(found) != 1:
            what = (
                f"several clips for {sequence}: {', '.join(found)}" if found else f"no {sequence}"
            )
            raise ValueError(f"{name}: {what}")
        chosen[found[0]] = clips[found[0]]
    return chosen


def beside(records: Sequence[dict], name: str) -> list[dict]:
    """Figures of the paper for a set beside those of our curves in the records of a sweep.

    Each row: figure; published [(method, value)]; curve, None where it was not measured; measured
    [value], or [at the lowest, at the highest rate]; format of the values; note.
    """
    done = complete(records)
    ours = {r["point"]: curve_of(r) for r in done if r["codec"]["codec"] == "gnvc"}
    rows: list[dict] = []

    def add(figure, published, spec, found, note, otherwise):
        known = {"figure": figure, "published": list(published.items()), "format": spec}
        for curve, values in found.items():
            rows.append(known | {"curve": curve, "measured": values, "note": note})
        if not found:
            rows.append(known | {"curve": None, "measured": [], "note": otherwise})

    table = bd_table(done)
    for (of, measure), published in BD_RATE.items():
        for own in MEASURES[measure] if of == name else ():
            found = {
                row["curve"]: [row["bd_rate_percent"]]
                for row in table
                if row["measure"] == own
                and row["against"] == ANCHOR
                and row["bd_rate_percent"] is not None
            }
            figure, note = f"BD-rate {own}, % (Table 3)", "against VVenC; published: VTM-17.0"
            missing = f"needs {own}, four points, the anchor {ANCHOR}, and overlap"
            add(figure, published, "+.1f", found, note, missing)
    for (of, measure), value in WITHOUT_REFINEMENT.items():
        for own in MEASURES[measure] if of == name else ():
            known = {k: v for k, v in curves(done, own).items() if k in ours.values()}
            plain = known.get("gnvc, 0 steps", ())
            found = {
                curve: [lost]
                for curve, points in known.items()
                if curve != "gnvc, 0 steps" and (lost := bd_quality(points, plain)) is not None
            }
            figure, published = f"{own} lost without refinement (Table 4)", {"GNVC-VD": value}
            missing = f"needs {own}, four points, and --steps 0 beside others"
            add(figure, published, "+.3f", found, "mean at the same rate", missing)
    if name == "hevc-b":
        for figure, (field, factor, spec, published) in OVER_TIME.items():
            found = over_rates(done, ours, lambda r, f=field: r["temporal"].get(f), factor)
            note, missing = "lowest to highest rate; published: rate unknown", f"needs {figure}"
            add(f"{figure} (Table 2)", published, spec, found, note, missing)
    published = {"GNVC-VD": PARAMETERS / 1e9}
    found = over_rates(done, ours, lambda r: r["codec"].get("parameters"), 1e-9)
    found = {curve: values[:1] for curve, values in found.items()}
    add("parameters, G (Table 6)", published, ".3f", found, "", "needs a file of a model")
    for way, published in MILLISECONDS.items():
        found = over_rates(
            done, ours, lambda r, w=way: r["speed"][f"{w}_seconds"] / r["source"]["frames"], 1000.0
        )
        note = "lowest to highest rate, with start and compilation; published: one A800"
        figure = f"{way} a frame, ms" + (" (Table 7)" if way == "decode" else "")
        add(figure, {"GNVC-VD": published}, ".0f", found, note, "needs a file of a model")
    return rows


def over_rates(
    records: Sequence[dict], ours: Mapping[str, str], value, factor: float
) -> dict[str, list[float]]:
    """{curve: [at the lowest, at the highest rate]} of the mean over clips of factor x a value.

    ours: curve of each point; value: of a record, None where it has none. Curves without are left
    out.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for point, curve in ours.items():
        pairs = [(r["rate"]["bpp"], value(r)) for r in records if r["point"] == point]
        pairs = [pair for pair in pairs if pair[1] is not None]
        if pairs:
            rate, mean = (sum(column) / len(pairs) for column in zip(*pairs))
            found.setdefault(curve, []).append((rate, factor * mean))
    return {curve: [min(p)[1], max(p)[1]] for curve, p in found.items()}
