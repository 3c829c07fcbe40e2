"""Stage `codec`: rate and latent error of the latent codec under a frozen VAE (the warm start)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gnvc_jax.codec.config import QUALITIES
from gnvc_jax.codec.model import LatentCodec
from gnvc_jax.training.checkpoints import load_params
from gnvc_jax.training.config import Experiment, LossConfig
from gnvc_jax.training.stages import Stage, Tree
from gnvc_jax.training.stages.vae import init_vae, pixels
from gnvc_jax.vae import VAE, encode_clip

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class CodecLoss(LossConfig):
    """lambda * distortion + rate, both per latent value, over sqrt(lambda) (see `balanced`).

    lambda_low, lambda_high: weight of the mean squared error of normalised latents at quality 0
    and 63, geometric between; vae: run of the stage `vae` whose averaged weights are frozen here;
    statistics_batches: batches that the mean and deviation of each latent channel are taken from.
    """

    lambda_low: float = 0.5
    lambda_high: float = 64.0
    vae: str = "runs/tiny/vae"
    statistics_batches: int = 8


class CodecStage(Stage):
    """Rate-distortion training with a quality level drawn for every clip."""

    def __init__(self, experiment: Experiment):
        super().__init__(experiment)
        self.vae = VAE(experiment.vae)
        self.codec = LatentCodec(experiment.codec)

    def init(self, key: Array) -> Tree:
        latents = jnp.zeros((1, 2, 8, 8, self.experiment.codec.latent_channels))
        return self.codec.init(key, latents, jnp.zeros((1,), jnp.int32), key)["params"]

    def load_vae(self) -> Tree:
        """The averaged weights of the VAE's run, on the host."""
        like = jax.eval_shape(lambda key: init_vae(self.vae, key), jax.random.key(0))
        return load_params(self.experiment.loss.vae, like)

    def frozen(self) -> Tree:
        """The VAE's weights, and mean and deviation of each channel of its latents.

        Those of a linear encoder are 0 and 1 as they are: the transform keeps distances, so that
        equal errors in any two channels are equal errors of pixels.
        """
        params = self.load_vae()
        if self.experiment.vae.linear_encoder:
            channels = self.experiment.vae.latent_channels
            return {
                "vae": params,
                "mean": np.zeros(channels, np.float32),
                "std": np.ones(channels, np.float32),
            }
        encode = jax.jit(lambda batch: encode_clip(self.vae, params, pixels(batch)))
        batches = iter(self.dataset())
        count = self.experiment.loss.statistics_batches
        latents = np.concatenate([np.asarray(encode(next(batches))) for _ in range(count)])
        axes = tuple(range(latents.ndim - 1))
        return {"vae": params, "mean": latents.mean(axes), "std": latents.std(axes)}

    def model_parts(self, params: Tree, frozen: Tree) -> tuple[Tree, Tree]:
        """Parameters of the VAE and of the codec that go into a model file."""
        return frozen["vae"], params

    def loss(
        self, params: Tree, frozen: Tree, batch: Array, key: Array, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        """batch: uint8 (b, t, h, w, 3), h and w multiples of 64."""
        _, rate, distortion, multiplier, parts = self.code(params, frozen, batch, key)
        return balanced(multiplier, distortion.mean(1), rate.mean(1)), parts

    def code(self, params: Tree, frozen: Tree, batch: Array, key: Array):
        """Code a batch at random quality levels, in training form.

        Returns Coded; rate (b, t') in bits and squared error (b, t'), both per latent value; lambda
        (b,), rising along the batch; and a dict of metrics.
        """
        key_q, key_noise = jax.random.split(key)
        latents = encode_clip(self.vae, frozen["vae"], pixels(batch))
        latents = jax.lax.stop_gradient((latents - frozen["mean"]) / frozen["std"])
        count = batch.shape[0]
        # One level from each of `count` equal ranges: every batch sees the whole scale.
        draws = (jnp.arange(count) + jax.random.uniform(key_q, (count,))) / count
        q_index = jnp.minimum(draws * QUALITIES, QUALITIES - 1).astype(jnp.int32)

        coded = self.codec.apply({"params": params}, latents, q_index, key_noise)
        bits = coded.y_bits + coded.z_bits
        rate = bits / latents[0, 0].size
        distortion = jnp.mean((coded.latent - latents) ** 2, axis=(2, 3, 4))
        bpp = bits.sum(1) / batch[0, ..., 0].size
        parts = {
            "distortion": jnp.mean(distortion),
            "bpp": jnp.mean(bpp),
            "bpp_lowest": bpp[0],
            "bpp_highest": bpp[-1],
            "intra_rate": jnp.mean(rate[:, 0]),
            "inter_rate": jnp.mean(rate[:, 1:]),
            "z_share": coded.z_bits.sum() / bits.sum(),
        }
        return coded, rate, distortion, self.multiplier(q_index), parts

    def multiplier(self, q_index: Array) -> Array:
        """lambda(q): geometric between the two ends."""
        low, high = self.experiment.loss.lambda_low, self.experiment.loss.lambda_high
        return low * (high / low) ** (q_index / (QUALITIES - 1))


def balanced(multiplier: Array, distortion: Array, rate: Array) -> Array:
    """Mean of (lambda * distortion + rate) / sqrt(lambda); all arguments (b,).

    Without the root the best levels, whose loss is a hundred times that of the lowest, would be
    all that shared weights learn for.
    """
    return jnp.mean(multiplier**-0.5 * (multiplier * distortion + rate))
