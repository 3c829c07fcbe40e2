"""Stage `transform`: the codec of a linear VAE with motion, on squared error of pixels.

A new run starts from statistics of training clips (`fit_to_clips`), so that its first step already
codes. In the roll-out, the last frame of each latent goes through the VAE's head and becomes the
reference of the next latent's motion, as it will in use; codec and head train together.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from gnvc_jax.arrays import Array, Tree
from gnvc_jax.codec.config import QUALITIES
from gnvc_jax.codec.fit import init_from_statistics
from gnvc_jax.codec.layers import space_to_depth
from gnvc_jax.frames import HALF_RANGE, to_float
from gnvc_jax.moments import Moments
from gnvc_jax.motion.warp import predict
from gnvc_jax.training import inputs, losses
from gnvc_jax.training.config import Experiment
from gnvc_jax.training.latent_statistics import identity_statistics, shapes
from gnvc_jax.training.levels import Metrics, by_level
from gnvc_jax.training.networks import Networks, init_networks, make_networks
from gnvc_jax.training.rollout import (
    LevelPattern,
    MotionOutput,
    draw_levels,
    encode_latent,
    roll_out_with_motion,
)
from gnvc_jax.training.stages import Stage
from gnvc_jax.training.weights import Statistics, agreed, placed_like
from gnvc_jax.vae import klt

LOSS_SCALE = 0.03  # keeps the norm of gradients well below `optim.clip`


@dataclasses.dataclass(frozen=True)
class TransformLoss(LevelPattern):
    """Settings of the mean over frames of (lambda * E + R) / lambda^balance.

    E is the mean squared error of frames in 8-bit steps, R the rate in bits per pixel.

    Attributes:
        lambda_low: Bits per pixel that a squared error of one 8-bit step is worth at quality 0.
        lambda_high: The same at quality 63, geometric between.
        balance: 0 counts a bit alike at all levels, 1 counts a squared error alike.
    """

    lambda_low: float = 1e-5
    lambda_high: float = 1e-2
    balance: float = 0.5
    intra_offset: tuple[int, int] = (17, 33)
    pattern: tuple[int, ...] = (-4, -2, -4, 4)
    pattern_prob: float = 0.5


def transform_stage(experiment: Experiment) -> Stage:
    """Makes the stage, which trains the codec and the VAE's head, but not the VAE's basis."""
    networks, weights = make_networks(experiment)._replace(refiner=None), experiment.loss
    data, channels = inputs.clips(experiment, motion=True), experiment.vae.latent_channels

    def loss(
        params: Tree, constants: Tree, batch: Tree, key: Array, step: Array
    ) -> tuple[Array, Metrics]:
        return transform_loss(networks, weights, params, batch, key)

    def fit(params: Tree, statistics: Statistics) -> Tree:
        # An iterator of its own: the run's first step sees the same clips again.
        batches = iter(data.batches(experiment.data.shape_at(0)))
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
) -> tuple[Array, Metrics]:
    """Computes loss and metrics of a batch of `gnvc_jax.data.clips.with_motion`."""
    video = to_float(batch["video"])
    # One key for the levels and one for each of the 1 + t // 4 latents.
    key_levels, *keys = jax.random.split(key, 2 + video.shape[1] // 4)
    levels = draw_levels(key_levels, weights, batch["q_index"], len(keys))
    coded = roll_out_with_motion(networks, params, video, batch["vectors"], levels, jnp.stack(keys))

    return codec_loss(weights, coded, levels, batch)


def codec_loss(
    weights: TransformLoss, coded: MotionOutput, levels: Array, batch: Tree
) -> tuple[Array, Metrics]:
    """Computes rate-distortion loss and metrics of a roll-out with motion.

    Args:
        weights: Settings of the loss.
        coded: Clips of `batch` as `roll_out_with_motion` codes them.
        levels: Quality level of each latent, (b, k).
        batch: Batch of `gnvc_jax.data.clips.with_motion`.
    """
    _, t, h, w, _ = coded.frames.shape
    counts, size = jnp.asarray([1.0] + [4.0] * (t // 4)), h * w  # frames per latent; pixels
    rd_lambda = losses.rd_lambda(levels, weights.lambda_low, weights.lambda_high)
    # (b, k): bits per pixel of a frame, and errors summed over the frames of a latent. The sum over
    # latents, divided by t, is a mean over frames.
    errors = coded.error * counts
    costs = losses.rate_distortion(coded.bits / size, errors, rd_lambda, weights.balance)
    costs = LOSS_SCALE * costs.sum(1) / t  # (b,)

    written = coded.written.sum(1) / (t * size)
    motion = batch["motion_bits"].sum(1) / (t * size)
    # Of the mean error of each latent's frames, (b, k).
    psnr = 10.0 * jnp.log10(255.0**2 / coded.error)
    low = batch["q_index"] < QUALITIES // 2

    def mean_of(values: Array, which: Array) -> Array:
        return jnp.sum(values * which) / jnp.maximum(1, jnp.sum(which))

    # "predicted" is the quality of motion alone, before residuals; "low" the lower half of levels.
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
        "z_share": coded.written_z.sum() / coded.written.sum(),
        "skip_share": coded.skipped.mean(),
        "clipped_share": coded.clipped.mean(),
    }
    values = {"loss": costs, "bpp": written + motion, "distortion": errors.sum(1) / t}
    return costs.mean(), metrics | by_level(batch["q_index"], **values)


def fit_to_clips(
    networks: Networks, weights: TransformLoss, params: Tree, batches: list[Tree]
) -> Tree:
    """Fits the VAE's basis and the codec to batches of clips; networks stay as they are.

    See `gnvc_jax.vae.klt.fit` and `gnvc_jax.codec.fit.init_from_statistics`.
    """
    config, vae = networks.codec.config, networks.vae
    # First the basis of the VAE, by the strides 8 and 4 that motion is made for; then, on its
    # latents, the codec.
    moments = klt.moments_of_blocks(8, 4)
    for batch in batches:
        klt.count_blocks(moments, np.asarray(to_float(batch["video"])), 8, 4)
    fitted = params["vae"] | {"klt": klt.fit(moments, config.latent_channels)}

    @jax.jit
    def latents_of(batch: Tree) -> tuple[Array, Array, Array]:
        """Intra latents of every fourth frame, later latents, and residuals of the latter."""
        video = to_float(batch["video"])
        # Any frame may begin a group, so every fourth one is encoded as if it did.
        first = rearrange(video[:, ::4], "b t h w c -> (b t) 1 h w c")
        intra = encode_latent(vae, fitted, first, True)
        groups = rearrange(video[:, 1:], "b (k f) h w c -> (b k) f h w c", f=4)
        # Predictions are from source frames, since there are no decoded ones yet.
        reference = rearrange(video[:, :-1:4], "b k h w c -> (b k) h w c")
        vectors = rearrange(batch["vectors"], "b k f h w c -> (b k) f h w c")
        later = encode_latent(vae, fitted, groups, False)
        predicted = predict(reference, vectors, config.motion_kernel)
        prediction = encode_latent(vae, fitted, predicted, False)
        return intra, later, later - prediction

    channels = config.latent_channels
    # Of single latents, and of cells of 2x2 latents, which one position of y codes.
    plain = {kind: Moments(channels) for kind in ("intra", "inter")}
    cells = {kind: Moments(4 * channels) for kind in ("intra", "inter")}
    for batch in batches:
        intra, later, residual = latents_of(batch)
        for kind, latents, coded in (("intra", intra, intra), ("inter", later, residual)):
            plain[kind].add(np.asarray(latents))
            cells[kind].add(np.asarray(space_to_depth(coded)))
    # A copy, in which the transforms for intra latents and for residuals are replaced.
    codec = dict(params["codec"])
    scales: dict[Literal["intra", "inter"], str] = {"intra": "first_scale", "inter": "later_scale"}
    for kind, scale in scales.items():
        # One latent unit is 1 / scale of an orthonormal coefficient of pixels; the squared error of
        # a pixel is the mean of three colours.
        worth = (HALF_RANGE / fitted["klt"][scale]) ** 2 / 3.0
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
