"""Stage `codec`: rate and latent error of the latent codec under a fixed VAE (the warm start).

It precedes stage I of GNVC-VD: the codec learns alone, on latents, so that batches may come from a
cache of latents and no DiT runs.
"""

import dataclasses

from gnvc_jax.arrays import Array, Tree
from gnvc_jax.errors import UsageError
from gnvc_jax.model import vae_fingerprint
from gnvc_jax.training import inputs, latent_statistics, losses
from gnvc_jax.training.config import Experiment
from gnvc_jax.training.levels import Metrics, by_level
from gnvc_jax.training.networks import init_networks, make_networks
from gnvc_jax.training.rollout import CodecOutput, LevelPattern, roll_out
from gnvc_jax.training.stages import Stage
from gnvc_jax.training.weights import load_vae


@dataclasses.dataclass(frozen=True)
class CodecLoss(LevelPattern):
    """Settings of (lambda * E_c + R) / lambda^balance.

    See `gnvc_jax.training.losses.rate_distortion`.
    R is the rate in bits per pixel of the source, E_c the mean squared error of decoded latents,
    which are normalised. Where quality levels differ within a group (see `LevelPattern`), errors
    count in proportion to the lambda of their latent; lambda itself is that of the clip.

    Attributes:
        lambda_low: Lambda at quality 0.
        lambda_high: Lambda at quality 63, geometric between.
        balance: Weight of good levels against bad ones; 0 is the paper's sum.

    Raises:
        UsageError: If lambda does not rise with quality.
    """

    lambda_low: float = 0.05
    lambda_high: float = 0.5
    balance: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.lambda_low, self.lambda_high
        if not 0 < low < high:
            raise UsageError(
                f"loss.lambda_low: expected 0 < lambda_low < lambda_high, got {low} and {high}; "
                "equal ones would make all quality levels the same"
            )


def codec_stage(experiment: Experiment) -> Stage:
    """Makes the stage; a quality level is drawn for every clip."""
    # A refiner that the experiment has is neither made nor loaded here.
    networks, weights = make_networks(experiment)._replace(refiner=None), experiment.loss

    def loss(
        params: Tree, constants: Tree, batch: Array, key: Array, step: Array
    ) -> tuple[Array, Metrics]:
        output = roll_out(networks, params, constants, batch, key, weights)
        # Distortion is that of latents alone: no frame is decoded.
        distortion = (worth_of_latents(weights, output) * output.latent_error).mean(1)
        costs = rate_distortion(weights, output, distortion)
        levels = by_level(output.q_index, loss=costs, bpp=output.written, distortion=distortion)
        return costs.mean(), output.metrics | levels

    return Stage(
        experiment,
        init=lambda key: init_networks(networks, key),
        loss=loss,
        data=codec_data(experiment),
        trainable=("codec/",),
        measure=lambda: latent_statistics.measure(experiment),
        constants=dict,
        constant_shapes=lambda: latent_statistics.shapes(experiment),
    )


def rate_distortion(weights: CodecLoss, output: CodecOutput, distortion: Array) -> Array:
    """Rate-distortion loss of each clip, (b,).

    Args:
        weights: Settings of the loss; those of other stages are settings of this one, too.
        output: Result of the roll-out.
        distortion: Distortion of each clip, (b,).
    """
    # (b,), one lambda for the level of each clip.
    weight = losses.rd_lambda(output.q_index, weights.lambda_low, weights.lambda_high)
    return losses.rate_distortion(output.rate, distortion, weight, weights.balance)


def worth_of_latents(weights: CodecLoss, output: CodecOutput) -> Array:
    """Weight (b, t) of the errors of each latent: its lambda over that of its clip."""
    low, high = weights.lambda_low, weights.lambda_high
    # A ratio of lambdas is lambda of the difference of levels, in units of `low`. All are exactly 1
    # where the levels of a group are the same.
    return losses.rd_lambda(output.levels - output.q_index[:, None], low, high) / low


def codec_data(experiment: Experiment) -> inputs.Data:
    """Makes the data: clips, or cached latents of the experiment's VAE."""

    def fingerprint() -> str:
        return vae_fingerprint(experiment.vae, load_vae(experiment))

    return inputs.clips_or_latents(experiment, fingerprint)
