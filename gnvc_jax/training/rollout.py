"""The codec's roll-out: a batch of clips becomes decoded latents, rates and errors.

There are two, since prediction differs. `roll_out` is for codecs without motion, whose latents are
predicted from the latent before; the stages `codec`, `latent`, `pixel` and `distill` use it.
`roll_out_with_motion` is for codecs with motion, whose latents are predicted from the last decoded
frame; the stages `transform` and `refine` use it.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from gnvc_jax.arrays import Array, Tree
from gnvc_jax.codec.config import QUALITIES, SYMBOL_BOUND, Z_BOUND, CodecConfig
from gnvc_jax.codec.entropy import LatentSymbols
from gnvc_jax.codec.quantise import straight_through
from gnvc_jax.errors import UsageError
from gnvc_jax.frames import HALF_RANGE, to_float
from gnvc_jax.motion.warp import predict, to_eight_bits
from gnvc_jax.parallel import backend, constrain
from gnvc_jax.training import losses
from gnvc_jax.training.levels import Metrics
from gnvc_jax.training.networks import Networks
from gnvc_jax.training.settings import check_range
from gnvc_jax.vae import VAE, encode_clip


@dataclasses.dataclass(frozen=True)
class LevelPattern:
    """Settings of the quality levels of latents within a group (hierarchical quality).

    Latents that others are predicted from are worth more bits; see `CodecConfig.levels` for what
    encoders do.

    Attributes:
        intra_offset: Range of levels by which the first latent is better, drawn for each clip.
        pattern: Levels by which latents 1, 2, 3, 4 after the first (and so on) are better, in clips
            that have a pattern.
        pattern_prob: Share of clips that have a pattern.
    """

    intra_offset: tuple[int, int] = (0, 0)
    pattern: tuple[int, ...] = (0,)
    pattern_prob: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.intra_offset
        if low > high:
            raise UsageError(f"loss.intra_offset: must be a rising range, got {low} to {high}")
        if not self.pattern:
            raise UsageError("loss.pattern: must name at least one level, got none")
        check_range("loss", self, pattern_prob=(0, 1))


def draw_levels(key: Array, settings: LevelPattern, q_index: Array, latents: int) -> Array:
    """Draws the quality level of every latent.

    Args:
        key: Random key.
        settings: Range and pattern of levels.
        q_index: Quality levels of the clips, (b,).
        latents: Number of latents per clip.

    Returns:
        Quality levels (b, latents), int32.
    """
    (b,) = q_index.shape
    key_intra, key_pattern = jax.random.split(key)
    low, high = settings.intra_offset
    # (b, 1), the upper end included.
    intra = jax.random.randint(key_intra, (b, 1), low, high + 1)
    # Repeated to the number of later latents: (1, latents - 1).
    pattern = jnp.resize(jnp.asarray(settings.pattern, jnp.int32), (1, latents - 1))
    on = jax.random.bernoulli(key_pattern, settings.pattern_prob, (b, 1))
    offsets = jnp.concatenate([intra, on * pattern], axis=1)
    return jnp.clip(q_index[:, None] + offsets, 0, QUALITIES - 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodecOutput:
    """A batch of clips after the codec, in training form.

    Attributes:
        latents: Latents of the source, (b, t, h, w, c), normalised; no gradient.
        decoded: Decoded latents, same shape.
        features: Features of the codec, (b, t, h, w, f), which condition a refiner.
        q_index: Quality levels of the clips, (b,) int32, rising.
        levels: Quality levels of the latents, (b, t) int32.
        rate: Differentiable rate, (b,), in bits per pixel of the source.
        written: Rate of what a stream would hold, (b,), in the same unit; no gradient.
        error: Mean squared error of the decoded latents, (b,).
        latent_error: The same of each latent, (b, t).
        metrics: Metrics for the log.
    """

    latents: Array
    decoded: Array
    features: Array
    q_index: Array
    levels: Array
    rate: Array
    written: Array
    error: Array
    latent_error: Array
    metrics: Metrics


class MotionOutput(NamedTuple):
    """Clips after the codec with motion, in training form; k latents of each of b clips.

    Attributes:
        latents: Latents of the source, (b, k, h, w, c).
        decoded: Decoded latents, same shape.
        features: Features of the codec, (b, k, h, w, f), which condition a refiner.
        bits: Differentiable rate of each latent, (b, k).
        written: Bits that a stream would hold, (b, k); no gradient.
        written_z: Those of them that hyperlatents take, (b, k).
        skipped, clipped: See `symbol_shares`, (b, k).
        error: Mean squared error of the decoded frames in 8-bit steps, (b, k). Its gradient is that
            of frames without copies (see `roll_out_with_motion`).
        predicted_error: Mean squared error of the frames that motion predicts, (b, k - 1).
        frames: Decoded frames, (b, t, h, w, 3), not clipped.
    """

    latents: Array
    decoded: Array
    features: Array
    bits: Array
    written: Array
    written_z: Array
    skipped: Array
    clipped: Array
    error: Array
    predicted_error: Array
    frames: Array


def symbol_shares(config: CodecConfig, symbols: LatentSymbols) -> tuple[Array, Array]:
    """Shares of symbols that a stream skips, and that do not fit into their tables.

    Args:
        config: Sizes of the codec.
        symbols: Symbols as training has them, none of them skipped: (..., h, w, c).

    Returns:
        The share of the elements of y that carry no symbol, (...); and the share of all symbols of
        y and z in a stream that are as large as their bounds, which encoders clip them to. It
        should be zero.
    """

    def total(x: Array) -> Array:
        return x.sum((-3, -2, -1), dtype=jnp.float32)

    sent = symbols.index >= config.k_skip
    y, z = sent & (jnp.abs(symbols.y) >= SYMBOL_BOUND), jnp.abs(symbols.z) >= Z_BOUND
    count = total(sent) + total(jnp.ones_like(z))
    return 1.0 - sent.mean((-3, -2, -1)), (total(y) + total(z)) / count


def normalised_latents(vae: VAE, params: Tree, statistics: Tree, batch: Array) -> Array:
    """Encodes a batch to normalised latents (b, t, h, w, c), without gradient.

    Args:
        vae: The VAE.
        params: Parameters of the VAE.
        statistics: "mean" and "std" of its latents.
        batch: Frames (b, t, h, w, 3) uint8, or normalised latents from a cache.
    """
    # Devices along `context` share the columns of each clip, here and in the codec.
    latents = constrain(batch, batch=0, context=3)
    # Latents from a cache are normalised already.
    if batch.dtype == jnp.uint8:
        latents = encode_clip(vae, params, to_float(latents))
        latents = (latents - statistics["mean"]) / statistics["std"]
    return constrain(jax.lax.stop_gradient(latents), batch=0, context=3)


def roll_out(
    networks: Networks,
    params: Tree,
    statistics: Tree,
    batch: Array,
    key: Array,
    pattern: LevelPattern | None = None,
) -> CodecOutput:
    """Codes a batch at random quality levels, each latent predicted by the one before.

    Args:
        networks: Networks, with a codec without motion.
        params: Parameters by part, "vae" and "codec".
        statistics: "mean" and "std" of the VAE's latents.
        batch: Frames (b, t, h, w, 3) uint8, h and w multiples of 64, or latents of such clips.
        key: Random key of quality levels and noise.
        pattern: Settings of levels within a group; all latents of a clip have the same by default.
    """
    vae, codec = networks.vae, networks.codec
    key_quality, key_noise = jax.random.split(key)
    latents = normalised_latents(vae, params["vae"], statistics, batch)
    count, t, h, w, _ = latents.shape
    strides = vae.config.temporal_stride, vae.config.stride
    size = (1 + (t - 1) * strides[0]) * h * w * strides[1] ** 2  # pixels of a clip
    q_index = losses.draw_quality(key_quality, count)
    # A key of its own: levels of clips are the same with and without a pattern.
    key_pattern = jax.random.fold_in(key_quality, 1)
    levels = draw_levels(key_pattern, pattern or LevelPattern(), q_index, t)
    coded = codec.apply({"params": params["codec"]}, latents, levels, key_noise)
    bits = coded.y_bits + coded.z_bits
    error = ((coded.latent - latents) ** 2).mean((2, 3, 4))
    # The rate that trains bills noise where nothing is sent; what is logged is what a file has.
    written = (coded.written_y_bits + coded.written_z_bits).sum(1) / size
    skipped, clipped = symbol_shares(codec.config, coded.symbols)
    metrics: Metrics = {
        "distortion": jnp.mean(error),
        "bpp": jnp.mean(written),
        # Levels rise along the batch, so its first and last clip are the extremes.
        "bpp_lowest": written[0],
        "bpp_highest": written[-1],
        "intra_share": bits[:, 0].sum() / bits.sum(),
        "z_share": coded.written_z_bits.sum() / (written.sum() * size),
        "skip_share": skipped.mean(),
        "clipped_share": clipped.mean(),
    }
    return CodecOutput(
        latents,
        coded.latent,
        coded.feature,
        q_index,
        levels,
        bits.sum(1) / size,
        written,
        error.mean(1),
        error,
        metrics,
    )


def encode_latent(vae: VAE, params: Tree, video: Array, first: bool) -> Array:
    """Encodes the frames (b, t, h, w, 3) of one latent to the latent (b, h, w, c)."""
    latents, _ = vae.apply({"params": params}, video, first, method="encode")
    return latents[:, 0]


def roll_out_with_motion(
    networks: Networks,
    params: Tree,
    video: Array,
    vectors: Array,
    levels: Array,
    keys: Array,
    cleaned: int = 1,
) -> MotionOutput:
    """Codes clips in training form, each latent predicted from the last decoded frame.

    Args:
        networks: A linear VAE and a codec with motion.
        params: Parameters by part.
        video: Frames (b, t, h, w, 3) in [-1, 1], t = 1 + 4 (k - 1).
        vectors: Motion of the frames after the first, (b, k - 1, 4, h/16, w/16, 2).
        levels: Quality level of each latent, (b, k).
        keys: Random keys of the latents, (k,).
        cleaned: Number of frames of each latent, counted from the last, that go through the head.
            One is enough for the codec, since later latents depend on no other, and the head costs
            more than the codec.
    """
    vae, codec = {"params": params["vae"]}, {"params": params["codec"]}

    def error(a: Array, b: Array) -> Array:
        return losses.squared_error(a, b) * HALF_RANGE**2  # in 8-bit steps

    def result(
        latent: Array,
        coded: Any,
        decoded: Array,
        compared: Array,
        frames: Array,
        predicted_error: Any,
    ) -> MotionOutput:
        bits = coded.y_bits + coded.z_bits
        return MotionOutput(
            latent,
            coded.latent,
            coded.feature,
            bits,
            coded.written_y_bits + coded.written_z_bits,
            coded.written_z_bits,
            *symbol_shares(networks.codec.config, coded.symbols),
            straight_through(error(decoded, frames), error(compared, frames)),
            predicted_error,
            decoded,
        )

    # The first latent is coded on its own (intra) and decodes to one frame.
    latent = encode_latent(networks.vae, params["vae"], video[:, :1], True)
    state, coded = networks.codec.apply(codec, latent, None, levels[:, 0], keys[0], method="train")
    decoded = networks.vae.apply(vae, coded.latent[:, None], method="decode")
    first = result(latent, coded, decoded, decoded, video[:, :1], None)

    def step(carry: Tree, xs: Tree) -> tuple[Tree, MotionOutput]:
        last, state = carry
        # Of one latent: frames (b, 4, h, w, 3), vectors (b, 4, h/16, w/16, 2), q_index (b,).
        frames, vectors, q_index, key = xs
        # The picture that a decoder has. It passes no gradients on to the past: cells without
        # symbols copy it, so the straight-through gradient of one zero would count once for every
        # latent that copies, and the codec would learn to spend far too many bits.
        kernel = networks.codec.config.motion_kernel
        predicted = predict(to_eight_bits(last), vectors, kernel)
        prediction = encode_latent(networks.vae, params["vae"], predicted, False)
        latent = encode_latent(networks.vae, params["vae"], frames, False)
        state, coded = networks.codec.apply(
            codec, latent, state, q_index, key, prediction, method="train"
        )
        # Frames of the decoded latent, and what no latent can express of the predicted ones.
        given = coded.latent, prediction, predicted, coded.fresh, coded.detail, cleaned
        decoded = networks.vae.apply(vae, *given, method="compensate")
        # A copy has no gradient. The codec learns from what its cells would be if they were coded.
        # (To give copies that gradient with their own error would reward symbols that mend nothing,
        # since the mean of a copied cell is not used: files grew until training diverged.)
        skipped = coded.skipped[:, None]
        compared = networks.vae.apply(vae, decoded, skipped, False, method="add_latents")
        done = result(latent, coded, decoded, compared, frames, error(predicted, frames))
        return (decoded[:, -1], state), done

    # Each of the k - 1 later latents is a step of a scan, with its number as leading axis.
    steps = (
        rearrange(video[:, 1:], "b (k f) h w c -> k b f h w c", f=4),
        jnp.moveaxis(vectors, 1, 0),
        levels[:, 1:].T,
        keys[1:],
    )
    # XLA's CPU code takes about half the time outside loops; the price is compilation.
    unroll = len(keys) - 1 if backend() == "cpu" else 1
    carry = decoded[:, -1], state
    _, later = jax.lax.scan(step, carry, steps, unroll=max(1, unroll))
    later = jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1), later
    )  # (k - 1, b, ...) -> (b, k - 1, ...)
    # Frames (b, k - 1, 4, h, w, 3) follow each other without a border.
    frames = rearrange(later.frames, "b k f h w c -> b (k f) h w c")
    frames = jnp.concatenate([first.frames, frames], axis=1)
    # All fields but the last, `frames`, are (b, ...) of the first latent and (b, k - 1, ...) of the
    # others; nothing predicts the first one.
    joined = [
        b if a is None else jnp.concatenate([a[:, None], b], axis=1)
        for a, b in zip(first[:-1], later[:-1])
    ]
    return MotionOutput._make([*joined, frames])
