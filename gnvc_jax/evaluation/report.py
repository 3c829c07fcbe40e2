"""report.html: a whole run in one file that needs no network.

`write_report` collects what the page shows, and the template report.html.jinja lays it out. Jinja
escapes all text that comes from records, clip names above all; pictures are WebP in data URIs, and
the page forbids itself to load anything.
"""

import base64
import io
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import markupsafe
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

MAX_BYTES = 11_000_000  # of all pictures; base64 adds a third
QUALITIES = (90, 80, 65, 50)  # of WebP; the first that keeps to MAX_BYTES is taken
MAX_WIDTH = 1280  # pixels of a whole frame; larger ones are scaled down
MIN_SHOWN = 640  # pixels that a whole frame takes on the page where there is room


class Table(NamedTuple):
    """A table of the page; the first cell of each row is its heading."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_report(out: Path, results: dict) -> Path:
    """Writes OUT/plots and OUT/report.html.

    Args:
        out: Folder of a sweep, with frames, bitstreams and pictures beside the records.
        results: Contents of results.json, as `tables.write_results` writes it.

    Returns:
        The path of the report.
    """
    # Failed points have no measures; they are listed under `gaps` instead.
    records = results["records"]
    finished = [r for r in records if r["status"] == "ok"]
    clips: dict[str, list[dict]] = {}
    for record in finished:
        clips.setdefault(record["clip"], []).append(record)
    drawings = write_plots(out, records, _frame_curves(out, finished), _seams(out, finished))
    pictures = Pictures(out)
    variables = {
        "title": _title(finished),
        "counts": f"{len({r['point'] for r in finished})} points on {len(clips)} clips, "
        f"{len(records) - len(finished)} failed",
        "created": results["created"],
        "facts": _facts(results, finished),
        "means_plot": _plot(drawings.get("rd"), "mean", "Quality over rate, means over clips"),
        "mean_tables": _mean_tables(finished, results.get("paper")),
        "clips": [
            _clip(f"clip{number}", own, drawings, pictures)
            for number, own in enumerate(clips.values())
        ],
        "gaps": _gaps(records),
        "max_width": MAX_WIDTH,
        "min_shown": MIN_SHOWN,
    }
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    # Strict: a name that the template misspells is an error rather than an empty place.
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined
    )
    template = environment.get_template("report.html.jinja")
    # How large the pictures become is known only when they are encoded, while the page is rendered.
    for quality in QUALITIES:
        album = Album(pictures, quality)
        text = template.render(variables, album=album)
        if album.size <= MAX_BYTES:
            break
    write_whole(out / "report.html", text)
    return out / "report.html"


class Album:
    """Pictures as data URIs of one quality.

    Attributes:
        quality: Quality of WebP, 0 to 100.
        size: Bytes of all pictures so far.
    """

    def __init__(self, pictures: Pictures, quality: int):
        self.pictures, self.quality, self.size = pictures, quality, 0

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
    # A dictionary keeps the order and drops what comes twice.
    models = dict.fromkeys(r["codec"]["model"] for r in records if r["codec"].get("model"))
    return f"Evaluation of {', '.join(models)}" if models else "Evaluation"


def _facts(results: dict, finished: Sequence[dict]) -> dict[str, str]:
    """Says what the run was made with, as far as it is known."""
    env = results["env"]
    packages, git = env.get("packages") or {}, env.get("git") or {}
    models = {
        f"{r['codec']['model']}, SHA-256 {r['codec']['model_sha256'][:16]}"
        for r in finished
        if r["codec"].get("model_sha256")
    }
    facts = {
        "model": "; ".join(sorted(models)),
        "command": shlex.join(results["command"]),
        "hardware": ", ".join(filter(None, [env.get("cpu"), *env.get("devices", ())])),
        "versions": ", ".join(f"{name} {v}" for name, v in packages.items() if v),
        "Python, ffmpeg": ", ".join(filter(None, [env.get("python"), env.get("ffmpeg")])),
        "commit": git.get("commit", "")[:12] + (", with changes" if git.get("dirty") else ""),
    }
    return {name: text for name, text in facts.items() if text}


def _mean_tables(records: Sequence[dict], paper: dict | None) -> list[Table]:
    """Means over clips, BD-rates, and the figures of the paper, where there are any."""
    columns = measured_columns(records)
    rows = [
        [label, str(mean["clips"]), *(cell(mean, *c) for c in columns.values())]
        for label, mean in means(records).items()
    ]
    tables = [Table("Plain means over the clips", ["point", "clips", *columns], rows)]
    # One row for each pair of curves and each measure that both have.
    bd_rows = [
        [f"{row['curve']} against {row['against']}", row["measure"], *bd_cells(row)]
        for row in bd_table(records)
    ]
    if bd_rows:
        caption = "Difference in rate between two curves at the same quality"
        tables.append(Table(caption, ["curves", "measure", *BD_HEADINGS], bd_rows))
    if paper:
        rows = [paper_cells(row) for row in paper["rows"]]
        tables.append(Table(paper_caption(paper), PAPER_HEADINGS, rows))
    return tables


def _clip(
    key: str, records: list[dict], drawings: Mapping[str, str], pictures: Pictures
) -> dict[str, Any]:
    """Gathers what the page shows of one clip.

    Args:
        key: Identifier of the section in the page.
        records: Finished records of the clip.
        drawings: Plots by name, see `write_plots`.
        pictures: Pictures that the sweep kept.
    """
    clip, source = records[0]["clip"], records[0]["source"]
    columns = measured_columns(records)
    rows = [[r["point"], *(cell(r, *c) for c in columns.values())] for r in records]
    section = {
        "key": key,
        "name": clip,
        "source": source,
        "fps": f"{float(Fraction(source['fps'])):.4g}",
        "rate_plot": _plot(drawings.get(f"clips/{clip}_rd"), f"{key}-rd", "Quality over rate"),
        "frame_plot": _plot(
            drawings.get(f"clips/{clip}_frames"), f"{key}-frames", "Quality over frames"
        ),
        "table": Table("Every point", ["point", *columns], rows),
        "view": None,
        "groups": [],
    }
    # Pictures of another source under the same name must not be shown beside these numbers.
    view = pictures.load_view(clip, source["sha256"])
    shown = [r for r in records if view and pictures.complete(clip, r["point"], view)]
    if not view or not shown:
        return section

    def captions(records: Sequence[dict]) -> dict[str, str]:
        return {SOURCE: "source", **{r["point"]: _caption(r) for r in records}}

    return section | {
        "view": view,
        "frames": dict(zip(view.frames, view.files)),  # without the slice, which is the last file
        "frame_names": {str(index): str(index) for index in view.frames},
        "middle": view.frames[view.middle],
        "points": captions(shown),
        # The page opens with a point of middling rate, where differences show.
        "first": shown[len(shown) // 2]["point"],
        "groups": [(group_name(group), captions(group)) for group in rate_groups(shown)],
    }


def _gaps(records: Sequence[dict]) -> dict[str, list[tuple[str, str, str]]]:
    """Lists what is missing, as (name, reason, clips concerned) below headings."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for record in records:
        for name, reason in record.get("not_measured", {}).items():
            reasons.setdefault((name, reason), []).append(record["clip"])
    return {
        "Failed": [
            (f"{r['clip']} {r['point']}", r["error"], "") for r in records if r["status"] != "ok"
        ],
        "Not measured": [
            (name, reason, ", ".join(dict.fromkeys(clips)))
            for (name, reason), clips in reasons.items()
        ],
        "Larger than requested, even at the coarsest setting of the codec": [
            (f"{r['clip']} {r['point']}", "", "")
            for r in records
            if r.get("codec", {}).get("at_floor")
        ],
    }


def _caption(record: dict) -> str:
    """Point, rate and PSNR in one line."""
    facts = {"bpp": ("rate", "bpp", ".4f"), "dB": ("quality", "psnr_rgb", ".1f")}
    return " · ".join(
        [record["point"]]
        + [f"{cell(record, *c)} {u}" for u, c in facts.items() if value_of(record, *c[:2])]
    )


def _plot(drawing: str | None, prefix: str, label: str) -> markupsafe.Markup | None:
    """A drawing of `write_plots`, whose texts matplotlib has escaped, as an element of the page."""
    return None if drawing is None else markupsafe.Markup(inline_svg(drawing, prefix, label))
