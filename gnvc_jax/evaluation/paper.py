"""Published figures of the GNVC-VD paper beside those of a run on the same sequences.

Figure 4 of the paper shows curves of LPIPS and DISTS, which every run plots; this module has its
tables. The paper does not say which network LPIPS uses, nor the flow and the scale of E_warp (taken
to be 0..255 here).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gnvc_jax.errors import UsageError
from gnvc_jax.evaluation.bd_rate import bd_quality, bd_table, complete, curves
from gnvc_jax.evaluation.records import curve_of

SEQUENCES = {  # of 1920x1080
    "hevc-b": ("BQTerrace", "BasketballDrive", "Cactus", "Kimono", "ParkScene"),
    "mcl-jcv": tuple(f"videoSRC{n:02d}" for n in range(1, 31)),
    "uvg": tuple("Beauty Bosphorus HoneyBee Jockey ReadySteadyGo ShakeNDry YachtRide".split()),
}
FRAMES, GROUP, SIZE = 96, 25, (1920, 1080)
ANCHOR = "vvc"  # VVenC; the paper's is VTM-17.0
MEASURES = {"LPIPS": ("LPIPS alex", "LPIPS vgg"), "DISTS": ("DISTS",)}
BD_RATE = {  # Table 3, percent against VTM-17.0, without doubtful figures of GLC-Video
    ("hevc-b", "LPIPS"): {"GNVC-VD": -89.4, "GLC-Video": -79.1, "DCVC-RT": -20.9},
    ("hevc-b", "DISTS"): {"GNVC-VD": -94.5, "DCVC-RT": 15.4},
    ("mcl-jcv", "LPIPS"): {"GNVC-VD": -90.8, "GLC-Video": -74.8},
    ("uvg", "LPIPS"): {"GNVC-VD": -86.5, "GLC-Video": -60.0, "DCVC-RT": -30.7},
    ("uvg", "DISTS"): {"GNVC-VD": -96.1, "DCVC-RT": 2.03},
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
PARAMETERS = 2.3  # Table 6, in billions
# Per frame on one A800: decoding from Table 7, encoding as quoted by the authors of VoRTeC.
MILLISECONDS = {"encode": 153.0, "decode": 1557.0}


def sequences(name: str, clips: Mapping[str, Path]) -> dict[str, Path]:
    """Selects the clips of a test set by the beginnings of their file names.

    Args:
        name: One of SEQUENCES.
        clips: Paths by name.

    Returns:
        The clips of the set, in its order.

    Raises:
        UsageError: If a sequence is missing, or several clips match it.
    """
    chosen = {}
    for sequence in SEQUENCES[name]:
        found = [k for k, path in clips.items() if path.name.lower().startswith(sequence.lower())]
        if not found:
            raise UsageError(f"{name}: no {sequence}")
        if len(found) > 1:
            several = ", ".join(str(clips[k]) for k in found)
            raise UsageError(f"{name}: several clips for {sequence}: {several}")
        chosen[found[0]] = clips[found[0]]
    return chosen


def beside(records: Sequence[dict], name: str, full_range: bool) -> dict:
    """Puts figures of the paper for a test set beside those of a run.

    Args:
        records: Records of the run.
        name: One of SEQUENCES.
        full_range: Whether YUV was read as full range, as in the paper.

    Returns:
        "set"; "differs", a list of differences to the setup of the paper; and "rows", each with
        figure, published [(method, value)], curve (None if not measured), measured ([value], or
        [value at the lowest, at the highest rate]), format of the values, and note.
    """
    done = complete(records)
    ours = {r["point"]: curve_of(r) for r in done if r["codec"]["codec"] == "gnvc"}
    rows: list[dict] = []

    def add(
        figure: str,
        published: Mapping[str, float],
        spec: str,
        found: Mapping[str, tuple[list[float], str]],  # (values, note) by curve
        otherwise: str,
    ) -> None:
        known = {"figure": figure, "published": list(published.items()), "format": spec}
        for curve, (values, note) in found.items():
            rows.append(known | {"curve": curve, "measured": values, "note": note})
        if not found:
            rows.append(known | {"curve": None, "measured": [], "note": otherwise})

    table = [row for row in bd_table(done) if row["against"] == ANCHOR]
    for (of, measure), published in BD_RATE.items():
        for own in MEASURES[measure] if of == name else ():
            found = {}
            for row in (row for row in table if row["measure"] == own):
                values = [x for x in [row["bd_rate_percent"]] if x is not None]
                note = ", ".join(filter(None, [row["note"], "VVenC here, VTM-17.0 there"]))
                found[row["curve"]] = values, note
            missing = f"needs {own} and the anchor {ANCHOR}"
            add(f"BD-rate {own}, % (Table 3)", published, "+.1f", found, missing)
    for (of, measure), value in WITHOUT_REFINEMENT.items():
        for own in MEASURES[measure] if of == name else ():
            known = {k: v for k, v in curves(done, own).items() if k in ours.values()}
            plain = known.pop("gnvc, 0 steps", ())
            found = {
                curve: ([change], "mean at the same rate")
                for curve, points in known.items()
                if (change := bd_quality(points, plain)) is not None
            }
            figure, missing = f"rise of {own} without refinement (Table 4)", f"needs {own}"
            missing += ", four points, and --steps 0 beside others"
            add(figure, {"GNVC-VD": value}, "+.3f", found, missing)
    if name == "hevc-b":
        for figure, (field, factor, spec, published) in OVER_TIME.items():
            found = over_rates(done, lambda r, f=field: r["temporal"].get(f), factor)
            note = "lowest to highest rate; published: rate"
            note += ", flow and scale unknown" if field == "e_warp" else " unknown"
            found = {curve: (values, note) for curve, values in found.items()}
            add(f"{figure} (Table 2)", published, spec, found, f"needs {figure}")
    nothing = "no point of ours has a file for every clip"
    found = over_rates(done, lambda r: r["codec"].get("parameters"), 1e-9)
    found = {curve: (values[:1], "") for curve, values in found.items()}
    published = {"GNVC-VD": PARAMETERS}
    add("parameters, billions (Table 6)", published, ".2g", found, nothing)
    for way, published in MILLISECONDS.items():
        found = over_rates(
            done, lambda r, w=way: r["speed"][f"{w}_seconds"] / r["source"]["frames"], 1000.0
        )
        note = "lowest to highest rate, start and compilation included; published: one A800"
        found = {curve: (values, note) for curve, values in found.items()}
        figure = f"{way} a frame, ms" + (" (Table 7)" if way == "decode" else "")
        add(figure, {"GNVC-VD": published}, ".0f", found, nothing)
    return {"set": name, "differs": differs(done, name, full_range), "rows": rows}


def differs(records: Sequence[dict], name: str, full_range: bool) -> list[str]:
    """Differences to the setup of the paper: missing sequences, length, size, groups, range."""
    clips = {r["clip"] for r in records}
    frames = {r["source"]["frames"] for r in records}
    sizes = {(r["source"]["width"], r["source"]["height"]) for r in records}
    groups = {r["codec"]["gop"] for r in records if r["codec"]["codec"] == "gnvc"}
    wanted = len(SEQUENCES[name])
    texts = [f"{len(clips)} of {wanted} sequences"] if len(clips) != wanted else []
    texts += [f"{n} frames" for n in sorted(frames - {FRAMES})]
    texts += [f"{width}x{height}" for width, height in sorted(sizes - {SIZE})]
    texts += [f"groups of {n}" for n in sorted(groups - {GROUP})]
    return texts if full_range else [*texts, "limited range"]


def over_rates(
    records: Sequence[dict], value: Callable[[dict], float | None], factor: float
) -> dict[str, list[float]]:
    """Means over clips at the lowest and at the highest rate of each of our curves.

    Args:
        records: Records of a run.
        value: Function from a record to a value; None excludes the record.
        factor: Factor of the value.

    Returns:
        [mean at the lowest rate, mean at the highest rate] by curve.
    """
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for r in complete(records, lambda r: value(r) is not None):
        amount = value(r)
        if r["codec"]["codec"] == "gnvc" and amount is not None:
            points = found.setdefault(curve_of(r), {})
            points.setdefault(r["point"], []).append((r["rate"]["bpp"], factor * amount))
    ends = {}
    for curve, points in found.items():
        pairs = [[sum(column) / len(column) for column in zip(*p)] for p in points.values()]
        ends[curve] = [min(pairs)[1], max(pairs)[1]]
    return ends
