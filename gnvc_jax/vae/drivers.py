"""Two ways through the same VAE: a whole clip at once, or group by group with a cache.

A clip of 1 + 4k frames is coded as the groups 1, 4, 4, ...; one latent frame stands for each. The
whole-clip and the streaming drivers give equal results to float rounding; the memory of the
streaming drivers does not depend on the length of the clip, apart from input and output.

Videos (b, t, h, w, 3) float in [-1, 1]; latents (b, n, h', w', z), not normalised, where
n = 1 + ceil((t - 1) / 4), h' = ceil(h / 8), w' = ceil(w / 8).
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from gnvc_jax.vae.model import VAE

Array = jax.Array
Tree = dict


def pad_video(video: Array, temporal_stride: int = 4, stride: int = 8) -> Array:
    """Repeat the last frame up to 1 + 4k frames, the last row and column up to multiples of 8."""
    _, t, h, w, _ = video.shape
    pads = ((0, 0), (0, -(t - 1) % temporal_stride), (0, -h % stride), (0, -w % stride), (0, 0))
    return jnp.pad(video, pads, mode="edge")


def encode_chunk(vae: VAE, params: Tree, cache: Tree | None, video: Array) -> tuple[Array, Tree]:
    """Posterior mean of the next frames of a clip, and the cache for the frames after them.

    cache: None at the start of a clip (then 1 + 4m frames), else what the last call returned
    (then 4m frames). Sizes must be multiples of the strides.
    """
    first = cache is None
    variables = {"params": params} | ({} if first else {"cache": cache})
    (mean, _), state = vae.apply(variables, video, first, method="encode", mutable=["cache"])
    return mean, state.get("cache", {})  # a linear encoder keeps nothing


def decode_chunk(vae: VAE, params: Tree, cache: Tree | None, latents: Array) -> tuple[Array, Tree]:
    """Frames of the next latents of a clip, clipped to [-1, 1], and the cache for what follows.

    cache: None at the start of a clip (1 + m latents give 1 + 4m frames), else what the last call
    returned (m latents give 4m frames).
    """
    first = cache is None
    variables = {"params": params} | ({} if first else {"cache": cache})
    video, state = vae.apply(variables, latents, first, method="decode", mutable=["cache"])
    return jnp.clip(video, -1.0, 1.0), state.get("cache", {})  # nor does a linear decoder


def encode_clip(vae: VAE, params: Tree, video: Array) -> Array:
    """Latents (posterior mean) of a whole clip of any length and size, in one pass."""
    cfg = vae.config
    video = pad_video(video, cfg.temporal_stride, cfg.stride)
    return vae.apply({"params": params}, video, method="encode")[0]


def decode_clip(
    vae: VAE, params: Tree, latents: Array, frames: int, size: tuple[int, int]
) -> Array:
    """The first `frames` frames, cropped to `size` (h, w), of a whole clip in one pass."""
    video = vae.apply({"params": params}, latents, method="decode")
    return jnp.clip(video[:, :frames, : size[0], : size[1]], -1.0, 1.0)


def encode_stream(vae: VAE, params: Tree, video: Array) -> Array:
    """As `encode_clip`, by `lax.scan` over groups of four frames."""
    cfg = vae.config
    video = pad_video(video, cfg.temporal_stride, cfg.stride)
    head, cache = encode_chunk(vae, params, None, video[:, :1])
    groups = rearrange(video[:, 1:], "b (n s) h w c -> n b s h w c", s=cfg.temporal_stride)

    def step(cache, group):
        mean, cache = encode_chunk(vae, params, cache, group)
        return cache, mean

    _, rest = lax.scan(step, cache, groups)
    return jnp.concatenate([head, rearrange(rest, "n b s h w c -> b (n s) h w c")], axis=1)


def decode_stream(
    vae: VAE, params: Tree, latents: Array, frames: int, size: tuple[int, int]
) -> Array:
    """As `decode_clip`, by `lax.scan` over single latents."""
    head, cache = decode_chunk(vae, params, None, latents[:, :1])

    def step(cache, latent):
        video, cache = decode_chunk(vae, params, cache, latent[:, None])
        return cache, video

    _, rest = lax.scan(step, cache, jnp.moveaxis(latents[:, 1:], 1, 0))
    video = jnp.concatenate([head, rearrange(rest, "n b s h w c -> b (n s) h w c")], axis=1)
    return video[:, :frames, : size[0], : size[1]]
