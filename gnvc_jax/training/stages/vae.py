"""Stage `vae`: train a small VAE from scratch (Wan's own VAE is ported, never trained here)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

from gnvc_jax.metrics.backbones import load_weights
from gnvc_jax.metrics.lpips import lpips
from gnvc_jax.training.config import Experiment, LossConfig, Policy
from gnvc_jax.training.stages import Stage, Tree, agreed, placed_like
from gnvc_jax.vae import VAE, klt

Array = jax.Array

KLT_BLOCKS = 40_000  # that the linear transform of a VAE is fitted to


@dataclasses.dataclass(frozen=True)
class VAELoss(LossConfig):
    """Weights of the loss terms; pixels are in [-1, 1].

    l1, mse: mean absolute and squared error; kl: divergence from N(0, 1), mean over latent
    elements; lpips: LPIPS (alex), computed from step `lpips_from` on, before it costs nothing, on
    `lpips_frames` random frames of each clip.
    """

    l1: float = 1.0
    mse: float = 4.0
    kl: float = 1e-4
    lpips: float = 0.1
    lpips_from: int = 0
    lpips_frames: int = 2


class VAEStage(Stage):
    """Reconstruction of clips from a sample of the posterior."""

    def __init__(self, experiment: Experiment):
        super().__init__(experiment)
        self.vae = make_vae(experiment)
        self.perceptual = load_weights("alex") if experiment.loss.lpips else None

    def init(self, key: Array) -> Tree:
        return init_vae(self.vae, key)

    def warm_start(self, params: Tree) -> Tree:
        """A linear transform is fitted to training clips, unless a run is named to start from."""
        cfg = self.experiment.vae
        if not cfg.linear or self.experiment.init_from is not None:
            return super().warm_start(params)
        strides, batches = (cfg.stride, cfg.temporal_stride), iter(self.dataset())
        moments = klt.moments_of_blocks(*strides)
        while moments["later"].count < KLT_BLOCKS:
            klt.count_blocks(moments, np.asarray(pixels(next(batches))), *strides)
        fitted = agreed(klt.fit(moments, cfg.latent_channels))
        return params | {"klt": placed_like(params["klt"], fitted)}

    def frozen(self) -> Tree:
        return {"lpips": self.perceptual}

    def frozen_shapes(self) -> Tree:
        return jax.eval_shape(self.frozen)

    def loss(
        self, params: Tree, frozen: Tree, batch: Array, key: Array, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        """batch: uint8 (b, t, h, w, 3)."""
        weights = self.experiment.loss
        video = pixels(batch)
        variables = {"params": params}
        mean, logvar = self.vae.apply(variables, video, method="encode")
        key_noise, key_frames = jax.random.split(key)
        latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key_noise, mean.shape)
        output = self.vae.apply(variables, latents, method="decode")

        mse = jnp.mean((output - video) ** 2)
        l1 = jnp.mean(jnp.abs(output - video))
        kl = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1.0 - logvar)
        loss = weights.l1 * l1 + weights.mse * mse + weights.kl * kl
        parts = {"psnr": 10.0 * jnp.log10(4.0 / mse), "kl": kl}
        if weights.lpips:

            def perceptual(output):
                policy, count = self.experiment.compute.perceptual, weights.lpips_frames
                each = lpips_of_frames(frozen["lpips"], policy, output, video, key_frames, count)
                return each.mean()

            on = step >= weights.lpips_from
            parts["lpips"] = lax.cond(on, perceptual, lambda _: 0.0, output)
            loss = loss + weights.lpips * parts["lpips"]
        return loss, parts


def make_vae(experiment: Experiment) -> VAE:
    """The VAE of an experiment, computing as `compute.vae` says."""
    policy = experiment.compute.vae
    return VAE(experiment.vae, policy.remat == "full", policy.jax_dtype, policy.precision)


def init_vae(vae: VAE, key: Array) -> Tree:
    """Random parameters of a VAE."""
    side = 2 * vae.config.stride
    return vae.init(key, jnp.zeros((1, 1 + vae.config.temporal_stride, side, side, 3)))["params"]


def lpips_of_frames(
    params: Tree, policy: Policy, output: Array, video: Array, key: Array, count: int
) -> Array:
    """Mean LPIPS (b,) of `count` random frames of each clip, the same for all clips of a batch.

    policy: how the network computes; output, video: (b, t, h, w, 3), of which the output is clipped
    to [-1, 1].
    """

    def measure(params, x, y):
        return lpips(params, x, y, policy.jax_dtype, policy.precision)

    if policy.remat == "full":
        measure = jax.checkpoint(measure)
    b, t = video.shape[:2]
    chosen = jax.random.choice(key, t, (min(t, count),), replace=False)
    pair = (jnp.clip(output, -1.0, 1.0), video)
    pair = (rearrange(v[:, chosen], "b t h w c -> (b t) h w c") for v in pair)
    return measure(params, *pair).reshape(b, -1).mean(1)


def pixels(batch: Array) -> Array:
    """uint8 0..255 -> float32 in [-1, 1]."""
    return batch.astype(jnp.float32) / 127.5 - 1.0
