"""Comparison of two runs: what both measured, and how much the results differ.

`read_results` reads the results.json of `gnvc eval`; `compare` pairs records by clip and point and
writes Markdown. What the runs do not share (clips, points, metrics, hardware, versions) is listed
first, since it may explain a difference.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from gnvc_jax.evaluation.records import SCHEMA
from gnvc_jax.evaluation.tables import cell, measured_columns, pipe_table, value_of

_RELATIVE = ("bytes", "bpp", "kbps")  # fields whose difference is given in per cent


class ResultsError(ValueError):
    """A file that is not a results.json; the message names it."""


def read_results(path: Path) -> dict:
    """Reads a results.json; raises ResultsError."""
    try:
        results = json.loads(path.read_text())
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise ResultsError(f"{path}: not JSON") from None
    schema = results.get("schema") if isinstance(results, dict) else None
    if schema != SCHEMA:
        raise ResultsError(f"{path}: schema is {schema!r}, expected {SCHEMA!r}")
    if missing := [name for name in ("created", "env", "records") if name not in results]:
        raise ResultsError(f"{path}: lacks '{missing[0]}'")
    return results


def compare(a: dict, b: dict, names: Sequence[str]) -> tuple[str, bool]:
    """Compares two results.

    Args:
        a: Results of the first run, from `read_results`.
        b: Results of the second run.
        names: Names of the two, usually their paths.

    Returns:
        Markdown, and whether they have any clip and point in common.
    """
    # By clip and point: sweeps may list them in any order, and may have been stopped.
    runs = [_finished(a), _finished(b)]
    both = [key for key in runs[0] if key in runs[1]]
    # Clips of one name may be different videos; only their content counts.
    same = [key for key in both if _sha256(runs[0][key]) == _sha256(runs[1][key])]
    parts = [
        "\n".join(
            f"- {letter}: {_plain(name)}, {run['created']}"
            for letter, name, run in zip("AB", names, (a, b))
        ),
        *_differences(runs, (a, b), [key for key in both if key not in same]),
    ]
    if not same:
        return "\n\n".join([*parts, "No clip and point in common."]) + "\n", False
    pairs = [(runs[0][key], runs[1][key]) for key in same]
    measured = [measured_columns(records) for records in zip(*pairs)]
    # Metrics that both runs have, in the order of the first.
    columns = {heading: c for heading, c in measured[0].items() if heading in measured[1]}
    headings = [f"{heading}, A → B" for heading in columns]
    mean_rows = []
    # One row for each point, over the clips that both runs have at it.
    for point in dict.fromkeys(point for _, point in same):
        own = [pair for pair in pairs if pair[0]["point"] == point]
        changes = [_change(own, *column) for column in columns.values()]
        mean_rows.append([_plain(point), str(len(own)), *changes])
    rows = [
        [_plain(clip), _plain(point), *(_change([pair], *column) for column in columns.values())]
        for (clip, point), pair in zip(same, pairs)
    ]
    parts += [
        "Means over the clips in common, differences in brackets:",
        pipe_table(["point", "clips", *headings], mean_rows),
        "Every clip:",
        pipe_table(["clip", "point", *headings], rows),
    ]
    return "\n\n".join(parts) + "\n", True


def _finished(results: dict) -> dict[tuple[str, str], dict]:
    return {(r["clip"], r["point"]): r for r in results["records"] if r["status"] == "ok"}


def _sha256(record: dict) -> str:
    return record["source"]["sha256"]


def _differences(
    runs: Sequence[dict], results: Sequence[dict], changed: Sequence[tuple[str, str]]
) -> list[str]:
    """Paragraphs on what only one run has, and on how the two were made differently."""
    lines = []
    # Same name, other content: said first, since it is most often a mistake.
    for clip in dict.fromkeys(clip for clip, _ in changed):
        first, second = (next(r for (c, _), r in run.items() if c == clip) for run in runs)
        lines.append(
            f"Clip {_plain(clip)} differs and is not compared: {_source(first)} in A, "
            f"{_source(second)} in B."
        )
    collections = {
        "clips": [[clip for clip, _ in run] for run in runs],
        "points": [[point for _, point in run] for run in runs],
        "metrics": [list(measured_columns(list(run.values()))) for run in runs],
    }
    for what, sets in collections.items():
        for letter, mine, other in zip("AB", sets, sets[::-1]):
            if only := [x for x in dict.fromkeys(mine) if x not in other]:
                lines.append(f"Only {letter} has {what}: {', '.join(map(_plain, only))}.")
    # Among clips and points that both runs know, some combinations may be missing in one.
    clips, points = (
        [name for name in dict.fromkeys(collections[what][0]) if name in collections[what][1]]
        for what in ("clips", "points")
    )
    for letter, run, other in zip("AB", runs, runs[::-1]):
        only = [f"{c} {p}" for c, p in run if c in clips and p in points and (c, p) not in other]
        if only:
            lines.append(f"Only {letter} has finished: {', '.join(map(_plain, only))}.")
    for letter, result in zip("AB", results):
        failed = [f"{r['clip']} {r['point']}" for r in result["records"] if r["status"] != "ok"]
        if failed:
            lines.append(f"Failed in {letter}: {', '.join(_plain(f.strip()) for f in failed)}.")
    # Last, how the runs were made: another model, machine or version may explain everything.
    facts = [_facts(run.values(), result["env"]) for run, result in zip(runs, results)]
    for name in dict.fromkeys([*facts[0], *facts[1]]):
        first, second = (fact.get(name) or "none" for fact in facts)
        if first != second:
            lines.append(f"{name}: {_plain(first)} in A, {_plain(second)} in B.")
    return ["\n".join(f"- {line}" for line in lines)] if lines else []


def _facts(records: Iterable[dict], env: dict) -> dict[str, str]:
    """Model, hardware and versions that a run was made with."""
    models = {
        f"{r['codec']['model']} {r['codec']['model_sha256'][:12]}"
        for r in records
        if r["codec"].get("model_sha256")
    }
    git = env.get("git") or {}
    return {
        "Model": ", ".join(sorted(models)),
        "Hardware": ", ".join([env.get("cpu") or "", *env.get("devices", ())]),
        "Commit": (git.get("commit") or "")[:12] + (" with changes" if git.get("dirty") else ""),
        "ffmpeg": env.get("ffmpeg") or "",
        **{f"Package {name}": version or "" for name, version in env.get("packages", {}).items()},
    }


def _source(record: dict) -> str:
    source = record["source"]
    return (
        f"{source['frames']} frames of {source['width']}×{source['height']} at {source['fps']} "
        f"({source['sha256'][:8]})"
    )


def _change(pairs: Sequence[tuple[dict, dict]], section: str, field: str, spec: str) -> str:
    """Means over the pairs in which both have the number, such as '26.78 → 27.01 (+0.23)'."""
    values = [[value_of(record, section, field) for record in pair] for pair in pairs]
    # A mean over other clips on either side would be no comparison.
    values = [pair for pair in values if None not in pair]
    if not values:
        return "–"
    a, b = (sum(column) / len(values) for column in zip(*values))
    # Quality differs by so many dB or points, rates by a share.
    if field not in _RELATIVE:
        difference = format(b - a, f"+{spec}")
    else:
        difference = f"{100 * (b / a - 1):+.1f} %" if a else "–"
    texts = [cell({section: {field: value}}, section, field, spec) for value in (a, b)]
    return f"{' → '.join(texts)} ({difference})"


def _plain(text: str) -> str:
    """Text with escaped column separators of Markdown tables."""
    return str(text).replace("|", "\\|")
