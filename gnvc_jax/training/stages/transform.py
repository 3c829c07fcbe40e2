"""Stage `transform`: the codec of a linear VAE with motion, on squared error of pixels.

A new run starts from statistics of training clips (`fit_to_clips`), so that its first step already
codes. In `roll_out`, the last frame of each latent goes through the VAE's head and becomes the
reference of the next latent's motion, as it will in use; codec and head train together.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from gnvc_jax.codec.config import QUALITIES
from gnvc_jax.codec.fit import init_from_statistics
from gnvc_jax.codec.model import space_to_depth
from gnvc_jax.codec.quantise import straight_through
from gnvc_jax.frames import to_float
from gnvc_jax.moments import Moments
from gnvc_jax.motion.warp import predict, to_eight_bits
from gnvc_jax.parallel import backend
from gnvc_jax.training import inputs, losses
from gnvc_jax.training.config import Experiment
from gnvc_jax.training.latent_statistics import identity_statistics, shapes
from gnvc_jax.training.networks import Networks, init_networks, make_networks
from gnvc_jax.training.stages import Stage
from gnvc_jax.training.weights import Statistics, agreed, placed_like
from gnvc_jax.vae import VAE, klt

Array = jax.Array
Tree = Any

LOSS_SCALE = 0.03  # keeps the norm of gradients well below `optim.clip`
LEVELS_PER_UNIT = 127.5  # 8-bit steps per unit of pixels in [-1, 1]


@dataclasses.dataclass(frozen=True)
class TransformLoss:
    """Settings of the mean over frames of (lambda * E + R) / lambda^balance.

    E is the mean squared error of frames in 8-bit steps, R the rate in bits per pixel.

    Attributes:
        lambda_low: Bits per pixel that a squared error of one 8-bit step is worth at quality 0.
        lambda_high: The same at quality 63, geometric between.
        balance: 0 counts a bit alike at all levels, 1 counts a squared error alike.
        intra_offset: Range of levels by which the first latent is better, drawn for each clip.
        pattern: Levels by which latents 1, 2, 3, 4 after the first (and so on) are better, in clips
            that have a pattern.
        pattern_prob: Share of clips that have a pattern.
    """

    lambda_low: float = 1e-5
    lambda_high: float = 1e-2
    balance: float = 0.5
    intra_offset: tuple[int, int] = (17, 33)
    pattern: tuple[int, ...] = (-4, -2, -4, 4)
    pattern_prob: float = 0.5


class MotionOutput(NamedTuple):
    """Clips after the codec with motion, in training form; k latents of each of b clips.

    Attributes:
        latents: Latents of the source, (b, k, h, w, c).
        decoded: Decoded latents, same shape.
        features: Features of the codec, (b, k, h, w, f), which condition a refiner.
        bits: Differentiable rate of each latent, (b, k).
        written: Bits that a stream would hold, (b, k); no gradient.
        error: Mean squared error of the decoded frames in 8-bit steps, (b, k). Its gradient is that
            of frames without copies (see `roll_out`).
        predicted_error: Mean squared error of the frames that motion predicts, (b, k - 1).
        frames: Decoded frames, (b, t, h, w, 3), not clipped.
    """

    latents: Array
    decoded: Array
    features: Array
    bits: Array
    written: Array
    error: Array
    predicted_error: Array
    frames: Array


def transform_stage(experiment: Experiment) -> Stage:
    """Makes the stage, which trains the codec and the VAE's head, but not the VAE's basis."""
    networks, weights = make_networks(experiment)._replace(refiner=None), experiment.loss
    data, channels = inputs.clips(experiment, motion=True), experiment.vae.latent_channels

    def loss(
        params: Tree, constants: Tree, batch: Tree, key: Array, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        return transform_loss(networks, weights, params, batch, key)

    def fit(params: Tree, statistics: Statistics) -> Tree:
        batches = iter(data.batches(experiment.data.frames))
        batches = [next(batches) for _ in range(experiment.data.statistics_batches)]
        fitted = fit_to_clips(networks, weights, jax.device_get(params), batches)
        return placed_like(params, agreed(fitted))

    def measure() -> Statistics:
        """Leaves latents of a linear VAE as they are: the transform keeps distances."""
        found = identity_statistics(channels)
        return {name: found[name] for name in ("mean", "std")}

    return Stage(
        experiment,
        init=lambda key: init_networks(networks, key),
        loss=loss,
        data=data,
        measure=measure,
        constants=dict,
        constant_shapes=lambda: {name: shapes(experiment)[name] for name in ("mean", "std")},
        fit=fit,
    )


def transform_loss(
    networks: Networks, weights: TransformLoss, params: Tree, batch: Tree, key: Array
) -> tuple[Array, dict[str, Array]]:
    """Computes loss and metrics of a batch of `gnvc_jax.data.clips.with_motion`."""
    video = to_float(batch["video"])
    _, t, h, w, _ = video.shape
    key_levels, *keys = jax.random.split(key, 2 + t // 4)
    levels = draw_levels(key_levels, weights, batch["q_index"], len(keys))
    coded = roll_out(networks, params, video, batch["vectors"], levels, jnp.stack(keys))

    counts, size = jnp.asarray([1.0] + [4.0] * (t // 4)), h * w  # frames per latent; pixels
    rd_lambda = losses.rd_lambda(levels, weights.lambda_low, weights.lambda_high)
    costs = losses.rate_distortion(
        coded.bits / size, coded.error * counts, rd_lambda, weights.balance
    )
    loss = jnp.mean(jnp.sum(costs, 1) / t)

    written = coded.written.sum(1) / (t * size)
    motion = batch["motion_bits"].sum(1) / (t * size)
    psnr = 10.0 * jnp.log10(255.0**2 / coded.error)
    low = batch["q_index"] < QUALITIES // 2

    def mean_of(values: Array, which: Array) -> Array:
        return jnp.sum(values * which) / jnp.maximum(1, jnp.sum(which))

    metrics = {
        "bpp": jnp.mean(written + motion),
        "motion_bpp": jnp.mean(motion),
        "intra_share": coded.written[:, 0].sum() / coded.written.sum(),
        "psnr": psnr.mean(),
        "psnr_intra": psnr[:, 0].mean(),
        "psnr_last": psnr[:, -1].mean(),
        "psnr_predicted": jnp.mean(10.0 * jnp.log10(255.0**2 / coded.predicted_error)),
        "bpp_low": mean_of(written + motion, low),
        "psnr_low": mean_of(psnr.mean(1), low),
    }
    return LOSS_SCALE * loss, metrics


def draw_levels(key: Array, weights: Any, q_index: Array, latents: int) -> Array:
    """Draws the quality level of every latent.

    Args:
        key: Random key.
        weights: `TransformLoss`, or other settings with `intra_offset`, `pattern` and
            `pattern_prob`.
        q_index: Quality levels of the clips, (b,).
        latents: Number of latents per clip.

    Returns:
        Quality levels (b, latents), int32.
    """
    (b,) = q_index.shape
    key_intra, key_pattern = jax.random.split(key)
    low, high = weights.intra_offset
    intra = jax.random.randint(key_intra, (b, 1), low, high + 1)
    pattern = jnp.resize(jnp.asarray(weights.pattern, jnp.int32), (1, latents - 1))
    on = jax.random.bernoulli(key_pattern, weights.pattern_prob, (b, 1))
    offsets = jnp.concatenate([intra, on * pattern], axis=1)
    return jnp.clip(q_index[:, None] + offsets, 0, QUALITIES - 1)


def encode_group(vae: VAE, params: Tree, video: Array, first: bool) -> Array:
    """Encodes the frames (b, t, h, w, 3) of one latent to the latent (b, h, w, c)."""
    latents, _ = vae.apply({"params": params}, video, first, method="encode")
    return latents[:, 0]


def roll_out(
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
        return losses.squared_error(a, b) * LEVELS_PER_UNIT**2

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
            coded.written_bits,
            straight_through(error(decoded, frames), error(compared, frames)),
            predicted_error,
            decoded,
        )

    latent = encode_group(networks.vae, params["vae"], video[:, :1], True)
    state, coded = networks.codec.apply(codec, latent, None, levels[:, 0], keys[0], method="train")
    decoded = networks.vae.apply(vae, coded.latent[:, None], method="decode")
    first = result(latent, coded, decoded, decoded, video[:, :1], None)

    def step(carry: Tree, xs: Tree) -> tuple[Tree, MotionOutput]:
        last, state = carry
        frames, vectors, q_index, key = xs
        # The picture that a decoder has. It passes no gradients on to the past: cells without
        # symbols copy it, so the straight-through gradient of one zero would count once for every
        # latent that copies, and the codec would learn to spend far too many bits.
        predicted = predict(to_eight_bits(last), vectors)
        prediction = encode_group(networks.vae, params["vae"], predicted, False)
        latent = encode_group(networks.vae, params["vae"], frames, False)
        state, coded = networks.codec.apply(
            codec, latent, state, q_index, key, prediction, method="train"
        )
        given = coded.latent, prediction, predicted, coded.fresh, coded.detail, cleaned
        decoded = networks.vae.apply(vae, *given, method="compensate")
        # A copy has no gradient. The codec learns from what its cells would be if they were coded.
        # (To give copies that gradient with their own error would reward symbols that mend nothing,
        # since the mean of a copied cell is not used: files grew until training diverged.)
        skipped = coded.skipped[:, None]
        compared = networks.vae.apply(vae, decoded, skipped, False, method="add_latents")
        done = result(latent, coded, decoded, compared, frames, error(predicted, frames))
        return (decoded[:, -1], state), done

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
    joined = [
        b if a is None else jnp.concatenate([a[:, None], b], axis=1)
        for a, b in zip(first[:-1], later[:-1])
    ]
    return MotionOutput._make([*joined, frames])


def fit_to_clips(
    networks: Networks, weights: TransformLoss, params: Tree, batches: list[Tree]
) -> Tree:
    """Fits the VAE's basis and the codec to batches of clips; networks stay as they are.

    See `gnvc_jax.vae.klt.fit` and `gnvc_jax.codec.fit.init_from_statistics`.
    """
    config, vae = networks.codec.config, networks.vae
    moments = klt.moments_of_blocks(8, 4)
    for batch in batches:
        klt.count_blocks(moments, np.asarray(to_float(batch["video"])), 8, 4)
    fitted = params["vae"] | {"klt": klt.fit(moments, config.latent_channels)}

    @jax.jit
    def latents_of(batch: Tree) -> tuple[Array, Array, Array]:
        """Intra latents of every fourth frame, later latents, and residuals of the latter."""
        video = to_float(batch["video"])
        first = rearrange(video[:, ::4], "b t h w c -> (b t) 1 h w c")
        intra = encode_group(vae, fitted, first, True)
        groups = rearrange(video[:, 1:], "b (k f) h w c -> (b k) f h w c", f=4)
        reference = rearrange(video[:, :-1:4], "b k h w c -> (b k) h w c")
        vectors = rearrange(batch["vectors"], "b k f h w c -> (b k) f h w c")
        later = encode_group(vae, fitted, groups, False)
        prediction = encode_group(vae, fitted, predict(reference, vectors), False)
        return intra, later, later - prediction

    channels = config.latent_channels
    plain = {kind: Moments(channels) for kind in ("intra", "inter")}
    cells = {kind: Moments(4 * channels) for kind in ("intra", "inter")}
    for batch in batches:
        intra, later, residual = latents_of(batch)
        for kind, latents, coded in (("intra", intra, intra), ("inter", later, residual)):
            plain[kind].add(np.asarray(latents))
            cells[kind].add(np.asarray(space_to_depth(coded)))
    codec = dict(params["codec"])
    scales: dict[Literal["intra", "inter"], str] = {"intra": "first_scale", "inter": "later_scale"}
    for kind, scale in scales.items():
        # One latent unit is 1 / scale of an orthonormal coefficient of pixels; the squared error of
        # a pixel is the mean of three colours.
        worth = (LEVELS_PER_UNIT / fitted["klt"][scale]) ** 2 / 3.0
        codec[kind] = init_from_statistics(
            codec,
            config,
            kind,
            cells[kind],
            np.diag(plain[kind].covariance),
            weights.lambda_low * worth,
            weights.lambda_high * worth,
        )
    return {"vae": fitted, "codec": codec}
