"""Plots of a sweep: quality over rate, and quality over the frames of a clip.

A curve is a codec, ours with one number of refinement steps. Standard codecs are dashed. Axes of
error metrics are inverted, so that up is better everywhere.
"""

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from gnvc_jax.evaluation.records import curve_of, means
from gnvc_jax.evaluation.tables import measured_columns, value_of
from gnvc_jax.files import write_whole

Columns = Mapping[str, tuple[str, str, str]]
Colours = Mapping[str, str]

_ERRORS = ("lpips", "dists", "pulse")  # prefixes of fields of which less is better
_COLOURS = ("#d1495b", "#2a78b8", "#3a8f4d", "#b8740f", "#7d5ba6", "#0f8b8d", "#8c6a4f")
_PANEL = (3.3, 2.6)  # inches, width and height of one panel
# Texts stay texts, in the font of the page, and identifiers are the same in every run, so that
# equal records give equal files.
_STYLE: dict[Any, Any] = {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "gnvc"}


def is_anchor(record: dict) -> bool:
    """Whether a record is of a standard codec at the rate of another point."""
    return "like" in record["codec"]


def rate_groups(records: Sequence[dict]) -> list[list[dict]]:
    """Groups the finished records of one clip by rate.

    Points of ours with files of the same size share a group. A standard codec joins the point whose
    rate it was given, and is left out at multiples of that rate. Groups are in order of rate,
    points without a file last.
    """
    groups: dict[int | None, list[dict]] = {}
    # Points that differ in refinement steps alone have the same file, and so the same size.
    sizes = {r["point"]: r["rate"]["bytes"] for r in records if not is_anchor(r)}
    for record in records:
        # `like` is the label of the point that gave the rate. At a multiple of it, it has a prefix,
        # such as "2x-", and names no point.
        point = record["codec"].get("like", record["point"])
        if point in sizes:
            groups.setdefault(sizes[point], []).append(record)
    return [groups[size] for size in sorted(groups, key=lambda size: size or math.inf)]


def mean_records(records: Sequence[dict]) -> list[dict]:
    """Means over clips, with the codec of each point.

    Points that some clip lacks are left out, since a mean over other clips does not belong on the
    same curve.
    """
    finished = [r for r in records if r["status"] == "ok"]
    clips = {r["clip"] for r in finished}
    # Reversed, so that the first record of a point is the one that stays.
    first = {r["point"]: r for r in reversed(finished)}
    return [
        {"point": label, "codec": first[label]["codec"], **mean}
        for label, mean in means(records).items()
        if mean["clips"] == len(clips)
    ]


def rd_figure(records: Sequence[dict], columns: Columns, colours: Colours, title: str) -> Figure:
    """Quality over log rate, one panel for each column.

    Args:
        records: Records with codec, rate, quality and temporal; a point without a rate becomes a
            horizontal line.
        columns: Columns as in `tables.COLUMNS`, of the sections quality and temporal.
        colours: Colour of each curve.
        title: Title, taken literally.
    """
    across = min(3, len(columns))
    down = math.ceil(len(columns) / across)
    figure, panels = _figure(down, across, title)
    for panel, (heading, (section, field, _)) in zip(panels, columns.items()):
        for name, colour in colours.items():
            group = [r for r in records if curve_of(r) == name]
            if not group:
                continue
            values = [(r["rate"]["bpp"], value_of(r, section, field)) for r in group]
            points = sorted((x, y) for x, y in values if None not in (x, y))
            dashes = "--" if is_anchor(group[0]) else "-"
            if points:
                panel.plot(*zip(*points), dashes, color=colour, marker="o", ms=4, label=name)
            # A point without a file, such as the VAE alone, has a quality but no rate.
            for level in (y for x, y in values if x is None and y is not None):
                panel.axhline(level, color=colour, linestyle=":", label=name)
        _finish(panel, heading, field)
        if any(r["rate"]["bpp"] for r in records):
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter("")
        panel.set_xlabel("bits per pixel")
    _legend(figure, panels)
    return figure


def frame_figure(
    groups: Sequence[Sequence[dict]],
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    seams: Mapping[str, Sequence[int]],
    columns: Columns,
    colours: Colours,
    title: str,
) -> Figure:
    """Quality over the frames of one clip: a row for each column, a panel for each rate.

    Args:
        groups: Groups from `rate_groups`.
        curves: Values of every frame by field, for each point.
        seams: First frames of the groups that a point was coded in, drawn as vertical lines.
        columns: Columns to draw, if some curve has them.
        colours: Colour of each curve.
        title: Title, taken literally.
    """
    columns = {
        heading: column
        for heading, column in columns.items()
        if any(column[1] in curve for curve in curves.values())
    }
    figure, panels = _figure(len(columns), len(groups), title, sharey="row")
    for place, panel in enumerate(panels):
        # Panels come row by row.
        row, group = place // len(groups), groups[place % len(groups)]
        heading, (_, field, _) = list(columns.items())[row]
        # Frame 0 begins a group in any case; a seam lies between two frames.
        for seam in sorted({s for r in group for s in seams.get(r["point"], ()) if s}):
            panel.axvline(seam - 0.5, color="#888888", linewidth=0.7, linestyle=":")
        for record in group:
            name, values = curve_of(record), curves[record["point"]].get(field, ())
            dashes = "--" if is_anchor(record) else "-"
            panel.plot(values, dashes, color=colours[name], linewidth=1.1, label=name)
        _finish(panel, heading if place % len(groups) == 0 else "", field)
        if row == 0:
            panel.set_title(group_name(group), fontsize=9)
        if row == len(columns) - 1:
            panel.set_xlabel("frame")
    _legend(figure, panels)
    return figure


def group_name(group: Sequence[dict]) -> str:
    """Name of a group from `rate_groups`: the rate of its first point."""
    bpp = group[0]["rate"]["bpp"]
    return "without a file" if bpp is None else f"{bpp:.4f} bpp"


def write_plots(
    out: Path,
    records: Sequence[dict],
    curves: Mapping[tuple[str, str], Mapping[str, Sequence[float]]],
    seams: Mapping[tuple[str, str], Sequence[int]],
) -> dict[str, str]:
    """Writes OUT/plots/NAME.png and NAME.svg.

    Names are rd (means over clips, all metrics), rd_FIELD (one metric), clips/CLIP_rd and
    clips/CLIP_frames.

    Args:
        out: Folder of the sweep.
        records: Records of the sweep.
        curves: Values of every frame by field, for each (clip, point).
        seams: First frames of groups, for each (clip, point).

    Returns:
        SVG texts by name.
    """
    finished = [r for r in records if r["status"] == "ok"]
    columns = {
        heading: column
        for heading, column in measured_columns(finished).items()
        if column[0] in ("quality", "temporal")
    }
    if not columns:
        return {}
    average = mean_records(finished)
    colours = dict(zip(dict.fromkeys(map(curve_of, finished)), itertools.cycle(_COLOURS)))
    figures = {}
    if average:
        figures["rd"] = rd_figure(average, columns, colours, "")
        for heading, column in columns.items():
            figures[f"rd_{column[1]}"] = rd_figure(
                average, {heading: column}, colours, "Mean over clips"
            )
    for clip in dict.fromkeys(r["clip"] for r in finished):
        own = [r for r in finished if r["clip"] == clip]
        figures[f"clips/{clip}_rd"] = rd_figure(own, columns, colours, clip)
        own_curves = {p: values for (c, p), values in curves.items() if c == clip}
        own_seams = {p: values for (c, p), values in seams.items() if c == clip}
        if any(own_curves.values()):
            figures[f"clips/{clip}_frames"] = frame_figure(
                rate_groups(own), own_curves, own_seams, columns, colours, clip
            )
    return {name: _write(out / "plots", name, figure) for name, figure in figures.items()}


def _write(folder: Path, name: str, figure: Figure) -> str:
    """Writes both files and returns the SVG."""
    with matplotlib.rc_context(_STYLE):
        picture, drawing = io.BytesIO(), io.StringIO()
        figure.savefig(picture, format="png", dpi=130, facecolor="white")
        figure.savefig(drawing, format="svg", metadata={"Date": None}, transparent=True)
    write_whole(folder / f"{name}.png", picture.getvalue())
    write_whole(folder / f"{name}.svg", drawing.getvalue())
    return drawing.getvalue()


def inline_svg(drawing: str, prefix: str, label: str) -> str:
    """Converts an SVG of `write_plots` to an element of a page, in the colour of the page's text.

    Args:
        drawing: SVG text.
        prefix: Prefix of all identifiers, so that a page can hold many drawings; identifiers that
            nothing refers to are dropped.
        label: Label of the drawing, already escaped.
    """
    svg = drawing[drawing.index("<svg") :]
    svg = re.sub(r' id="([^"]+)"', lambda m: m[0] if f"#{m[1]}" in svg else "", svg)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\1{prefix}", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Black texts and axes follow the page, which may be dark.
    svg = svg.replace("#000000", "currentColor")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _figure(
    down: int, across: int, title: str, sharey: Literal["none", "row"] = "none"
) -> tuple[Figure, list[Axes]]:
    """An empty figure and its panels. Margins are fixed: measuring all texts takes seconds."""
    with matplotlib.rc_context(_STYLE):
        width, height = _PANEL
        size = max(width * across, 2 * width), height * down + 1.0
        figure = Figure(figsize=size)
        panels = figure.subplots(down, across, squeeze=False, sharey=sharey)
        figure.subplots_adjust(
            left=0.6 / size[0],
            right=1 - 0.15 / size[0],
            bottom=0.9 / size[1],
            top=1 - 0.45 / size[1],
            wspace=0.3 if sharey == "none" else 0.1,
            hspace=0.35,
        )
        if title:
            figure.suptitle(title, y=1 - 0.15 / size[1], va="center", parse_math=False)
        return figure, list(panels.flat)


def _finish(panel: Axes, heading: str, field: str) -> None:
    """Gives a panel its label and grid, and turns the axis of an error metric upside down."""
    panel.set_ylabel(heading)
    panel.grid(color="#888888", alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    # Panels of a row share their axis: inverted twice, it would be as before.
    if field.startswith(_ERRORS) and not panel.yaxis_inverted():
        panel.invert_yaxis()


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Adds one legend below all panels, and removes panels that stayed empty."""
    entries = {}
    for panel in panels:
        # By label, so that a curve that several panels have is listed once.
        entries |= dict(zip(*reversed(panel.get_legend_handles_labels())))
        if not panel.has_data():
            panel.remove()
    figure.legend(entries.values(), entries, loc="lower center", ncols=6, frameon=False)
