"""Stage `latent` (stage I of GNVC-VD): codec and refiner together, on latents.

A window of the decoded latents is refined by one step from a random flow time. The loss compares
the velocity there (conditional flow matching, equations 3 and 4) and the latents it leads to.
"""

import dataclasses

import jax
import numpy as np

from gnvc_jax.arrays import Array, Tree
from gnvc_jax.training import latent_statistics, losses, weights
from gnvc_jax.training.config import Experiment
from gnvc_jax.training.levels import Metrics, by_level
from gnvc_jax.training.networks import init_networks, make_networks
from gnvc_jax.training.refinement import random_window, refiner_velocity
from gnvc_jax.training.rollout import roll_out
from gnvc_jax.training.stages import Stage
from gnvc_jax.training.stages.codec import CodecLoss, codec_data, rate_distortion, worth_of_latents
from gnvc_jax.training.weights import Statistics


@dataclasses.dataclass(frozen=True)
class LatentLoss(CodecLoss):
    """Settings of (R + lambda (refined E_1 + decoded E_c)) / lambda^balance + matching L_CFM.

    R is the rate in bits per pixel; E_1 and E_c are mean squared errors of refined and of decoded
    latents, the refined ones estimated in one step from the drawn flow time; L_CFM is the error of
    the velocity there (GNVC-VD, stage I).

    Attributes:
        refined: Weight of E_1.
        decoded: Weight of E_c.
        matching: Weight of L_CFM.
    """

    refined: float = 1.0
    decoded: float = 0.1
    matching: float = 1.0


def latent_stage(experiment: Experiment) -> Stage:
    """Makes the stage, which starts from a codec that was trained alone.

    `experiment.train` says which parameters train.
    """
    loss_weights, networks = experiment.loss, make_networks(experiment)
    config = networks.refiner.config

    def loss(
        params: Tree, constants: Tree, batch: Array, key: Array, step: Array
    ) -> tuple[Array, Metrics]:
        # Roll-out of the codec, with its rate and E_c.
        key_code, key_time, key_noise, key_window = jax.random.split(key, 4)
        output = roll_out(networks, params, constants, batch, key_code, loss_weights)
        # One window of the group, whitened, and one flow time per clip. Decoded latents keep their
        # gradient, so that the refiner's loss reaches the codec, too.
        count = output.latents.shape[1]
        window = random_window(key_window, constants["white"], count, config.window)
        clean, decoded = window.whitened(output.latents), window.whitened(output.decoded)
        levels = window.cut(output.levels)
        velocity = refiner_velocity(networks.refiner, levels, constants["text"])
        conditions = params["refiner"], decoded, window.cut(output.features)
        # Equations 3 and 4 on the window, and their error at the drawn time.
        noise = config.noise * jax.random.normal(key_noise, clean.shape)
        tau = losses.draw_flow_time(key_time, len(clean), config.start)
        found = losses.flow_matching(
            lambda state, tau: velocity(conditions, state, tau),
            clean,
            decoded,
            noise,
            tau,
            config.start,
        )
        # E_1 is in the units of the codec's latents, as E_c is, hence not whitened.
        worth = worth_of_latents(loss_weights, output)
        errors = (window.unwhitened(found.estimate - clean) ** 2).mean((2, 3, 4))
        refined = (window.cut(worth) * errors).mean(1)
        coded = (worth * output.latent_error).mean(1)
        distortion = loss_weights.refined * refined + loss_weights.decoded * coded
        # Matching is outside of the rate-distortion sum: no lambda weighs it.
        costs = rate_distortion(loss_weights, output, distortion)
        costs += loss_weights.matching * found.error
        metrics = output.metrics | {"flow": found.error.mean(), "refined": refined.mean()}
        levels = by_level(output.q_index, loss=costs, bpp=output.written, distortion=distortion)
        return costs.mean(), metrics | levels

    return Stage(
        experiment,
        init=lambda key: init_networks(networks, key),
        loss=loss,
        data=codec_data(experiment),
        trainable=experiment.train,
        measure=lambda: latent_statistics.measure(experiment),
        constants=lambda statistics: refiner_constants(experiment, statistics),
        constant_shapes=lambda: refiner_constant_shapes(experiment),
    )


def refiner_constants(experiment: Experiment, statistics: Statistics) -> Tree:
    """Constants of a refiner: statistics of latents, and the text condition or None."""
    return statistics | {"text": weights.load_text(experiment)}


def refiner_constant_shapes(experiment: Experiment) -> Tree:
    """Shapes of what `refiner_constants` returns."""
    text = None
    if (config := weights.text_config(experiment)) is not None:
        text = jax.ShapeDtypeStruct((1, config.text_length, config.text_width), np.float32)
    return latent_statistics.shapes(experiment) | {"text": text}
