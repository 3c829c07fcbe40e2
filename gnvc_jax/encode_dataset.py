"""Encoding of many videos (`gnvc encode-all`).

Processes of one JAX runtime share the videos. Each finished stream is written whole and listed in
manifest.csv, so that the same call resumes after an interruption.
"""

import io
import logging
import os

import jax

from gnvc_jax.buckets import AnyPath, as_path, make_folder
from gnvc_jax.coder import DEFAULT_GOP, Coder, check_gop, check_qp, check_video_info
from gnvc_jax.data.jobs import for_each_video
from gnvc_jax.files import write_whole
from gnvc_jax.media.reader import open_video

log = logging.getLogger(__name__)

COLUMNS = ("video", "stream", "width", "height", "frames", "bytes", "bpp")


def encode_all(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    coder: Coder,
    qp: int,
    gop: int = DEFAULT_GOP,
    progress: bool = True,
) -> dict[str, str]:
    """Encodes all videos at `source` into `folder`, see `for_each_video`.

    Processes of one JAX runtime share the videos, each on its own devices.

    Args:
        source: Folder of videos, list of videos (.txt), or a single video.
        folder: Output folder.
        coder: Encoder.
        qp: Quality level, 0 to 63.
        gop: Frames per group.
        progress: Whether to show a progress bar.

    Returns:
        Reasons by path of the videos that were left out.

    Raises:
        MissingInput: If there is nothing at `source`.
        UsageError: If `qp` or `gop` is out of range.
    """
    check_gop(gop, coder.model.vae_config.temporal_stride)
    check_qp(qp)
    folder = as_path(folder)
    make_folder(folder)

    def work(video: AnyPath, name: str) -> dict:
        return encode_one(video, folder / f"{name}.gnvc", coder, qp, gop)

    return for_each_video(
        source,
        folder,
        work,
        COLUMNS,
        settings={"qp": qp, "gop": gop, "model": [f.hex() for f in coder.model.fingerprints]},
        shard=(jax.process_index(), jax.process_count()),
        progress=progress,
        title="encoding",
    )


def encode_one(video: AnyPath, stream: AnyPath, coder: Coder, qp: int, gop: int) -> dict:
    """Encodes one video, and returns its row of the manifest.

    Raises:
        MediaError: If the video cannot be read.
    """
    # In memory: a stream is small, and a half-written one must never be in the folder.
    data = io.BytesIO()
    with open_video(str(video)) as frames:
        check_video_info(frames.info)
        # The rate is a fraction throughout, since 30000/1001 has no exact decimal.
        fps = frames.fps.numerator, frames.fps.denominator
        size = frames.width, frames.height
        header = coder.header(*size, fps, gop=gop, colour=frames.colour.code_points)
        count = coder.encode_frames(frames, data, header, qp)
        for note in [*frames.notes, *["audio is not carried"] * frames.has_audio]:
            log.warning("%s: %s", video, note)
    write_whole(stream, data.getvalue())
    pixels = size[0] * size[1] * count
    facts = str(video), stream.name, *size, count, data.tell(), 8 * data.tell() / pixels
    return dict(zip(COLUMNS, facts))
