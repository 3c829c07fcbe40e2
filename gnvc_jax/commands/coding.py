"""Commands on single streams: decode, info, demo; what they share with `encode`.

The order inside a command is always the same: options are checked, then the input is opened and its
header read, then the model is loaded, and the output is opened last. A mistake thus shows before
seconds are spent on a model, and no failed command leaves an output behind.
"""

import contextlib
import dataclasses
import itertools
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from tqdm import tqdm
from tyro.conf import Positional

from gnvc_jax.bitstream import BitstreamError, GroupPayload, Header, StreamReader
from gnvc_jax.commands.options import EXIT_PARTIAL, MAX_STEPS, Force, check_range
from gnvc_jax.errors import UsageError
from gnvc_jax.files import atomic_output, is_same_file, would_overwrite
from gnvc_jax.media.colour import Colour
from gnvc_jax.media.errors import OutputExists, UnwritableOutput

if TYPE_CHECKING:
    from gnvc_jax.coder import Coder


def decode(
    input: Positional[str],
    output: Positional[str],
    *,
    steps: int | None = None,
    tolerant: bool = False,
    max_pixels: int | None = None,
    devices: int = 1,
    model: str = "small",
    decoder: str | None = None,
    refiner: str | None = None,
    t_start: float | None = None,
    strength: float = 1.0,
    guard: float | None = None,
    map: str | None = None,
    force: Force = False,
    no_progress: bool = False,
) -> int:
    """Decode a .gnvc stream to a video.

    Example: gnvc decode clip.gnvc clip.mp4

    Args:
        input: Stream to read, or - for stdin.
        output: Video to write: .mp4, .mkv (lossless), .y4m, a folder of PNG images, or - for y4m
            on stdout.
        steps: Number of refinement steps, 0 for none; if not given, what the model was trained for,
            or none in streams that are marked "do not refine".
        tolerant: Replace the frames of damaged groups by the last good frame, and exit with
            code 3.
        max_pixels: Refuse streams whose frames have more pixels; 33554432 (8K) if not given.
        devices: Number of devices to shard each frame over (for large frames).
        model: Name of a shipped model, or path of a model file.
        decoder: Light decoder to use in place of the VAE's, faster and less exact: a folder made by
            `gnvc port` of taew2_1.
        refiner: Refiner to use in place of the model's: a folder made by `gnvc port` with a DiT of
            the model's VAE, which then refines without training, or a model file or a run.
        t_start: Flow time at which --refiner begins, from 0 (pure noise) to below 1 (decoded
            latents unchanged); 0.8 for a ported DiT if not given.
        strength: Share of the refinement to apply, from 0 (as --steps 0) to 1.
        guard: Limit to what refinement may change: the root mean square of the change in each
            block of 16x16 pixels, in 8-bit steps.
        map: Video to write in which grey shows how much refinement changed each block: black is
            nothing, white 32 8-bit steps or more.
        force: Overwrite an existing output.
        no_progress: Hide the progress bar.
    """
    from gnvc_jax.api import with_light_decoder, with_refiner
    from gnvc_jax.decoder import MAX_PIXELS
    from gnvc_jax.media.audio import AudioTrack
    from gnvc_jax.media.writer import open_writer
    from gnvc_jax.pretrained import Codec, load_pretrained

    refuse_same_file(input, output)
    source = sys.stdin.buffer if input == "-" else input
    damaged: list[BitstreamError] = []
    check_range("--steps", steps, 0, MAX_STEPS)
    check_range("--strength", strength, 0, 1)
    check_range("--guard", guard, 0)
    if t_start is not None and refiner is None:
        raise UsageError("--t-start needs --refiner")
    if map is not None:
        refuse_same_file(input, map)
        if map == output or is_same_file(output, map):
            raise UsageError(f"--map {map} is the output; name another file")
    # The header is read and checked before a model is loaded or an output opened.
    with frames_over(devices), StreamReader(source) as reader:
        header, coder = reader.header, load_pretrained(model)
        coder.check(header, MAX_PIXELS if max_pixels is None else max_pixels)
        if decoder is not None:
            coder = Codec(with_light_decoder(coder.model, decoder))
        if refiner is not None:
            coder = Codec(with_refiner(coder.model, refiner, t_start))
        elif steps not in (None, 0, coder.steps) and coder.steps:
            trained = f"{coder.steps} step{'s' * (coder.steps > 1)}"
            # A note rather than an error: other numbers work, but were not trained for.
            print(f"gnvc: --steps {steps}: {model} was trained for {trained}", file=sys.stderr)
        if steps is None:
            # Naming a refiner, or a number of steps, overrides the mark in the stream.
            steps = coder.steps if header.refine or refiner is not None else 0
            if coder.steps and not steps:
                note = 'is marked "do not refine"; --steps overrides that'
                print(f"gnvc: {input}: {note}", file=sys.stderr)
        if not steps and (guard is not None or map is not None):
            raise UsageError("--guard and --map need refinement, and there is none")
        fps = Fraction(*header.fps)
        colour = Colour.from_code_points(*header.colour)
        shape = header.width, header.height, fps
        shown = GroupDecoder(coder, header, steps, strength, guard, map is not None, tolerant)
        groups = reader.groups(tolerant=tolerant)
        # Streams hold the audio before the first group, and a writer must know it from the start.
        first = list(itertools.islice(groups, 1))
        audio = AudioTrack.unpack(reader.audio) if reader.audio else None
        with contextlib.ExitStack() as outputs:
            out = outputs.enter_context(
                open_writer(output, *shape, colour=colour, force=force, audio=audio)
            )
            map_out = None
            if map is not None:
                map_out = outputs.enter_context(open_writer(map, *shape, force=force))
            start, count = time.perf_counter(), 0
            with progress_bar(header.frame_count, "decoding", no_progress) as progress:
                for group in itertools.chain(first, groups):
                    for frame, drawn in shown.frames(group, damaged):
                        out.write(frame)
                        if map_out is not None:
                            map_out.write(drawn)
                        count += 1
                        progress.update(1)
                # Inside `open_writer`, so that a video of no frames is not left behind.
                if damaged and not count:
                    raise damaged[-1]
            seconds = time.perf_counter() - start
    rate = f"{count / seconds:.2f} frames/s including compilation"
    print(f"{output}: {count} frames, {rate}", file=sys.stderr)
    for note in out.notes:
        print(f"gnvc: {output}: {note}", file=sys.stderr)
    for error in damaged:
        print(f"gnvc: {input}: {error.n_frames} frames replaced: {error}", file=sys.stderr)
    return EXIT_PARTIAL if damaged else 0


def info(input: Positional[str]) -> int:
    """Print what a stream contains: video, rate, model, groups.

    Example: gnvc info clip.gnvc

    Args:
        input: Stream to read.
    """
    with StreamReader(input) as reader:
        header = reader.header
        size = Path(input).stat().st_size
        groups = [group for group in reader.groups() if isinstance(group, GroupPayload)]
    frames = sum(g.n_frames for g in groups)
    latents = sum(len(s) for g in groups for s in g.segments)
    motion = sum(len(g.motion) for g in groups)
    fps = header.fps[0] / header.fps[1]
    codec, vae = (x.hex()[:8] for x in (header.codec_fingerprint, header.vae_fingerprint))
    print(f"{input}: gnvc stream, {size} bytes")
    print(f"  video     {header.width}x{header.height}, {frames} frames, {fps:.3f} frames/s")
    print(f"  rate      {rate_text(size - len(reader.audio), frames, header)}")
    print(f"  model     codec {codec}, VAE {vae}")
    if not header.refine:
        print('  refiner   marked "do not refine"')
    # What is left: header, chunk heads, checksums, index and footer.
    container = size - latents - motion - len(reader.audio)
    print(f"  bytes     latents {latents}, motion {motion}, container {container}")
    print(f"  audio     {len(reader.audio) or 'none'}" + " bytes" * bool(reader.audio))
    for g in groups:
        coded = f"{len(g.q_indices)} latents, {sum(map(len, g.segments)) + len(g.motion)} bytes"
        # Streams count levels from the worst, commands from the best.
        qps = sorted({63 - q for q in g.q_indices})
        print(f"  group {g.number}: frames {g.first_frame}+{g.n_frames}, {coded}, qp {qps}")
    return 0


def demo(
    *,
    clip: str | None = None,
    qp: int = 45,
    frames: int = 33,
    model: str = "small",
    out: str = "demo_out",
) -> int:
    """Encode a clip, decode it in a new process, and compare the two.

    Example: gnvc demo --clip clip.mp4

    Args:
        clip: Video to use; if not given, a camera move over a photograph.
        qp: Quality level from 0 to 63; lower is better and larger.
        frames: Maximum number of frames to use.
        model: Name of a shipped model, or path of a model file.
        out: Folder for the results.
    """
    from gnvc_jax.demo import run

    check_range("--frames", frames, 1)
    run(clip, qp, frames, model, Path(out))
    return 0


def frames_over(devices: int) -> contextlib.AbstractContextManager:
    """Context in which frames are sharded over a number of devices.

    Raises:
        UsageError: If there are fewer devices.
    """
    if devices == 1:
        return contextlib.nullcontext()

    import jax

    from gnvc_jax.parallel import MeshConfig, make_mesh

    # `context` is the axis along which the columns of a frame are sharded, see
    # `gnvc_jax.programs.shard_columns`.
    return jax.set_mesh(make_mesh(MeshConfig(data=1, context=devices)))


@dataclasses.dataclass
class GroupDecoder:
    """Decodes groups to frames and maps of what refinement changed; stands in for damaged ones.

    Attributes:
        coder: Decoder.
        header: Header of the stream.
        steps: Refinement steps.
        strength: Share of the refinement to apply.
        guard: Largest change of a block by refinement, None for any.
        mapped: Whether maps are wanted.
        tolerant: Whether damaged groups are replaced instead of raising.
        last: The frame before the next group, uint8 (h, w, 3); grey if there is none.
    """

    coder: "Coder"
    header: Header
    steps: int
    strength: float
    guard: float | None
    mapped: bool
    tolerant: bool

    def __post_init__(self) -> None:
        self.last = np.full((self.header.height, self.header.width, 3), 128, np.uint8)

    def frames(
        self, group: GroupPayload | BitstreamError, damaged: list[BitstreamError]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Decodes a group, or repeats the last frame for a damaged one.

        Args:
            group: GroupPayload as read from the stream, or the error that reading it gave.
            damaged: List to which errors are appended.

        Yields:
            Frames and maps, uint8 (h, w, 3); without maps, the frame takes their place.
        """
        if isinstance(group, BitstreamError):
            error = group
        else:
            try:
                frames = self._decoded(group)
                # Decoded to the end before the first frame goes out: damage may show late in a
                # group, and a group is replaced as a whole.
                for pair in list(frames) if self.tolerant else frames:
                    self.last = pair[0]
                    yield pair
                return
            except BitstreamError as caught:
                if not self.tolerant:
                    raise
                # So many frames take the place of the group, and the video keeps its length.
                error, caught.n_frames = caught, group.n_frames
        damaged.append(error)
        yield from [(self.last, np.zeros_like(self.last))] * error.n_frames

    def _decoded(self, group: GroupPayload) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        from gnvc_jax.fidelity import change_map, limit_change

        given = self.header, group, self.steps, self.strength
        # Without a limit or a map, frames need not be decoded without refinement as well.
        if self.guard is None and not self.mapped:
            for frame in self.coder.decode_group(*given):
                yield frame, frame
            return
        for plain, refined in self.coder.decode_group_both(*given):
            if self.guard is not None:
                refined = limit_change(plain, refined, self.guard)
            yield refined, change_map(plain, refined)


def rate_text(size: int, frames: int, header: Header) -> str:
    """Bits per pixel and bitrate of `size` bytes, as text."""
    if not frames:
        return "none, there are no frames"
    bpp = 8 * size / (frames * header.width * header.height)
    kbps = 8 * size * header.fps[0] / header.fps[1] / frames / 1000
    return f"{bpp:.5f} bpp, {kbps:.2f} kb/s"


def progress_bar(total: int | None, text: str, hidden: bool) -> tqdm:
    """A progress bar on stderr; None leaves it to tqdm, which shows one on terminals only."""
    return tqdm(total=total, desc=text, unit="frame", disable=hidden or None)


class CountingFile:
    """A binary file that counts the bytes written to it, since pipes cannot tell."""

    def __init__(self, file: BinaryIO):
        self.file, self.count = file, 0

    def write(self, data: bytes) -> None:
        """Writes all of `data`."""
        self.file.write(data)
        self.count += len(data)

    def tell(self) -> int:
        """Returns the number of bytes written so far."""
        return self.count


def refuse_same_file(source: str, output: str) -> None:
    """Refuses an output that is the input, by links or a redirected stdin, too.

    Raises:
        UnwritableOutput: If the two are one file.
    """
    if output != "-" and is_same_file(0 if source == "-" else source, output):
        raise UnwritableOutput(output, "is the input; name another output")


@contextlib.contextmanager
def binary_output(path: str, force: bool) -> Iterator[CountingFile]:
    """Opens an output file that appears at `path` only if the block succeeds.

    Args:
        path: Path of the file, or "-" for standard output.
        force: Whether to replace an existing file.

    Raises:
        OutputExists: If the file exists and `force` is not given.
        UnwritableOutput: If the path is a folder, or nothing can be created there.
    """
    if path == "-":
        yield CountingFile(sys.stdout.buffer)
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
        yield CountingFile(file)
