"""Video to stream and back, group by group.

`Coder` puts the parts together: the networks (`gnvc_jax.functions`), motion (`gnvc_jax.motion`) and
entropy coding (`gnvc_jax.bitstream`). `encode_frames` takes frames from any iterable and writes
chunks to any file; `decode_frames` and `decode_group` are generators of frames. For whole videos in
memory, see `gnvc_jax.load_pretrained`.

A group of pictures (GOP) of 1 + 4k frames can be decoded alone: VAE and codec start anew. Inside it
everything streams: the first frame gives one latent, every further four frames give another. So
memory depends on the size of frames and not on the length of the video.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from gnvc_jax.bitstream import (
    EntropyCoder,
    GroupPayload,
    Header,
    QuantisedLatent,
    StreamReader,
    StreamWriter,
    decode_group,
    encode_group,
)
from gnvc_jax.bitstream.errors import LimitExceeded, WrongModel
from gnvc_jax.bitstream.header import check_picture
from gnvc_jax.codec.config import LATENT_MULTIPLE
from gnvc_jax.codec.entropy import LatentSymbols
from gnvc_jax.codec.model import DecodedLatent
from gnvc_jax.errors import UsageError
from gnvc_jax.frames import check_frame, pad_frames, to_float
from gnvc_jax.functions import CodecFunctions
from gnvc_jax.media.errors import UnsupportedFormat
from gnvc_jax.media.video import VideoInfo
from gnvc_jax.model import Model
from gnvc_jax.motion import MotionField, expand
from gnvc_jax.motion.coding import MotionDecoder, encode_fields
from gnvc_jax.motion.field import COARSE
from gnvc_jax.parallel import axis_size
from gnvc_jax.reconstruct import reconstruct_frames

MAX_QP = 63
MAX_PIXELS = 1 << 25  # largest frame that is decoded by default; 7680x4320 fits
DEFAULT_GOP = 97
Progress = Callable[[int], None]  # called with the number of frames that were finished


@dataclasses.dataclass
class Timing:
    """Seconds spent in each part of coding."""

    vae: float = 0.0
    motion: float = 0.0
    codec: float = 0.0
    entropy: float = 0.0
    refiner: float = 0.0


class DecodedGroup(NamedTuple):
    """Latents of a group as the codec decodes them, before refinement.

    Attributes:
        latents: Normalised latents (1, t, h, w, c), padded as the codec needs them.
        features: Features of the codec after each latent, (1, t, h, w, f).
        q_index: Quality level, 0 (worst) to 63.
        seed: Seed of the refiner's noise: the checksum of the group's symbols, which every decoder
            of the stream has.
    """

    latents: Array
    features: Array
    q_index: int
    seed: int


def check_video_info(info: VideoInfo) -> None:
    """Checks that a stream can hold the size and the frame rate of a video.

    Raises:
        UnsupportedFormat: If it cannot.
    """
    try:
        check_picture(info.width, info.height, info.fps.as_integer_ratio())
    except LimitExceeded as error:
        raise UnsupportedFormat(info.name, str(error)) from None


class _Clock:
    """Context that adds the time spent in it to one part of a `Timing`."""

    def __init__(self, timing: Timing, part: str):
        self.timing, self.part = timing, part

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        spent = time.perf_counter() - self.start
        setattr(self.timing, self.part, getattr(self.timing, self.part) + spent)


class Coder:
    """Encoder and decoder of one model.

    Compiled functions are kept between calls, so one object serves many videos.

    Attributes:
        model: The model.
        functions: Its jitted functions, with parameters on devices.
        entropy: Entropy coder with the tables of the model.
        timing: Seconds spent in each part since the coder was made; replace it to start anew.
        motion: Whether the codec predicts from moved frames.
        unit: Side in pixels of what one position of the hyperlatents stands for.
        padding: Multiple to which the sides of frames are padded.
    """

    def __init__(self, model: Model):
        self.model, self.functions = model, CodecFunctions(model)
        self.entropy = EntropyCoder(model.tables)
        self.timing = Timing()
        self.motion = model.codec_config.motion is not None
        self.unit = model.vae_config.stride * LATENT_MULTIPLE
        # Motion compensates whole padded frames; without it, latents are padded instead, which
        # costs the VAE less.
        self.padding = self.unit if self.motion else model.vae_config.stride

    @property
    def steps(self) -> int:
        """Refinement steps that the model was trained for; 0 without a refiner."""
        config = self.model.refiner_config
        return 0 if config is None else config.steps

    def header(
        self,
        width: int,
        height: int,
        fps: tuple[int, int],
        *,
        gop: int = DEFAULT_GOP,
        frame_count: int | None = None,
        **extra: Any,
    ) -> Header:
        """Header of a new stream.

        Args:
            width: Width of the frames in pixels.
            height: Height of the frames in pixels.
            fps: Frame rate as numerator and denominator.
            gop: Frames per group, see `check_gop`.
            frame_count: Number of frames, None if it is not known yet.
            **extra: Other fields of `Header`, such as `colour`.

        Raises:
            UsageError: If no group can have `gop` frames.
        """
        stride = self.model.vae_config.temporal_stride
        check_gop(gop, stride)
        cfg = self.model.codec_config
        codec, vae = self.model.fingerprints
        return Header(
            width=width,
            height=height,
            fps=fps,
            gop_latents=1 + (gop - 1) // stride,
            gop_frames=gop,
            y_channels=cfg.y_channels,
            z_channels=cfg.z_channels,
            k_skip=cfg.k_skip,
            codec_fingerprint=codec,
            vae_fingerprint=vae,
            tables_crc=self.model.tables.crc32(),
            frame_count=frame_count,
            latent_channels=cfg.latent_channels,
            latent_stride=self.model.vae_config.stride,
            temporal_stride=stride,
            **extra,
        )

    # Encoding

    def encode_frames(
        self,
        frames: Iterable[UInt8[np.ndarray, "h w 3"]],
        out: BinaryIO,
        header: Header,
        qp: int,
        progress: Progress = lambda n: None,
    ) -> int:
        """Encodes frames as they come.

        Args:
            frames: RGB frames of the size in the header.
            out: File to write the stream to.
            header: Header of the stream, see `header`.
            qp: Quality level, 0 (best) to 63.
            progress: Called with the number of new frames whenever some are finished.

        Returns:
            The number of frames.

        Raises:
            UsageError: If a frame has another size or type, `qp` is out of range, the mesh in use
                cannot shard frames of this width, or there is no frame.
        """
        check_qp(qp)
        check_columns(header.width, header.latent_stride)
        writer, frames, first, number = StreamWriter(out, header), iter(frames), 0, 0
        while True:
            group = itertools.islice(frames, header.gop_frames)
            payload, count = self._encode_group(group, header, qp, number, first, progress)
            if not count:
                break
            writer.write_group(payload)
            number, first = number + 1, first + count
        if not first:
            raise UsageError("there is no frame to encode")
        writer.close()
        return first

    def _encode_group(
        self,
        frames: Iterator[np.ndarray],
        header: Header,
        qp: int,
        number: int,
        first: int,
        progress: Progress,
    ) -> tuple[bytes, int]:
        """Encodes the frames of one group.

        Args:
            frames: Frames of this group.
            header: Header of the stream.
            qp: Quality level of the stream.
            number: Number of the group.
            first: Number of its first frame.
            progress: See `encode_frames`.

        Returns:
            The payload of the group, and its number of frames: 0 if there are no frames left.
        """
        stride = header.temporal_stride
        # A model may code some latents of a group better than others, which are predicted from
        # them.
        levels = self.model.codec_config.levels(MAX_QP - qp, header.gop_latents)
        latents, fields, count = [], [], 0
        # What passes from one latent to the next: the VAE's cache, the codec's state, the last
        # frame of the source and as decoded, and the last symbols.
        cache = state = source = reference = None
        previous = (None, None)
        predicted = prediction = None
        while chunk := list(itertools.islice(frames, stride if latents else 1)):
            for frame in chunk:
                check_frame(frame, header.height, header.width, first + count)
            kind, given, q_index = int(bool(latents)), len(chunk), levels[len(latents)]
            # The last chunk of a video may be short: its last frame is repeated, and the decoder
            # drops what is too much.
            chunk += [chunk[-1]] * (stride - given if kind else 0)
            chunk = pad_frames(np.stack(chunk), self.padding)  # (t, h, w, 3)
            if source is not None and reference is not None:  # with motion, after the first latent
                with _Clock(self.timing, "motion"):
                    # Motion is searched between source frames, where it is true, but predicts from
                    # the decoded frame, which is all that the decoder has.
                    fields.append(self._search(chunk, source, q_index, fields))
                    vectors = expand(fields[-1])
                    predicted, prediction = self.functions.predict(reference, vectors)
            with _Clock(self.timing, "vae"):
                latent, cache = self.functions.encode_video(cache, to_float(chunk)[None])
                latent.block_until_ready()  # so that the clocks tell where time is spent
            with _Clock(self.timing, "codec"):
                coded = self.functions.analyse(latent[:, 0], state, q_index, prediction)
                z, y = (np.asarray(v, np.int8) for v in coded[:2])
                index = self.functions.scale_index(kind, q_index, z, *previous)
                # Symbols that are almost surely zero are not coded; the decoder takes them as zero.
                y = np.where(index >= self.model.tables.k_skip, y, 0).astype(np.int8)
                # From here on the encoder is a decoder: what it predicts from is what that sees.
                decoded, state = self.functions.reconstruct(
                    _symbols(z, y, index), state, q_index, prediction
                )
            if self.motion:
                shown = self._frames(decoded, prediction, predicted)
                source, reference = chunk[-1], shown[0, -1]
            latents.append(QuantisedLatent(kind, q_index, z, y, index))
            previous, count = (y, index), count + given
            progress(given)
        if not latents:
            return b"", 0
        with _Clock(self.timing, "entropy"):
            payload = encode_group(
                latents,
                self.entropy,
                self.functions.scale_index,
                number=number,
                first_frame=first,
                n_frames=count,
                motion=encode_fields(fields, self.entropy),
                temporal_stride=stride,
            )
        return payload, count

    def _frames(
        self, decoded: DecodedLatent, prediction: Array | None, predicted: Array | None
    ) -> UInt8[Array, "1 t h w 3"]:
        """Frames of a latent of a codec with motion; without a prediction, of an intra latent."""
        with _Clock(self.timing, "vae"):
            if prediction is None or predicted is None:
                return self.functions.decode_latents(None, decoded.latent[:, None])[0]
            return self.functions.compensate(decoded, prediction, predicted)

    def _search(
        self, frames: np.ndarray, reference: np.ndarray, q_index: int, fields: list[MotionField]
    ) -> MotionField:
        """Searches the motion of frames (4, h, w, 3) relative to the source frame before them."""
        from gnvc_jax.motion.search import search, search_rate  # needs OpenCV; decoding does not

        return search(frames, reference, search_rate(q_index), fields[-1] if fields else None)

    # Decoding

    def check(self, header: Header, max_pixels: int = MAX_PIXELS) -> None:
        """Validates a header before anything is decoded or allocated.

        Args:
            header: Header of a stream.
            max_pixels: Largest frame to accept. A few bytes can claim a frame that no memory holds.

        Raises:
            WrongModel: If the stream was made with another model.
            ModelCorrupt: If the tables of the model are not those that the stream was made with.
            LimitExceeded: If frames have more than `max_pixels` pixels.
            UsageError: If the mesh in use cannot shard frames of this width.
        """
        check_columns(header.width, header.latent_stride)
        header.check_model(*self.model.fingerprints, self.model.tables.crc32())
        pixels = header.width * header.height
        if pixels > max_pixels:
            raise LimitExceeded(
                f"frames of {header.width}x{header.height} have {pixels} pixels; at most "
                f"{max_pixels} are allowed"
            )

    def symbols(self, header: Header, group: GroupPayload) -> list[QuantisedLatent]:
        """Decodes the symbols of a group. Raises BitstreamError if they are damaged."""
        h, w = self._grid(header)
        cfg = self.model.codec_config
        z_shape, y_shape = (h, w, cfg.z_channels), (4 * h, 4 * w, cfg.y_channels)
        with _Clock(self.timing, "entropy"):
            return decode_group(group, self.entropy, self.functions.scale_index, z_shape, y_shape)

    def fields(self, header: Header, group: GroupPayload) -> list[MotionField]:
        """Decodes the motion of the predicted latents of a group.

        Raises:
            WrongModel: If the group has motion, but the codec does not use any.
            BitstreamError: If the motion segment is damaged.
        """
        if not self.motion:
            if group.motion:
                raise WrongModel("the stream has motion, the loaded model has none")
            return []
        if len(group.q_indices) == 1:
            return []
        side = self.unit // COARSE
        h, w = (side * n for n in self._grid(header))
        with _Clock(self.timing, "entropy"):
            decoder = MotionDecoder(group.motion, self.entropy)
            fields = [decoder.next((h, w)) for _ in group.q_indices[1:]]
            decoder.finish()
        return fields

    def _grid(self, header: Header) -> tuple[int, int]:
        """Rows and columns of hyperlatents."""
        return -(-header.height // self.unit), -(-header.width // self.unit)

    def decode_group(
        self, header: Header, group: GroupPayload, steps: int | None = None
    ) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """Decodes the frames of one group.

        Args:
            header: Header of the stream.
            group: Group, as `StreamReader` reads it.
            steps: Refinement steps, 0 for none; None for what the model was trained for.

        Yields:
            Frames. Without refinement they come as their latents are decoded; with it, after all
            latents of the group.
        """
        if steps is None:
            steps = self.steps
        decoded = self._decoded(header, group)
        if steps:
            decoded = self._refined(group, list(decoded), steps)
        # The codec works on padded latents. Without motion the encoder's VAE saw frames with less
        # padding; its decoder is given latents of that size.
        h, w = (-(-side // self.padding) * self.padding for side in (header.height, header.width))
        h, w = (side // header.latent_stride for side in (h, w))
        cache, left = None, group.n_frames
        for latent, _, frames in decoded:
            if frames is None:
                with _Clock(self.timing, "vae"):
                    frames, cache = self.functions.decode_latents(cache, latent[:, None, :h, :w])
            frames = np.asarray(frames[0, :left, : header.height, : header.width])
            left -= len(frames)
            yield from frames

    def latents(self, header: Header, group: GroupPayload) -> DecodedGroup:
        """Decodes a group to latents and features of the codec, what a refiner works on."""
        return _stack(group, list(self._decoded(header, group)))

    def _decoded(
        self, header: Header, group: GroupPayload
    ) -> Iterator[tuple[Array, Array, Array | None]]:
        """Decodes a group latent by latent.

        Yields:
            Latent (1, h, w, c), features of the codec after it (1, h, w, f), and uint8 frames
            (1, t, h, w, 3). With motion the next latent is predicted from these frames; without it
            they are None, and left to the caller.
        """
        state = predicted = prediction = frames = None
        symbols, fields = self.symbols(header, group), self.fields(header, group)
        for i, s in enumerate(symbols):
            if frames is not None:  # with motion, after the first latent
                with _Clock(self.timing, "motion"):
                    vectors = expand(fields[i - 1])
                    predicted, prediction = self.functions.predict(frames[0, -1], vectors)
            with _Clock(self.timing, "codec"):
                integers = _symbols(s.z, s.y, s.index)
                decoded, state = self.functions.reconstruct(integers, state, s.q_index, prediction)
                decoded.latent.block_until_ready()
            if self.motion:
                frames = self._frames(decoded, prediction, predicted)
            yield decoded.latent, decoded.feature, frames

    def _refined(
        self, group: GroupPayload, decoded: list[tuple[Array, Array, Array | None]], steps: int
    ) -> Iterator[tuple[Array, None, Array | None]]:
        """Latents after refinement, in the form of `_decoded`.

        With motion, frames hold detail that latents do not, so they are not decoded again: what
        refinement adds to the latents is added to them.
        """
        with _Clock(self.timing, "refiner"):
            refined = self.functions.refine(*_stack(group, decoded), steps)
            refined.block_until_ready()
        for t, (latent, _, frames) in enumerate(decoded):
            if frames is not None:
                with _Clock(self.timing, "vae"):
                    frames = self.functions.add_latent(frames, refined[:, t] - latent, t == 0)
            yield refined[:, t], None, frames

    def decode_frames(
        self, reader: StreamReader, steps: int | None = None
    ) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """Decodes all frames of a stream, in order.

        Args:
            reader: Stream.
            steps: Refinement steps, see `decode_group`.

        Yields:
            Frames.

        Raises:
            BitstreamError: If the stream is damaged, or was made with another model.
        """
        self.check(reader.header)
        for group in reader.groups():
            yield from self.decode_group(reader.header, group, steps)

    def reconstruct(self, video: UInt8[np.ndarray, "t h w 3"]) -> UInt8[np.ndarray, "t h w 3"]:
        """Passes a video through the VAE alone: what a codec without any loss would give."""
        encode, decode = self.functions.encode_video, self.functions.decode_latents
        pairs = reconstruct_frames(video, encode, decode, self.model.vae_config)
        return np.stack([decoded for _, decoded in pairs])


def _stack(group: GroupPayload, decoded: list[tuple[Array, Array, Array | None]]) -> DecodedGroup:
    """Latents and features of a group along a time axis."""
    latents, features = (jnp.stack(part, axis=1) for part in list(zip(*decoded))[:2])
    return DecodedGroup(latents, features, group.q_indices[-1], group.crc_symbols)


def check_gop(gop: int, stride: int) -> None:
    """Checks the length of groups.

    Args:
        gop: Frames per group.
        stride: Frames per latent.

    Raises:
        UsageError: If the length is not 1 + stride * k for any k < 256.
    """
    most = 1 + 255 * stride
    if gop < 1 or (gop - 1) % stride or gop > most:
        raise UsageError(f"gop must be 1 + {stride}k frames in [1, {most}], got {gop}")


def check_qp(qp: int) -> None:
    """Raises UsageError unless `qp` is a quality level."""
    if not 0 <= qp <= MAX_QP:
        raise UsageError(f"qp must be in [0, {MAX_QP}], got {qp}")


def _symbols(z: np.ndarray, y: np.ndarray, index: np.ndarray) -> LatentSymbols:
    """Symbols for `CodecFunctions.reconstruct`, whose jitted function takes NumPy's arrays too."""
    arrays: tuple[Any, ...] = z, y, index
    return LatentSymbols(*arrays)


def check_columns(width: int, stride: int) -> None:
    """Checks that frames can be sharded over the mesh in use.

    Args:
        width: Width of the frames in pixels.
        stride: Pixels per latent in each direction.

    Raises:
        UsageError: If the mesh axis `context` does not divide the columns of latents.
    """
    devices, columns = axis_size("context"), -(-width // stride)
    if columns % devices:
        raise UsageError(
            f"frames {width} pixels wide have {columns} columns of latents, which cannot be split "
            f"evenly over {devices} devices"
        )
