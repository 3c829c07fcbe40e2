"""Stream to video, group by group.

`Decoder` puts the parts together: entropy decoding (`gnvc_jax.bitstream`), motion
(`gnvc_jax.motion`) and the networks (`gnvc_jax.functions`). `decode_frames` and `decode_group` are
generators of frames. Encoders are decoders, too, since they predict from what decoders see: see
`gnvc_jax.coder`.

A group of pictures (GOP) of 1 + 4k frames can be decoded alone: VAE and codec start anew. Inside it
everything streams: the first latent gives one frame, every further latent four. So memory depends
on the size of frames and not on the length of the video.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from gnvc_jax.bitstream import (
    EntropyCoder,
    GroupPayload,
    Header,
    QuantisedLatent,
    StreamReader,
    decode_group,
)
from gnvc_jax.bitstream.errors import LimitExceeded, WrongModel
from gnvc_jax.codec.config import LATENT_MULTIPLE
from gnvc_jax.codec.entropy import LatentSymbols
from gnvc_jax.codec.transform import DecodedLatent
from gnvc_jax.errors import UsageError
from gnvc_jax.functions import CodecFunctions
from gnvc_jax.model import Model
from gnvc_jax.motion import MotionField, expand
from gnvc_jax.motion.coding import MotionDecoder
from gnvc_jax.motion.field import COARSE
from gnvc_jax.parallel import axis_size
from gnvc_jax.reconstruct import reconstruct_frames

MAX_PIXELS = 1 << 25  # largest frame that is decoded by default; 7680x4320 fits


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
        q_index: Quality level of each latent, (1, t), 0 (worst) to 63.
        seed: Seed of the refiner's noise: the checksum of the group's symbols, which every decoder
            of the stream has.
    """

    latents: Array
    features: Array
    q_index: Array
    seed: int


class Decoder:
    """Decoder of one model.

    Compiled functions are kept between calls, so one object serves many streams.

    Attributes:
        model: The model.
        functions: Its jitted functions, with parameters on devices.
        entropy: Entropy coder with the tables of the model.
        timing: Seconds spent in each part since the decoder was made; replace it to start anew.
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

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds the time that is spent in a `with` block to one part of `timing`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            setattr(self.timing, part, getattr(self.timing, part) + spent)

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
        """Decodes the symbols of a group.

        Raises:
            BitstreamError: If they are damaged.
        """
        h, w = self._grid(header)
        cfg = self.model.codec_config
        # Shapes follow from header and model; a segment holds nothing but symbols.
        z_shape, y_shape = (h, w, cfg.z_channels), (4 * h, 4 * w, cfg.y_channels)
        with self.timed("entropy"):
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
        # Motion is coded on 32x32 blocks of the padded frame: side x side per hyperlatent.
        side = self.unit // COARSE
        h, w = (side * n for n in self._grid(header))
        with self.timed("entropy"):
            decoder = MotionDecoder(group.motion, self.entropy)
            # One field per predicted latent; each is coded with contexts from the one before.
            fields = [decoder.next((h, w)) for _ in group.q_indices[1:]]
            decoder.finish()
        return fields

    def _grid(self, header: Header) -> tuple[int, int]:
        """Number of rows and columns of hyperlatents."""
        # Rounded up, since frames or latents are padded to whole units.
        return -(-header.height // self.unit), -(-header.width // self.unit)

    def decode_group(
        self,
        header: Header,
        group: GroupPayload,
        steps: int | None = None,
        strength: float = 1.0,
    ) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """Decodes the frames of one group.

        Args:
            header: Header of the stream.
            group: Group, as `StreamReader` reads it.
            steps: Refinement steps, 0 for none; None for what the model was trained for, or none
                in a stream whose header says so.
            strength: Share of the refinement to apply, from 0 (none) to 1.

        Yields:
            Frames. Without refinement they come as their latents are decoded; with it, after all
            latents of the group.
        """
        if steps is None:
            steps = self.steps if header.refine else 0
        decoded = self.decode_each_latent(header, group)
        # The refiner sees all latents of a group at once, so frames must wait for the last of them.
        if steps and strength:
            decoded = self._refined(group, list(decoded), steps, strength)
        yield from self._shown(header, group, decoded)

    def decode_group_both(
        self, header: Header, group: GroupPayload, steps: int, strength: float = 1.0
    ) -> Iterator[tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w 3"]]]:
        """Decodes the frames of one group without and with refinement.

        Args:
            header: Header of the stream.
            group: Group, as `StreamReader` reads it.
            steps: Refinement steps, at least 1.
            strength: Share of the refinement to apply, from 0 (none) to 1.

        Yields:
            Pairs of a decoded and a refined frame.

        Raises:
            UsageError: If the model has no refiner.
            BitstreamError: If the group is damaged.
        """
        decoded = list(self.decode_each_latent(header, group))
        refined = self._refined(group, decoded, steps, strength)
        shown = (self._shown(header, group, latents) for latents in (decoded, refined))
        return zip(*shown, strict=True)

    def _shown(
        self,
        header: Header,
        group: GroupPayload,
        decoded: Iterable[tuple[Array, Any, Array | None]],
    ) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """Turns latents in the form of `decode_each_latent` into the frames that are shown."""
        # The codec works on padded latents. Without motion the encoder's VAE saw frames with less
        # padding; its decoder is given latents of that size.
        h, w = (-(-side // self.padding) * self.padding for side in (header.height, header.width))
        h, w = (side // header.latent_stride for side in (h, w))
        # The last latent may stand for more frames than the group has.
        cache, left = None, group.n_frames
        for latent, _, frames in decoded:
            if frames is None:
                with self.timed("vae"):
                    # (1, 1, h, w, c): one latent, with an axis for time; the cache is that of the
                    # causal VAE.
                    frames, cache = self.functions.decode_latents(cache, latent[:, None, :h, :w])
            # Takes off the padding, and the frames by which the last chunk was filled up.
            frames = np.asarray(frames[0, :left, : header.height, : header.width])
            left -= len(frames)
            yield from frames

    def latents(self, header: Header, group: GroupPayload) -> DecodedGroup:
        """Decodes a group to latents and features of the codec, on which a refiner works."""
        return _stack(group, list(self.decode_each_latent(header, group)))

    def _frames(
        self, decoded: DecodedLatent, prediction: Array | None, predicted: Array | None
    ) -> UInt8[Array, "1 t h w 3"]:
        """Decodes the frames of a latent of a codec with motion.

        Args:
            decoded: Decoded latent.
            prediction: Latent of the predicted frames, None for an intra latent.
            predicted: Frames that motion predicts, None for an intra latent.
        """
        with self.timed("vae"):
            # An intra latent starts the group, so the VAE starts, too; later ones build on
            # predicted frames.
            if prediction is None or predicted is None:
                return self.functions.decode_latents(None, decoded.latent[:, None])[0]
            return self.functions.compensate(decoded, prediction, predicted)

    def decode_each_latent(
        self, header: Header, group: GroupPayload
    ) -> Iterator[tuple[Array, Array, Array | None]]:
        """Decodes a group latent by latent.

        Yields:
            Latent (1, h, w, c), features of the codec after it (1, h, w, f), and uint8 frames
            (1, t, h, w, 3). With motion the next latent is predicted from these frames; without it
            they are None, and left to the caller.
        """
        # All symbols of the group are decoded first: that takes no network but the integer one, and
        # a damaged group is refused before any frame is shown.
        state = predicted = prediction = frames = None
        symbols, fields = self.symbols(header, group), self.fields(header, group)
        for i, s in enumerate(symbols):
            if frames is not None:  # with motion, after the first latent
                with self.timed("motion"):
                    vectors = expand(fields[i - 1])
                    predicted, prediction = self.functions.predict(frames[0, -1], vectors)
            with self.timed("codec"):
                integers = latent_symbols(s.z, s.y, s.index)
                decoded, state = self.functions.reconstruct(integers, state, s.q_index, prediction)
                # JAX computes asynchronously; without waiting, the clock would stop too early.
                decoded.latent.block_until_ready()
            if self.motion:
                frames = self._frames(decoded, prediction, predicted)
            yield decoded.latent, decoded.feature, frames

    def _refined(
        self,
        group: GroupPayload,
        decoded: list[tuple[Array, Array, Array | None]],
        steps: int,
        strength: float,
    ) -> Iterator[tuple[Array, None, Array | None]]:
        """Refines the latents of a group and yields them in the form of `decode_each_latent`.

        With motion, frames hold detail that latents do not, so they are not decoded again: the
        change of the latents is added to them.
        """
        with self.timed("refiner"):
            stacked = _stack(group, decoded)
            refined = self.functions.refine(*stacked, steps)
            if strength != 1.0:
                refined = stacked.latents + strength * (refined - stacked.latents)
            refined.block_until_ready()
        # Latents without frames (no motion) are decoded by `_shown`, with the cache of the VAE.
        for t, (latent, _, frames) in enumerate(decoded):
            if frames is not None:
                with self.timed("vae"):
                    # Codecs with motion have a linear VAE: what is added to latents adds to frames.
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
    """Stacks the latents and features of a group along a time axis."""
    latents, features = (jnp.stack(part, axis=1) for part in list(zip(*decoded))[:2])
    return DecodedGroup(latents, features, jnp.asarray([group.q_indices]), group.crc_symbols)


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


def latent_symbols(z: np.ndarray, y: np.ndarray, index: np.ndarray) -> LatentSymbols:
    """Puts symbols in the form that `CodecFunctions.reconstruct` takes; NumPy arrays will do."""
    arrays: tuple[Any, ...] = z, y, index
    return LatentSymbols(*arrays)
