"""Video <-> stream, group by group. Memory does not depend on the length of the video.

A group of pictures (GOP) of 1 + 4k frames is decodable alone: VAE and codec start anew. Inside it
everything streams: four frames give one latent, one latent gives one segment.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

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
from gnvc_jax.codec.entropy import LatentSymbols
from gnvc_jax.codec.model import LATENT_MULTIPLE, DecodedLatent
from gnvc_jax.errors import UsageError
from gnvc_jax.functions import CodecFunctions
from gnvc_jax.media.errors import UnsupportedFormat
from gnvc_jax.media.video import VideoInfo
from gnvc_jax.model import Model
from gnvc_jax.motion import MotionField, expand
from gnvc_jax.motion.coding import MotionDecoder, encode_fields
from gnvc_jax.motion.field import COARSE
from gnvc_jax.parallel import axis_size

MAX_QP = 63
MAX_PIXELS = 1 << 25  # of a frame that is decoded unless told otherwise; 7680x4320 fits
DEFAULT_GOP = 97
Progress = Callable[[int], None]
Array = jax.Array


@dataclasses.dataclass
class Timing:
    """Seconds spent by part."""

    vae: float = 0.0
    motion: float = 0.0
    codec: float = 0.0
    entropy: float = 0.0
    refiner: float = 0.0


def check_video(info: VideoInfo) -> None:
    """UnsupportedFormat, naming the video, if a stream cannot hold its size or rate."""
    try:
        check_picture(info.width, info.height, info.fps.as_integer_ratio())
    except LimitExceeded as error:
        raise UnsupportedFormat(info.name, str(error)) from None


class _Clock:
    def __init__(self, timing: Timing, part: str):
        self.timing, self.part = timing, part

    def __enter__(self):
        self.start = time.perf_counter()

    def __exit__(self, *_):
        spent = time.perf_counter() - self.start
        setattr(self.timing, self.part, getattr(self.timing, self.part) + spent)


class Coder:
    """Encoder and decoder of one model; the compiled functions are kept between calls."""

    def __init__(self, model: Model):
        self.model, self.functions = model, CodecFunctions(model)
        self.entropy = EntropyCoder(model.tables)
        self.timing = Timing()
        self.motion = model.codec_config.motion is not None
        # Side in pixels of what one hyperlatent position stands for.
        self.unit = model.vae_config.stride * LATENT_MULTIPLE
        # Motion compensates whole padded frames; without it, latents are padded instead.
        self.padding = self.unit if self.motion else model.vae_config.stride

    def header(
        self,
        width: int,
        height: int,
        fps: tuple[int, int],
        *,
        gop: int = DEFAULT_GOP,
        frame_count: int | None = None,
        **extra,
    ) -> Header:
        """Header of a new stream. UsageError if no group can have `gop` frames."""
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

    def encode_frames(
        self,
        frames: Iterable[np.ndarray],
        out: BinaryIO,
        header: Header,
        qp: int,
        progress: Progress = lambda n: None,
    ) -> int:
        """Encode uint8 RGB frames (h, w, 3) at qp 0..63 (lower is better); returns the frames.

        progress(n) is called whenever n more frames are done. UsageError for a frame of another
        size, a qp out of range, a width that the mesh in use does not divide, or no frame at all.
        """
        check_qp(qp)
        check_columns(header.width, header.latent_stride)
        writer, frames, first, number = StreamWriter(out, header), iter(frames), 0, 0
        while gop := self._encode_group(itertools.islice(frames, header.gop_frames),
                                        header, qp, number, first, progress):  # fmt: skip
            payload, count = gop
            writer.write_group(payload)
            number, first = number + 1, first + count
        if not first:
            raise UsageError("there is no frame to encode")
        writer.close()
        return first

    def _encode_group(self, frames, header, qp, number, first, progress):
        stride = header.temporal_stride
        levels = self.model.codec_config.levels(MAX_QP - qp, header.gop_latents)
        latents, fields, count = [], [], 0
        cache = state = source = reference = predicted = prediction = None
        previous = (None, None)
        while chunk := list(itertools.islice(frames, stride if latents else 1)):
            for frame in chunk:
                check_frame(frame, header, first + count)
            kind, given, q_index = int(bool(latents)), len(chunk), levels[len(latents)]
            chunk += [chunk[-1]] * (stride - given if kind else 0)
            chunk = pad_frames(np.stack(chunk), self.padding)
            if kind and self.motion:
                with _Clock(self.timing, "motion"):
                    fields.append(self._search(chunk, source, q_index, fields))
                    vectors = expand(fields[-1])
                    predicted, prediction = self.functions.predict(reference, vectors)
            with _Clock(self.timing, "vae"):
                latent, cache = self.functions.encode_video(cache, to_float(chunk))
                latent.block_until_ready()
            with _Clock(self.timing, "codec"):
                coded = self.functions.analyse(latent[:, 0], state, q_index, prediction)
                z, y = (np.asarray(v, np.int8) for v in coded[:2])
                index = self.functions.scale_index(kind, q_index, z, *previous)
                y = np.where(index >= self.model.tables.k_skip, y, 0).astype(np.int8)
                decoded, state = self.functions.reconstruct(
                    LatentSymbols(z, y, index), state, q_index, prediction
                )
            if self.motion:
                shown = self._frames(decoded, prediction, predicted)
                source, reference = chunk[-1], shown[0, -1]
            latents.append(QuantisedLatent(kind, q_index, z, y, index))
            previous, count = (y, index), count + given
            progress(given)
        if not latents:
            return None
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
    ) -> Array:
        """uint8 frames (1, t, h, w, 3) of a latent of a codec with motion; no prediction: intra."""
        with _Clock(self.timing, "vae"):
            if prediction is None:
                return self.functions.decode_latents(None, decoded.latent[:, None])[0]
            return self.functions.compensate(decoded, prediction, predicted)

    def _search(
        self, frames: np.ndarray, reference: np.ndarray, q_index: int, fields: list[MotionField]
    ) -> MotionField:
        """Motion of uint8 frames relative to the source frame before them."""
        from gnvc_jax.motion.search import search, search_rate  # needs OpenCV; decoding does not

        return search(frames, reference, search_rate(q_index), fields[-1] if fields else None)

    def check(self, header: Header, max_pixels: int = MAX_PIXELS) -> None:
        """Before anything is decoded or allocated.

        WrongModel or ModelCorrupt unless the stream was made with this model, LimitExceeded if a
        frame has more than max_pixels: a few bytes can claim a picture that no memory holds;
        UsageError for a width that the mesh in use does not divide.
        """
        check_columns(header.width, header.latent_stride)
        header.check_model(*self.model.fingerprints, self.model.tables.crc32())
        pixels = header.width * header.height
        if pixels > max_pixels:
            raise LimitExceeded(
                f"frames of {header.width}x{header.height}, {pixels} pixels, allowed {max_pixels}"
            )

    def symbols(self, header: Header, group: GroupPayload) -> list[QuantisedLatent]:
        """The integers of a group; raises BitstreamError kinds."""
        h, w = self._grid(header)
        cfg = self.model.codec_config
        z_shape, y_shape = (h, w, cfg.z_channels), (4 * h, 4 * w, cfg.y_channels)
        with _Clock(self.timing, "entropy"):
            return decode_group(group, self.entropy, self.functions.scale_index, z_shape, y_shape)

    def fields(self, header: Header, group: GroupPayload) -> list[MotionField]:
        """Motion of the predicted latents of a group; raises BitstreamError kinds."""
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
    ) -> Iterator[np.ndarray]:
        """Frames uint8 (h, w, 3) of one group, refined in `steps` steps (0: not at all).

        steps: by default one if the model has a refiner. Without refinement frames come as their
        latents are read; with it, after all latents of the group.
        """
        if steps is None:
            steps = int(self.model.refiner is not None)
        decoded = self._decoded(header, group)
        if steps:
            decoded = self._refined(group, list(decoded), steps)
        # Latents of frames that were not padded end where the frames do.
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

    def _decoded(
        self, header: Header, group: GroupPayload
    ) -> Iterator[tuple[Array, Array, Array | None]]:
        """Decoded latents (1, h, w, c) of a group, the codec's features after each, and frames.

        Frames (1, t, h, w, 3) are there with motion only, which needs the last one of each latent.
        """
        state = predicted = prediction = frames = None
        symbols, fields = self.symbols(header, group), self.fields(header, group)
        for i, s in enumerate(symbols):
            if i and self.motion:
                with _Clock(self.timing, "motion"):
                    vectors = expand(fields[i - 1])
                    predicted, prediction = self.functions.predict(frames[0, -1], vectors)
            with _Clock(self.timing, "codec"):
                integers = LatentSymbols(s.z, s.y, s.index)
                decoded, state = self.functions.reconstruct(integers, state, s.q_index, prediction)
                decoded.latent.block_until_ready()
            if self.motion:
                frames = self._frames(decoded, prediction, predicted)
            yield decoded.latent, decoded.feature, frames

    def _refined(
        self, group: GroupPayload, decoded: list, steps: int
    ) -> Iterator[tuple[Array, None, Array | None]]:
        """The latents after refinement; the checksum of the group's symbols seeds the noise.

        With motion, frames hold detail that latents do not; they get what refinement adds.
        """
        with _Clock(self.timing, "refiner"):
            latents, features = (jnp.stack(part, axis=1) for part in list(zip(*decoded))[:2])
            seed, q_index = group.crc_symbols, group.q_indices[-1]
            refined = self.functions.refine(latents, features, q_index, seed, steps)
            refined.block_until_ready()
        for t, (latent, _, frames) in enumerate(decoded):
            if frames is not None:
                with _Clock(self.timing, "vae"):
                    frames = self.functions.add_latent(frames, refined[:, t] - latent, t == 0)
            yield refined[:, t], None, frames

    def decode_frames(self, reader: StreamReader, steps: int | None = None) -> Iterator[np.ndarray]:
        """All frames of a stream, in order; steps: see `decode_group`."""
        self.check(reader.header)
        for group in reader.groups():
            yield from self.decode_group(reader.header, group, steps)

    def reconstruct(self, video: np.ndarray) -> np.ndarray:
        """Through the VAE only, without codec: uint8 (t, h, w, 3) -> the same."""
        t, h, w, _ = video.shape
        stride = self.model.vae_config.temporal_stride
        out, encoder, decoder = [], None, None
        for start in (0, *range(1, t, stride)):
            chunk = video[start : start + (stride if start else 1)]
            chunk = np.concatenate([chunk] + [chunk[-1:]] * (stride - len(chunk) if start else 0))
            chunk = pad_frames(chunk, self.model.vae_config.stride)
            latent, encoder = self.functions.encode_video(encoder, to_float(chunk))
            frames, decoder = self.functions.decode_latents(decoder, latent)
            out.append(np.asarray(frames[0, :, :h, :w]))
        return np.concatenate(out)[:t]


def check_gop(gop: int, stride: int) -> None:
    """UsageError unless gop is 1 + stride * k with k < 256; stride: frames per latent."""
    most = 1 + 255 * stride
    if gop < 1 or (gop - 1) % stride or gop > most:
        raise UsageError(f"gop {gop}: expected 1 + {stride}k frames, 1..{most}")


def check_qp(qp: int) -> None:
    """UsageError unless qp is a quality level."""
    if not 0 <= qp <= MAX_QP:
        raise UsageError(f"qp {qp}: expected 0..{MAX_QP}")


def check_columns(width: int, stride: int) -> None:
    """UsageError unless the mesh axis `context` divides the columns of latents of frames.

    stride: pixels per latent, each way.
    """
    devices, columns = axis_size("context"), -(-width // stride)
    if columns % devices:
        raise UsageError(
            f"{devices} devices cannot share frames {width} wide: that makes {columns} columns of "
            "latents, which they do not divide"
        )


def check_frame(frame: np.ndarray, header: Header, number: int) -> None:
    """UsageError unless a frame is uint8 (h, w, 3) of the header's size."""
    size = (header.height, header.width, 3)
    if frame.shape != size:
        raise UsageError(f"frame {number} is {frame.shape}, expected {size}")
    if frame.dtype != np.uint8:
        raise UsageError(
            f"frame {number} is {frame.dtype}, expected uint8 RGB in 0..255; frames in [0, 1] are "
            "np.round(255 * frame).astype(np.uint8)"
        )


def pad_frames(frames: np.ndarray, multiple: int) -> np.ndarray:
    """Repeats the last row and column of (t, h, w, 3) up to multiples of so many pixels."""
    _, h, w, _ = frames.shape
    return np.pad(frames, ((0, 0), (0, -h % multiple), (0, -w % multiple), (0, 0)), mode="edge")


def to_float(frames: np.ndarray) -> np.ndarray:
    """uint8 (t, h, w, 3) -> float32 (1, t, h, w, 3) in [-1, 1]."""
    return frames[None].astype(np.float32) / np.float32(127.5) - np.float32(1.0)
