"""Search for videos in a folder, for training, datasets and evaluation.

`find_videos` goes by the suffixes of file names, since opening thousands of files would take
minutes; what cannot be read shows later. The result is sorted: data order must not depend on the
file system.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from gnvc_jax.buckets import AnyPath, as_path, files_below, is_remote

log = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .qt .3gp .3g2 .mkv .webm .avi .wmv .asf .flv .f4v .ogv .ogg .mpg .mpeg .m2v"
    " .vob .ts .mts .m2ts .mxf .nut .gif .264 .h264 .265 .hevc .ivf .obu .y4m .yuv".split()
)
# Folders with copies, thumbnails and deleted files, made by file managers and network drives.
_SYSTEM_FOLDERS = frozenset(
    (
        "@eaDir",
        "@Recycle",
        "@Recently-Snapshot",
        "@tmp",
        "#recycle",
        "#snapshot",
        "__MACOSX",
        "lost+found",
        "$RECYCLE.BIN",
        "System Volume Information",
    )
)


def _is_video(file: AnyPath, folder: AnyPath) -> bool:
    """Whether a file in a bucket is one of the videos of a folder."""
    names = file.relative_to(folder).parts
    hidden = any(name[0] == "." or name in _SYSTEM_FOLDERS for name in names)
    return not hidden and file.suffix.lower() in VIDEO_SUFFIXES


def find_videos(folder: str | os.PathLike) -> Sequence[AnyPath]:
    """Finds the videos in a folder and its subfolders.

    Hidden files and folders, and those of network drives, are skipped. PNG images count as frames
    only if there is no video beside or below them; otherwise they are left out with a warning. In
    buckets they never count.

    Returns:
        Video files, then folders of PNG frames, each sorted.
    """
    if is_remote(folder):
        return [file for file in files_below(as_path(folder)) if _is_video(file, as_path(folder))]
    videos, pictures, visited = [], {}, set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in visited:  # links can lead back up
            folders.clear()
            continue
        visited.add(real)
        # In place: `os.walk` goes into what is left in the list.
        folders[:] = [name for name in folders if name[0] != "." and name not in _SYSTEM_FOLDERS]
        suffixes = {name: Path(name).suffix.lower() for name in names if name[0] != "."}
        videos += [Path(place, name) for name in suffixes if suffixes[name] in VIDEO_SUFFIXES]
        if count := list(suffixes.values()).count(".png"):
            pictures[Path(place)] = count
    with_videos = {parent for video in videos for parent in video.parents}
    for place in sorted(with_videos & pictures.keys()):
        log.warning("%s: PNG pictures beside videos are left out (%d)", place, pictures[place])
    return sorted(videos) + sorted(pictures.keys() - with_videos)
