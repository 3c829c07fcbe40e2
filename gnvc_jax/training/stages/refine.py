"""Stage `refine`: the refiner of a codec with motion, one step, on frames.

The codec is rolled out as in the stage `transform`. The refiner sees a window of decoded latents
and learns, by one step of its flow, to make the frames look like the source. Its change of latents
becomes a change of decoded frames by the VAE's inverse transform, as in decoders.

The codec stays as it is, unless `RefineLoss.codec` gives its own loss a weight: then both train
together, and the codec learns to send what the refiner makes the most of (GNVC-VD, stage II).

A codec that stays as it is need not be rolled out in each step: with `data.latents`, clips come
from a cache, as the codec's encoder and decoder have made them (`gnvc cache-coded`). That is
faster, and it is what the refiner meets in use: groups of full length, and motion that the encoder
searched along what it had decoded.
"""

import dataclasses
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from einops import rearrange

from gnvc_jax.arrays import Array, Tree
from gnvc_jax.errors import UsageError
from gnvc_jax.frames import to_float
from gnvc_jax.metrics.backbones import load_weights
from gnvc_jax.metrics.dists import dists, load_dists
from gnvc_jax.metrics.lpips import lpips
from gnvc_jax.pretrained import find_model
from gnvc_jax.training import inputs, latent_statistics, losses
from gnvc_jax.training.config import Experiment
from gnvc_jax.training.discriminator import (
    NAME,
    AdversarialConfig,
    adversarial_loss,
    init_discriminator,
    trainable,
)
from gnvc_jax.training.levels import Metrics, by_level
from gnvc_jax.training.networks import Networks, init_networks, make_networks
from gnvc_jax.training.refinement import random_window, refiner_velocity
from gnvc_jax.training.rollout import draw_levels, roll_out_with_motion
from gnvc_jax.training.stages import Stage
from gnvc_jax.training.stages.latent import refiner_constant_shapes, refiner_constants
from gnvc_jax.training.stages.transform import TransformLoss, codec_loss
from gnvc_jax.training.weights import Statistics

PAIR = 2  # latents whose frames are compared: two, so that differences cross their border

# Metrics of the codec that are of interest beside those of refined frames.
CODEC_METRICS = (
    *("bpp", "bpp_low", "psnr_low", "levels/bpp"),
    *("z_share", "skip_share", "clipped_share"),
)


@dataclasses.dataclass(frozen=True)
class RefineLoss(TransformLoss):
    """Settings of the loss of refined frames, with or without that of the codec.

    The loss is squared * E + lpips * LPIPS + vgg * V + dists * DISTS + temporal * T + latent * L
    + codec * C + adversarial.weight * A.

    E is the mean squared error of pixels in [-1, 1], T that of the differences of successive
    frames, which keeps refinement from flickering. LPIPS (AlexNet) sees the frames of two latents
    of each clip; DISTS and V, which is LPIPS with VGG16, see a quarter of one of these frames. L is
    the mean squared error of all whitened latents of the window, most of which are not seen as
    frames in a step. C is the loss of the stage `transform`, which has the inherited settings; the
    other terms are of refined frames.

    A refiner with attention in windows must see more than one window, as it will in use, while
    losses cost more than it does: with `part`, they see a random part of each frame.

    Attributes:
        part: Height and width in pixels of what losses see of frames; None for all.
        squared: Weight of E.
        lpips: Weight of LPIPS.
        vgg: Weight of V.
        dists: Weight of DISTS.
        temporal: Weight of T.
        latent: Weight of L.
        codec: Weight of C. At 0 the codec does not train.
        adversarial: Weight of A, the hinge loss against a discriminator that sees the same frames
            as LPIPS. At 0 there is none.
    """

    part: int | None = None
    squared: float = 4.0
    lpips: float = 2.0
    vgg: float = 0.0
    dists: float = 1.5
    temporal: float = 1.0
    latent: float = 0.05
    codec: float = 0.0
    adversarial: AdversarialConfig = dataclasses.field(default_factory=AdversarialConfig)


class CodedClips(NamedTuple):
    """Clips as a codec decodes them, k latents of each of b clips.

    Attributes:
        video: Frames of the source, (b, t, h, w, 3) in [-1, 1].
        frames: Decoded frames, same shape.
        latents: Latents of the source, (b, k, h, w, c), normalised.
        decoded: Decoded latents, same shape.
        features: Features of the codec, (b, k, h, w, f).
        levels: Quality level of each latent, (b, k).
        loss: Loss and metrics of the codec, see `gnvc_jax.training.stages.transform.codec_loss`.
    """

    video: Array
    frames: Array
    latents: Array
    decoded: Array
    features: Array
    levels: Array
    loss: tuple[Array | float, Metrics]


class RefinedFrames(NamedTuple):
    """Frames of a window of latents that losses compare.

    Attributes:
        refined, decoded, source: Frames (b, t, h, w, 3) of `PAIR` latents.
        first: The same three for the first frame of the group, each (b, 1, h, w, 3).
        latents: Error of the whitened latents of the window, (b,).
        codec: Loss and metrics of the codec.
        q_index: Quality levels of the clips, (b,).
    """

    refined: Array
    decoded: Array
    source: Array
    first: tuple[Array, Array, Array]
    latents: Array
    codec: tuple[Array | float, Metrics]
    q_index: Array


def refine_stage(experiment: Experiment) -> Stage:
    """Makes the stage, which starts from a run of the stage `transform`, or from one of its own.

    The VAE of that run stays as it is.

    Raises:
        UsageError: If windows or clips are too short, `loss.part` is larger than a crop, or a cache
            is given to a stage that trains the codec or does not start from a model file.
    """
    # A window with the first latent must have room for a pair beside it, and clips are one latent
    # longer than the window.
    networks, weights = make_networks(experiment), experiment.loss
    window, least = networks.refiner.config.window, 1 + (PAIR + 1) * experiment.vae.temporal_stride
    if window <= PAIR or experiment.data.frames < least:
        raise UsageError(
            f"the stage `refine` needs refiner.window > {PAIR} and data.frames >= {least}, got "
            f"{window} and {experiment.data.frames}"
        )
    perceptual = {"alex": load_weights("alex"), "dists": load_dists()}
    if weights.part and weights.part > min(min(shape.size) for shape in experiment.data.shapes):
        raise UsageError(f"loss.part: must be at most data.size, got {weights.part}")
    if weights.vgg:
        perceptual["vgg"] = load_weights("vgg")
    cached, model = experiment.data.latents is not None, experiment.init.model
    if cached and (weights.codec or model is None):
        raise UsageError(
            "data.latents: the codec of coded clips stays as it is: set loss.codec = 0, and "
            "init.model to the model that coded them"
        )

    def codec_fingerprint() -> str:
        return find_model(cast(str, model)).fingerprints[0].hex()

    def loss(
        params: Tree, constants: Tree, batch: Tree, key: Array, step: Array
    ) -> tuple[Array, Metrics]:
        key_code, key_frames, key_dists = jax.random.split(key, 3)
        if cached:
            coded = from_cache(batch)
        else:
            coded = rolled_out(networks, weights, params, batch, key_code)
        frames = refined_frames(networks, params, constants, coded, key_frames)
        discriminator = params.get(NAME, {})
        return refine_loss(weights, constants, frames, key_dists, discriminator, step)

    def constants(statistics: Statistics) -> Tree:
        return refiner_constants(experiment, statistics) | perceptual

    def constant_shapes() -> Tree:
        return refiner_constant_shapes(experiment) | jax.eval_shape(lambda: perceptual)

    return Stage(
        experiment,
        init=lambda key: (
            init_networks(networks, key) | init_discriminator(weights.adversarial, key)
        ),
        loss=loss,
        data=(
            inputs.coded_clips(experiment, codec_fingerprint)
            if cached
            else inputs.clips(experiment, motion=True)
        ),
        trainable=(
            *(("codec/", "refiner/") if weights.codec else ("refiner/",)),
            *trainable(weights.adversarial),
        ),
        measure=lambda: latent_statistics.measure(experiment),
        constants=constants,
        constant_shapes=constant_shapes,
    )


def rolled_out(
    networks: Networks, weights: RefineLoss, params: Tree, batch: Tree, key: Array
) -> CodedClips:
    """Codes a batch in training form.

    Args:
        networks: A linear VAE and a codec with motion.
        weights: Settings of the loss. Gradients reach the codec only if its loss has a weight.
        params: Parameters by part.
        batch: Batch of `gnvc_jax.data.clips.with_motion`.
        key: Random key.
    """
    video, vectors = to_float(batch["video"]), batch["vectors"]
    count = 1 + vectors.shape[1]
    key_levels, key_code = jax.random.split(key)
    levels = draw_levels(key_levels, weights, batch["q_index"], count)
    keys = jax.random.split(key_code, count)
    # All four frames of each latent go through the head: any of them may be shown.
    coded = roll_out_with_motion(networks, params, video, vectors, levels, keys, cleaned=4)
    if not weights.codec:
        coded = jax.lax.stop_gradient(coded)
    loss, metrics = codec_loss(weights, coded, levels, batch)
    found = coded.frames, coded.latents, coded.decoded, coded.features, levels
    return CodedClips(video, *found, (loss, {name: metrics[name] for name in CODEC_METRICS}))


def from_cache(batch: Tree) -> CodedClips:
    """Makes coded clips of a batch of `gnvc_jax.data.latents.CODED`."""
    video, frames = (to_float(batch[name]) for name in ("video", "frames"))
    latents, decoded, features = (batch[name] for name in ("latents", "decoded", "features"))
    return CodedClips(video, frames, latents, decoded, features, batch["levels"], (0.0, {}))


def refined_frames(
    networks: Networks, params: Tree, constants: Tree, coded: CodedClips, key: Array
) -> RefinedFrames:
    """Refines a window of the latents of coded clips, and decodes a part of it to frames.

    Args:
        networks: A linear VAE, a codec with motion, and a refiner.
        params: Parameters by part.
        constants: Constants of the refiner.
        coded: Coded clips.
        key: Random key.
    """
    video, count, config = coded.video, coded.levels.shape[1], networks.refiner.config
    key_window, key_noise, key_pair = jax.random.split(key, 3)

    # One step of the flow on a window of latents.
    window = random_window(key_window, constants["white"], count, config.window)
    # Both are cut out of the group; features are not whitened.
    decoded, features = window.whitened(coded.decoded), window.cut(coded.features)
    noise = config.noise * jax.random.normal(key_noise, decoded.shape)
    velocity = refiner_velocity(networks.refiner, window.cut(coded.levels), constants["text"])
    refined = losses.refine_through_last_step(
        velocity, (params["refiner"], decoded, features), decoded, noise, 1, config.start
    )
    # In units of the codec's latents. The VAE is linear: a change of latents is one of frames.
    change = window.unwhitened(refined - decoded)

    def shown(latents: Array, frames: Array, first: bool) -> Array:
        """Changes decoded frames as a change of their latents does."""
        vae = {"params": params["vae"]}
        return networks.vae.apply(vae, frames, latents, first, method="add_latents")

    # Two latents after the first one of the group, and their 8 frames. Latent n > 0 stands for the
    # frames 4n - 3 to 4n.
    start = jax.random.randint(
        key_pair, (), jnp.maximum(window.first, 1), window.first + window.size - PAIR + 1
    )
    # (b, PAIR, h, w, c) of the window, and (b, 4 * PAIR, H, W, 3) of the clip.
    pair = jax.lax.dynamic_slice_in_dim(change, start - window.first, PAIR, 1)
    before, source = (
        jax.lax.dynamic_slice_in_dim(x, 4 * start - 3, 4 * PAIR, 1) for x in (coded.frames, video)
    )
    # The first frame changes only where the window holds it.
    intra = jnp.where(window.first == 0, 1.0, 0.0) * change[:, :1]
    first = shown(intra, coded.frames[:, :1], True), coded.frames[:, :1], video[:, :1]
    error = losses.squared_error(refined, window.whitened(coded.latents))
    after = shown(pair, before, False)
    # The level of the last latent is that of the clip; the first may be coded at a better one.
    return RefinedFrames(after, before, source, first, error, coded.loss, coded.levels[:, -1])


def random_square(frames: Array, side: int | None, key: Array) -> Array:
    """Cuts the same random square out of all frames (b, t, h, w, 3), the same for equal keys."""
    if side is None:
        return frames
    _, _, h, w, _ = frames.shape
    top, left = jax.random.randint(key, (2,), 0, jnp.asarray([h, w]) - side + 1)
    return jax.lax.dynamic_slice(
        frames, (0, 0, top, left, 0), (*frames.shape[:2], side, side, frames.shape[-1])
    )


def refine_loss(
    weights: RefineLoss,
    constants: Tree,
    frames: RefinedFrames,
    key: Array,
    discriminator: Tree,
    step: Array,
) -> tuple[Array, Metrics]:
    """Computes loss and metrics of refined frames.

    Args:
        weights: Weights of the terms.
        constants: Weights of the networks "alex" and "vgg" (LPIPS) and "dists".
        frames: Frames to compare.
        key: Random key of what DISTS and LPIPS of VGG16 see.
        discriminator: Parameters of the discriminator, empty if there is none.
        step: Number of steps done.
    """
    key, key_part = jax.random.split(key)
    shown = frames.refined, frames.decoded, frames.source
    pair, first = (
        [random_square(x, weights.part, key_part) for x in xs] for xs in (shown, frames.first)
    )
    # The first frame and those of the pair, (b, 1 + 4 * PAIR, h, w, 3), clipped as by a decoder.
    refined, decoded, source = (
        jnp.clip(jnp.concatenate([a, b], axis=1), -1.0, 1.0) for a, b in zip(first, pair)
    )

    def flat(x: Array) -> Array:
        return rearrange(x, "b t h w c -> (b t) h w c")

    perceptual = lpips(constants["alex"], flat(refined), flat(source))
    perceptual = rearrange(perceptual, "(b t) -> b t", b=len(source)).mean(1)
    # VGG16 costs far more than the AlexNet of LPIPS, hence a random quarter of one frame for it.
    key_frame, key_place = jax.random.split(key)
    one = jax.random.randint(key_frame, (1,), 0, refined.shape[1])
    side = min(refined.shape[2:4]) // 2
    small, true = (flat(random_square(x[:, one], side, key_place)) for x in (refined, source))
    before = lpips(constants["alex"], flat(decoded[:, one]), flat(source[:, one])).mean()
    # Images of DISTS are in [0, 1].
    structure = dists(constants["dists"], (small + 1) / 2, (true + 1) / 2)
    vgg = lpips(constants["vgg"], small, true) if weights.vgg else jnp.zeros_like(structure)
    squared = losses.squared_error(refined, source)
    # Differences of the pair alone, since the first frame need not come right before it.
    moves = jnp.diff(pair[0], axis=1) - jnp.diff(pair[2], axis=1)
    temporal = losses.per_clip(moves**2)
    costs = (  # (b,)
        weights.squared * squared
        + weights.lpips * perceptual
        + weights.vgg * vgg
        + weights.dists * structure
        + weights.temporal * temporal
        + weights.latent * frames.latents
    )
    game_metrics, adversary = {}, 0.0
    if weights.adversarial.weight:
        game = adversarial_loss(weights.adversarial, discriminator, refined, source, step)
        costs += weights.adversarial.weight * game.generator
        game_metrics, adversary = game.metrics, game.training
    loss = costs.mean() + weights.codec * frames.codec[0] + adversary

    def psnr(error: Array) -> Array:
        return jnp.mean(10.0 * jnp.log10(4.0 / error))

    # The codec's metrics are means over whole clips, the others over the frames compared.
    metrics = frames.codec[1] | {
        "lpips": perceptual.mean(),
        "lpips_decoded": before,
        "dists": structure.mean(),
        "psnr": psnr(squared),
        "psnr_decoded": psnr(losses.squared_error(decoded, source)),
        "temporal": temporal.mean(),
    }
    if weights.vgg:
        metrics["vgg"] = vgg.mean()
    # Of refined frames alone, without the loss of the codec.
    levels = by_level(frames.q_index, loss=costs, distortion=squared, lpips=perceptual)
    return loss, metrics | game_metrics | levels
