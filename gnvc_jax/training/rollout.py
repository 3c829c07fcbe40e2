"""The codec's roll-out: a batch of clips becomes decoded latents, rates and errors.

Stages take it from here: the rate and the error of latents are the loss of the stage `codec`, and
what a refiner corrects are the decoded latents.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gnvc_jax.frames import to_float
from gnvc_jax.parallel import constrain
from gnvc_jax.training import losses
from gnvc_jax.training.networks import Networks
from gnvc_jax.vae import VAE, encode_clip

Array = jax.Array
Tree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodecOutput:
    """A batch of clips after the codec, in training form.

    Attributes:
        latents: Latents of the source, (b, t, h, w, c), normalised; no gradient.
        decoded: Decoded latents, same shape.
        features: Features of the codec, (b, t, h, w, f), which condition a refiner.
        q_index: Quality levels, (b,) int32, rising.
        rate: Differentiable rate, (b,), in bits per pixel of the source.
        error: Mean squared error of the decoded latents, (b,).
        metrics: Scalars for the log.
    """

    latents: Array
    decoded: Array
    features: Array
    q_index: Array
    rate: Array
    error: Array
    metrics: dict[str, Array]


def normalised_latents(vae: VAE, params: Tree, statistics: Tree, batch: Array) -> Array:
    """Encodes a batch to normalised latents (b, t, h, w, c), without gradient.

    Args:
        vae: The VAE.
        params: Parameters of the VAE.
        statistics: "mean" and "std" of its latents.
        batch: Frames (b, t, h, w, 3) uint8, or normalised latents from a cache.
    """
    # Devices along `context` share the columns of each clip, here and in the codec.
    latents = constrain(batch, batch=0, context=3)
    if batch.dtype == jnp.uint8:
        latents = encode_clip(vae, params, to_float(latents))
        latents = (latents - statistics["mean"]) / statistics["std"]
    return constrain(jax.lax.stop_gradient(latents), batch=0, context=3)


def roll_out(
    networks: Networks, params: Tree, statistics: Tree, batch: Array, key: Array
) -> CodecOutput:
    """Codes a batch at random quality levels, each latent predicted by the one before.

    Args:
        networks: Networks, with a codec without motion.
        params: Parameters by part, "vae" and "codec".
        statistics: "mean" and "std" of the VAE's latents.
        batch: Frames (b, t, h, w, 3) uint8, h and w multiples of 64, or latents of such clips.
        key: Random key of quality levels and noise.
    """
    vae, codec = networks.vae, networks.codec
    key_quality, key_noise = jax.random.split(key)
    latents = normalised_latents(vae, params["vae"], statistics, batch)
    count, t, h, w, _ = latents.shape
    strides = vae.config.temporal_stride, vae.config.stride
    size = (1 + (t - 1) * strides[0]) * h * w * strides[1] ** 2  # pixels of a clip
    q_index = losses.draw_quality(key_quality, count)
    coded = codec.apply({"params": params["codec"]}, latents, q_index, key_noise)
    bits = coded.y_bits + coded.z_bits
    error = losses.squared_error(coded.latent, latents)
    # The rate that trains bills noise where nothing is sent; what is logged is what a file has.
    written = coded.written_bits.sum(1) / size
    metrics = {
        "distortion": jnp.mean(error),
        "bpp": jnp.mean(written),
        "bpp_lowest": written[0],
        "bpp_highest": written[-1],
        "intra_share": bits[:, 0].sum() / bits.sum(),
        "z_share": coded.z_bits.sum() / bits.sum(),
    }
    return CodecOutput(
        latents, coded.latent, coded.feature, q_index, bits.sum(1) / size, error, metrics
    )
