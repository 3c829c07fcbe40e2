"""Two ways through the same VAE: a whole clip at once, or chunk by chunk with a cache.

`encode_clip` and `decode_clip` take a whole clip in one pass; `encode_stream` and `decode_stream`
scan over it and give equal results up to float rounding. Their memory does not depend on the length
of the clip, apart from input and output. `encode_chunk` and `decode_chunk` are the steps that they
scan; a caller who reads a video piece by piece uses them directly.

The frames 1 + 4 + 4 + ... of a clip become one latent each. Videos (b, t, h, w, 3) are float in
[-1, 1]; latents (b, n, h2, w2, z) are not normalised, with n = 1 + ceil((t - 1) / 4),
h2 = ceil(h / 8), w2 = ceil(w / 8) for the strides of Wan2.1.
"""

from typing import cast

import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float

from gnvc_jax.arrays import AnyArray, Tree
from gnvc_jax.vae.light import LightDecoder
from gnvc_jax.vae.model import VAE


def pad_video(
    video: Float[AnyArray, "b t h w c"], temporal_stride: int = 4, stride: int = 8
) -> Float[Array, "b t2 h2 w2 c"]:
    """Repeats the last frame, row and column up to sizes that the VAE can encode.

    These are 1 + temporal_stride * k frames, and multiples of stride in space.
    """
    _, t, h, w, _ = video.shape
    # The first frame stands alone, so only the frames after it fill up whole latents.
    pads = ((0, 0), (0, -(t - 1) % temporal_stride), (0, -h % stride), (0, -w % stride), (0, 0))
    return jnp.pad(video, pads, mode="edge")


def encode_chunk(
    vae: VAE, params: Tree, cache: Tree | None, video: Float[AnyArray, "b t h w 3"]
) -> tuple[Float[Array, "b n h2 w2 z"], Tree]:
    """Encodes the next frames of a clip.

    Args:
        vae: The VAE.
        params: Parameters of the VAE.
        cache: None at the start of a clip, else what the last call returned.
        video: 1 + 4m frames at the start of a clip, 4m later; multiples of the strides.

    Returns:
        Posterior mean, and the cache for the frames that follow.
    """
    # `first` is a Python bool, so the start of a clip and its continuation are two programs.
    first = cache is None
    variables = {"params": params} | ({} if first else {"cache": cache})
    (mean, _), state = vae.apply(variables, video, first, method="encode", mutable=["cache"])
    return mean, state.get("cache", {})  # a linear encoder keeps nothing


def decode_chunk(
    vae: VAE | LightDecoder,
    params: Tree,
    cache: Tree | None,
    latents: Float[AnyArray, "b n h2 w2 z"],
) -> tuple[Float[Array, "b t h w 3"], Tree]:
    """Decodes the next latents of a clip.

    Args:
        vae: The VAE, or a light decoder.
        params: Its parameters.
        cache: None at the start of a clip, where 1 + m latents give 1 + 4m frames; else what the
            last call returned, and m latents give 4m frames.
        latents: Latents that are not normalised; for a light decoder, normalised ones.

    Returns:
        Frames, clipped to [-1, 1], and the cache for the latents that follow.
    """
    first = cache is None
    variables = {"params": params} | ({} if first else {"cache": cache})
    video, state = vae.apply(variables, latents, first, method="decode", mutable=["cache"])
    return jnp.clip(video, -1.0, 1.0), state.get("cache", {})  # nor does a linear decoder


def encode_clip(
    vae: VAE, params: Tree, video: Float[AnyArray, "b t h w 3"]
) -> Float[Array, "b n h2 w2 z"]:
    """Encodes a whole clip of any length and size in one pass, to the posterior mean."""
    cfg = vae.config
    video = pad_video(video, cfg.temporal_stride, cfg.stride)
    # Without `mutable`, no cache is written, and none takes memory.
    return vae.apply({"params": params}, video, method="encode")[0]


def decode_clip(
    vae: VAE | LightDecoder,
    params: Tree,
    latents: Float[AnyArray, "b n h2 w2 z"],
    frames: int,
    size: tuple[int, int],
) -> Float[Array, "b t h w 3"]:
    """Decodes a whole clip in one pass and takes off what `pad_video` has added.

    Args:
        vae: The VAE, or a light decoder.
        params: Its parameters.
        latents: Latents that are not normalised; for a light decoder, normalised ones.
        frames: Number of frames to return.
        size: Height and width to return.
    """
    video = cast(Array, vae.apply({"params": params}, latents, method="decode"))
    return jnp.clip(video[:, :frames, : size[0], : size[1]], -1.0, 1.0)


def grey_latents(vae: VAE, params: Tree) -> Float[Array, "2 z"]:
    """Computes the latents of a grey clip, a first and a later one, not normalised.

    They are taken from the middle of the frame and the end of the clip, where padding at the
    borders has no effect. VACE marks with them what is to be generated.
    """
    # 8x8 latents, and four in time; zero is mid-grey in [-1, 1].
    side, frames = 8 * vae.config.stride, 1 + 3 * vae.config.temporal_stride
    latents = encode_clip(vae, params, jnp.zeros((1, frames, side, side, 3)))
    return latents[0, jnp.array([0, -1]), 4, 4]


def encode_stream(
    vae: VAE, params: Tree, video: Float[AnyArray, "b t h w 3"]
) -> Float[Array, "b n h2 w2 z"]:
    """Does the same as `encode_clip` by `lax.scan` over chunks of four frames."""
    cfg = vae.config
    video = pad_video(video, cfg.temporal_stride, cfg.stride)
    # The first chunk stays outside the scan: it has one frame, and no cache goes in. The cache that
    # comes out has the shapes of all later ones, as a carry must.
    head, cache = encode_chunk(vae, params, None, video[:, :1])
    chunks = rearrange(video[:, 1:], "b (n s) h w c -> n b s h w c", s=cfg.temporal_stride)

    def step(cache: Tree, chunk: Array) -> tuple[Tree, Array]:
        mean, cache = encode_chunk(vae, params, cache, chunk)
        return cache, mean

    # rest: (n - 1, b, 1, h2, w2, z), one latent per chunk.
    _, rest = lax.scan(step, cache, chunks)
    return jnp.concatenate([head, rearrange(rest, "n b s h w c -> b (n s) h w c")], axis=1)


def decode_stream(
    vae: VAE,
    params: Tree,
    latents: Float[AnyArray, "b n h2 w2 z"],
    frames: int,
    size: tuple[int, int],
) -> Float[Array, "b t h w 3"]:
    """Does the same as `decode_clip` by `lax.scan` over single latents."""
    head, cache = decode_chunk(vae, params, None, latents[:, :1])

    def step(cache: Tree, latent: Array) -> tuple[Tree, Array]:
        video, cache = decode_chunk(vae, params, cache, latent[:, None])
        return cache, video

    # rest: (n - 1, b, 4, h, w, 3), four frames per latent.
    _, rest = lax.scan(step, cache, jnp.moveaxis(latents[:, 1:], 1, 0))
    video = jnp.concatenate([head, rearrange(rest, "n b s h w c -> b (n s) h w c")], axis=1)
    return video[:, :frames, : size[0], : size[1]]
