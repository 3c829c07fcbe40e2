"""What the commands of gnvc do. Arguments and exit codes: see `gnvc_jax.arguments`."""

import argparse
import contextlib
import errno
import itertools
import os
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gnvc_jax.arguments import MAX_STEPS, parser
from gnvc_jax.bitstream import BitstreamError, Group, StreamReader
from gnvc_jax.errors import GnvcError, UsageError
from gnvc_jax.files import atomic_output, is_same_file, would_overwrite
from gnvc_jax.media.colour import Colour
from gnvc_jax.media.errors import DiskFull, OutputExists, UnwritableOutput

EXIT_DAMAGED, EXIT_INTERRUPTED = 3, 130
AUDIO_NOTE = "audio is not carried"


def encode(args: argparse.Namespace) -> int:
    from gnvc_jax.coder import check_video
    from gnvc_jax.media.reader import open_video
    from gnvc_jax.pretrained import load_pretrained

    if args.output is None and args.input == "-":
        raise UsageError("name an output when the input is stdin")
    output = args.output or f"{args.input.rstrip('/')}.gnvc"
    refuse_same_file(args.input, output)
    options = {
        "size": _size(args.size),
        "fps": args.fps,
        "pix_fmt": args.pix_fmt,
        "stream": args.stream,
        "tolerant": args.tolerant,
    }
    with (
        frames_over(args.devices),
        open_video(args.input, **options) as video,
        binary_output(output, args.force) as file,
    ):
        check_video(video.info)
        coder = load_pretrained(args.model)
        fps = (video.fps.numerator, video.fps.denominator)
        header = coder.header(
            video.width, video.height, fps, gop=args.gop, colour=video.colour.code_points
        )
        total = min(filter(None, (video.frame_count, args.frames)), default=None)
        start = time.perf_counter()
        with bar(total, args, "encoding") as progress:
            frames = itertools.islice(video, args.frames)
            count = coder.encode_frames(frames, file, header, args.qp, progress.update)
        written, seconds = file.tell(), time.perf_counter() - start
        for note in [*video.notes, *[AUDIO_NOTE] * video.has_audio]:
            print(f"gnvc: {args.input}: {note}", file=sys.stderr)
    report(output, written, count, header, seconds)
    return EXIT_DAMAGED if video.damaged else 0


def decode(args: argparse.Namespace) -> int:
    from gnvc_jax.coder import MAX_PIXELS
    from gnvc_jax.media.writer import open_writer
    from gnvc_jax.pretrained import load_pretrained

    refuse_same_file(args.input, args.output)
    source = sys.stdin.buffer if args.input == "-" else args.input
    damaged = []
    if args.steps is not None and not 0 <= args.steps <= MAX_STEPS:
        raise UsageError(f"--steps {args.steps}: expected 0 to {MAX_STEPS}")
    with frames_over(args.devices), StreamReader(source) as reader:
        header, coder = reader.header, load_pretrained(args.model)
        coder.check(header, MAX_PIXELS if args.max_pixels is None else args.max_pixels)
        fps = Fraction(*header.fps)
        colour = Colour.from_code_points(*header.colour)
        with open_writer(
            args.output, header.width, header.height, fps, colour=colour, force=args.force
        ) as out:
            start, count, last = time.perf_counter(), 0, None
            with bar(header.frame_count, args, "decoding") as progress:
                for group in reader.groups(tolerant=args.tolerant):
                    for frame in group_frames(coder, header, group, last, damaged, args):
                        out.write(frame)
                        last, count = frame, count + 1
                        progress.update(1)
                if damaged and not count:
                    raise damaged[-1]
            seconds = time.perf_counter() - start
    rate = f"{count / seconds:.2f} frames/s with compilation"
    print(f"{args.output}: {count} frames, {rate}", file=sys.stderr)
    for note in out.notes:
        print(f"gnvc: {args.output}: {note}", file=sys.stderr)
    for error in damaged:
        print(f"gnvc: {args.input}: {error.n_frames} frames replaced: {error}", file=sys.stderr)
    return EXIT_DAMAGED if damaged else 0


def frames_over(devices: int) -> contextlib.AbstractContextManager:
    """Within it, so many devices share each frame. UsageError if there are not so many."""
    if devices == 1:
        return contextlib.nullcontext()

    import jax

    from gnvc_jax.parallel import MeshConfig, make_mesh

    return jax.set_mesh(make_mesh(MeshConfig(data=1, context=devices)))


def group_frames(coder, header, group, last, damaged, args) -> Iterator[np.ndarray]:
    """Frames of a group; of a damaged one, if tolerated, repeats of the last good frame."""
    error = group
    if isinstance(group, Group):
        try:
            frames = coder.decode_group(header, group, args.steps)
            yield from list(frames) if args.tolerant else frames
            return
        except BitstreamError as caught:
            if not args.tolerant:
                raise
            error, caught.n_frames = caught, group.n_frames
    damaged.append(error)
    grey = np.full((header.height, header.width, 3), 128, np.uint8)
    yield from [grey if last is None else last] * group.n_frames


def info(args: argparse.Namespace) -> int:
    with StreamReader(args.input) as reader:
        h = reader.header
        size = Path(args.input).stat().st_size
        groups = list(reader.groups())
    frames = sum(g.n_frames for g in groups)
    latents = sum(len(s) for g in groups for s in g.segments)
    motion = sum(len(g.motion) for g in groups)
    print(f"{args.input}: gnvc stream, {size} bytes")
    print(f"  video     {h.width}x{h.height}, {frames} frames, {h.fps[0] / h.fps[1]:.3f} frames/s")
    print(f"  rate      {rate_text(size, frames, h)}")
    print(f"  model     codec {h.codec_fingerprint.hex()[:8]}, VAE {h.vae_fingerprint.hex()[:8]}")
    container = size - latents - motion
    print(f"  bytes     latents {latents}, motion {motion}, container {container}")
    print(f"  audio     {AUDIO_NOTE}")
    for g in groups:
        latents = f"{len(g.q_indices)} latents, {sum(map(len, g.segments)) + len(g.motion)} bytes"
        qps = sorted({63 - q for q in g.q_indices})
        print(f"  group {g.number}: frames {g.first_frame}+{g.n_frames}, {latents}, qp {qps}")
    return 0


def demo(args: argparse.Namespace) -> int:
    from gnvc_jax.demo import run

    run(args.clip, args.qp, args.frames, args.model, Path(args.out))
    return 0


def port(args: argparse.Namespace) -> int:
    from gnvc_jax.porting.perceptual import open_perceptual, port_perceptual
    from gnvc_jax.porting.port import port

    if open_perceptual(args.source):
        if args.prompt or args.heads is not None or args.dtype != "stored":
            raise UsageError("--dtype, --prompt and --heads are of no use for LPIPS")
        print(port_perceptual(args.source, args.to))
        return 0
    parts = port(
        args.source, args.to, args.dtype, args.heads, args.prompt, progress=not args.no_progress
    )
    for part in parts:
        print(
            f"{args.to}/{part.architecture.component}: {part.tensors} tensors, "
            f"{part.parameters} parameters, {part.bytes / 2**30:.2f} GiB, "
            f"from {part.source.path} ({part.source.scheme} names)"
        )
    return 0


def export(args: argparse.Namespace) -> int:
    from gnvc_jax.porting.export import export

    if args.shard_gib <= 0:
        raise UsageError(f"--shard-gib {args.shard_gib}: expected more than 0")
    size = int(args.shard_gib * 2**30)
    for folder in export(args.source, args.to, size, progress=not args.no_progress):
        print(folder)
    return 0


def encode_all(args: argparse.Namespace) -> int:
    from gnvc_jax.encode_dataset import encode_all
    from gnvc_jax.pretrained import load_pretrained
    from gnvc_jax.runtime import join_processes

    join_processes()
    coder = load_pretrained(args.model)
    failed = encode_all(args.data, args.to, coder, args.qp, args.gop, not args.no_progress)
    return left_out(failed)


def cache_latents(args: argparse.Namespace) -> int:
    from gnvc_jax.caching import cache_latents
    from gnvc_jax.runtime import join_processes

    join_processes()
    failed = cache_latents(args.data, args.to, args.vae, args.frames, not args.no_progress)
    return left_out(failed)


def left_out(failed: dict[str, str]) -> int:
    """The exit code after saying which videos failed."""
    for reason in failed.values():
        print(f"gnvc: left out: {reason}", file=sys.stderr)
    return EXIT_DAMAGED if failed else 0


def plan(args: argparse.Namespace) -> int:
    import jax

    from gnvc_jax.files import write_json
    from gnvc_jax.planner import coding, training
    from gnvc_jax.training import config

    if args.coding and (args.per_device or any(x.startswith("--mesh") for x in args.settings)):
        raise UsageError(
            "--mesh and --per-device are of training; with --coding all devices share each frame"
        )
    jax.config.update("jax_platforms", "cpu")  # compiles for TPUs, needs none
    sys.path.insert(0, os.getcwd())  # configurations import each other, as under train.py
    experiment = config.override(config.load(args.config), args.settings)
    plans, report = [], training.report
    found_each = training.sweep(experiment, args.topology, args.per_device, args.clips)
    if args.coding:
        report = coding.coding_report
        found_each = (
            coding.plan_coding(experiment, topology, args.coding, args.steps)
            for topology in args.topology
        )
    for found in found_each:
        print(report(found), flush=True)
        plans.append(found)
        if args.out:  # after each, since a large one takes minutes
            write_json(Path(args.out), plans)
    if len(plans) > 1 and not args.coding:
        print(training.table(plans))
    return 0 if all(found["fits"] for found in plans) else EXIT_DAMAGED


def rate_text(size: int, frames: int, header) -> str:
    if not frames:
        return "none, there are no frames"
    bpp = 8 * size / (frames * header.width * header.height)
    kbps = 8 * size * header.fps[0] / header.fps[1] / frames / 1000
    return f"{bpp:.5f} bpp, {kbps:.2f} kb/s"


def report(output: str, size: int, frames: int, header, seconds: float) -> None:
    print(
        f"{output}: {frames} frames, {size} bytes, {rate_text(size, frames, header)}, "
        f"{frames / seconds:.2f} frames/s with compilation",
        file=sys.stderr,
    )


def bar(total: int | None, args: argparse.Namespace, text: str) -> tqdm:
    return tqdm(total=total, desc=text, unit="frame", disable=args.no_progress or None)


class Counting:
    """A binary file that knows how much was written to it, pipes included."""

    def __init__(self, file):
        self.file, self.count = file, 0

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.count += len(data)

    def tell(self) -> int:
        return self.count


def refuse_same_file(source: str, output: str) -> None:
    """UnwritableOutput if the output is the input, also by a link or through a redirected stdin."""
    if output != "-" and is_same_file(0 if source == "-" else source, output):
        raise UnwritableOutput(output, "is the input; name another output")


@contextlib.contextmanager
def binary_output(path: str, force: bool) -> Iterator[Counting]:
    """The output file, which appears at `path` if the block succeeds; "-" is standard output.

    Raises OutputExists without `force`, UnwritableOutput for a folder and where nothing can be
    made.
    """
    if path == "-":
        yield Counting(sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return
    target = Path(path)
    if target.is_dir() or path.endswith("/"):
        raise UnwritableOutput(path, "is a folder, expected the name of a file")
    if would_overwrite(target) and not force:
        raise OutputExists(path, "exists; use --force to overwrite")
    with contextlib.ExitStack() as stack:
        try:
            temporary = stack.enter_context(atomic_output(target))
            file = stack.enter_context(open(temporary, "wb"))
        except OSError as error:
            raise UnwritableOutput(path, error.strerror or str(error)) from error
        yield Counting(file)


def _size(text: str | None) -> tuple[int, int] | None:
    """'WxH' -> (width, height)."""
    if text is None:
        return None
    try:
        width, height = map(int, text.lower().split("x"))
    except ValueError:
        raise UsageError(f"--size {text}: expected WxH, as 1920x1080") from None
    return width, height


COMMANDS = (encode, decode, info, demo, encode_all, cache_latents, port, export, plan)


def main(argv: list[str] | None = None) -> int:
    commands = {f.__name__.replace("_", "-"): f for f in COMMANDS}
    top = parser()
    args, args.settings = top.parse_known_args(argv)
    if args.settings and args.command != "plan":
        top.error(f"unrecognized arguments: {' '.join(args.settings)}")
    if args.command not in ("info", "port", "export", "plan"):
        from gnvc_jax.runtime import use_compilation_cache

        use_compilation_cache()
    name = getattr(args, "input", args.command)
    try:
        return commands[args.command](args)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except (BitstreamError, UsageError) as error:  # they do not know the file
        return _fail(f"{name}: {error}", error.exit_code)
    except GnvcError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:
        if error.filename is None and error.errno is None:  # raised here, says everything
            return _fail(str(error), 66)
        code = DiskFull.exit_code if error.errno == errno.ENOSPC else 66
        return _fail(f"{error.filename or name}: {error.strerror or error}", code)


def _fail(message: str, code: int) -> int:
    print(f"gnvc: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
