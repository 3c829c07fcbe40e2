"""Many videos to streams, shared by the processes of a run: what `gnvc encode-all` does."""

import csv
import io
import json
import logging
from pathlib import Path

import jax
from tqdm import tqdm

from gnvc_jax.coder import DEFAULT_GOP, Coder, check_video
from gnvc_jax.data.index import find_videos
from gnvc_jax.data.latents import video_key
from gnvc_jax.files import keyed_name, write_json, write_whole
from gnvc_jax.media.errors import MediaError
from gnvc_jax.media.reader import open_video

log = logging.getLogger(__name__)

COLUMNS = ("video", "stream", "width", "height", "frames", "bytes", "bpp")


def encode_all(
    source: str | Path,
    folder: str | Path,
    coder: Coder,
    qp: int,
    gop: int = DEFAULT_GOP,
    progress: bool = True,
) -> dict[str, str]:
    """Encode all videos at `source` (folder, list or video) into `folder`; those that failed.

    Each stream has its row of the manifest beside it in a .json file, written last. Videos that
    have one with the same settings are passed over, so the same call goes on where it stopped.
    `manifest.csv` (see COLUMNS) holds all rows that are there when a process has finished; the
    last one's is complete. Processes of one JAX runtime share the videos, each on its own devices.

    Raises MissingInput for the source.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"qp": qp, "gop": gop, "model": [f.hex() for f in coder.model.fingerprints]}
    videos = sorted(set(find_videos(Path(source))))[jax.process_index() :: jax.process_count()]
    failed = {}
    for video in tqdm(videos, unit="video", desc="encoding", disable=not progress or None):
        name = keyed_name(video.stem, video_key(video))
        stream, row = folder / f"{name}.gnvc", folder / f"{name}.json"
        if row.exists() and json.loads(row.read_text())["settings"] == settings:
            continue
        try:
            facts = encode_one(video, stream, coder, qp, gop)
        except MediaError as error:
            failed[str(video)] = str(error)
            log.warning("left out: %s", error)
            continue
        write_json(row, facts | {"settings": settings})
    write_manifest(folder)
    return failed


def encode_one(video: Path, stream: Path, coder: Coder, qp: int, gop: int) -> dict:
    """Write one stream whole; its row of the manifest. Raises MediaError."""
    data = io.BytesIO()
    with open_video(str(video)) as frames:
        check_video(frames.info)
        fps = frames.fps.numerator, frames.fps.denominator
        size = frames.width, frames.height
        header = coder.header(*size, fps, gop=gop, colour=frames.colour.code_points)
        count = coder.encode_frames(frames, data, header, qp)
        for note in frames.notes:
            log.warning("%s: %s", video, note)
    write_whole(stream, data.getvalue())
    pixels = size[0] * size[1] * count
    facts = str(video), stream.name, *size, count, data.tell(), 8 * data.tell() / pixels
    return dict(zip(COLUMNS, facts))


def write_manifest(folder: Path) -> None:
    """manifest.csv of the rows that are there."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(json.loads(row.read_text()) for row in sorted(folder.glob("*.json")))
    write_whole(folder / "manifest.csv", text.getvalue())
