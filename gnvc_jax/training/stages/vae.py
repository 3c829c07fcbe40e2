"""Stage `vae`: train a small VAE from scratch (Wan's own VAE is ported, never trained here)."""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from gnvc_jax.metrics.lpips import load_lpips, lpips
from gnvc_jax.training.config import Experiment, LossConfig
from gnvc_jax.training.stages import Stage, Tree
from gnvc_jax.vae import VAE

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class VAELoss(LossConfig):
    """Weights of the loss terms; pixels are in [-1, 1].

    l1, mse: mean absolute and squared error; kl: divergence from N(0, 1), mean over latent
    elements; lpips: LPIPS (alex), computed from step `lpips_from` on, before it costs nothing.
    """

    l1: float = 1.0
    mse: float = 4.0
    kl: float = 1e-4
    lpips: float = 0.1
    lpips_from: int = 0


class VAEStage(Stage):
    """Reconstruction of clips from a sample of the posterior."""

    def __init__(self, experiment: Experiment):
        super().__init__(experiment)
        self.vae = VAE(experiment.vae)
        self.perceptual = load_lpips("alex") if experiment.loss.lpips else None

    def init(self, key: Array) -> Tree:
        stride = self.experiment.vae.stride
        return self.vae.init(key, jnp.zeros((1, 5, 2 * stride, 2 * stride, 3)))["params"]

    def frozen(self) -> Tree:
        return {"lpips": self.perceptual}

    def loss(
        self, params: Tree, frozen: Tree, batch: Array, key: Array, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        """batch: uint8 (b, t, h, w, 3)."""
        weights = self.experiment.loss
        video = pixels(batch)
        variables = {"params": params}
        mean, logvar = self.vae.apply(variables, video, method="encode")
        latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        output = self.vae.apply(variables, latents, method="decode")

        mse = jnp.mean((output - video) ** 2)
        l1 = jnp.mean(jnp.abs(output - video))
        kl = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1.0 - logvar)
        loss = weights.l1 * l1 + weights.mse * mse + weights.kl * kl
        parts = {"psnr": 10.0 * jnp.log10(4.0 / mse), "kl": kl}
        if weights.lpips:

            def perceptual(output):
                a, b = (rearrange(v, "b t h w c -> (b t) h w c") for v in (output, video))
                return jnp.mean(lpips(frozen["lpips"], a, b))

            on = step >= weights.lpips_from
            parts["lpips"] = lax.cond(on, perceptual, lambda _: 0.0, jnp.clip(output, -1.0, 1.0))
            loss = loss + weights.lpips * parts["lpips"]
        return loss, parts


def pixels(batch: Array) -> Array:
    """uint8 0..255 -> float32 in [-1, 1]."""
    return batch.astype(jnp.float32) / 127.5 - 1.0
