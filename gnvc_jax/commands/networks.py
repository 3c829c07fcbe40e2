"""Commands that run the networks of a codec without the codec: reconstruct, generate.

They show what ported weights can do before any codec is trained: `reconstruct` measures what the
VAE alone loses, the bound of every codec on its latents; `generate` shows that the DiT is intact.
"""

import itertools
import sys
from typing import Literal

import numpy as np
from tqdm import tqdm
from tyro.conf import Positional

from gnvc_jax.buckets import as_path
from gnvc_jax.commands.coding import progress_bar, refuse_same_file
from gnvc_jax.commands.options import Force, check_range, parse_rate, parse_size
from gnvc_jax.errors import UsageError


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
                # (1, h, w, 3): the metric takes batches of frames.
                decibels.append(float(psnr(frame[None], decoded[None])[0]))
                progress.update(1)
        for note in [*video.notes, *["audio is not carried"] * video.has_audio]:
            print(f"gnvc: {input}: {note}", file=sys.stderr)
    for note in out.notes:
        print(f"gnvc: {output}: {note}", file=sys.stderr)
    # The file need not be lossless; the quality is that of the frames that go into it.
    mean, low = np.mean(decibels), np.min(decibels)
    text = f"{output}: {len(decibels)} frames, PSNR {mean:.2f} dB (lowest frame {low:.2f} dB)"
    print(text, file=sys.stderr if output == "-" else sys.stdout)
    return 0


def generate(
    output: Positional[str],
    *,
    weights: str,
    vae: str | None = None,
    decoder: str | None = None,
    prompt: str | None = None,
    negative: str | None = None,
    size: str = "832x480",
    frames: int = 81,
    fps: str = "16",
    steps: int = 50,
    guidance: float = 5.0,
    shift: float = 5.0,
    sampler: Literal["unipc", "euler"] = "unipc",
    seed: int = 0,
    force: Force = False,
    no_progress: bool = False,
) -> int:
    """Generate a video from the embedding of a prompt, with ported weights of Wan2.1.

    Example: gnvc generate cat.mp4 --weights weights/t2v --prompt cat.npy --negative negative.npy

    Args:
        output: Video to write: .mp4, .mkv (lossless), .y4m, a folder of PNG images, or - for y4m
            on stdout.
        weights: Folder made by `gnvc port`, with a text-to-video DiT or VACE.
        vae: VAE of the DiT; if not given, the one in the same folder. A folder made by `gnvc port`,
            run folder, name of a shipped model, or path of a model file.
        decoder: Light decoder to use in place of the VAE's, faster and less exact: a folder made by
            `gnvc port` of taew2_1.
        prompt: Embedding of the prompt, a .npy or .safetensors file; if not given, the one stored
            with the weights.
        negative: Embedding of the negative prompt; not needed with --guidance 1.
        size: Size of the video, WIDTHxHEIGHT, multiples of 16.
        frames: Number of frames, 1 + 4k.
        fps: Frame rate to write; Wan2.1 was trained on 16 frames/s.
        steps: Steps of the sampler.
        guidance: Scale of classifier-free guidance; 1 for none.
        shift: Shift of the noise schedule.
        sampler: Sampler of the flow.
        seed: Seed of the noise.
        force: Overwrite an existing output.
        no_progress: Hide the progress bars.
    """
    from gnvc_jax.generate import load_generator
    from gnvc_jax.media.writer import open_writer
    from gnvc_jax.porting.checkpoint import PROMPT, load_prompt

    width, height = parse_size(size)
    check_range("--steps", steps, 1)
    stored = as_path(weights) / PROMPT
    if prompt is None and not stored.is_file():
        raise UsageError(f"{weights} has no prompt of its own; name one with --prompt FILE")
    if negative is None and guidance != 1.0:
        raise UsageError(
            f"--guidance {guidance:g} needs --negative FILE, the embedding of a negative prompt; "
            "without one, use --guidance 1"
        )
    # Prompts are checked against the DiT's width; no text encoder is part of the package.
    generator = load_generator(weights, vae, decoder)
    text = load_prompt(prompt or stored, generator.dit)
    other = None if negative is None else load_prompt(negative, generator.dit)
    noise = generator.noise(frames, height, width, seed)
    with open_writer(output, width, height, parse_rate(fps), force=force) as out:
        with tqdm(total=steps, desc="sampling", unit="step", disable=no_progress or None) as bar:
            latents = generator.sample(
                noise,
                text,
                other,
                steps=steps,
                guidance=guidance,
                shift=shift,
                sampler=sampler,
                progress=bar.update,
            )
        with progress_bar(frames, "decoding", no_progress) as progress:
            for frame in generator.vae.decode_frames(latents):
                out.write(frame)
                progress.update(1)
    print(f"{output}: {frames} frames", file=sys.stderr)
    return 0
