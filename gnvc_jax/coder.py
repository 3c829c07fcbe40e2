"""Video to stream and back, group by group.

`Coder` is a `Decoder` (`gnvc_jax.decoder`) that encodes, too. It needs all of the decoder, because
everything is predicted from what decoders see. `encode_frames` takes frames from any iterable and
writes chunks to any file; inside a group it works on four frames at a time, so that memory does not
depend on the length of the video. For whole videos in memory, see `gnvc_jax.load_pretrained`.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from gnvc_jax.analysis import Analysis
from gnvc_jax.arrays import Array
from gnvc_jax.bitstream import Header, QuantisedLatent, StreamWriter, encode_group
from gnvc_jax.bitstream.errors import LimitExceeded
from gnvc_jax.bitstream.header import check_picture
from gnvc_jax.bitstream.tables import QUALITIES, TOTAL
from gnvc_jax.codec.model import CodecState
from gnvc_jax.codec.transform import DecodedLatent
from gnvc_jax.decoder import Decoder, check_columns, latent_symbols
from gnvc_jax.errors import UsageError
from gnvc_jax.frames import HALF_RANGE, check_frame, pad_frames, to_float
from gnvc_jax.leaky_bucket import LeakyBucket
from gnvc_jax.media.errors import UnsupportedFormat
from gnvc_jax.media.video import VideoInfo
from gnvc_jax.motion import MotionField, expand
from gnvc_jax.motion.coding import bits as motion_bits
from gnvc_jax.motion.coding import encode_fields
from gnvc_jax.scenes import split_groups

# Users count as in other codecs, 0 for the best; streams and networks count q_index = 63 - qp.
MAX_QP = 63
# One intra latent and 24 predicted ones of four frames each.
DEFAULT_GOP = 97
# Bits that a squared error of one 8-bit step of a pixel is worth, at the worst and the best level:
# eight times the lambda of training, since the latents after a latent inherit its errors.
PIXEL_WORTH = (8e-5, 8e-2)
Progress = Callable[[int], None]  # called with the number of frames that were finished


class Coder(Decoder):
    """Encoder and decoder of one model; one object serves many videos, see `Decoder`."""

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

    def encode_frames(
        self,
        frames: Iterable[UInt8[np.ndarray, "h w 3"]],
        out: BinaryIO,
        header: Header,
        qp: float | LeakyBucket,
        progress: Progress = lambda n: None,
        *,
        scene_cuts: bool = True,
        analysis: Analysis | None = None,
        audio: bytes = b"",
        effort: int = 0,
    ) -> int:
        """Encodes frames as they come.

        Args:
            frames: RGB frames of the size in the header.
            out: File to write the stream to.
            header: Header of the stream, see `header`.
            qp: Quality level, 0 (best) to 63. Between two whole levels, in steps of 1/8, latents
                of the two are mixed. A `LeakyBucket` chooses levels for a bitrate.
            progress: Called with the number of new frames whenever some are finished.
            scene_cuts: Whether a scene cut begins a group, see `gnvc_jax.scenes`.
            analysis: What earlier passes over the same frames found, which this one adds to; None
                for a single pass.
            audio: Audio track to write before the frames, see `gnvc_jax.media.audio.AudioTrack`.
            effort: 1 chooses symbols by the bits that they take, too, 0 by the error alone.

        Returns:
            The number of frames.

        Raises:
            UsageError: If a frame has another size or type, `qp` is out of range, the mesh in use
                cannot shard frames of this width, there is no frame, or the model has no block
                motion and `effort` is not 0.
        """
        if effort and not self.motion:
            raise UsageError(f"effort {effort} needs a model with block motion")
        if not isinstance(qp, LeakyBucket):
            check_qp(qp)
        check_columns(header.width, header.latent_stride)
        analysis = Analysis(limit=0) if analysis is None else analysis
        writer, first = StreamWriter(out, header), 0
        writer.write_audio(audio)
        checked = self._checked(frames, header)
        groups = split_groups(checked, header.gop_frames, scene_cuts)
        for number, group in enumerate(groups):
            chunks = self._chunks(group, header, first, analysis)
            if isinstance(qp, LeakyBucket):
                # A bitrate is that of the pictures, so audio does not count.
                qp.begin_group(writer.closed_size - len(audio), first)
                levels = qp
            else:
                # A model may code some latents of a group better than others, which are predicted
                # from them.
                levels = self.model.codec_config.levels(MAX_QP - qp, header.gop_latents, number)
            payload, count = self._encode_group(
                chunks, levels, number, first, progress, analysis, effort
            )
            writer.write_group(payload)
            first += count
        if not first:
            raise UsageError("there is no frame to encode")
        writer.close()
        return first

    def _checked(self, frames: Iterable[np.ndarray], header: Header) -> Iterator[np.ndarray]:
        """Checks frames as they come: nothing is known of them in advance."""
        for number, frame in enumerate(frames):
            check_frame(frame, header.height, header.width, number)
            yield frame

    def _chunks(
        self, frames: Iterable[np.ndarray], header: Header, first: int, analysis: Analysis
    ) -> Iterator[tuple[UInt8[np.ndarray, "t h w 3"], int, Array]]:
        """Takes the frames of a group latent by latent.

        Args:
            frames: Frames of the group.
            header: Header of the stream.
            first: Number of the first frame of the group.
            analysis: See `encode_frames`.

        Yields:
            Padded frames of a latent, how many of them the video has, and the latent of the VAE,
            normalised, (1, 1, h, w, c): one latent, with axes for clips and time.
        """
        frames, cache = iter(frames), None
        known = analysis.latents.get(first)
        kept = analysis.new_group() if known is None else None
        # The first latent stands for one frame, each later one for `stride` frames, as in the
        # causal VAE.
        for i in itertools.count():
            chunk = list(itertools.islice(frames, header.temporal_stride if i else 1))
            if not chunk:
                break
            given = len(chunk)
            # The last chunk of a video may be short: its last frame is repeated, and the decoder
            # drops what is too much.
            chunk += [chunk[-1]] * (header.temporal_stride - given if i else 0)
            chunk = pad_frames(np.stack(chunk), self.padding)  # (t, h, w, 3)
            if known is not None:
                latent = jnp.asarray(known[i])
            else:
                with self.timed("vae"):
                    latent, cache = self.functions.encode_video(cache, to_float(chunk)[None])
                    latent.block_until_ready()  # so that the clocks tell where time is spent
            if kept is not None:
                kept.append(np.asarray(latent))
            yield chunk, given, latent
        if kept:
            analysis.keep(first, kept)

    def _encode_group(
        self,
        chunks: Iterable[tuple[np.ndarray, int, Array]],
        levels: Sequence[int] | LeakyBucket,
        number: int,
        first: int,
        progress: Progress,
        analysis: Analysis,
        effort: int,
    ) -> tuple[bytes, int]:
        """Encodes the frames of one group.

        Args:
            chunks: Frames of each latent and the latent, see `_chunks`.
            levels: Quality level of each latent, or what chooses it.
            number: Number of the group.
            first: Number of its first frame.
            progress: See `encode_frames`.
            analysis: See `encode_frames`.
            effort: See `encode_frames`.

        Returns:
            The payload of the group, and its number of frames.
        """
        latents, fields, count = [], [], 0
        bucket = levels if isinstance(levels, LeakyBucket) else None
        # What passes from one latent to the next: the codec's state, the last frame as decoded, and
        # what motion is searched from.
        state = reference = tracked = predicted = prediction = None
        for chunk, given, latent in chunks:
            i = len(latents)
            q_index = levels.level() if isinstance(levels, LeakyBucket) else levels[i]
            if tracked is not None and reference is not None:  # with motion, after the first latent
                with self.timed("motion"):
                    # Motion is searched from a sharp stand-in of the decoded frame, but predicts
                    # from the decoded frame, which is all that the decoder has.
                    field = analysis.field(first + count, q_index)
                    if field is None:
                        field = self._search(chunk, tracked, q_index, fields)
                        analysis.keep_field(first + count, q_index, field)
                    fields.append(field)
                    predicted, prediction = self.functions.predict(reference, expand(field))
            with self.timed("codec"):
                coded = self._code(latent[:, 0], state, q_index, prediction, latents, effort)
                if bucket is not None:
                    bits = self._bits(coded, fields)
                    if bucket.misjudges(bits):
                        # Only first latents are judged, and these have no prediction.
                        coded = self._code(
                            latent[:, 0], state, bucket.level(), None, latents, effort
                        )
                        bits = self._bits(coded, fields)
                    bucket.coded(bits)
                # From here on the encoder is a decoder: what it predicts from is what that sees.
                decoded, state = self.functions.reconstruct(
                    latent_symbols(coded.z, coded.y, coded.index), state, coded.q_index, prediction
                )
            if self.motion:
                reference = self._frames(decoded, prediction, predicted)[0, -1]
                with self.timed("motion"):
                    tracked = self._track(chunk[-1], tracked, fields, decoded)
            latents.append(coded)
            count += given
            progress(given)
        with self.timed("entropy"):
            payload = encode_group(
                latents,
                self.entropy,
                self.functions.scale_index,
                number=number,
                first_frame=first,
                n_frames=count,
                motion=encode_fields(fields, self.entropy),
                temporal_stride=self.model.vae_config.temporal_stride,
            )
        return payload, count

    def _code(
        self,
        latent: Array,
        state: CodecState | None,
        q_index: int,
        prediction: Array | None,
        before: list[QuantisedLatent],
        effort: int,
    ) -> QuantisedLatent:
        """Codes a latent (1, h, w, c) to symbols, given the symbols of those before it."""
        kind = int(bool(before))
        previous = (before[-1].y, before[-1].index) if before else (None, None)
        worth = self._worth(kind, q_index) if effort else None
        coded = self.functions.analyse(latent, state, q_index, prediction, worth)
        z, y = (np.asarray(v, np.int8) for v in coded[:2])
        # The indices come from the exported integers, as in the decoder, not from the network in
        # training form.
        index = self.functions.scale_index(kind, q_index, z, *previous)
        # Symbols that are almost surely zero are not coded; the decoder takes them as zero.
        y = np.where(index >= self.model.tables.k_skip, y, 0).astype(np.int8)
        return QuantisedLatent(kind, q_index, z, y, index)

    def _worth(self, kind: int, q_index: int) -> float:
        """Bits that a squared error of an element of a latent is worth."""
        klt = self.model.vae["klt"]
        # Latents of a linear VAE are orthonormal coefficients of pixels in [-1, 1], times a scale:
        # an error e of a latent is a squared error of (127.5 e / scale)^2 in 8-bit steps.
        scale = float(klt[("first_scale", "later_scale")[kind]])
        pixel = float(np.geomspace(*PIXEL_WORTH, QUALITIES)[q_index])
        # PIXEL_WORTH counts the mean of three colours, the coefficients sum over them.
        return pixel * (HALF_RANGE / scale) ** 2 / 3.0

    def _bits(self, coded: QuantisedLatent, fields: list[MotionField]) -> float:
        """Information content in bits of a latent, and of its motion, the last of `fields`."""
        bits = self.entropy.ideal_bits(coded)
        if fields:
            before = fields[-2] if len(fields) > 1 else None
            bits += motion_bits(fields[-1], before, self.model.tables.motion / TOTAL)
        return bits

    def _search(
        self, frames: np.ndarray, reference: np.ndarray, q_index: int, fields: list[MotionField]
    ) -> MotionField:
        """Searches the motion of frames (4, h, w, 3) relative to the tracked frame before them."""
        from gnvc_jax.motion.search import search, search_rate  # needs OpenCV; decoding does not

        return search(frames, reference, search_rate(q_index), fields[-1] if fields else None)

    def _track(
        self,
        source: np.ndarray,
        tracked: np.ndarray | None,
        fields: list[MotionField],
        decoded: DecodedLatent,
    ) -> np.ndarray:
        """Finds what the motion of the next latent is searched from, see `track`."""
        from gnvc_jax.motion.search import track  # needs OpenCV; decoding does not

        if tracked is None:  # after the first latent, which is coded everywhere
            return source
        side = self.model.vae_config.stride
        coded = np.asarray(decoded.fresh)[0, ..., 0] > 0  # of every latent, (h, w)
        return track(source, tracked, fields[-1], coded.repeat(side, 0).repeat(side, 1))


def check_video_info(info: VideoInfo) -> None:
    """Checks that a stream can hold the size and the frame rate of a video.

    Raises:
        UnsupportedFormat: If it cannot.
    """
    try:
        check_picture(info.width, info.height, info.fps.as_integer_ratio())
    except LimitExceeded as error:
        raise UnsupportedFormat(info.name, str(error)) from None


def check_gop(gop: int, stride: int) -> None:
    """Checks the length of groups.

    Args:
        gop: Frames per group.
        stride: Frames per latent.

    Raises:
        UsageError: If the length is not 1 + stride * k for any k < 256.
    """
    # A group has at most 256 latents (`gnvc_jax.bitstream.group.MAX_LATENTS`).
    most = 1 + 255 * stride
    if gop < 1 or (gop - 1) % stride or gop > most:
        raise UsageError(f"gop must be 1 + {stride}k frames in [1, {most}], got {gop}")


def check_qp(qp: float) -> None:
    """Checks a quality level.

    Raises:
        UsageError: If `qp` is out of range.
    """
    if not 0 <= qp <= MAX_QP:
        raise UsageError(f"qp must be in [0, {MAX_QP}], got {qp:g}")
