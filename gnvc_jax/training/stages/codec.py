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
from gnvc_jax.training.stages.vae import pixels
from gnvc_jax.vae import VAE, encode_clip

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class CodecLoss(LossConfig):
    """lambda * distortion + rate, both per latent value.

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

    def frozen(self) -> Tree:
        """The VAE's weights, and the mean and deviation of its latents over training clips."""
        like = jax.eval_shape(
            lambda k: self.vae.init(k, jnp.zeros((1, 5, 16, 16, 3)))["params"], jax.random.key(0)
        )
        params = load_params(self.experiment.loss.vae, like)
        encode = jax.jit(lambda batch: encode_clip(self.vae, params, pixels(batch)))
        batches = iter(self.dataset())
        count = self.experiment.loss.statistics_batches
        latents = np.concatenate([np.asarray(encode(next(batches))) for _ in range(count)])
        axes = tuple(range(latents.ndim - 1))
        return {"vae": params, "mean": latents.mean(axes), "std": latents.std(axes)}

    def loss(
        self, params: Tree, frozen: Tree, batch: Array, key: Array, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        """batch: uint8 (b, t, h, w, 3), h and w multiples of 64."""
        key_q, key_noise = jax.random.split(key)
        latents = encode_clip(self.vae, frozen["vae"], pixels(batch))
        latents = jax.lax.stop_gradient((latents - frozen["mean"]) / frozen["std"])
        q_index = jax.random.randint(key_q, (batch.shape[0],), 0, QUALITIES)

        coded = self.codec.apply({"params": params}, latents, q_index, key_noise)
        values = latents[0, 0].size  # of one latent frame
        rate = (coded.y_bits + coded.z_bits) / values
        distortion = jnp.mean((coded.latent - latents) ** 2, axis=(2, 3, 4))
        loss = jnp.mean(self.multiplier(q_index)[:, None] * distortion + rate)
        bpp = (coded.y_bits + coded.z_bits).sum() / batch[..., 0].size
        return loss, {
            "distortion": jnp.mean(distortion),
            "bpp": bpp,
            "intra_rate": jnp.mean(rate[:, 0]),
            "inter_rate": jnp.mean(rate[:, 1:]),
            "z_share": coded.z_bits.sum() / (coded.y_bits + coded.z_bits).sum(),
        }

    def multiplier(self, q_index: Array) -> Array:
        """lambda(q): geometric between the two ends."""
        low, high = self.experiment.loss.lambda_low, self.experiment.loss.lambda_high
        return low * (high / low) ** (q_index / (QUALITIES - 1))
