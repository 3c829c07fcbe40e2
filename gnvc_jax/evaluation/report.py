"""report.html: a run in one file that needs no network.

All text that comes from records, clip names above all, is escaped; pictures are WebP in data URIs;
the page forbids itself to load anything.
"""

import base64
import io
import json
import shlex
import string
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from html import escape
from importlib.resources import files
from pathlib import Path

from PIL import Image

from gnvc_jax.evaluation.bd_rate import bd_table
from gnvc_jax.evaluation.pictures import SOURCE, Pictures, View
from gnvc_jax.evaluation.plots import group_name, inline_svg, rate_groups, write_plots
from gnvc_jax.evaluation.points import group_starts
from gnvc_jax.evaluation.records import means
from gnvc_jax.evaluation.tables import (
    BD_HEADINGS,
    PAPER_HEADINGS,
    bd_cells,
    cell,
    measured_columns,
    paper_caption,
    paper_cells,
    value_of,
)
from gnvc_jax.files import write_whole

MAX_BYTES = 11_000_000  # of all pictures; a third more as text
QUALITIES = (90, 80, 65, 50)  # of WebP; the first that keeps to MAX_BYTES is taken
MAX_WIDTH = 1280  # pixels of a whole frame; larger ones are made smaller
MIN_SHOWN = 640  # pixels that a whole frame takes on the page where there is room


def write_report(out: Path, results: dict) -> Path:
    """Writes OUT/plots and OUT/report.html.

    Args:
        out: folder of a sweep, with frames, bitstreams and pictures beside the records.
        results: what `tables.write_results` put into results.json.

    Returns:
        The path of the report.
    """
    records = results["records"]
    finished = [r for r in records if r["status"] == "ok"]
    clips: dict[str, list[dict]] = {}
    for record in finished:
        clips.setdefault(record["clip"], []).append(record)
    drawings = write_plots(out, records, _frame_curves(out, finished), _seams(out, finished))
    for quality in QUALITIES:
        album = Album(out, quality)
        sections = [_clip(f"clip{n}", own, drawings, album) for n, own in enumerate(clips.values())]
        if album.size <= MAX_BYTES:
            break
    headings = {"means": "Means over clips", **{f"clip{n}": name for n, name in enumerate(clips)}}
    headings["gaps"] = "Failed and not measured"
    template = string.Template(files(__package__).joinpath("report.html").read_text())
    text = template.substitute(
        title=_title(finished),
        summary=_summary(results),
        contents="".join(f'<li><a href="#{i}">{escape(h)}</a></li>' for i, h in headings.items()),
        body="\n".join(
            [_means(finished, drawings, results.get("paper")), *sections, _gaps(records)]
        ),
        footer=f"Pictures are WebP of quality {quality}, whole frames at most {MAX_WIDTH} pixels "
        "wide. What was measured are the lossless frames; some are kept as PNG beside this file.",
    )
    write_whole(out / "report.html", text)
    return out / "report.html"


class Album:
    """Pictures as data URIs of one quality; `size` counts their bytes."""

    def __init__(self, out: Path, quality: int):
        self.pictures, self.quality, self.size = Pictures(out), quality, 0

    def view(self, record: dict) -> View | None:
        """The view of a record's clip, None where no pictures were kept."""
        return self.pictures.load_view(record["clip"], record["source"]["sha256"])

    def frame(self, clip: str, point: str, file: str) -> str:
        """A whole frame."""
        image = self._open(clip, point, file)
        image.thumbnail((MAX_WIDTH, MAX_WIDTH))
        return self._uri(image)

    def square(self, clip: str, point: str, view: View) -> str:
        """The part of the middle frame that is shown enlarged."""
        box = view.left, view.top, view.left + view.side, view.top + view.side
        return self._uri(self._open(clip, point, view.files[view.middle]).crop(box))

    def slice(self, clip: str, point: str) -> str:
        """One row over time."""
        return self._uri(self._open(clip, point, "slice.png"))

    def _open(self, clip: str, point: str, file: str) -> Image.Image:
        return Image.open(self.pictures.path(clip, point, file)).convert("RGB")

    def _uri(self, image: Image.Image) -> str:
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=self.quality, method=2)
        self.size += buffer.tell()
        return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _frame_curves(out: Path, records: Iterable[dict]) -> dict[tuple[str, str], dict]:
    curves = {}
    for record in records:
        path = out / "frames" / f"{record['clip']}__{record['point']}.json"
        if path.is_file():
            curves[record["clip"], record["point"]] = json.loads(path.read_text())
    return curves


def _seams(out: Path, records: Iterable[dict]) -> dict[tuple[str, str], list[int]]:
    """First frames of the groups of every .gnvc file."""
    labels = [(record["clip"], record["point"]) for record in records]
    return {
        (clip, point): starts
        for clip, point in labels
        if (starts := group_starts(out / "bitstreams" / f"{clip}__{point}.gnvc"))
    }


def _title(records: Sequence[dict]) -> str:
    models = dict.fromkeys(r["codec"]["model"] for r in records if r["codec"].get("model"))
    return escape(f"Evaluation of {', '.join(models)}" if models else "Evaluation")


def _summary(results: dict) -> str:
    records, env = results["records"], results["env"]
    finished = [r for r in records if r["status"] == "ok"]
    clips, points = ({r[k] for r in finished} for k in ("clip", "point"))
    failed = len(records) - len(finished)
    packages = env.get("packages") or {}
    git = env.get("git") or {}
    commit = git.get("commit", "")[:12] + (", with changes" if git.get("dirty") else "")
    models = {
        f"{r['codec']['model']}, SHA-256 {r['codec']['model_sha256'][:16]}"
        for r in finished
        if r["codec"].get("model_sha256")
    }
    facts = {
        "model": "; ".join(sorted(models)),
        "command": f"<code>{escape(shlex.join(results['command']))}</code>",
        "hardware": ", ".join(filter(None, [env.get("cpu"), *env.get("devices", ())])),
        "versions": ", ".join(f"{name} {v}" for name, v in packages.items() if v),
        "Python, ffmpeg": ", ".join(filter(None, [env.get("python"), env.get("ffmpeg")])),
        "commit": commit,
    }
    rows = "".join(
        f"<dt>{name}</dt><dd>{text if name == 'command' else escape(text)}</dd>"
        for name, text in facts.items()
        if text
    )
    return (
        f'<p class="soft">{len(points)} points on {len(clips)} clips, {failed} failed; '
        f"{escape(results['created'])}. Rates are those of whole files, decoded in processes of "
        f"their own; metrics are taken on 8-bit RGB.</p><dl>{rows}</dl>"
    )


def _means(records: Sequence[dict], drawings: Mapping[str, str], paper: dict | None) -> str:
    columns = measured_columns(records)
    rows = [
        [label, str(mean["clips"]), *(cell(mean, *c) for c in columns.values())]
        for label, mean in means(records).items()
    ]
    return (
        '<section><h2 id="means">Means over clips</h2>'
        + _plot(drawings.get("rd"), "mean", "Quality over rate, means over clips")
        + '<p class="soft">Dashed: standard codecs at the rates of ours. Dotted: without a file. '
        "Up is better, except for ratios, whose best is 1. Points that a clip lacks are in "
        "the table alone.</p>"
        + _table("Plain means over the clips", ["point", "clips", *columns], rows)
        + _bd_rates(records)
        + _paper(paper)
        + "</section>"
    )


def _bd_rates(records: Sequence[dict]) -> str:
    rows = [
        [f"{row['curve']} against {row['against']}", row["measure"], *bd_cells(row)]
        for row in bd_table(records)
    ]
    if not rows:
        return ""
    caption = "Rate that a curve takes more than another for the same quality"
    return _table(caption, ["curves", "measure", *BD_HEADINGS], rows)


def _paper(paper: dict | None) -> str:
    """What was measured beside what was published; paper: see `tables.write_results`."""
    if not paper:
        return ""
    return _table(paper_caption(paper), PAPER_HEADINGS, [paper_cells(row) for row in paper["rows"]])


def _clip(key: str, records: list[dict], drawings: Mapping[str, str], album: Album) -> str:
    """Everything about one clip; key: its identifier in the page; records: finished ones."""
    clip, source = records[0]["clip"], records[0]["source"]
    columns = measured_columns(records)
    rows = [[r["point"], *(cell(r, *c) for c in columns.values())] for r in records]
    parts = [
        f'<section><h2 id="{key}">{escape(clip)}</h2>'
        f'<p class="soft">{source["frames"]} frames of {source["width"]}×{source["height"]} at '
        f"{float(Fraction(source['fps'])):.4g} per second</p>"
    ]
    view = album.view(records[0])
    shown = [r for r in records if view and album.pictures.complete(clip, r["point"], view)]
    if shown:
        parts.append(_viewer(shown, view, album))
    else:
        parts.append('<p class="soft">No pictures were kept.</p>')
    parts += [
        _plot(drawings.get(f"clips/{clip}_rd"), f"{key}-rd", "Quality over rate"),
        _table("Every point", ["point", *columns], rows),
    ]
    groups = rate_groups(shown)
    if groups:
        parts.append(
            "<h3>Side by side at the same rate</h3>"
            f'<p class="soft">A square of {view.side} pixels of frame {view.frames[view.middle]}, '
            "where the source has most texture and motion, and pixel row "
            f"{view.row} over time, downwards: what flickers shows as horizontal stripes.</p>"
        )
        parts += [
            _group(group, view, album, n == len(groups) // 2) for n, group in enumerate(groups)
        ]
    if curves := drawings.get(f"clips/{clip}_frames"):
        parts.append(
            "<h3>Frame by frame</h3>"
            + _plot(curves, f"{key}-frames", "Quality over frames")
            + '<p class="soft">Vertical dotted lines: where a group of frames begins.</p>'
        )
    return "\n".join([*parts, "</section>"])


def _viewer(records: Sequence[dict], view: View, album: Album) -> str:
    """A picture of two halves, each of the source or of any point, with a slider between them."""
    clip, source = records[0]["clip"], records[0]["source"]
    points = {SOURCE: "source", **{r["point"]: _caption(r) for r in records}}
    first, middle = records[len(records) // 2]["point"], view.frames[view.middle]
    images = []
    for index, file in zip(view.frames, view.files):
        for point, caption in points.items():
            side = {SOURCE: "left", first: "right"}.get(point, "") if index == middle else ""
            images.append(
                f'<img class="{side}" data-point="{escape(point)}" data-frame="{index}" '
                f'alt="{escape(caption)}, frame {index}" src="{album.frame(clip, point, file)}">'
            )
    wide = max(source["width"], MIN_SHOWN)
    return (
        f'<div class="viewer" style="--wide: {wide}px; '
        f'--shape: {source["width"]} / {source["height"]}">'
        f'<div class="stage"><output></output><output></output>{"".join(images)}</div>'
        f'<input type="range" min="0" max="100" step="0.5" value="50" '
        f'aria-label="Border between left and right, {escape(clip)}">'
        '<div class="controls">'
        + _select("left", points, SOURCE)
        + _select("right", points, first)
        + _select("frame", {str(i): str(i) for i in view.frames}, str(middle))
        + "</div></div>"
    )


def _group(group: Sequence[dict], view: View, album: Album, opened: bool) -> str:
    """Enlarged squares and slices of points of about one rate, the source before them."""
    clip = group[0]["clip"]
    points = {SOURCE: "source", **{r["point"]: _caption(r) for r in group}}
    squares, slices = (
        "".join(
            f'<figure><img src="{take(point)}" alt="{what}, {escape(caption)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
            for point, caption in points.items()
        )
        for what, take in (
            ("Detail", lambda point: album.square(clip, point, view)),
            ("Row over time", lambda point: album.slice(clip, point)),
        )
    )
    return (
        f"<details{' open' if opened else ''}><summary>{escape(group_name(group))}</summary>"
        f'<div class="row">{squares}</div><div class="row wide">{slices}</div></details>'
    )


def _gaps(records: Sequence[dict]) -> str:
    failed = [
        f"<li><b>{escape(r['clip'])} {escape(r['point'])}</b>: {escape(r['error'])}</li>"
        for r in records
        if r["status"] != "ok"
    ]
    reasons: dict[tuple[str, str], list[str]] = {}
    for record in records:
        for name, reason in record.get("not_measured", {}).items():
            reasons.setdefault((name, reason), []).append(record["clip"])
    missing = [
        f"<li><b>{escape(name)}</b>: {escape(reason)} "
        f'<span class="soft">({escape(", ".join(dict.fromkeys(clips)))})</span></li>'
        for (name, reason), clips in reasons.items()
    ]
    floor = [
        f"<li>{escape(r['clip'])} {escape(r['point'])}</li>"
        for r in records
        if r.get("codec", {}).get("at_floor")
    ]
    lists = {
        "Failed": failed,
        "Not measured": missing,
        "Larger than asked: the coarsest setting of the codec still takes more": floor,
    }
    return (
        '<section><h2 id="gaps">Failed and not measured</h2>'
        + "".join(f"<h3>{h}</h3><ul>{''.join(items)}</ul>" for h, items in lists.items() if items)
        + ("" if any(lists.values()) else "<p>Nothing: every point and every metric is there.</p>")
        + "</section>"
    )


def _caption(record: dict) -> str:
    """Point, rate and PSNR in one line."""
    facts = {"bpp": ("rate", "bpp", ".4f"), "dB": ("quality", "psnr_rgb", ".1f")}
    return " · ".join(
        [record["point"]]
        + [f"{cell(record, *c)} {u}" for u, c in facts.items() if value_of(record, *c[:2])]
    )


def _select(name: str, choices: Mapping[str, str], chosen: str) -> str:
    options = "".join(
        f'<option value="{escape(value)}"{" selected" if value == chosen else ""}>'
        f"{escape(text)}</option>"
        for value, text in choices.items()
    )
    return f"<label>{name} <select>{options}</select></label>"


def _plot(drawing: str | None, prefix: str, label: str) -> str:
    if drawing is None:
        return ""
    return f'<div class="plot scroll">{inline_svg(drawing, prefix, label)}</div>'


def _table(caption: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(text)}</td>" for text in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><caption>{caption}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
