"""What the command line takes."""

import argparse
from fractions import Fraction

MAX_STEPS = 100
EXIT_CODES = """\
Exit codes: 0 good; 2 wrong use; 3 done, but damaged frames, groups or videos were left out or
replaced, or a plan does not fit into memory; 10-24 a stream or model is wrong
(gnvc_jax.bitstream.errors); 25 weights to port do not fit; 65-74 a video cannot be read or written
(gnvc_jax.media.errors); 130 interrupted.
Errors go to stderr, a line per problem; a command that fails leaves no output behind.
"""


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got '{text}'")
    return int(text)


def rate(text: str) -> Fraction:
    """A positive number of frames a second, as 25, 29.97 or 30000/1001."""
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if value <= 0:
        raise argparse.ArgumentTypeError(
            f"must be a positive number such as 25, 29.97 or 30000/1001, got '{text}'"
        )
    return value


def parser() -> argparse.ArgumentParser:
    """Each command stands in `command`; what it does is in gnvc_jax.cli."""
    top = argparse.ArgumentParser(
        prog="gnvc",
        description="Generative neural video codec.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, epilog=f"example: {example}")

    def output_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--model", default="small", help="name or file (default: small)")
        sub.add_argument("--force", "-y", action="store_true", help="overwrite the output")
        sub.add_argument("--no-progress", action="store_true", help="no progress bar")

    def devices_option(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--devices",
            type=int,
            default=1,
            help="that share each frame, for large ones (default: 1)",
        )

    def many_videos(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--data", required=True, help="folder, list (.txt) or video")
        sub.add_argument("--to", required=True, help="folder; the same command goes on in it")
        sub.add_argument("--no-progress", action="store_true", help="no progress bar")

    enc = command("encode", "Video to stream.", "gnvc encode clip.mp4 clip.gnvc --qp 24")
    enc.add_argument("input", help="video, .y4m, raw .yuv, folder of PNG, or - for y4m on stdin")
    enc.add_argument("output", nargs="?", help="default: INPUT.gnvc")
    enc.add_argument("--qp", type=int, default=24, help="0..63, lower is better (default: 24)")
    enc.add_argument("--gop", type=int, default=97, help="frames per group, 1 + 4k (default: 97)")
    enc.add_argument("--frames", type=count, help="encode at most this many frames")
    enc.add_argument("--size", help="WxH of raw .yuv")
    enc.add_argument("--fps", type=rate, help="frame rate, in place of what the input says")
    enc.add_argument("--pix-fmt", help="pixel format of raw .yuv (default: yuv420p)")
    enc.add_argument(
        "--stream",
        type=int,
        help="number of the video stream, from 0 (default: the default one, else the largest)",
    )
    enc.add_argument(
        "--tolerant",
        action="store_true",
        help="encode what can be decoded of a damaged or truncated video, with exit code 3",
    )
    devices_option(enc)
    output_options(enc)

    dec = command("decode", "Stream to video.", "gnvc decode clip.gnvc clip.mp4")
    dec.add_argument("input", help="stream, or - for stdin")
    dec.add_argument("output", help=".mp4, .mkv (lossless), .y4m, folder of PNG, or - for stdout")
    dec.add_argument("--tolerant", action="store_true", help="repeat a frame for damaged groups")
    dec.add_argument(
        "--steps", type=int, help="of refinement, 0 for none (default: 1 if the model can refine)"
    )
    dec.add_argument(
        "--max-pixels",
        type=int,
        help="refuse frames of more pixels (default: 33554432, 8K)",
    )
    devices_option(dec)
    output_options(dec)

    inf = command("info", "What a stream says of itself.", "gnvc info clip.gnvc")
    inf.add_argument("input")

    dem = command("demo", "Code a clip, decode it in a new process, compare.", "gnvc demo")
    dem.add_argument("--clip", help="video to use (default: a camera move over a photograph)")
    dem.add_argument("--qp", type=int, default=24)
    dem.add_argument("--frames", type=count, default=33)
    dem.add_argument("--model", default="small")
    dem.add_argument("--out", default="demo_out", help="folder for the results")

    prt = command(
        "port",
        "Public weights of Wan2.1 to a checkpoint folder, or of LPIPS to a file in one.",
        "gnvc port --from Wan2.1-VACE-1.3B --to weights/vace",
    )
    prt.add_argument(
        "--from",
        dest="source",
        required=True,
        help="file, or folder of Wan-AI or diffusers with the VAE, the DiT or both; "
        "for LPIPS, files of torchvision and lpips in one folder",
    )
    prt.add_argument("--to", required=True, help="new folder")
    prt.add_argument("--dtype", default="stored", choices=("stored", "float32", "bfloat16"))
    prt.add_argument("--prompt", help=".npy or .safetensors of a text condition to keep with it")
    prt.add_argument("--heads", type=int, help="attention heads, if config.json is missing")
    prt.add_argument("--no-progress", action="store_true", help="no progress bar")

    exp = command(
        "export",
        "Checkpoint folder to model folders of diffusers.",
        "gnvc export --from weights/vace --to exported",
    )
    exp.add_argument("--from", dest="source", required=True, help="folder that `gnvc port` made")
    exp.add_argument("--to", required=True, help="new folder")
    exp.add_argument("--shard-gib", type=float, default=2.0, help="largest file (default: 2)")
    exp.add_argument("--no-progress", action="store_true", help="no progress bar")

    every = command(
        "encode-all",
        "Streams of many videos and a manifest; processes started together share the work.",
        "gnvc encode-all --data clips --to streams --qp 24",
    )
    many_videos(every)
    every.add_argument("--qp", type=int, default=24, help="0..63, lower is better (default: 24)")
    every.add_argument("--gop", type=int, default=97, help="frames per group (default: 97)")
    every.add_argument("--model", default="small", help="name or file (default: small)")

    cache = command(
        "cache-latents",
        "Latents of videos by a frozen VAE, for training on them.",
        "gnvc cache-latents --data clips --vae weights/vace --to cache",
    )
    many_videos(cache)
    cache.add_argument("--vae", required=True, help="folder of `gnvc port`, run, or model")
    cache.add_argument("--frames", type=count, default=13, help="per clip, 1 + 4k (default: 13)")

    pod = command(
        "plan",
        "What a training step, or coding, costs on a TPU pod, without the pod. Settings of the "
        "experiment are changed as for train.py.",
        "gnvc plan --config configs/wan_1_3b/latent.py --topology v5p:4x4x4 --mesh fsdp=16 "
        "--data.batch 64 --data.latents cache",
    )
    pod.add_argument("--config", required=True, help="of an experiment; nothing it names is read")
    pod.add_argument("--topology", required=True, nargs="+", help="CHIP:AxB[xC], one or several")
    pod.add_argument(
        "--per-device", type=int, help="clips per device of data x fsdp, in place of data.batch"
    )
    pod.add_argument("--clips", type=int, default=1_000_000, help="per epoch (default: a million)")
    pod.add_argument(
        "--coding",
        choices=("encode", "decode"),
        help="groups of data.frames frames of data.size, all devices sharing each frame",
    )
    pod.add_argument("--steps", type=int, default=1, help="of refinement in decode (default: 1)")
    pod.add_argument("--out", help="JSON file for the plans")
    return top
