"""Jobs that make one output for each of many videos, such as `encode-all` and `cache-latents`.

`for_each_video` runs them. Beside each output lies its row of the manifest, a JSON file that is
written last. So a job can be interrupted and started again, several processes can share it, and
each, when it ends, writes `manifest.csv` with the rows of all that are done.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from gnvc_jax.buckets import AnyPath, absolute, as_path, stamp
from gnvc_jax.data.index import find_videos
from gnvc_jax.data.left_out import log_left_out, reason
from gnvc_jax.files import keyed_name, write_json, write_whole
from gnvc_jax.media.errors import UnwritableOutput, WriteFailed

LEFT_OUT = "left_out"  # column of the reason


def for_each_video(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    work: Callable[[AnyPath, str], dict[str, Any]],
    columns: Sequence[str],
    *,
    settings: Any = None,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
    title: str = "",
) -> dict[str, str]:
    """Runs `work` on all videos at `source`.

    Videos whose row has the same settings are skipped. If `work` fails on a video, the reason is
    listed and logged, and the job goes on; only an error of the output ends it.

    Args:
        source: Folder, list or video, see `find_videos`.
        folder: Folder that `work` writes to; it must exist.
        work: Function of a video and a name that makes the output of this name in the folder and
            returns the row.
        columns: Columns of `manifest.csv`, beside `left_out`; "video" is one of them.
        settings: Settings of the job, JSON-ready, which are kept in the rows.
        shard: Number of this process, and number of processes that share the videos.
        progress: Whether to show a progress bar.
        title: Title of the progress bar.

    Returns:
        The videos that `work` failed on, with the reason.

    Raises:
        MissingInput: If there is nothing at the source.
        OSError, UnwritableOutput, WriteFailed: If the output cannot be written.
    """
    folder, failed = as_path(folder), {}
    videos = sorted(set(find_videos(as_path(source))))
    # Every shard-th video of the sorted list: processes need not talk to each other.
    mine = videos[shard[0] :: shard[1]]
    for video in tqdm(mine, unit="video", desc=title, disable=not progress or None):
        name = keyed_name(video.stem, video_key(video))
        row = folder / f"{name}.json"
        # The row is written after the output, so a row means that the output is complete.
        known = read_row(row)
        if known and LEFT_OUT not in known and known.get("settings") == settings:
            continue
        try:
            facts = work(video, name)
        except (OSError, UnwritableOutput, WriteFailed):
            raise  # an error of the output; errors of a video are other kinds of MediaError
        except Exception as error:
            failed[str(video)] = reason(str(video), error)
            log_left_out(str(video), error)
            facts = {"video": str(video), LEFT_OUT: failed[str(video)]}
        write_json(row, facts if settings is None else facts | {"settings": settings})
    write_manifest(folder, columns, videos)
    return failed


def video_key(video: AnyPath) -> str:
    """Twelve digits that differ for videos of the same name, and after a video has changed."""
    try:
        size, time = stamp(video)
    except OSError:  # reported when it is opened
        size, time = 0, 0
    text = f"{absolute(video)} {size} {time}"
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:12]


def read_row(path: AnyPath) -> dict[str, Any] | None:
    """Reads a row of the manifest, None if there is none."""
    try:
        row = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return row if isinstance(row, dict) and "video" in row else None


def write_manifest(folder: AnyPath, columns: Sequence[str], videos: Sequence[AnyPath]) -> None:
    """Writes `manifest.csv` from the rows in a folder.

    Args:
        folder: Folder with the rows.
        columns: Columns, see `for_each_video`.
        videos: Videos of this job. A failure is listed only if its video is one of them and has no
            output.
    """
    rows = [row for path in sorted(folder.glob("*.json")) if (row := read_row(path))]
    # A video that has changed has an old row beside the new one; a failure counts only where there
    # is no output of it.
    done = {row["video"] for row in rows if LEFT_OUT not in row}
    open_ones = set(map(str, videos)) - done
    text = io.StringIO()
    writer = csv.DictWriter(text, (*columns, LEFT_OUT), extrasaction="ignore")
    writer.writeheader()
    writer.writerows(r for r in rows if LEFT_OUT not in r or r["video"] in open_ones)
    write_whole(folder / "manifest.csv", text.getvalue())
