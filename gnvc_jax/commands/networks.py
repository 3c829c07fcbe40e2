"""Commands that run the networks of a codec without the codec: reconstruct."""

import itertools
import sys

import numpy as np
from tyro.conf import Positional

from gnvc_jax.commands.coding import AUDIO_NOTE, progress_bar, refuse_same_file
from gnvc_jax.commands.options import Force, check_range


def reconstruct(
    input: Positional[str],
    output: Positional[str],
    *,
    vae: str,
    frames: int | None = None,
    force: Force = False,
    no_progress: bool = False,
) -> int:
    """Pass a video through a VAE alone, and print the PSNR of the result.

    Example: gnvc reconstruct clip.mp4 clip_vae.mkv --vae weights/vace

    Args:
        input: Video file, folder of PNG images, or - to read y4m from stdin.
        output: Video to write: .mp4, .mkv (lossless), .y4m, a folder of PNG images, or - for y4m
            on stdout.
        vae: Folder made by `gnvc port`, run folder, name of a shipped model, or path of a model
            file.
        frames: Maximum number of frames to use.
        force: Overwrite an existing output.
        no_progress: Hide the progress bar.
    """
    from gnvc_jax.api import load_vae
    from gnvc_jax.media.reader import open_video
    from gnvc_jax.media.writer import open_writer
    from gnvc_jax.metrics.psnr import psnr

    check_range("--frames", frames, 1)
    refuse_same_file(input, output)
    with open_video(input) as video:
        loaded = load_vae(vae)
        size, colour = (video.width, video.height), video.colour
        total = min(filter(None, (video.frame_count, frames)), default=None)
        decibels = []
        with (
            open_writer(output, *size, video.fps, colour=colour, force=force) as out,
            progress_bar(total, "reconstructing", no_progress) as progress,
        ):
            for frame, decoded in loaded.reconstruct(itertools.islice(video, frames)):
                out.write(decoded)
                decibels.append(float(psnr(frame[None], decoded[None])[0]))
                progress.update(1)
        for note in [*video.notes, *[AUDIO_NOTE] * video.has_audio]:
            print(f"gnvc: {input}: {note}", file=sys.stderr)
    for note in out.notes:
        print(f"gnvc: {output}: {note}", file=sys.stderr)
    # The file need not be lossless; the quality is that of the frames that go into it.
    mean, low = np.mean(decibels), np.min(decibels)
    text = f"{output}: {len(decibels)} frames, PSNR {mean:.2f} dB (lowest frame {low:.2f} dB)"
    print(text, file=sys.stderr if output == "-" else sys.stdout)
    return 0
