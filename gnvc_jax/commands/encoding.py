"""The command that encodes a single video.

`encode` opens input and output and has the video encoded: once, at a fixed level or by a leaky
bucket, or several times by `gnvc_jax.rate_control`. Then it reports what came out. `chosen_target`
makes one target of the options that exclude each other.
"""

import contextlib
import itertools
import shutil
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, cast

import numpy as np
from tyro.conf import Positional, arg

from gnvc_jax.commands.coding import (
    binary_output,
    frames_over,
    progress_bar,
    rate_text,
    refuse_same_file,
)
from gnvc_jax.commands.options import (
    EXIT_PARTIAL,
    Force,
    check_range,
    parse_amount,
    parse_rate,
    parse_size,
)
from gnvc_jax.errors import UsageError
from gnvc_jax.media.errors import MediaError

if TYPE_CHECKING:
    from gnvc_jax.rate_control import Target

DEFAULT_QP = 24


def encode(
    input: Positional[str],
    output: Annotated[
        Positional[str], arg(help_behavior_hint="(default: INPUT with .gnvc appended)")
    ] = "",
    *,
    qp: float | None = None,
    bitrate: str | None = None,
    bpp: float | None = None,
    max_size: str | None = None,
    target_psnr: float | None = None,
    target_lpips: float | None = None,
    one_pass: bool = False,
    effort: int = 0,
    gop: int = 97,
    no_scene_cut: bool = False,
    frames: int | None = None,
    size: str | None = None,
    fps: str | None = None,
    pix_fmt: str | None = None,
    stream: int | None = None,
    tolerant: bool = False,
    devices: int = 1,
    model: str = "small",
    no_refine: bool = False,
    audio: str | None = None,
    no_audio: bool = False,
    force: Force = False,
    no_progress: bool = False,
) -> int:
    """Encode a video to a .gnvc stream.

    Example: gnvc encode clip.mp4 clip.gnvc --qp 24

    Quality, size or rate is set by one of --qp, --bitrate, --bpp, --max-size, --target-psnr and
    --target-lpips. All but --qp encode the video several times, to find the level that meets the
    target; if none does, nothing is written. From stdin, --bitrate and --bpp encode it once.

    Args:
        input: Video file, raw .yuv file, folder of PNG images, or - to read y4m from stdin.
        output: Stream to write, or - for stdout.
        qp: Quality level from 0 to 63, in steps of 1/8; lower is better and larger. 24 if nothing
            else is given.
        bitrate: Bits per second, for example 200k or 1.5M.
        bpp: Bits per pixel, for example 0.01.
        max_size: Maximum size of the stream in bytes, for example 500k or 8M.
        target_psnr: Minimum mean PSNR of the decoded frames in dB.
        target_lpips: Maximum mean LPIPS (AlexNet) of the decoded frames.
        one_pass: Encode the video only once and steer --bitrate or --bpp by what its first part
            took; always so from stdin.
        effort: With 1, symbols are also chosen by the bits that they take: slower, and fewer bits
            at the same PSNR. With 0, they are chosen by the error alone.
        gop: Maximum number of frames in a group, 1 + 4k; each group can be decoded on its own.
        no_scene_cut: Do not begin a group at a scene cut, only every --gop frames.
        frames: Maximum number of frames to encode.
        size: Frame size of a raw .yuv file, for example 1920x1080.
        fps: Frame rate such as 25, 29.97 or 30000/1001, overriding that of the input.
        pix_fmt: Pixel format of a raw .yuv file; yuv420p if not given.
        stream: Index of the video stream to encode, counted from 0; if not given, the default
            stream of the file, or else its largest.
        tolerant: Encode as much as can be decoded of a damaged or truncated video, and exit
            with code 3.
        devices: Number of devices to shard each frame over (for large frames).
        model: Name of a shipped model, or path of a model file.
        no_refine: Mark the stream as "do not refine": decoders then leave the refiner out unless
            they are given --steps.
        audio: Bits per second, for example 24k, at which to code the audio as Opus; if not given,
            its packets are copied.
        no_audio: Leave out the audio.
        force: Overwrite an existing output.
        no_progress: Hide the progress bar.
    """
    from gnvc_jax.coder import Progress, check_video_info
    from gnvc_jax.leaky_bucket import LeakyBucket
    from gnvc_jax.media.reader import open_video
    from gnvc_jax.pretrained import load_pretrained
    from gnvc_jax.rate_control import encode_to_target

    if not output and input == "-":
        raise UsageError("an output is required when the input is stdin")
    output = output or f"{input.rstrip('/')}.gnvc"
    check_range("--frames", frames, 1)
    check_range("--effort", effort, 0, 1)
    # None stands for a fixed level: nothing has to be searched for.
    target = chosen_target(qp, bitrate, bpp, max_size, target_psnr, target_lpips)
    # Only rates can be steered within one pass; a size or a quality is known at the end.
    rate = target if target is not None and target.kind in ("bitrate", "bpp") else None
    if one_pass and rate is None:
        raise UsageError("--one-pass needs --bitrate or --bpp")
    if input == "-" and target != rate:
        raise UsageError(
            "sizes and qualities need an input that can be read again, which stdin cannot; use "
            "--bitrate, --bpp or --qp"
        )
    if audio is not None and no_audio:
        raise UsageError("--audio and --no-audio exclude each other; give only one of them")
    audio_bitrate = None if audio is None else round(parse_amount("--audio", audio))
    check_range("--audio", audio_bitrate, 6000, 510_000)
    # The output appears at the end in place of what has its name, with --force the input, too.
    refuse_same_file(input, output)
    options: dict[str, Any] = {
        "size": None if size is None else parse_size(size),
        "fps": None if fps is None else parse_rate(fps),
        "pix_fmt": pix_fmt,
        "stream": stream,
        "tolerant": tolerant,
    }
    with (
        frames_over(devices),
        open_video(input, **options) as video,
        binary_output(output, force) as file,
    ):
        check_video_info(video.info)
        coder = load_pretrained(model)
        header = coder.header(
            video.width,
            video.height,
            (video.fps.numerator, video.fps.denominator),
            gop=gop,
            colour=video.colour.code_points,
            refine=not no_refine,
        )
        track = b""
        # With another frame rate the pictures run at another speed than the audio.
        if video.has_audio and not no_audio and fps is None:
            seconds = None if frames is None else frames / video.fps
            track = audio_track(input, stream, audio_bitrate, seconds)
        # What the container states and what was asked for; either may be unknown.
        total = min(filter(None, (video.frame_count, frames)), default=None)
        start = time.perf_counter()
        with contextlib.ExitStack() as bars:

            def begin(text: str) -> Progress:
                bars.close()  # that of the pass before
                bar = bars.enter_context(progress_bar(total, text, no_progress))
                return lambda count: cast(None, bar.update(count))

            # Opens the video again for each pass; the notes reported below are those of the last.
            def read() -> Iterator[np.ndarray]:
                nonlocal source
                with open_video(input, **options) as source:
                    yield from itertools.islice(source, frames)

            source, out, found = video, cast(BinaryIO, file), ""
            more: dict[str, Any] = {
                "scene_cuts": not no_scene_cut,
                "audio": track,
                "effort": effort,
            }
            if target is None or one_pass or input == "-":
                # islice stops at the last frame wanted, so damage behind it is never looked at.
                wanted, level = itertools.islice(video, frames), DEFAULT_QP if qp is None else qp
                if rate is not None:
                    bits, found = rate.bitrate(header), f"{rate} wanted, "
                    level = LeakyBucket(coder.model.codec_config, header, bits, total)
                progress = begin("encoding")
                count = coder.encode_frames(wanted, out, header, level, progress, **more)
            else:
                # The trial that met the target best, in a temporary file: it need not be the last.
                trial = encode_to_target(coder, read, header, target, begin, **more)
                trial.file.seek(0)
                shutil.copyfileobj(trial.file, out)
                count, found = trial.frames, f"qp {trial.qp:g}, "
                if target.kind in ("psnr", "lpips"):
                    found += f"{target.rule.format(trial.value)}, "
        # By the file itself: a pipe has no size afterwards.
        written, seconds = file.tell(), time.perf_counter() - start
        notes = list(source.notes)
        if source.has_audio and fps is not None and not no_audio:
            notes.append("the audio was left out, since --fps changes the speed")
        for note in notes:
            print(f"gnvc: {input}: {note}", file=sys.stderr)
    if track:
        found += f"{len(track)} bytes of audio, "
    # Rates are those of the pictures, as targets are; the audio is told apart.
    rate_of_frames = rate_text(written - len(track), count, header)
    print(
        f"{output}: {count} frames, {written} bytes, {rate_of_frames}, {found}"
        f"{count / seconds:.2f} frames/s including compilation",
        file=sys.stderr,
    )
    return EXIT_PARTIAL if source.damaged else 0


def audio_track(
    path: str, stream: int | None, bitrate: int | None, seconds: Fraction | None
) -> bytes:
    """Reads the audio of a video in the form that streams hold it in; empty if there is none.

    Args:
        path: The video.
        stream: Index of the video stream that is encoded.
        bitrate: Bits per second of Opus, None to copy.
        seconds: Time after which audio is left out.

    Raises:
        MediaError: If the audio cannot be read.
    """
    from gnvc_jax.media.audio import read_audio

    try:
        track = read_audio(path, stream, bitrate, seconds)
    except MediaError as error:
        raise type(error)(path, f"{error.reason}; --no-audio leaves it out") from None
    return b"" if track is None else track.pack()


def chosen_target(
    qp: float | None,
    bitrate: str | None,
    bpp: float | None,
    max_size: str | None,
    psnr: float | None,
    lpips: float | None,
) -> "Target | None":
    """Makes a target of the options of `encode`.

    Returns:
        The target, None if a level is to be used.

    Raises:
        UsageError: If more than one is given, or a value is out of range.
    """
    from gnvc_jax.rate_control import Target

    options = {
        "--qp": qp,
        "--bitrate": bitrate,
        "--bpp": bpp,
        "--max-size": max_size,
        "--target-psnr": psnr,
        "--target-lpips": lpips,
    }
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other; give only one of them")
    if bitrate is not None:
        return Target("bitrate", parse_amount("--bitrate", bitrate))
    if max_size is not None:
        return Target("size", parse_amount("--max-size", max_size))
    if bpp is not None:
        return Target("bpp", bpp)
    if psnr is not None:
        return Target("psnr", psnr)
    if lpips is not None:
        return Target("lpips", lpips)
    return None
