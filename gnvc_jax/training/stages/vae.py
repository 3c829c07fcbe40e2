"""Stage `vae`: a small VAE from scratch. Wan's own VAE is ported, never trained here.

The VAE learns to reconstruct clips from a sample of its posterior (Kingma and Welling, arXiv
1312.6114), with LPIPS as an additional loss.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gnvc_jax.arrays import Array, Tree
from gnvc_jax.frames import to_float
from gnvc_jax.metrics.backbones import load_weights
from gnvc_jax.metrics.dists import dists
from gnvc_jax.metrics.lpips import lpips, lpips_features
from gnvc_jax.training import inputs, losses
from gnvc_jax.training.config import Experiment, Policy
from gnvc_jax.training.networks import make_networks
from gnvc_jax.training.stages import Stage
from gnvc_jax.training.weights import Statistics, agreed, placed_like
from gnvc_jax.vae import init_vae, klt

KLT_BLOCKS = 40_000  # blocks of later frames that the linear transform of a VAE is fitted to


@dataclasses.dataclass(frozen=True)
class VAELoss:
    """Weights of the loss terms; pixels are in [-1, 1].

    Attributes:
        l1: Weight of the mean absolute error.
        mse: Weight of the mean squared error.
        kl: Weight of the divergence of the posterior from N(0, 1), mean over latent elements.
        lpips: Weight of LPIPS (AlexNet).
        lpips_from: Step from which LPIPS is computed; before, it costs nothing.
        lpips_frames: Number of random frames of each clip that LPIPS is computed on.
    """

    l1: float = 1.0
    mse: float = 4.0
    kl: float = 1e-4
    lpips: float = 0.1
    lpips_from: int = 0
    lpips_frames: int = 2


def vae_stage(experiment: Experiment) -> Stage:
    """Makes the stage; for a linear VAE, the transform is fitted and only the head trains."""
    weights, vae = experiment.loss, make_networks(experiment).vae
    data = inputs.clips(experiment)
    network = load_weights("alex") if weights.lpips else None

    def loss(
        params: Tree, constants: Tree, batch: Array, key: Array, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        video, variables = to_float(batch), {"params": params["vae"]}
        mean, logvar = vae.apply(variables, video, method="encode")
        key_noise, key_frames = jax.random.split(key)
        # A sample of the posterior, differentiable in mean and variance (reparameterisation).
        latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key_noise, mean.shape)
        output = vae.apply(variables, latents, method="decode")

        mse = losses.squared_error(output, video).mean()
        l1 = jnp.mean(jnp.abs(output - video))
        kl = losses.kl_divergence(mean, logvar).mean()
        total = weights.l1 * l1 + weights.mse * mse + weights.kl * kl
        # Pixels span 2, whose square is 4.
        metrics = {"psnr": 10.0 * jnp.log10(4.0 / mse), "kl": kl}
        if weights.lpips:

            def perceptual(output: Array) -> Array:
                measure = image_distance("lpips", constants, experiment.compute.perceptual)
                count = weights.lpips_frames
                return losses.perceptual_of_frames(measure, output, video, key_frames, count).mean()

            on = step >= weights.lpips_from
            # A condition runs one branch only, forward and backward, unlike a product with 0.
            metrics["lpips"] = lax.cond(on, perceptual, lambda _: 0.0, output)
            total = total + weights.lpips * metrics["lpips"]
        return total, metrics

    def fit(params: Tree, statistics: Statistics) -> Tree:
        """Fits a linear transform to training clips."""
        if not experiment.vae.linear:
            return params
        strides = experiment.vae.stride, experiment.vae.temporal_stride
        moments = klt.moments_of_blocks(*strides)
        batches = iter(data.batches(experiment.data.shape_at(0)))
        # First frames have statistics of their own, which need fewer blocks.
        # As many batches as it takes, whatever the size of clips.
        while moments["later"].count < KLT_BLOCKS:
            klt.count_blocks(moments, np.asarray(to_float(next(batches))), *strides)
        fitted = agreed(klt.fit(moments, experiment.vae.latent_channels))
        return {"vae": params["vae"] | {"klt": placed_like(params["vae"]["klt"], fitted)}}

    def constants(statistics: Statistics) -> Tree:
        return {"lpips": network}

    return Stage(
        experiment,
        init=lambda key: {"vae": init_vae(vae, key)},
        loss=loss,
        data=data,
        constants=constants,
        constant_shapes=lambda: jax.eval_shape(constants, {}),
        fit=fit,
    )


def image_distance(name: str, constants: Tree, policy: Policy) -> losses.Perceptual:
    """Makes a distance a function of two batches of images (n, h, w, 3) in [-1, 1].

    Args:
        name: "lpips", "features" (`losses.feature_matching` on the network of LPIPS) or "dists".
        constants: Weights of the networks "lpips" and "dists".
        policy: How the network of LPIPS computes. DISTS, which subtracts products of means from
            means of products, is always float32.
    """

    def measure(params: Tree, x: Array, y: Array) -> Array:
        if name == "dists":
            return dists(params, (x + 1) / 2, (y + 1) / 2)
        if name == "lpips":
            return lpips(params, x, y, policy.jax_dtype, policy.precision)
        pair = (lpips_features(params, z, policy.jax_dtype, policy.precision) for z in (x, y))
        return losses.feature_matching(*pair).astype(jnp.float32)

    params = constants["dists" if name == "dists" else "lpips"]

    if policy.remat == "full":
        measure = jax.checkpoint(measure)
    return lambda x, y: measure(params, x, y)
