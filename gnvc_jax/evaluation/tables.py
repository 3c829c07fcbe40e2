"""Records as results.json, results.csv, bd.csv and Markdown tables.

`write_results` writes all of them from the same records. results.json has everything, among it the
command and the environment; `gnvc_jax.evaluation.report` and `gnvc_jax.evaluation.compare` read it.
The tables have a column for what some record has a value of (`measured_columns`).
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gnvc_jax.evaluation.bd_rate import FIGURES, bd_csv, bd_table
from gnvc_jax.evaluation.records import SCHEMA, means, now
from gnvc_jax.files import write_json, write_whole

COLUMNS = {  # heading: (section of the record, field, format)
    "bytes": ("rate", "bytes", "d"),
    "bpp": ("rate", "bpp", ".5f"),
    "kbps": ("rate", "kbps", ".1f"),
    "PSNR": ("quality", "psnr_rgb", ".2f"),
    "PSNR YUV": ("quality", "psnr_yuv", ".2f"),
    "MS-SSIM": ("quality", "ms_ssim_rgb", ".4f"),
    "LPIPS alex": ("quality", "lpips_alex", ".4f"),
    "LPIPS vgg": ("quality", "lpips_vgg", ".4f"),
    "DISTS": ("quality", "dists", ".4f"),
    "VMAF": ("quality", "vmaf", ".1f"),
    "tPSNR": ("temporal", "tpsnr", ".2f"),
    "TI ratio": ("temporal", "ti_ratio", ".3f"),
    "pulse": ("temporal", "pulse", ".3f"),
    "seam": ("temporal", "seam", ".2f"),
    "PSNR slope": ("temporal", "psnr_slope", ".3f"),
    "E_warp ratio": ("temporal", "e_warp_ratio", ".3f"),
    "CLIP-F": ("temporal", "clip_f", ".4f"),
    "source CLIP-F": ("temporal", "clip_f_source", ".4f"),
    "CMMD": ("temporal", "cmmd", ".3f"),
}
BD_HEADINGS = ("BD-rate", "mean of clips", "note")
PAPER_HEADINGS = ("figure", "published", "curve", "measured", "note")
_SCALARS = ("source", "codec", "rate", "quality", "temporal", "speed")


def write_results(
    out: Path,
    records: Sequence[dict],
    command: Sequence[str],
    env: dict,
    paper: dict | None = None,
    options: dict | None = None,
) -> str:
    """Writes results.json, results.csv, bd.csv and results.md.

    Args:
        out: Folder of the sweep.
        records: Records of the sweep.
        command: Command line of the run.
        env: Hardware and software, from `environment`.
        paper: Result of `paper.beside`, if the clips are a test set of the paper.
        options: Options of the run.

    Returns:
        The tables in Markdown.
    """
    # Rendered first: a record that cannot be shown leaves the files of the run before as they are.
    table = markdown(records, paper)
    write_json(
        out / "results.json",
        {
            "schema": SCHEMA,
            "created": now(),
            "command": list(command),
            "options": options,
            "env": env,
            "means": means(records),
            "paper": paper,
            "records": list(records),
        },
    )
    write_whole(out / "results.csv", as_csv(records))
    write_whole(out / "bd.csv", bd_csv(bd_table(records)))
    write_whole(out / "results.md", table)
    return table


def as_csv(records: Sequence[dict]) -> str:
    """Records as CSV, one line each, with all scalars in columns named section.field."""
    rows = []
    for record in records:
        row = {name: record.get(name) for name in ("clip", "point", "status", "error")}
        # Failed records lack sections, and nested values have no column.
        for section in _SCALARS:
            for field, value in (record.get(section) or {}).items():
                if not isinstance(value, dict):
                    row[f"{section}.{field}"] = value
        rows.append(row)
    text = io.StringIO()
    # All fields of all records, in the order of their first appearance.
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown(records: Sequence[dict], paper: dict | None = None) -> str:
    """Tables of means over clips, of every clip, and of failures; paper: see `write_results`."""
    columns = measured_columns(records)
    # Means say how many clips they are of: a point that failed on some is not comparable.
    mean_rows = [
        [label, str(mean["clips"]), *(cell(mean, *column) for column in columns.values())]
        for label, mean in means(records).items()
    ]
    rows = [
        [
            record["clip"],
            # The star is explained below the tables.
            record["point"] + ("*" if record["codec"].get("at_floor") else ""),
            *(cell(record, *column) for column in columns.values()),
        ]
        for record in records
        if record["status"] == "ok"
    ]
    parts = []
    if mean_rows:
        parts += [
            "Means over clips, 8-bit RGB, rates from files:",
            pipe_table(["point", "clips", *columns], mean_rows),
            "Every clip:",
            pipe_table(["clip", "point", *columns], rows),
        ]
    if bd_rows := bd_table(records):
        cells = [[row["measure"], row["curve"], row["against"], *bd_cells(row)] for row in bd_rows]
        parts += ["Difference in rate between two curves at the same quality:"]
        parts += [pipe_table(["measure", "curve", "against", *BD_HEADINGS], cells)]
    if paper:
        parts += [f"{paper_caption(paper)}:"]
        parts += [pipe_table(PAPER_HEADINGS, [paper_cells(row) for row in paper["rows"]])]
    if any("*" in row[1] for row in rows):
        parts.append("\\* The coarsest setting of this codec still takes more than the target.")
    # The same reason holds for many records and is given once.
    reasons = dict.fromkeys(
        f"- {name}: {reason}"
        for record in records
        for name, reason in record.get("not_measured", {}).items()
    )
    if reasons:
        parts.append("Not measured:\n\n" + "\n".join(reasons))
    failures = [
        "- " + f"{r['clip']} {r['point']}".strip() + f": {r['error']}"
        for r in records
        if r["status"] != "ok"
    ]
    if failures:
        parts.append("Failed:\n\n" + "\n".join(failures))
    return "\n\n".join(parts) + "\n"


def measured_columns(records: Sequence[dict]) -> dict[str, tuple[str, str, str]]:
    """Columns out of COLUMNS for which some record has a value."""
    return {
        heading: column
        for heading, column in COLUMNS.items()
        if any(value_of(r, *column[:2]) is not None for r in records)
    }


def value_of(record: dict, section: str, field: str) -> Any:
    """Number of a record or of means; None if there is none."""
    return (record.get(section) or {}).get(field)


def cell(record: dict, section: str, field: str, spec: str) -> str:
    """Number of a record as text, in the format `spec`."""
    value = value_of(record, section, field)
    if value is None:
        return "–"
    # A mean of bytes is no whole number.
    return format(round(value) if spec == "d" else value, spec)


def bd_cells(row: dict) -> list[str]:
    """Cells of a row of `bd_rate.bd_table` below BD_HEADINGS."""
    mean, single = ("–" if row[k] is None else f"{row[k]:+.1f} %" for k in FIGURES)
    return [mean, f"{single} ({row['clips']})", row["note"]]


def paper_caption(paper: dict) -> str:
    """Caption of the rows of `paper.beside`, with differences to the setup of the paper."""
    differs = f" (not as there: {', '.join(paper['differs'])})" if paper["differs"] else ""
    return f"Beside the figures of GNVC-VD's paper, {paper['set']}{differs}"


def paper_cells(row: dict) -> list[str]:
    """Cells of a row of `paper.beside` below PAPER_HEADINGS."""
    published = ", ".join(f"{name} {value:{row['format']}}" for name, value in row["published"])
    measured = " to ".join(f"{value:{row['format']}}" for value in row["measured"]) or "–"
    return [row["figure"], published, row["curve"] or "–", measured, row["note"]]


def pipe_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first two are aligned to the right."""
    lines = [headings, ["---", "---", *("---:" for _ in headings[2:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
